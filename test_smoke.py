"""Tests: python -m pytest -q test_smoke.py

They make their own data and need no network and no GPU; three minutes on two cores. Tables,
helpers and fixtures come first, then the parts of the scripts, then the scripts as commands."""

import itertools
import json
import os
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
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.functional import perspective, to_pil_image

import data
import evaluate
import model as crnn
import predict
import train

pytestmark = pytest.mark.filterwarnings("ignore")
cases = pytest.mark.parametrize
HERE = Path(__file__).resolve().parent
ALPHABET = data.ALPHABET
SIZE = (32, 128)
CPU = "--precision fp32 --device cpu"
FAST = f"train --data plates {CPU} --epochs 1 --batch-size 20 --val 0.2"
GOOD = ((500, 560), (200, 500), (205, 400), (505, 460))  # lower right, lower left, and on
PARAMETERS = {"notebook lstm": 6_046_286, "notebook gru": 5_717_582, "small lstm": 1_385_060}
LABELS = {
    "皖AX511H": "01-皖AX511H.jpg 皖AX511H.jpg a-b-皖ax511h.JPG 皖A·X511H.png 1-皖ＡX５11H.jpg",
    "粤BD12345": "粤BD12345.jpg",
    "皖AR0031": "0225502873564-皖AR0O3I.jpg",
    None: "image.jpg IMG-0042.jpg 皖OX511H.jpg 皖AX511.jpg 皖AX511H223.jpg AAX511H.jpg",
}
# (a part of a checkpoint, a value that does not fit, words of the message)
MISFITS = [
    ("fc.bias", torch.full((66,), float("inf")), "not numbers"),
    ("fc.bias", torch.zeros(3), "fc.bias"),
    ("other.bias", torch.zeros(3), "other.bias"),
    ("hidden_size", 8000, "does not fit"),
    ("size", [32, 400_000], "not a checkpoint"),
    ("alphabet", list(ALPHABET), "not a checkpoint"),
    ("preset", "large", "not a checkpoint"),
]
# Words of the one sentence that ends a command, and such commands. The sentence must also hold
# a word of the command: the file or the option that is wrong.
MISTAKES = {
    "not a whole checkpoint": "predict half.pth; predict zero; predict trap.pth; predict noise.pth",
    "not a checkpoint of train.py": "predict other.pth",
    "no such checkpoint": "predict absent.pth",
    "not a readable image": "predict *.xyz",
    "name it .pt2 or .onnx": "predict --export x.xyz; predict --export ckpt.pth",
    "not a file in a folder": "predict --export no/x.pt2; evaluate --csv no/a.csv",
    "give it a name": "predict photo.jpg --explain photo.jpg; evaluate --csv ckpt.pth; "
    "evaluate --json ckpt.pth; data show plates photo.jpg; data audit plates --json photo.jpg",
    "give a whole number": "predict photo.jpg --top 0; train --workers -3; train --epochs 0",
    "not on this machine": "predict --device cuda:99; train --device nonsense",
    "such as 01-皖AX511H.jpg": "evaluate --data CCPD2019; data show empty x.png",
    "no such f": "train --alphabet absent.txt; evaluate --data absent; data crop absent out",
    "has no folder 'other'": "evaluate --data plates --split other",
    "no images": "predict empty; data audit empty",
    "no photographs in it": "data crop empty out",
    "'zero": "evaluate --report zero; data render zero --count 1",
    "too few crops to train on": "train --data long --alphabet ab",
    "holds no characters": "train --alphabet zero",
    "no crop in it can be read": f"{FAST} --data broken --synthetic 0",
    "not UTF-8": "train --alphabet photo.jpg",
    "only Chinese plates can be drawn": "train --alphabet ab",
    "this network takes": "train --size 50 131; train --size 32 28",
    "--lr is a positive number": "train --lr inf; train --lr nan",
    "is a share from 0": "train --val 1; train --synthetic 1.5",
    "is from 0 to 2**63": "train --seed -1; train --seed 9223372036854775808",
    "is at least 2": "train --batch-size 1",
    "; drop --": "train --init ckpt.pth --size 48 128; train --init ckpt.pth --rnn gru; "
    "train --init ckpt.pth --model notebook; train --init ckpt.pth --alphabet ab",
    "cannot be written": "train --out zero/x.pth; train --out new/",
    "is not a regular file": "train --out empty",
    "give a share": "data crop CCPD2019 out --margin -1; data crop CCPD2019 out --margin nan",
}
MISTAKES = [(words, command) for words, some in MISTAKES.items() for command in some.split("; ")]
# The README's commands are tests. A clean clone lacks the notebook's checkpoint and some packages.
README = Path(HERE, "README.md").read_text("utf8")
CODE = r"(?:^ {4}|`)python ((?:data|train|evaluate|predict)\.py[^`#]*?)(?=`| *#|\n {4}|\n\n)"
COMMANDS = {" ".join(command.split()) for command in re.findall(CODE, README, re.M)}
COMMANDS = [(line, "") for line in COMMANDS if not re.search("notebook|tinkoff|onnx", line)]
assert len(COMMANDS) >= 12  # or CODE no longer finds them
COMMANDS += [
    (f"{FAST} --data broken", "(40 unreadable files left out)"),
    ("data audit oI --alphabet oI" + "".join(map(chr, range(0x4E00, 0x4E00 + 90))), "I 6"),
    ("data show oI x.png --alphabet oI-", "warning: a label is only"),
    (f"{FAST} --data oI --alphabet oI.txt --val 0.5", "2 characters"),
    (f"{FAST} --val 0", "1 epochs of 5 steps"),
    (f"{FAST} --synthetic 1", "1 epochs of 5 steps"),
    (f"{FAST} --model notebook --size 32 128", "1 epochs of 5 steps"),
    (f"{FAST} --size 64 256 --no-bidirectional", "small 64 x 256"),
]


def drawn(count, seed=0, size=SIZE):
    """Drawn plates and their strings."""
    return next(data.synthetic_batches(count, seed, size, count))


def save_crops(folder, count, seed=1):
    """Save drawn plates as labelled crops. Returns (paths, texts)."""
    Path(folder).mkdir(parents=True)
    for k, (image, text) in enumerate(zip(*drawn(count, seed))):
        to_pil_image(image).resize((220, 80)).save(f"{folder}/{k:04}-{text}.jpg", quality=95)
    return data.find_crops(folder)


def photograph(folder, corners=GOOD, box="200&400_505&560", indices="0_0_22_27_27_33_16"):
    """Save a photograph of a plate that hangs askew, named as in CCPD. Returns the plate."""
    plate = drawn(1, size=(140, 440))[0][0]
    photo = Image.new("RGB", (720, 1160))
    photo.paste(to_pil_image(plate))
    photo = perspective(photo, [(440, 140), (0, 140), (0, 0), (440, 0)], GOOD)
    points = "_".join(f"{x}&{y}" for x, y in corners)
    Path(folder).mkdir(parents=True, exist_ok=True)
    photo.save(f"{folder}/025-95_113-{box}-{points}-{indices}-37-15.jpg", quality=95)
    return plate


def interrupted(calls):
    """Within this context training is interrupted, as by Ctrl-C, after `calls` steps."""
    effects = [mock.DEFAULT] * calls + [KeyboardInterrupt]
    return mock.patch.object(train, "take_step", wraps=train.take_step, side_effect=effects)


def collapse(path):
    """CTC's map from a path to a string as its definition reads: merge repeats, drop blanks."""
    return "".join("-abc"[k] for k, _ in itertools.groupby(path)).replace("-", "")


def one_of_two(command):
    """One process of a run on two. Returns the strings it trained on and sums of its weights."""
    train.EPOCH_IMAGES = 100
    with mock.patch.object(train.Log, "add", autospec=True, side_effect=train.Log.add) as add:
        train.main(command.split()[1:])
    texts = {text for call in add.call_args_list for text in call.args[2]}
    weights = add.call_args.args[0].run.network.parameters()
    return texts, [weight.sum().item() for weight in weights]


class Recorder(TorchDispatchMode):
    """Notes the names of all operations that are not mere views."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names = getattr(self, "names", "") + " " * operation.is_view + f"{operation}\n"
        return operation(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Each test works in an empty folder of its own, with small numbers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "EPOCH_IMAGES", 100)
    monkeypatch.setattr(train, "BAD_STEPS", 3)
    monkeypatch.setattr(evaluate, "SYNTHETIC_VAL", (20, 2**40))
    monkeypatch.setattr(evaluate, "SYNTHETIC_TEST", (500, 2**40 + 1))


@pytest.fixture
def run(capsys):
    """A function that runs a command, looks for words in what it says, and returns all of it."""

    def call(command, *words, fails=False):
        name, *arguments = shlex.split(command)
        with pytest.raises(SystemExit) as stop:
            sys.exit(sys.modules[name].main(arguments))
        said = "".join(capsys.readouterr()) + f"\n{stop.value.code}"
        assert bool(stop.value.code) == fails, said
        assert not [word for word in words if word not in said], said
        return said

    return call


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """A folder with all that the commands below name. ckpt.pth learns from drawings, a minute."""
    folder = tmp_path_factory.mktemp("originals")
    for name in ("plates", "DIR", "CCPD2019-dl1"):
        save_crops(folder / name / "train", 40)
        photo = save_crops(folder / name / "test", 20, seed=2)[0][0]
    for name in ("ccpd_base", "ccpd_weather"):
        photograph(folder / "CCPD2019" / name)
    for name in (
        "oI/1-oI",
        "oI/2-oIoI",
        "oI/3-oIoIoI",
        f"long/{'ab' * 30}",
        "FOLDER/1",
        "photo",
        "crop",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(photo, folder / f"{name}.jpg")
    for path in save_crops(folder / "broken", 40)[0]:
        path.write_text("no image")
    train.main(["--epochs", "1", "--batch-size", "32", "--out", str(folder / "ckpt.pth")])
    (folder / "half.pth").write_bytes((folder / "ckpt.pth").read_bytes()[:5000])
    torch.save({"weights": 1}, folder / "other.pth")
    # a pickle that runs a command when it is loaded with trust
    (folder / "trap.pth").write_bytes(b"cos\nsystem\n(S'touch trapped'\ntR.")
    (folder / "noise.pth").write_bytes(b"\x80\x02" + np.random.default_rng(0).bytes(3000))
    (folder / "oI.txt").write_bytes(b"\xef\xbb\xbfo\nI\no\n")
    (folder / "zero").touch()
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def files(originals):
    """Links to all originals in the test's own folder."""
    shutil.copytree(originals, ".", copy_function=os.symlink, dirs_exist_ok=True)


class TestParts:
    def test_labels_come_from_file_names_and_other_files_are_left_out(self, run):
        for label, names in LABELS.items():
            for name in names.split():
                assert data.parse_label(name) == (label, label == "皖AR0031"), name
        for name in ("image.jpg", "IMG-0042.jpg", "1-皖AR0O3T.jpg"):
            Path(name).touch()
        photograph(".")
        left_out = ("2 files left out", "IMG-0042", "1 whole CCPD", "data.py crop", "1 labels")
        run("data show . x.png", "none of 1 images can be read", *left_out, fails=True)

    def test_images_of_every_mode_are_read_alike(self):
        pixels = np.zeros((40, 160, 3), np.uint8)
        pixels[:, 80:] = 255  # black left half, white right half
        source = Image.fromarray(pixels)
        source.convert("CMYK").save("CMYK.jpg")
        for mode in ("L", "RGB", "RGBA", "P", "1", "LA"):
            source.convert(mode).save(f"{mode}.png")
        Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257).save("16.png")
        exif = Image.Exif()
        exif[0x0112] = 6  # stored lying on its side
        source.rotate(90, expand=True).save("turned.jpg", exif=exif)
        for file in [pixels, pixels[:, :, 0], *Path().iterdir()]:
            image = data.read_image(file, (40, 160)).permute(1, 2, 0).numpy()
            assert abs(image - pixels.astype(int)).mean() < 2, file

    def test_a_dataset_decodes_an_image_once(self):
        paths, texts = save_crops("crops", 1)
        dataset = data.PlateDataset(paths, texts, SIZE, cache_bytes=10**6)
        assert dataset[0][1] == texts[0]
        paths[0].unlink()
        assert dataset[0][1] == texts[0]

    def test_validation_shares_no_plate_with_training(self):
        texts = [f"皖A{k % 70:05}" for k in range(200)]
        train_ids, val_ids = data.split_validation(texts, 0.1)
        assert sorted(train_ids + val_ids) == list(range(200))
        assert len({texts[k] for k in val_ids}) == 7
        assert len({texts[k] for k in train_ids}) == 63

    def test_drawn_plates_follow_from_the_seed_and_hold_every_character(self, run):
        images, texts = drawn(400, seed=5)
        assert torch.equal(drawn(400, seed=5)[0], images)
        assert not torch.equal(drawn(400, seed=6)[0], images)
        assert {text[0] for text in texts} == set(data.PROVINCES)
        assert {len(text) for text in texts} == {7, 8}
        assert all(crnn.is_plate(text, data.PATTERNS) for text in texts)
        assert data.load_glyphs(40).amax((2, 3)).amin() > 0.5  # in every typeface
        for char in "OIaq皖A0":  # on sheets those of other alphabets too
            assert 0.02 < data.character_picture(char, 22).mean() < 0.9, char
        run("data render drawn --count 20")
        assert len(data.find_crops("drawn/train")[0]) == 18

    def test_a_camera_of_no_strength_changes_nothing(self):
        image = torch.arange(128.0).expand(1, 3, *SIZE).to(torch.uint8)
        photo = data.camera(image, SIZE, data.RandomNumbers(0), strength=0.0)
        assert (photo.int() - image.int()).abs().max() <= 3

    def test_a_full_disk_keeps_what_there_was(self, monkeypatch):
        Path("a.json").write_text("old")
        monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(28, "No space")))
        with pytest.raises(OSError, match="a.json: cannot be written"):
            data.write_file("a.json", b"new")
        assert Path("a.json").read_text() == "old"
        assert os.listdir() == ["a.json"]

    @cases("patterns", [(), (("ab", "a"), ("abc", "bc", "ab"))])
    @cases("seed", range(10))
    def test_probabilities_and_beam_search_equal_brute_force(self, seed, patterns):
        logits = torch.randn(4, 1, 4, generator=torch.Generator().manual_seed(seed))
        log_probs = logits[:, 0].log_softmax(1)
        totals = Counter()  # the probability of a string is the sum over all paths that spell it
        for path in itertools.product(range(4), repeat=4):
            totals[collapse(path)] += log_probs[range(4), path].sum().exp().item()
        answer = crnn.string_log_probs(logits.expand(-1, len(totals), -1), list(totals), "abc")
        assert answer.exp().tolist() == pytest.approx(list(totals.values()), rel=1e-4)
        texts = sorted(totals, key=totals.get, reverse=True)
        texts = [text for text in texts if not patterns or crnn.is_plate(text, patterns)]
        beams = crnn.beam_search(log_probs, "abc", patterns, 10**6, 10**6)
        assert beams[: len(texts)] == texts  # what follows needs too many steps
        if patterns:
            best = pytest.approx(totals[texts[0]], rel=1e-4)
            assert crnn.candidates(logits, "abc", patterns)[0] == (texts[0], best)

    def test_greedy_decoding_and_the_steps_that_a_string_needs(self):
        paths = torch.randint(0, 4, (9, 300))  # few symbols: many repeats
        texts = [collapse(path) for path in paths.T.tolist()]
        assert crnn.greedy_decode(torch.nn.functional.one_hot(paths, 4), "abc") == texts
        assert [crnn.steps_needed(text) for text in ("", "ab", "aab", "aaa")] == [0, 2, 4, 5]
        assert crnn.ctc_loss(torch.zeros(4, 1, 4), ["aaa"], "abc").isinf()

    @cases("name", PARAMETERS)
    def test_a_network_reads_each_image_alone_folded_or_saved(self, name):
        preset, rnn = name.split()
        network = crnn.NETWORKS[preset](ALPHABET, rnn=rnn)
        assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]
        images = drawn(4, size=network.default_size)[0]
        with torch.no_grad():
            network(images)  # moves the batch-norm statistics off their start
            whole = network.eval()(images)
            assert whole.shape == (20 if preset == "notebook" else 32, 4, 66)
            alone = torch.cat([network(image[None]) for image in images], 1)
            assert torch.allclose(alone, whole, atol=1e-4)
            checkpoint = crnn.make_checkpoint(network, args="no dict")
            assert torch.allclose(crnn.fold_norms(network)(images), whole, atol=1e-4)
            network.fc.bias += 1  # the checkpoint is a copy
            torch.save(checkpoint, "x.pth")
            assert torch.allclose(crnn.load_checkpoint("x.pth")[0](images), whole, atol=1e-5)

    def test_an_unsure_read_takes_the_mean_of_three_looks(self):
        network = crnn.CRNN(ALPHABET).eval()  # has learnt nothing, so it is never sure
        image = drawn(1)[0]
        (result,) = predict.read(network, image.permute(0, 2, 3, 1).numpy(), "fp32")
        looks = torch.cat([image, predict.look_again(image)])
        log_probs = crnn.string_log_probs(network(looks), 3 * [result.plate], ALPHABET)
        assert log_probs.unique().numel() == 3
        assert result.confidence == pytest.approx(log_probs.exp().mean().item(), rel=1e-3)

    def test_a_checkpoint_of_the_notebook_is_read(self):
        network = crnn.NotebookCRNN(ALPHABET, None, "gru", True, hidden_size=64).eval()
        state = network.state_dict()
        names = " ".join(state)
        for k in range(8):  # its blocks are conv1, bn1, conv2, bn2
            names = names.replace(f"cnn.{k}.conv", f"cnn.{k // 2}.conv{k % 2 + 1}")
            names = names.replace(f"cnn.{k}.norm", f"cnn.{k // 2}.bn{k % 2 + 1}")
        state = {f"part.{name}": value for name, value in zip(names.split(), state.values())}
        state["part.proj.weight"] = state["part.proj.weight"][:, :, None, None]
        state["part.cnn.0.conv1.weight"] = state["part.cnn.0.conv1.weight"].flip(1)  # BGR
        torch.save({"state_dict": state, "optimizer": {}}, "notebook.pth")
        loaded, _ = crnn.load_checkpoint("notebook.pth", ALPHABET)
        assert loaded.config == network.config
        images = drawn(2, size=(96, 448))[0]
        assert torch.allclose(loaded(images), network(images), atol=1e-5)

    @cases("name, value, words", MISFITS)
    def test_a_checkpoint_that_does_not_fit_is_refused(self, name, value, words):
        content = crnn.make_checkpoint(crnn.CRNN(ALPHABET))
        content["model" if "." in name else "config"][name] = value
        torch.save(content, "x.pth")
        with pytest.raises(ValueError, match=words):
            crnn.load_checkpoint("x.pth")

    def test_metrics_are_right(self):
        for a, b, edits in (("kitten", "sitting", 3), ("", "皖A", 2), ("ab", "ba", 2)):
            assert evaluate.levenshtein(a, b) == evaluate.levenshtein(b, a) == edits
        trues = ["皖A27N53", "皖A12345", "ab"]
        preds = ["皖A7N53", "皖B12346", "ab"]
        scores = {"accuracy": 1 / 3, "cer": 3 / 16, "levenshtein": 1, "n": 3}
        assert evaluate.metrics(trues, preds) == pytest.approx(scores)
        assert evaluate.confusions(trues, preds) == {("A", "B"): 1, ("5", "6"): 1}
        assert evaluate.wilson(0.9, 100) == pytest.approx((0.8256, 0.9448), abs=1e-4)
        assert min(evaluate.wilson(0, n)[0] for n in range(300)) == 0
        assert evaluate.calibration_error([0.9, 0.9], "ab", "ac") == pytest.approx(0.4)

    def test_the_prior_says_how_common_a_province_is(self):
        prior = train.province_prior(["浙A12345"] * 9 + ["皖A12345"], ALPHABET)
        zhe, wan, yue = (prior[1 + ALPHABET.index(char)].item() for char in "浙皖粤")
        assert zhe - wan == pytest.approx(np.log(9.01 / 1.01))
        assert yue < wan < 0 < zhe
        assert not prior[: 1 + len(data.DIGITS + data.LETTERS)].any()
        assert not train.province_prior(["ab"], "ab").any()

    def test_drawing_gives_a_gpu_few_operations_and_rarely_waits(self, monkeypatch):
        monkeypatch.setitem(data.HANDFUL, "cpu", data.HANDFUL["cuda"])
        for seed in range(3):
            with Recorder() as recorder:
                data.draw_plates(128, SIZE, data.RandomNumbers(seed), data.load_glyphs(40))
            assert len(re.findall("^aten", recorder.names, re.M)) < 1100
            assert len(re.findall("_local_scalar|nonzero|_to_copy", recorder.names)) <= 16

    @pytest.mark.skipif(not hasattr(torch, "accelerator"), reason="torch before 2.6 cannot")
    def test_no_tensor_is_on_the_wrong_device(self, monkeypatch):
        """On an imitated GPU, whose tensors have a device and no content."""
        monkeypatch.setattr(data, "compress", lambda images, rng: images)
        monkeypatch.setattr(crnn.F, "ctc_loss", lambda log_probs, *_, **__: log_probs.sum((0, 2)))
        glyphs = data.load_glyphs(40)
        rng = data.RandomNumbers(0)
        rng.device = torch.device("cuda")
        rng.tensors = None
        with FakeTensorMode() as mode:
            with rng.device:
                network = crnn.CRNN(ALPHABET)
                prior = torch.zeros(66)
            images, texts = data.draw_plates(70, SIZE, rng, mode.from_tensor(glyphs).cuda())
            images = data.camera(images, SIZE, rng, data.CROP_STRENGTH)
            logits = crnn.predict_logits(network, images.cpu(), "bf16")
            loss = train.batch_loss(logits, texts, ALPHABET, 20, prior)
            train.move_average(network, network, 0.5)
        assert images.device.type == loss.device.type == "cuda"


class TestScripts:
    @cases("words, command", MISTAKES)
    def test_a_mistake_ends_with_one_sentence_that_names_it(self, files, run, words, command):
        before = sorted(Path().rglob("*"))
        (sentence,) = re.findall("error: .*", run(command, fails=True))
        assert words in sentence
        assert any(word in sentence for word in command.split()[1:])
        assert sorted(Path().rglob("*")) == before  # trap.pth would make a file

    @cases("command, words", sorted(COMMANDS))
    def test_commands_of_the_readme_and_rare_ones_work(self, files, run, command, words):
        Path("assets").symlink_to(HERE / "assets")
        if "0123456789" in command:  # an alphabet that its crops must have
            for k, path in enumerate(sorted(Path("DIR").rglob("*.jpg"))):
                path.rename(path.with_name(f"{k}-A1{k}B.jpg"))
        if command.startswith("train.py"):
            command += " --epochs 1"
        assert "nan" not in run(command.replace(".py", "", 1), words)

    def test_audit_finds_what_is_wrong(self, run):
        paths, texts = save_crops("set/train", 6)
        Path("set/test").mkdir()
        shutil.copy(paths[0], f"set/test/copy-{texts[0]}.jpg")  # a copy, and a plate in both
        run("data audit set")  # both are only reported
        Path("set/test/1-皖AO0003.jpg").write_bytes(paths[1].read_bytes()[:400])
        shutil.copy(paths[2], "set/test/holiday.jpg")
        said = ("holiday.jpg", "1-皖AO0003.jpg: not a readable image", "O or I         1")
        run("data audit set --json a.json", "is set/test/copy-", *said, fails=True)
        assert json.loads(Path("a.json").read_text("utf8"))["plates in train and test"] == texts[:1]

    @cases("option", ["", "--rectify"])
    def test_crop_cuts_plates_out_and_skips_what_it_cannot_cut(self, run, option):
        plate = photograph(".")
        photograph(".", indices="24_1_3_25_26_27_28_29")  # a plate of eight characters
        photograph(".", [(x + 400, y) for x, y in GOOD], "600&400_905&560")  # outside the picture
        photograph(".", GOOD[::-1])
        photograph(".", GOOD[:1] * 4)
        photograph(".", box="9&9_1&1")
        Path("IMG-1.jpg").touch()
        for result in ("2 cut", "2 already there"):  # its own crops are no photographs
            run(f"data crop . out {option}", result, "5 skipped")
        paths, texts = data.find_crops("out")
        assert sorted(texts) == ["云BD12345", "皖AY339S"]
        error = (data.read_image(paths[0], (140, 440)).float() - plate).abs().mean()
        assert (error < 25) == bool(option)

    def test_drawings_alone_teach_reading(self, files, run):
        run("evaluate ckpt.pth --json scores.json --report .", "500 synthetic plates")
        assert json.loads(Path("scores.json").read_text("utf8"))["accuracy"] > 0.15  # chance: 0
        sheet = np.asarray(Image.open("errors.png"))
        assert sheet[4:68, 4:260].std() > 1  # the plate is there

    def test_every_way_to_read_gives_the_same(self, files, run):
        run(f"{FAST} --init ckpt.pth --out 'a b/c.pth'", "on 32 crops", "validation: 8 crops")
        assert len(Path("a b/c.csv").read_text().splitlines()) == 2  # its head and one epoch
        facts = ("20 images", "by position", "by first", "calibration", "unseen")
        run(f"evaluate 'a b/c.pth' --report . {CPU}", *facts)
        head, *rows = Path("predictions.csv").read_text("utf8").splitlines()
        assert head == "filename,true,pred,confidence,same"
        _, _, plates, confidences, _ = zip(*(row.split(",") for row in rows))
        paths = sorted(Path("plates/test").iterdir())
        lines = [f"{path}\t{plate}\t" for path, plate in zip(paths, plates)]
        run(f"predict 'a b/c.pth' plates/test {CPU}", *lines)
        # the same from Python, as files and as arrays, in batches of another size
        network = predict.load("a b/c.pth", "cpu")
        for sources in (paths, [np.asarray(Image.open(path)) for path in paths]):
            reads = list(predict.read(network, sources, "fp32", batch_size=3, workers=3))
            assert [read.plate for read in reads] == list(plates)
            sure = list(map(float, confidences))
            assert [read.confidence for read in reads] == pytest.approx(sure, abs=1e-4)

    def test_explain_and_export(self, files, run):
        run("predict ckpt.pth FOLDER --explain ctc.png --top 3 --export model.pt2", "agrees")
        assert Image.open("ctc.png").width == 32 * predict.STEP
        assert b"\\u7696" in Path("model.pt2").read_bytes()  # 皖 in JSON, so the alphabet

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
        run("predict ckpt.pth odd", "8 read, 5 unreadable", "new\\nline.jpg", *unread, fails=True)
        run("data audit odd", fails=True)

    @cases("output, words", [("> /dev/full", "No space"), ("| true", ""), ("> ascii.txt", "")])
    def test_output_may_be_full_closed_or_ascii(self, files, output, words):
        """Also the one test that starts a script as users do."""
        command = f"PYTHONIOENCODING=ascii '{sys.executable}' '{HERE}/predict.py' FOLDER {output}"
        done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True)
        assert done.returncode == bool(words)
        assert words in done.stderr
        assert not re.search("Traceback|Exception", done.stderr)

    def test_a_notebook_can_call_main_and_one_folder_is_enough(self, files, run, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", mock.Mock(spec=["write", "flush"]))  # as Jupyter's
            for command in (f"{FAST} --data plates/train", "evaluate ckpt.pth", "predict FOLDER"):
                run(command)
        assert run("evaluate ckpt.pth", "training left out").startswith("8 images")

    @cases("options", ["--synthetic 0", "--synthetic 0.5 --precision bf16"])
    def test_a_stopped_run_goes_on_bit_for_bit(self, files, run, options):
        command = f"{FAST} --epochs 3 {options}"
        run(f"{command} --workers 1 --out a.1")  # its files are a.1.csv and so on
        command += " --workers 3 --out b.pth"
        Path("b.pth").write_text("old")
        with interrupted(2):
            run(command, "nothing was written", fails=True)
        run(f"{command} --lr 1e30", "lower --lr", fails=True)
        assert Path("b.pth").read_text() == "old"
        with interrupted(7):
            run(command, "b.pth.bak", "\n130", fails=True)
        assert Path("b.pth.bak").read_text() == "old"
        crnn.load_checkpoint("b.pth")
        command += " --resume"
        run(f"{command} --lr 0.5", "--lr", fails=True)
        torch.save({**torch.load("b.state.pth"), "minutes": 60.0}, "b.state.pth")
        run(command)
        a, b = (torch.load(f"{name}.state.pth") for name in ("a.1", "b"))
        for part, name in itertools.product(("model", "ema"), a["model"]):
            assert torch.equal(a[part][name], b[part][name]), name
        assert a["history"][-1]["val_loss"] == b["history"][-1]["val_loss"]
        assert b["history"][-1]["minutes"] > 60
        torch.save({**b, "epoch": 2}, "b.state.pth")
        run(f"{command} --precision fp16", "cpu fp16", "=== epoch   3")
        torch.save({"epoch": 1}, "b.state.pth")
        run(command, "not a state", fails=True)

    @cases("broken", [False, True])
    def test_two_processes_train_one_network(self, capfd, broken):
        """Each has its own half of the crops; in the second run one of the two can read none."""
        paths, texts = save_crops("plates", 40)
        train_ids, _ = data.split_validation(texts, 0.2)
        for k in train_ids[1::2] if broken else []:
            paths[k].write_text("no image")
        # one machine with two processes, started as torchrun starts them
        config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0")
        answers = elastic_launch(config, one_of_two)(f"{FAST} --synthetic 0")
        assert answers[0][0] == {texts[k] for k in train_ids[::2]}
        assert answers[1][0] == ({""} if broken else {texts[k] for k in train_ids[1::2]})
        assert answers[0][1] == answers[1][1]
        assert capfd.readouterr().out.count("2 process(es)") == 1  # only the first one speaks
