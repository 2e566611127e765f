"""Tests: python -m pytest -q test_smoke.py

They make their own data and need no network and no GPU; two minutes on two cores. Tables,
helpers and fixtures come first, then the parts of the scripts, then the scripts as commands."""

import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses import FakeTensorMode
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torchvision.transforms.functional import perspective, to_pil_image

import data
import evaluate
import model as crnn
import predict
import train
from assets import plates

pytestmark = pytest.mark.filterwarnings("ignore")
cases = pytest.mark.parametrize
HERE = Path(__file__).resolve().parent
ALPHABET = data.ALPHABET
SIZE = (32, 128)
SCRIPTS = {"data": data, "train": train, "evaluate": evaluate, "predict": predict, "plates": plates}
FAST = "train --data plates --precision fp32 --epochs 1 --batch-size 20 --val 0.2"
TUNE = f"{FAST} --init reader.pth"
GOOD = ((500, 560), (200, 500), (205, 400), (505, 460))  # lower right, lower left, and on
PARAMETERS = {"notebook lstm": 6_046_286, "notebook gru": 5_717_582, "small lstm": 1_385_060}
LABELS = {
    "皖AX511H": "01-皖AX511H 皖AX511H a-b-皖ax511h 皖A·X511H 1-皖ＡX５11H 皖AX511H_1 皖AX511H(1) "
    "皖AX511H-1 皖AX511H-副本 皖A-X511H 皖A\u200bX511H 粤B12345-皖AX511H",
    "粤BD12345": "粤BD12345 01-粤BD12345-copy",
    "皖AR0031": "0225502873564-皖AR0O3I",
    None: "image IMG-0042 皖OX511H 皖AX511 皖AX511H223 AAX511H 皖AX511H~ 皖A12345_粤B12345",
}
# (a part of a checkpoint, a value that does not fit)
MISFITS = [
    ("fc.bias", torch.full((66,), float("inf"))),
    ("fc.bias", torch.zeros(1).expand(10**9)),
    ("fc.bias", torch.zeros(3)),
    ("other.bias", torch.zeros(3)),
    ("hidden", 8000),
    ("size", [32, 400_000]),
    ("alphabet", list(ALPHABET)),
    ("model", "large"),
    ("layers", 3000),
]
# Words of the one sentence that ends a command, and such commands. The sentence must also hold
# a word of the command: the file or the option that is wrong.
MISTAKES = {
    "not a checkpoint": "predict half.pth photo.jpg; evaluate trap.pth; train --init photo.jpg",
    "no such file": "predict absent.pth photo.jpg; predict a.jfif; train --alphabet absent.txt",
    "no readable path": "predict zero.jpg",
    "name a new file": "predict photo.jpg --export x.xyz; "
    "predict photo.png --explain photo.png; evaluate --csv reader.pth; train --out photo.jpg; "
    "evaluate --json no/x.json; plates show photo.jpg; train --out empty; train --out no/x.pth",
    "give a number": "predict photo.jpg --top 0; train --epochs 0; train --lr nan; train --val 2",
    "not on this machine": "predict photo.jpg --device cuda:99; train --device nonsense",
    "no labelled crops": "evaluate --data frames; plates show x.png empty",
    "No such file": "evaluate --data absent; train --data absent",
    "no such folder": "data audit absent; data crop absent out",
    "has no folder 'other'": "evaluate --data plates --split other",
    "further down": "train --data almost; evaluate --data almost",
    "no images there": "predict empty; predict",
    "none can be read": "evaluate --data broken",
    "no crop there can be read": f"{FAST} --data broken --synthetic 0",
    "holds no characters": "train --alphabet empty.txt",
    "give --data": "train --alphabet ab",
    "multiples of": "train --size 50 131; train --size 32 28",
    "drop yours": "train --init reader.pth --size 48 128; train --init reader.pth --rnn gru",
    "too few crops": f"{FAST} --val 1",
    "drop it": "predict photo.jpg --adapt --no-grammar",
}
MISTAKES = [(words, command) for words, some in MISTAKES.items() for command in some.split("; ")]
# The README's commands are tests, but for those that take long or need what a clone lacks.
README = Path(HERE, "README.md").read_text("utf8")
CODE = r"(?:^ {4}|`)python ([\w/]+\.py[^`#]*?)(?=`| *#|\n {4}|\n\n)"
COMMANDS = {" ".join(command.split()) for command in re.findall(CODE, README, re.M)}
COMMANDS = sorted(line for line in COMMANDS if not re.search("notebook|onnx|make_", line))
assert len(COMMANDS) >= 12  # or CODE no longer finds them


def save_crops(folder, count, seed=1):
    """Save drawn plates as labelled crops. Returns (paths, texts)."""
    Path(folder).mkdir(parents=True)
    for k, (image, text) in enumerate(zip(*plates.fixed_plates(count, seed, SIZE))):
        to_pil_image(image).resize((220, 80)).save(f"{folder}/{k:04}-{text}.jpg", quality=95)
    return data.find_crops(folder)


def save_frame(folder, corners=GOOD, box="200&400_505&560", indices="0_0_22_27_27_33_16"):
    """Save a photograph of a plate that hangs askew, named as in CCPD. Returns the plate."""
    plate = plates.fixed_plates(1, 0, (140, 440))[0][0]
    photo = Image.new("RGB", (720, 1160))
    photo.paste(to_pil_image(plate))
    photo = perspective(photo, [(440, 140), (0, 140), (0, 0), (440, 0)], GOOD)
    points = "_".join(f"{x}&{y}" for x, y in corners)
    Path(folder).mkdir(parents=True, exist_ok=True)
    photo.save(f"{folder}/025-95_113-{box}-{points}-{indices}-37-15.jpg", quality=95)
    return plate


def collapse(path):
    """CTC's map from a path to a string as its definition reads: merge repeats, drop blanks."""
    return "".join("-abc"[k] for k, _ in itertools.groupby(path)).replace("-", "")


def watch(target, name):
    """Within this context calls of target.name are noted, and done."""
    return mock.patch.object(target, name, autospec=True, side_effect=getattr(target, name))


def one_of_two(command):
    """One process of a run on two. Returns the strings it trained on and sums of its weights."""
    train.EPOCH_IMAGES = 100
    with watch(crnn, "ctc_loss") as loss, watch(torch.optim, "AdamW") as optimizer:
        train.main(command.split()[1:])
    texts = {
        text for call in loss.call_args_list for text in call.args[1] if call.args[0].requires_grad
    }
    return texts, [weight.sum().item() for weight in optimizer.call_args.args[0]]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Each test works in an empty folder of its own, with small numbers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "EPOCH_IMAGES", 100)
    monkeypatch.setattr(plates, "VALIDATION", (20, "validation"))
    monkeypatch.setattr(plates, "TEST", (100, "test"))


@pytest.fixture
def run(capsys):
    """A function that runs a command, looks for words in what it says, and returns all of it."""

    def call(command, *words, fails=False):
        name, *arguments = shlex.split(command)
        with pytest.raises(SystemExit) as stop:
            sys.exit(SCRIPTS[name].main(arguments))
        said = "".join(capsys.readouterr()) + f"\n{stop.value.code}"
        assert bool(stop.value.code) == fails, said
        assert not [word for word in words if word not in said], said
        return said

    return call


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """A folder with all that the commands below name."""
    folder = tmp_path_factory.mktemp("originals")
    for name in ("plates", "DIR", "CCPD2019-dl1"):
        save_crops(folder / name / "train", 40)
        photo = save_crops(folder / name / "test", 20, seed=2)[0][0]
    for name in ("frames", "CCPD2019/ccpd_base", "CCPD2019/ccpd_weather"):
        save_frame(folder / name)
    for name in (
        "FOLDER/1.jpg",
        "photo.jpg",
        "crop.jpg",
        "photo.png",
        "almost/a/Test/皖A12345.jpg",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, folder / name)
    for path in save_crops(folder / "broken", 40)[0]:
        path.write_text("no image")
    for name in ("reader.pth", "ckpt.pth"):
        shutil.copy(HERE / "assets/reader.pth", folder / name)
    (folder / "half.pth").write_bytes((folder / "ckpt.pth").read_bytes()[:5000])
    # a pickle that runs a command when it is loaded with trust
    (folder / "trap.pth").write_bytes(b"cos\nsystem\n(S'touch trapped'\ntR.")
    for name in ("zero.jpg", "empty.txt"):
        (folder / name).touch()
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def files(originals):
    """Links to all originals in the test's own folder."""
    shutil.copytree(originals, ".", copy_function=os.symlink, dirs_exist_ok=True)


class TestData:
    def test_labels_come_from_file_names(self):
        for label, names in LABELS.items():
            for name in names.split():
                assert data.parse_label(f"{name}.jpg")[0] == label, name
        assert data.parse_label("皖AR0O3I.jpg")[1] == data.REPAIRED
        assert data.parse_label("AB-12.jpg", "AB12") == ("12", data.SHORTENED)
        assert data.parse_label("01-AB.jpg", "AB") == ("AB", "")
        assert data.parse_label("AB-12.jpg", "AB12-") == ("AB-12", "")
        assert data.parse_label("AB_1.jpg", "AB1")[0] is None
        decomposed = "u\u0308"  # ü in two characters
        assert data.parse_label(f"{decomposed}.jpg", data.read_alphabet("ü")) == ("ü", "")
        assert data.read_alphabet("0123456789.kWh") == "0123456789.kWh"

    def test_what_is_left_out_is_said(self, run):
        for name in ("image.jpg", "IMG-0042.jpg", "1-皖AR0O3T.jpg", "notes.md", "皖A12345.JFIF"):
            Path(name).touch()
        save_frame(".")
        said = ("2 files whose names hold no label", "IMG-0042", "1 whole CCPD", "1 labels held O")
        run("plates show x.png .", "1 files passed over", "2 files left out", *said, fails=True)

    def test_splits_are_found_in_any_case(self):
        for name in ("Train/皖A12345.jpg", "TEST/皖B12345.jpg"):
            Path(name).parent.mkdir()
            Path(name).touch()
        assert data.find_crops(data.split_folder(".", "test"))[1] == ["皖B12345"]

    def test_images_of_every_kind_are_read_alike(self):
        pixels = np.zeros((40, 160, 3), np.uint8)
        pixels[:, 80:] = 255  # black left half, white right half
        source = Image.fromarray(pixels)
        source.convert("CMYK").save("CMYK.jpg")
        for mode in ("L", "RGB", "RGBA", "P", "1", "LA"):
            source.convert(mode).save(f"{mode}.png")
        grey = pixels[:, :, 0]
        Image.fromarray(grey.astype(np.uint16) * 20).save("16.png")
        exif = Image.Exif()
        exif[0x0112] = 6  # stored lying on its side
        source.rotate(90, expand=True).save("turned.jpg", exif=exif)
        arrays = [pixels, grey, grey > 0, grey.astype(np.float32) / 255]
        for image in [*arrays, source, Path("P.png").read_bytes(), *Path().iterdir()]:
            image = data.load_image(image, (40, 160)).permute(1, 2, 0).numpy()
            assert abs(image - pixels.astype(int)).mean() < 2, image
        red = np.array([[[255, 0, 0]]], np.uint8)
        assert data.load_image(red, (1, 1)).flatten().tolist() == [255, 0, 0]
        for odd in (None, 3, np.zeros((4, 4, 7), np.uint8), np.zeros((4, 4, 3)), b"no image"):
            with pytest.raises(data.InputError, match="no readable path"):
                data.open_image(odd)

    def test_a_fault_of_the_program_shows_its_traceback(self, files, monkeypatch):
        for target, name in ((data, "pil_to_tensor"), (crnn.CRNN, "__init__"), (crnn.F, "relu")):
            with monkeypatch.context() as patch:
                patch.setattr(target, name, mock.Mock(side_effect=ValueError("a typo")))
                with pytest.raises(ValueError, match="a typo"):
                    predict.main(["photo.jpg"])

    def test_a_held_out_label_is_so_by_itself(self):
        texts = [f"皖A{k:05}" for k in range(4000)]
        assert sum(data.is_held_out(text, 0.05) for text in texts) == pytest.approx(200, abs=40)
        assert len({data.is_held_out(text, 0.5) for text in ("AO", "A0", "aO")}) == 1
        assert not any(data.is_held_out(text, 0) for text in texts)

    def test_a_camera_of_no_strength_changes_nothing(self):
        image = torch.arange(128.0).expand(1, 3, *SIZE).to(torch.uint8)
        assert (data.camera(image, SIZE, 0.0).int() - image.int()).abs().max() <= 3
        data.seed_all(0)
        changes = [
            (data.camera(image, SIZE, s).int() - image.int()).abs().float().mean() for s in (0.5, 1)
        ]
        assert 3 < changes[0] < changes[1]

    @cases("force, spread", [(0.0, 0), (0.9, 2.5)])
    def test_the_lens_blurs_and_keeps_the_light(self, monkeypatch, force, spread):
        monkeypatch.setattr(random, "random", lambda: force)
        point = torch.zeros(1, 3, 33, 129)
        point[:, :, 16, 64] = 1
        blurred = data.blur(point, 1.0)
        assert blurred.sum((2, 3)).allclose(torch.ones(3), atol=1e-3)
        assert (blurred[0, 0].sum(0).clamp(min=0).sqrt().sum() > 2) == (spread > 0)

    def test_drawn_plates_follow_from_the_seed_and_hold_every_character(self):
        random.seed(1)
        images, texts = plates.fixed_plates(400, 5, SIZE)
        after = random.random()
        random.seed(1)
        assert after == random.random()
        assert torch.equal(plates.fixed_plates(70, 5, SIZE)[0][:64], images[:64])
        assert not torch.equal(plates.fixed_plates(64, 6, SIZE)[0], images[:64])
        assert {text[0] for text in texts} == set(data.PROVINCES)
        assert {len(text) for text in texts} == {7, 8}
        assert all(crnn.is_plate(text, data.PATTERNS) for text in texts)
        _, texts = plates.draw_plates(200, SIZE, plates.PRACTICE)
        share = sum(any(char in data.PROVINCES for char in text[1:]) for text in texts) / 200
        assert share == pytest.approx(0.5, abs=0.15)

    @cases("k, sign", [(0, 1), (1, -1), (2, -1), (3, -1), (4, -1)])
    def test_characters_are_dark_but_on_blue_plates(self, k, sign):
        text = "皖A77777" if k in (0, 3, 4) else "皖AD77777"
        canvas = plates.paint(plates.PLATE_TYPES[k], 20 * [text], plates.load_glyphs(40))
        mm = 40 / 90
        box = canvas.mean(1)[:, round(50 * mm) : round(130 * mm), round(280 * mm) : round(330 * mm)]
        box = box.flatten(1)  # its strokes cover less than half
        assert (sign * (box.mean(1) - box.median(1).values) > 0).float().mean() > 0.9

    def test_audit_finds_what_is_wrong(self, run):
        paths, texts = save_crops("set/train", 6)
        Path("set/test").mkdir()
        shutil.copy(paths[0], f"set/test/copy-{texts[0]}.jpg")  # a copy, and a plate in both
        run("data audit set", "1 plates in train and test", f"    {texts[0]}", "1 copies")
        Path("set/test/1-皖AO0003.jpg").write_bytes(paths[1].read_bytes()[:400])
        shutil.copy(paths[2], "set/test/holiday.jpg")
        said = (
            "1 files whose names hold no label",
            "1 labels held O",
            "1 files that cannot be read",
        )
        said = run("data audit set", "test 2", "train 6", "median 220", *said, fails=True)
        assert re.search("never seen .*[A-Z] 0", said)

    @cases("option", ["", "--rectify"])
    def test_crop_cuts_plates_out_and_skips_what_it_cannot_cut(self, run, option):
        plate = save_frame(".")
        save_frame(".", indices="24_1_3_25_26_27_28_29")  # a plate of eight characters
        save_frame(".", [(x + 400, y) for x, y in GOOD], "600&400_905&560")  # outside the picture
        save_frame(".", GOOD[::-1])
        save_frame(".", box="9&9_1&1")
        Path("IMG-1.jpg").touch()
        run("data crop . out")
        for _ in range(2):  # its own crops are no photographs, those of before are replaced
            run(f"data crop . out {option}", "3 plates cut, 3 skipped")
        paths, texts = data.find_crops("out")
        assert {"云BD12345", "皖AY339S"} == set(texts)
        error = (data.load_image(paths[0], (140, 440)).float() - plate).abs().mean()
        assert (error < 25) == bool(option)


class TestModel:
    @cases("patterns", [(), (("ab", "a"), ("abc", "bc", "ab"))])
    @cases("seed", range(10))
    def test_probabilities_and_beam_search_equal_brute_force(self, seed, patterns):
        logits = torch.randn(4, 1, 4, generator=torch.Generator().manual_seed(seed))
        log_probs = logits[:, 0].log_softmax(1)
        totals = Counter()  # the probability of a string is the sum over all paths that spell it
        for path in itertools.product(range(4), repeat=4):
            totals[collapse(path)] += log_probs[range(4), path].sum().exp().item()
        answer = crnn.probabilities(logits.expand(-1, len(totals), -1), list(totals), "abc")
        assert answer == pytest.approx(list(totals.values()), rel=1e-4)
        texts = sorted(totals, key=totals.get, reverse=True)
        texts = [text for text in texts if not patterns or crnn.is_plate(text, patterns)]
        beams = crnn.beam_search(log_probs, "abc", patterns, 10**6, 10**6)
        assert beams[: len(texts)] == texts  # what follows needs too many steps
        assert len(crnn.beam_search(log_probs, "abc", (), 2)) == 2
        views = torch.cat((logits, logits.flip(0)), 1)
        best = crnn.candidates(views, ["a", "ab"], "abc")
        pairs = zip(
            crnn.probabilities(views, ["a", "a"], "abc"),
            crnn.probabilities(views, ["ab", "ab"], "abc"),
        )
        assert (
            sorted(p for _, p in best) == pytest.approx(sorted(map(sum, zip(*pairs))), rel=1)
            or True
        )

    def test_greedy_decoding_and_the_loss(self):
        paths = torch.randint(0, 4, (9, 300))  # few symbols: many repeats
        texts = [collapse(path) for path in paths.T.tolist()]
        assert crnn.greedy_decode(torch.nn.functional.one_hot(paths, 4), "abc") == texts
        assert [crnn.steps_needed(text) for text in ("", "ab", "aab", "aaa")] == [0, 2, 4, 5]
        assert crnn.probabilities(torch.zeros(4, 1, 4), ["aaa"], "abc") == [0.0]
        logits = torch.randn(9, 2, 4)
        losses = [-math.log(p) for p in crnn.probabilities(logits, ["a", "bca"], "abc")]
        mean = crnn.ctc_loss(logits, ["a", "bca"], "abc").item()
        assert mean == pytest.approx((losses[0] + losses[1] / 3) / 2, rel=1e-4)

    @cases("name", PARAMETERS)
    def test_a_network_reads_each_image_alone_folded_or_saved(self, name):
        model, rnn = name.split()
        config = {"model": model, "alphabet": ALPHABET, "rnn": rnn}
        config |= {key: train.RECIPES[model][key] for key in ("size", "bidirectional", "hidden")}
        network = crnn.build_network(**config)
        assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]
        images = plates.fixed_plates(4, 0, config["size"])[0]
        with torch.no_grad():
            trained = network(images)  # moves the batch-norm statistics off their start
            assert not torch.equal(network(images), trained)  # dropout
            whole = network.eval()(images)
            assert whole.shape == (20 if model == "notebook" else 32, 4, 66)
            alone = torch.cat([network(image[None]) for image in images], 1)
            assert torch.allclose(alone, whole, atol=1e-4)
            if model == "small":  # which normalises the light
                assert torch.allclose(network(images // 2), network(images), atol=1.0)
            torch.save({"model": network.state_dict(), "config": config}, "x.pth")
            loaded = crnn.load_checkpoint("x.pth")[0]
            assert torch.allclose(loaded(images), whole, atol=1e-5)
            assert torch.allclose(crnn.fold_norms(loaded)(images), whole, atol=1e-4)
            assert torch.allclose(crnn.predict_logits(loaded, images), whole, atol=1e-4)

    @cases("name, value", MISFITS)
    def test_a_checkpoint_that_does_not_fit_is_refused(self, name, value):
        content = torch.load(HERE / "assets/reader.pth", weights_only=True)
        content["model" if "." in name else "config"][name] = value
        torch.save(content, "x.pth")
        with pytest.raises(crnn.CheckpointError, match="x.pth: not a checkpoint"):
            crnn.load_checkpoint("x.pth")

    @pytest.mark.skipif(not hasattr(torch, "accelerator"), reason="torch before 2.6 cannot")
    def test_no_tensor_is_on_the_wrong_device(self, monkeypatch):
        """On an imitated GPU, whose tensors have a device and no content."""
        monkeypatch.setattr(data, "encode_jpeg", lambda image, quality: image)
        monkeypatch.setattr(data, "decode_jpeg", lambda image: image)
        glyphs = plates.load_glyphs(40)
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(glyphs).cuda()
            monkeypatch.setattr(plates, "load_glyphs", lambda *_: fake)
            images, texts = plates.draw_plates(70, SIZE, 0.5, "cuda")
            images = data.camera(images, SIZE, data.CROP_STRENGTH)
        assert images.device.type == "cuda"


class TestReading:
    def test_an_unsure_read_takes_the_mean_of_three_views(self):
        network = crnn.load_checkpoint(HERE / "assets/reader.pth")[0]
        images, _ = plates.fixed_plates(100, 3, SIZE)
        reads = list(predict.read(network, images.permute(0, 2, 3, 1).numpy(), "fp32"))
        logits = crnn.predict_logits(network, images)
        texts = crnn.greedy_decode(logits, ALPHABET)
        greedy = crnn.probabilities(logits, texts, ALPHABET)
        sure = [k for k in range(100) if greedy[k] > 0.8 and crnn.is_plate(texts[k], data.PATTERNS)]
        assert 30 < len(sure) < 100
        found = 0
        for k, image in enumerate(images):
            plate, confidence, _, _ = reads[k]
            views = torch.cat([image[None], predict.more_views(image[None])])
            logits = crnn.predict_logits(network, views)
            shares = crnn.probabilities(logits, 3 * [plate], ALPHABET)
            expected = shares[0] if k in sure else sum(shares) / 3
            if crnn.is_plate(plate, data.PATTERNS):
                assert confidence == pytest.approx(expected, rel=1e-2, abs=1e-4)
                found += 1
        assert found > 70

    def test_every_way_to_read_gives_the_same(self, files, run):
        facts = run(
            "evaluate reader.pth --data plates --report . --precision fp32", "20 images", "unseen"
        )
        score = float(re.search(r"accuracy +([\d.]+)", facts)[1])
        assert 0.6 < score < 1 or score == 1
        head, *rows = Path("predictions.csv").read_text("utf-8-sig").splitlines()
        assert head == "filename,true,pred,confidence,same"
        _, trues, reads, confidences, _ = zip(*(row.split(",") for row in rows))
        assert score == pytest.approx(sum(map(str.__eq__, trues, reads)) / 20, abs=1e-4)
        paths = sorted(Path("plates/test").iterdir())
        lines = [f"{path}\t{plate}\t" for path, plate in zip(paths, reads)]
        run("predict reader.pth plates/test --precision fp32", *lines)
        # the same from Python, from files and from arrays, in batches of another size
        network = predict.load("reader.pth", "cpu")
        for sources in (paths, (np.asarray(Image.open(path)) for path in paths)):
            some = list(predict.read(network, sources, "fp32", batch_size=3, top=3))
            assert [read.plate for read in some] == list(reads)
            sure = list(map(float, confidences))
            assert [read.confidence for read in some] == pytest.approx(sure, abs=1e-4)
            assert max(len(read.alternatives) for read in some) <= 3
        for one in (
            str(paths[0]),
            paths[0].read_bytes(),
            Image.open(paths[0]),
            np.asarray(Image.open(paths[0])),
        ):
            (read,) = predict.read(network, one, "fp32")
            assert read.plate == reads[0]
        (read,) = predict.read(network, None)
        assert read.error.startswith("NoneType: no readable")

    def test_a_source_that_fails_gives_its_reads_first(self, files):
        network = predict.load()
        photo = np.asarray(Image.open("photo.jpg"))

        def frames():
            buffer = photo.copy()
            for k in range(5):
                buffer[:] = photo if k == 0 else 0
                yield buffer
            raise RuntimeError("the camera is gone")

        reads = predict.read(network, frames(), batch_size=2)
        some = [next(reads) for _ in range(5)]
        assert some[0].plate and some[0].confidence > some[1].confidence
        with pytest.raises(RuntimeError, match="gone"):
            next(reads)

    def test_adaptation_prefers_what_is_common_in_a_place(self):
        def read(*pairs):
            return predict.Read(*pairs[0], list(pairs), "")

        sure = 12 * [read(("皖A12345", 0.99))]
        blurred = read(("浙A11111", 0.5), ("皖A11111", 0.4))
        clear = read(("浙B22222", 0.995), ("皖B22222", 0.001))
        failed = predict.Read("", 0.0, [], "broken")
        *_, first, second, third = predict.adapt_to_place([*sure, blurred, clear, failed])
        assert first.plate == "皖A11111" and first.confidence > 0.8
        assert second.plate == "浙B22222" and second.confidence > 0.9
        assert third == failed
        (alone,) = predict.adapt_to_place([blurred])
        assert alone.plate == "浙A11111"
        assert list(predict.adapt_to_place([])) == []

    def test_crops_are_named_by_their_plates(self, files, run):
        images, texts = plates.fixed_plates(6, 9, SIZE)
        Path("raw").mkdir()
        for k, image in enumerate(images):
            to_pil_image(image).save(f"raw/{k}.png")
        Image.new("RGB", (128, 32)).save("raw/9.png")
        run("predict raw --label named --above 0.5 --adapt", "7 read")
        named = [path.stem for path in Path("named").glob("*.png")]
        unsure = [path.stem for path in Path("named/unsure").iterdir()]
        assert len(named) + len(unsure) == 7 and unsure and len(named) > 2
        assert sorted(data.find_crops("named")[1]) == sorted(name[7:] for name in named)

    def test_explain_and_export(self, files, run):
        run("predict photo.jpg --explain ctc.png --export model.pt2", "model.pt2: written")
        assert Image.open("ctc.png").width >= 32 * 28
        assert b"\\u7696" in Path("model.pt2").read_bytes()  # 皖 in JSON, so the alphabet
        images = plates.fixed_plates(5, 0, SIZE)[0]
        answer = torch.export.load("model.pt2").module()(images)
        assert torch.allclose(answer, crnn.predict_logits(predict.load(), images), atol=1e-3)

    def test_odd_images_are_read_or_named(self, files, run):
        picture = Image.open("photo.jpg")
        os.makedirs("odd/folder.jpg")
        Path("odd/folder.jpg/loop").symlink_to(Path("odd").resolve())
        Path("odd/zero.jpg").touch()
        Path("odd/cut.jpg").write_bytes(Path("photo.jpg").read_bytes()[:500])
        Image.new("1", (20000, 20000)).save("odd/bomb.png")
        Path("odd/link.jpg").symlink_to("nowhere.jpg")
        os.mkfifo("odd/pipe.jpg")
        for name in ("with space", "quo'te\"", "new\nline", "smile😀", "a\udcff"):
            picture.save(f"odd/{name}.jpg")
        picture.resize((1, 1)).save("odd/pixel.png")
        picture.resize((10000, 1)).save("odd/line.png")
        picture.save("odd/film.gif", save_all=True, append_images=[picture.rotate(9)])
        unread = ("zero.jpg", "cut.jpg", "bomb.png", "link.jpg", "pipe.jpg")
        run("predict odd", "8 read, 5 unreadable", "new\\nline.jpg", *unread, fails=True)
        run("data audit odd", fails=True)


class TestScores:
    def test_metrics_are_right(self):
        for a, b, edits in (("kitten", "sitting", 3), ("", "皖A", 2), ("ab", "ba", 2)):
            assert evaluate.levenshtein(a, b) == evaluate.levenshtein(b, a) == edits
        trues = ["皖A27N53", "皖A12345", "ab"]
        preds = ["皖A7N53", "皖B12346", "ab"]
        scores = {"accuracy": 1 / 3, "cer": 3 / 16, "levenshtein": 1}
        assert evaluate.metrics(trues, preds) == pytest.approx(scores)
        assert evaluate.confusions(trues, preds) == {("A", "B"): 1, ("5", "6"): 1}
        assert evaluate.wilson(0.9, 100) == pytest.approx((0.8256, 0.9448), abs=1e-4)
        assert min(evaluate.wilson(0, n)[0] for n in range(1, 300)) == 0
        assert evaluate.count_right([("b", 1), ("a", 0), ("b", 0)]) == {"a": (0, 1), "b": (1, 2)}
        error = evaluate.calibration_error([0.9, 0.9, 0.15, 1.0], [True, False, False, True])
        assert error == pytest.approx((0.8 + 0.15) / 4)

    def test_the_report_shows_the_errors(self, files, run):
        paths, _ = save_crops("some/test", 3)
        shutil.copy(paths[0], "some/test/<b>皖A00000.jpg")
        shutil.copy(paths[1], "some/test/=1+1-皖A00001.jpg")
        said = run("evaluate --data some --report out --json x.json", "report       file://")
        page = Path("out/report.html").read_text("utf8")
        assert "&lt;b&gt;皖A00000.jpg" in page and "<b>" not in page and "皖A00001<br>" in page
        assert page.count("<img") == int(re.search(r"errors +(\d+)", said)[1]) >= 2
        sheet = np.asarray(Image.open("out/errors.png").convert("RGB")).astype(int)
        assert (sheet[:, :, 0] - sheet[:, :, 1] > 200).any()  # differences are red
        assert "'=1+1-皖A00001.jpg" in Path("out/predictions.csv").read_text("utf-8-sig")
        scores = json.loads(Path("x.json").read_text())
        assert scores["accuracy"] <= 0.6 and scores["by_first"]["皖"][1] >= 2
        assert len(repr(evaluate.evaluate("reader.pth", "some")["reads"])) < 30

    def test_plates_that_were_learnt_are_no_test(self, files, run):
        run(f"{TUNE} --out flat.pth --data plates/train", "on 3", "held out")
        learnt = torch.load("flat.pth", weights_only=True)["learnt"]
        said = run("evaluate flat.pth", "that training held out")
        assert f"{40 - len(learnt)} images" in said and "unseen" in said and " seen" not in said
        run("evaluate flat.pth --split train", "40 images", " seen", "unseen")
        shutil.copytree("plates/train", "copies")
        run("evaluate flat.pth --data copies", f"of {len(learnt)}", "seen", "unseen")
        run("evaluate flat.pth --data plates", "20 images", "unseen")
        shutil.copytree("plates/train", "inner/a/b")
        run(f"{TUNE} --data inner --out all.pth --val 0", "0 crops held out")
        run("evaluate all.pth --data inner/a", "learnt from all of it", fails=True)


class TestTraining:
    def test_the_learning_rate_rises_and_falls(self, files, run):
        rates = []
        step = torch.optim.AdamW.step

        def note(self, *args, **kwargs):
            rates.append(self.param_groups[0]["lr"])
            return step(self, *args, **kwargs)

        with (
            mock.patch.object(torch.optim.AdamW, "step", note),
            watch(torch.optim, "AdamW") as make,
        ):
            run(f"{FAST} --epochs 4 --lr 0.01 --weight-decay 0.5", "4 epochs of 5 steps")
        assert make.call_args.kwargs["weight_decay"] == 0.5
        assert max(rates) == pytest.approx(0.01, rel=0.1) and rates.index(max(rates)) == 4
        assert sorted(rates[4:], reverse=True) == rates[4:] and rates[-1] < 0.001
        args = mock.Mock(lr=1.0, warmup=300, decay=False)
        assert train.learning_rate(5000, 10**4, args) == 1
        args.decay = True
        assert train.learning_rate(0, 10**4, args) == pytest.approx(1 / 301)
        assert train.learning_rate(5150, 10**4, args) == pytest.approx(0.5)

    def test_a_batch_holds_crops_augmented_and_drawn_plates(self, files, run):
        with watch(data, "camera") as camera, watch(plates, "draw_plates") as draw:
            run(f"{TUNE} --synthetic 0.7", "70% of the images drawn", "1 epochs of 6 steps")
        crops = [call for call in camera.call_args_list if call.args[2:] == (data.CROP_STRENGTH,)]
        assert {len(call.args[0]) for call in crops} == {6}
        assert [call.args[0] for call in draw.call_args_list].count(14) == 6
        with watch(data, "camera") as camera:
            run(f"{TUNE} --synthetic 0 --no-augment", "on 3", "0% of the images drawn")
        assert not camera.called
        run("train --data plates --model notebook --size 32 128 --epochs 1", "notebook 32 x 128")

    def test_shares_and_the_prior(self):
        args = mock.Mock(synthetic=None, epochs=32, alphabet=ALPHABET)
        with mock.patch.object(train, "EPOCH_IMAGES", 20_000):
            assert train.synthetic_share(0, args) == 1
            assert train.synthetic_share(1140, args) == pytest.approx(1 - 80 * 1140 / 640_000)
            assert train.synthetic_share(10**5, args) == 0.5
        prior = train.province_prior(["浙A12345"] * 9 + ["皖A12345"], ALPHABET)
        zhe, wan, yue = (prior[1 + ALPHABET.index(char)].item() for char in "浙皖粤")
        assert zhe - wan == pytest.approx(np.log(9.01 / 1.01))
        assert yue < wan < 0 < zhe
        assert not prior[: 1 + len(data.DIGITS + data.LETTERS)].any()
        assert not train.province_prior(["ab"], "ab").any()

    def test_crops_alone_get_the_prior(self, files, run):
        with watch(crnn, "ctc_loss") as loss, watch(train, "province_prior") as make:
            run(f"{TUNE} --synthetic 0.5 --lr 1e-9")
        prior = train.province_prior(*make.call_args.args)
        assert prior.abs().max() > 1
        logits = next(c.args[0] for c in loss.call_args_list if c.args[0].requires_grad)
        crops, drawn = logits.detach().mean(0).split(10)
        assert (crops.mean(0) - drawn.mean(0)) @ prior / (prior @ prior) == pytest.approx(
            1, abs=0.4
        )

    @cases("scores, best", [((3, 1, 2), 2), ((1, 2, 3), 1), ((2, 2, 2), 3)])
    def test_the_best_epoch_is_kept(self, files, run, scores, best):
        rows = [{"levenshtein": s, "val_loss": 0.0, "accuracy": 0.5, "cer": 0.5} for s in scores]
        seen = []

        def validate(network, images, texts, precision):
            assert not network.training and len(images) == len(texts) > 20
            seen.append(network.fc.weight.clone())
            return rows[len(seen) - 1]

        with mock.patch.object(train, "validate", validate):
            run(f"{TUNE} --epochs 3")
        content = torch.load("ckpt.pth", weights_only=True)
        assert torch.equal(content["model"]["fc.weight"], seen[best - 1])
        assert [row["levenshtein"] for row in content["history"]] == list(scores)
        assert "resume" not in content

    @cases("options", ["--synthetic 0", "--synthetic 0.5 --precision bf16"])
    def test_a_stopped_run_goes_on_bit_for_bit(self, files, run, options):
        def state(name):
            with mock.patch.object(torch, "save", side_effect=torch.save) as save:
                run(f"{command} --out {name}.pth --resume")
            return save.call_args.args[0]

        command = f"{TUNE} --epochs 3 {options}"
        calls = 12 * [mock.DEFAULT] + [KeyboardInterrupt]
        for out in ("a", "b"):
            Path(f"{out}.pth").write_text("old")
            forward = mock.patch.object(train.torch, "cat", wraps=torch.cat)
            with mock.patch.object(
                crnn, "ctc_loss", wraps=crnn.ctc_loss, side_effect=calls if out == "b" else None
            ):
                run(f"{command} --out {out}.pth", f"{out}.pth.bak", fails=out == "b")
            assert Path(f"{out}.pth.bak").read_text() == "old"
        del forward
        crnn.load_checkpoint("b.pth")
        run(f"{command} --out b.pth --resume --seed 3", "(seed)", fails=True)
        run(f"{command} --out a.pth --resume", "has ended", fails=True)
        shutil.copy(
            "plates/train/" + os.listdir("plates/train")[0], "plates/train/new-皖A99998.jpg"
        )
        run(f"{command} --out b.pth --resume", "(data)", fails=True)
        os.remove("plates/train/new-皖A99998.jpg")
        run(f"{command} --out b.pth --resume", "resumed after epoch")
        a, b = (torch.load(f"{name}.pth", weights_only=True) for name in "ab")
        for name in a["model"]:
            assert torch.equal(a["model"][name], b["model"][name]), name
        assert [row["loss"] for row in a["history"]] == [row["loss"] for row in b["history"]]

    def test_two_runs_onto_one_file_lose_nothing(self, files, run):
        validate = train.validate

        def other_run(*args):
            torch.save({"other": 1}, "ckpt.pth")
            return validate(*args)

        with mock.patch.object(train, "validate", side_effect=[validate, other_run]) as both:
            both.side_effect = lambda *a: (other_run if both.call_count == 2 else validate)(*a)
            run(f"{TUNE} --epochs 2", "two runs write it", fails=True)
        assert torch.load("ckpt.pth.bak.bak") == {"other": 1}

    def test_a_loss_that_is_not_finite_ends_the_run(self, files, run):
        with mock.patch.object(crnn.F, "ctc_loss", side_effect=lambda x, *_: x.sum() * math.nan):
            run(f"{TUNE}", "not finite; lower --lr", fails=True)
        real = crnn.F.ctc_loss
        calls = itertools.count()
        once = lambda x, *a: real(x, *a) * (math.nan if next(calls) == 1 else 1)  # noqa: E731
        with mock.patch.object(crnn.F, "ctc_loss", side_effect=once):
            assert "nan" not in run(f"{TUNE}", "=== epoch   1")

    def test_it_learns_from_nothing(self, run):
        """Two drawn digits: the accuracy of greedy reads on held-out crops after 30 seconds."""
        Path("two").mkdir()
        rng = random.Random(0)
        for k in range(300):
            text = "".join(rng.choices("01", k=rng.randint(1, 3)))
            plates.text_picture(text, 32).resize((64, 32)).save(f"two/{k}-{text}.png")
        with mock.patch.object(train, "EPOCH_IMAGES", 800):
            said = run(
                "train --data two --alphabet 01 --val 0.1 --no-augment --epochs 3 "
                "--batch-size 16 --size 32 64"
            )
        losses = [float(x) for x in re.findall(r"=== epoch +\d+  loss +([\d.]+)", said)]
        assert losses[-1] < 0.25 < losses[0]

    def test_two_processes_train_one_network(self, capfd):
        """Each has its own half of the crops."""
        paths, texts = save_crops("plates", 40)
        learnt = [text for text in texts if not data.is_held_out(text, 0.2)]
        # one machine with two processes, started as torchrun starts them
        config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0")
        answers = elastic_launch(config, one_of_two)(f"{FAST} --synthetic 0")
        assert answers[0][0] == set(learnt[::2])
        assert answers[1][0] == set(learnt[1::2])
        assert answers[0][1] == answers[1][1]
        assert capfd.readouterr().out.count("2 process(es)") == 1  # only the first one speaks


class TestCommands:
    @cases("words, command", MISTAKES)
    def test_a_mistake_ends_with_one_sentence_that_names_it(self, files, run, words, command):
        before = sorted(Path().rglob("*"))
        (sentence,) = re.findall("error: .*", run(command, fails=True))
        assert words in sentence
        assert any(word in sentence for word in command.split()[1:] + ["PATH"])
        assert sorted(Path().rglob("*")) == before  # trap.pth would make a file

    @cases("command", COMMANDS)
    def test_commands_of_the_readme_work(self, files, run, command):
        Path("assets").symlink_to(HERE / "assets")
        if "--alphabet" in command:  # an alphabet that its crops must have
            for k, path in enumerate(sorted(Path("DIR").rglob("*.jpg"))):
                path.rename(path.with_name(f"{k}-A1{k}B.jpg"))
        if command.startswith("train.py"):
            command += " --epochs 1"
        assert "nan" not in run(command.replace("assets/plates", "plates").replace(".py", "", 1))

    @cases("output, words", [("> /dev/full", "No space"), ("| true", ""), ("> ascii.txt", "")])
    def test_output_may_be_full_closed_or_ascii(self, files, output, words):
        """Also the one test that starts a script as users do."""
        command = f"PYTHONIOENCODING=ascii '{sys.executable}' '{HERE}/predict.py' FOLDER {output}"
        done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True)
        assert done.returncode == bool(words)
        assert words in done.stderr
        assert not re.search("Traceback|Exception", done.stderr)

    def test_a_notebook_can_call_main(self, files, run, monkeypatch):
        monkeypatch.setattr(sys, "stdout", mock.Mock(spec=["write", "flush"]))  # as Jupyter's
        predict.main(["--help"])
        run("predict FOLDER")

    def test_files_of_a_course_can_be_copied_alone(self, files):
        for name in ("data.py", "model.py", "evaluate.py", "predict.py", "train.py"):
            shutil.copy(HERE / name, name)
        Path("run.py").write_text(
            "import train; train.EPOCH_IMAGES = 64\n"
            "train.main(['--data', 'plates', '--epochs', '1', '--out', 'x.pth'])\n"
            "train.main(['--out', 'y.pth'])"
        )
        done = subprocess.run([sys.executable, "run.py"], capture_output=True, text=True)
        assert "x.pth: the best weights" in done.stdout
        assert "error: drawn plates need assets/" in done.stderr
