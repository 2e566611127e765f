"""Tests: python -m pytest -q test_smoke.py. Two minutes on two cores, no network and no GPU."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torchvision.transforms.functional import to_pil_image

import data
import evaluate
import model
import predict
import train
from assets import plates

torch.set_num_threads(1)  # networks and batches are too small to share
pytestmark = pytest.mark.filterwarnings("ignore")
cases, near = pytest.mark.parametrize, pytest.approx
HERE = Path(__file__).resolve().parent
ALPHABET, PATTERNS, SIZE = data.ALPHABET, data.PATTERNS, (32, 128)
SCRIPTS = {"data": data, "train": train, "evaluate": evaluate, "predict": predict, "plates": plates}
FAST = "train --data plates --precision fp32 --epochs 1 --batch-size 20 --val 0.2"
TUNE = f"{FAST} --init assets/reader.pth"
TINY = f"{FAST} --size 16 64"
PARAMETERS = {"notebook gru": 5_717_582, "small lstm": 771_044, "wide gru": 1_317_092}
LABELS = """皖AX511H: 01-皖AX511H 皖AX511H a-b-皖ax511h 皖A·X511H 1-皖ＡX５11H 皖AX511H_1
皖AX511H: 皖AX511H(1) 皖AX511H-1 皖AX511H-副本 皖A-X511H 皖A\u200bX511H 粤B12345-皖AX511H
粤BD12345: 粤BD12345 01-粤BD12345-copy
皖AR0031: 0225502873564-皖AR0O3I
: image IMG-0042 皖OX511H 皖AX511 皖AX511H223 AAX511H 皖AX511H~ 皖A12345_粤B12345"""
# CCPD: 7 characters, 8, a plate outside the photograph, five corners, a box in the wrong order
FRAMES = """200&400_500&560-500&560_200&500_200&400_500&460-0_0_22_27_27_33_16
200&400_500&560-500&560_200&500_200&400_500&460-24_1_3_25_26_27_28_29
600&400_900&560-900&560_600&500_600&400_900&460-0_0_22_27_27_33_16
200&400_500&560-500&560_200&500_200&400_500&460_1&1-0_0_22_27_27_33_16
9&9_1&1-500&560_200&500_200&400_500&460-0_0_22_27_27_33_16"""
# parts of a checkpoint, and values that do not fit
MISFITS = [("fc.bias", torch.full((66,), np.inf)), ("fc.bias", torch.zeros(1).expand(10**9))]
MISFITS += [("fc.bias", torch.zeros(3)), ("other.bias", torch.zeros(3)), ("rnn", "rnn")]
MISFITS += [("size", [32, 400_000]), ("alphabet", list(ALPHABET)), ("model", "large"), ("x", 1)]
# mean, deviation, difference of rows and of columns: of drawn plates, and photographed again
GOLDEN = (116.835, 79.614, 15.847, 12.839, 113.702, 80.280, 8.305, 6.988)
# Words of the one sentence that ends a command, and such commands. It also names what is wrong.
MISTAKES = f"""not a checkpoint: predict half.pth crop.jpg; evaluate trap.pth; train --init crop.jpg
not a checkpoint: predict absent.pth crop.jpg | no readable path: predict a.jfif
name a new file: predict crop.jpg --export x.xyz; predict crop.png --explain crop.png
name a new file: evaluate --csv half.pth; evaluate --json no/x.json; plates show crop.jpg
name a new file: train --out crop.jpg; train --out empty; train --out no/x.pth
give a number: predict crop.jpg --top 0; train --epochs 0; train --lr nan; train --val 2
not on this machine: predict crop.jpg --device cuda:99; train --device nonsense
drop yours: train --init ckpt.pth --size 48 128; train --init ckpt.pth --rnn gru
no labelled crops: evaluate --data frames; plates show x.png empty
multiples of: train --size 50 131; train --size 32 28 | no such folder: data crop absent out
No such file: evaluate --data absent; train --alphabet absent.txt
no such folder: data audit absent | no readable path: predict zero.jpg
has no folder 'other': evaluate --data plates --split other | none can be read: evaluate --data bad
no images there: predict empty; predict | no crop there can be read: {FAST} --data bad --synthetic 0
holds no characters: train --alphabet empty.txt
drop it: predict crop.jpg --adapt --no-grammar | give --data: train --alphabet ab
no / in: train --alphabet a/ | name a new folder: predict crop.jpg --label named"""
ALONE = """predict.py ../ckpt.pth ../crop.jpg > /dev/full: No space
train.py: drawn plates need assets/"""
# The README's commands are tests, but for those that take long or need what a clone lacks.
CODE = r"(?:^ {4}|`)python ([\w/]+\.py[^`#]*?)(?=`| *#|\n {4}|\n\n)"
COMMANDS = re.findall(CODE, Path(HERE, "README.md").read_text("utf8"), re.M)
COMMANDS = {" ".join(x.split()) for x in COMMANDS if not re.search("notebook|onnx|make_", x)}
assert len(COMMANDS) >= 12  # or CODE no longer finds them


def watch(target, name, effect=None):
    """Until the test ends calls of target.name are noted, and done unless `effect` says else."""
    return mock.patch.object(target, name, wraps=getattr(target, name), side_effect=effect).start()


def one_of_two(command):
    """One process of a run on two. Returns the strings it trained on and sums of its weights."""
    train.EPOCH_IMAGES = 40
    loss, optimizer = watch(model, "ctc_loss"), watch(torch.optim, "AdamW")
    train.main(command.split()[1:])
    calls = [call.args for call in loss.call_args_list if call.args[0].requires_grad]
    weights = optimizer.call_args.args[0]
    return {text for call in calls for text in call[1]}, [x.sum().item() for x in weights]


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """A folder with all that the commands name."""
    os.chdir(tmp_path_factory.mktemp("originals"))
    os.symlink(HERE / "assets", "assets")
    os.symlink("assets/reader.pth", "ckpt.pth")
    for name in ("plates", "DIR", "CCPD2019-dl1", "named", "bad"):
        plates.render(name, 60 if name == "plates" else 10)
    for path in list(Path("DIR").rglob("*.jpg")):  # also for an alphabet without provinces
        path.rename(f"{path.with_suffix('')}-{path.stem[-6:]}.jpg")
    os.rename("DIR/train", "DIR/Train")
    plate = to_pil_image(plates.fixed_plates(1, 0, (140, 440))[0][0])  # hangs askew in a photograph
    photo = plate.transform((720, 1160), Image.AFFINE, (22 / 15, 0, -880 / 3, -0.28, 1.4, -504))
    for folder in ("frames", "CCPD2019/ccpd_base", "CCPD2019/ccpd_weather", "empty"):
        os.makedirs(folder)
        for name in FRAMES.split() * (folder != "empty"):
            photo.save(f"{folder}/025-95_113-{name}-37-15.jpg", quality=95)
    os.mkdir("FOLDER")
    for name in ("FOLDER/1.jpg", "crop.jpg", "crop.png"):
        shutil.copy(min(Path("plates/test").iterdir()), name)
    for path in [*Path("bad").rglob("*.jpg"), Path("zero.jpg"), Path("empty.txt")]:
        path.write_text("")
    Path("half.pth").write_bytes(Path("ckpt.pth").read_bytes()[:5000])
    Path("trap.pth").write_bytes(b"cos\nsystem\n(S'touch trapped'\ntR.")  # if loaded with trust
    return os.getcwd()


@pytest.fixture(autouse=True)
def run(originals, tmp_path, monkeypatch, capfd):
    """Each test has a folder of its own, with links to the originals, and small numbers.

    Gives a function that runs a command, looks for words in what it says, and returns that."""

    def call(command, words="", fails=False):
        name, *arguments = command.replace('"', "").split()
        with pytest.raises(SystemExit) as stop:
            sys.exit(SCRIPTS[name].main(arguments))
        said = "".join(capfd.readouterr()) + f"\n{stop.value.code}"
        assert bool(stop.value.code) == fails, said
        assert not [word for word in words.split("; ") if word not in said], said
        return said

    shutil.copytree(originals, tmp_path, copy_function=os.symlink, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "EPOCH_IMAGES", 60)
    monkeypatch.setattr(plates, "VALIDATION", (20, "validation"))
    monkeypatch.setattr(plates, "TEST", (100, "test"))
    yield call
    mock.patch.stopall()


class TestParts:
    def test_labels_come_from_file_names(self):
        for label, names in (line.split(": ") for line in LABELS.splitlines()):
            assert {str(data.parse_label(f"{x}.jpg")[0]) for x in names.split()} == {label}, names
        names = ("AB-12", "01-AB", "AB-12", "AB_1", "u\u0308")  # ü in two characters
        alphabets = map(data.read_alphabet, ("AB12", "AB", "AB12-", "AB1", "ü"))
        texts, remarks = zip(*map(data.parse_label, names, alphabets))
        assert texts == ("12", "AB", "AB-12", "", "ü")
        assert remarks == ("", "", "", data.UNLABELLED, "")
        assert data.read_alphabet("0123456789.kWh") == "0123456789.kWh"
        assert 160 < sum(data.is_held_out(f"皖A{k:05}", 0.05) for k in range(4000)) < 240
        assert len({data.is_held_out(text, 0.5) for text in ("AO", "A0", "aO")}) == 1

    def test_images_of_every_kind_are_read_alike(self):
        pixels = np.uint8(255 * (np.indices((40, 160, 3))[1] >= 80))  # left black, right white
        grey, source = pixels[:, :, 0], Image.fromarray(pixels)
        for name in ("L.png", "RGB.png", "RGBA.png", "P.png", "1.png", "LA.png", "CMYK.jpg"):
            source.convert(name[:-4]).save(f"empty/{name}")
        exif = Image.Exif()
        exif[0x0112] = 6  # stored lying on its side
        source.rotate(90, expand=True).save("empty/turned.jpg", exif=exif)
        images = [pixels, grey, grey > 0, source]
        for image in [*images, Path("empty/P.png").read_bytes(), *Path("empty").iterdir()]:
            image = data.load_image(image, (40, 160)).permute(1, 2, 0).numpy()
            assert abs(image - pixels.astype(int)).mean() < 2, image
        assert data.load_image(np.uint8([[[255, 0, 7]]]), (1, 1)).flatten().tolist() == [255, 0, 7]
        deep = grey.astype(np.uint16), grey.astype(np.float32)  # whose scale nobody knows
        for odd in (None, 3, np.zeros((4, 4, 7), np.uint8), pixels / 255, b"no image", *deep):
            error = pytest.raises(data.InputError, data.open_image, odd)
            assert "no readable path" in str(error.value)

    def test_a_seed_draws_the_same_plates_on_every_machine(self):
        """Or scores on drawn plates could not be compared. A change of the recipe changes these."""
        images, texts = plates.fixed_plates(200, "golden", SIZE)
        crops = data.camera(images, SIZE)
        assert torch.equal(plates.fixed_plates(70, "golden", SIZE)[0][:64], images[:64])
        assert all(model.is_plate(text, PATTERNS) for text in texts) and texts[0] == "陕TH0G70"
        assert {text[0] for text in texts} == set(data.PROVINCES) and {*map(len, texts)} == {7, 8}
        for some, golden in ((images, GOLDEN[:4]), (crops, GOLDEN[4:])):
            some = some.float()
            steps = [some.diff(dim=side).abs().mean().item() for side in (2, 3)]
            assert [some.mean().item(), some.std().item(), *steps] == near(golden, abs=0.01)
        assert plates.load_glyphs(40).amax((2, 3)).amin() > 0.6  # each character in full ink
        # without tilt, noise, glare, blur and JPEG, and with a box that fits, nothing changes
        neutral = torch.tensor([[(0.07 / 0.27) ** 0.5], [0.2]])  # of warp's zoom
        watch(data, "randn", lambda *shape: torch.zeros(*shape))
        watch(data, "rand", lambda *shape: neutral if len(shape) == 3 else torch.zeros(*shape))
        watch(data, "jpeg", lambda images, quality: images)
        watch(data.random, "random", lambda: 0.0)
        ramp = torch.arange(128.0).expand(1, 3, *SIZE).to(torch.uint8)
        assert abs(data.camera(ramp, SIZE).float() - ramp).max() <= 3
        mock.patch.stopall()
        texts = plates.draw_plates(200, SIZE, plates.PRACTICE)[1]
        assert 70 < sum(bool({*text[1:]} & {*data.PROVINCES}) for text in texts) < 130

    @pytest.mark.skipif(not hasattr(torch, "accelerator"), reason="torch before 2.6 cannot")
    def test_no_tensor_is_on_the_wrong_device(self):
        watch(data, "jpeg", lambda images, quality: images)
        glyphs = plates.load_glyphs(40)
        with torch._subclasses.FakeTensorMode() as mode:  # a GPU without content
            watch(plates, "load_glyphs", [mode.from_tensor(glyphs).cuda()])
            images, _ = plates.draw_plates(70, SIZE, 0.5, "cuda")
            assert data.camera(images, SIZE).device.type == "cuda"

    @cases("patterns", [(), (("ab", "a"), ("abc", "bc", "ab"))])
    @cases("seed", range(10))
    def test_ctc_equals_brute_force(self, seed, patterns):
        logits = torch.randn(4, 2, 4, generator=torch.Generator().manual_seed(seed))
        log_probs = logits[:, 0].log_softmax(1)
        paths = torch.cartesian_prod(*4 * [torch.arange(4)])  # all there are
        texts = ["".join("-abc"[k] for k in path) for path in paths]
        texts = [re.sub(r"(.)\1+", r"\1", text).replace("-", "") for text in texts]
        assert model.greedy_decode(model.F.one_hot(paths.T, 4), "abc") == texts
        totals = dict.fromkeys(texts, 0)  # a string is as likely as all paths that spell it
        for text, share in zip(texts, log_probs[range(4), paths].sum(1).exp().tolist()):
            totals[text] += share
        shares = model.probabilities(logits[:, :1].expand(-1, len(totals), -1), list(totals), "abc")
        assert shares.tolist() == near(list(totals.values()), rel=1e-4)
        best = sorted(totals, key=totals.get, reverse=True)
        best = [text for text in best if not patterns or model.is_plate(text, patterns)]
        beams = model.beam_search(log_probs, "abc", patterns, 10**6)
        assert beams[: len(best)] == best  # what follows needs too many steps
        assert len(model.beam_search(log_probs, "abc", (), 2)) == 2
        means = {
            x: model.probabilities(logits, [x, x], "abc").mean().item() for x in ("a", "ab", "c")
        }
        pairs = sorted(((x, near(means[x])) for x in means), key=lambda pair: -means[pair[0]])
        assert model.candidates(logits, list(means), "abc") == pairs
        losses = -model.probabilities(logits, ["a", "bca"], "abc").log()
        mean = model.ctc_loss(logits, ["a", "bca"], "abc").item()
        assert mean == near((losses[0] + losses[1] / 3).item() / 2, rel=1e-4)
        assert [model.steps_needed(text) for text in ("", "ab", "aab", "aaa")] == [0, 2, 4, 5]
        assert model.probabilities(logits, ["aaa", "aba"], "abc")[0] == 0
        sharp = torch.tensor([[-9.0, 0.0, -20.0], [-9.0, -20.0, 0.0]])  # spells ab
        assert model.beam_search(sharp, "ab", (("a",),)) == ["a"]  # by an unlikely blank

    @cases("name", PARAMETERS)
    def test_a_network_reads_each_image_alone_folded_or_saved(self, name):
        kind, rnn = name.split()
        config = {key: train.RECIPES[kind][key] for key in ("size", "bidirectional")}
        config |= {"model": kind, "alphabet": ALPHABET, "rnn": rnn}
        network = model.build_network(**config).requires_grad_(False)
        assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]
        images = plates.fixed_plates(4, 0, config["size"])[0]
        # training moves the batch-norm statistics off their start, and has dropout
        assert not torch.equal(network(images), network(images))
        whole = network.eval()(images)
        assert whole.shape == (20 if kind == "notebook" else 32, 4, 66)
        if kind != "notebook":  # which normalises the light
            assert torch.allclose(network(images // 2), whole, atol=1.0)
        content = {"model": network.state_dict(), "config": config, "args": {"labels": []}}
        torch.save(content, "x.pth")
        loaded = model.load_checkpoint("x.pth")[0]
        same = [torch.cat([network(image[None]) for image in images], 1), loaded(images)]
        same += [model.predict_logits(loaded, images)]
        assert all(torch.allclose(logits, whole, atol=1e-4) for logits in same)

    @cases("name, value", MISFITS)
    def test_a_checkpoint_that_does_not_fit_is_refused(self, name, value):
        content = torch.load("ckpt.pth", weights_only=True)
        content["model" if "." in name else "config"][name] = value
        torch.save(content, "x.pth")
        error = pytest.raises(OSError, model.load_checkpoint, "x.pth")
        assert "x.pth: not a checkpoint" in str(error.value)

    def test_an_unsure_read_takes_the_mean_of_three_views(self):
        network, images = predict.load(), plates.fixed_plates(100, 3, SIZE)[0]
        reads = list(predict.read(network, images.permute(0, 2, 3, 1).numpy(), "fp32"))
        logits, tilted = (
            model.predict_logits(network, x) for x in (images, predict.more_views(images))
        )
        views = (logits, *tilted.chunk(2, 1))
        shares = [model.probabilities(x, [read.plate for read in reads], ALPHABET) for x in views]
        texts = model.greedy_decode(logits, ALPHABET)
        is_sure = model.probabilities(logits, texts, ALPHABET) > 0.8
        is_sure &= torch.tensor([model.is_plate(text, PATTERNS) for text in texts])
        expected = shares[0].where(is_sure, sum(shares) / 3)
        found = [k for k in range(100) if model.is_plate(reads[k].plate, PATTERNS)]
        confidences = [reads[k].confidence for k in found]
        assert confidences == near(expected[found].tolist(), rel=1e-2, abs=1e-4)
        assert len(found) > 70 and 30 < is_sure.sum() < 100

    def test_adaptation_prefers_what_is_common_in_a_place(self):
        pairs = [("浙A11111", 0.5), ("皖A11111", 0.4)], [("浙B22222", 0.995), ("皖B22222", 0.001)]
        pairs = (*pairs, [("皖A12345", 0.99)])
        blurred, clear, sure = (predict.Read(*some[0], some, "") for some in pairs)
        failed = predict.Read("", 0.0, [], "broken")
        *_, first, second, third = predict.adapt_to_place([*12 * [sure], blurred, clear, failed])
        assert first.plate == "皖A11111" and first.confidence > 0.8
        assert second.plate == "浙B22222" and second.confidence > 0.9 and third == failed
        assert next(iter(predict.adapt_to_place([blurred]))).plate == "浙A11111"
        assert list(predict.adapt_to_place([])) == []

    def test_metrics_are_right(self):
        for a, b, edits in (("kitten", "sitting", 3), ("", "皖A", 2), ("ab", "ba", 2)):
            assert evaluate.levenshtein(a, b) == evaluate.levenshtein(b, a) == edits
        pair = (["皖A27N53", "皖A12345", "ab"], ["皖A7N53", "皖B12346", "ab"])
        scores = {"accuracy": 1 / 3, "cer": 3 / 16, "levenshtein": 1}
        assert evaluate.metrics(*pair) == near(scores)
        wrong = [place for place in evaluate.compare(*pair) if place[1] != place[2]]
        assert wrong == [(2, "A", "B"), (7, "5", "6")]
        assert evaluate.wilson(0.9, 100) == near((0.8256, 0.9448), abs=1e-4)
        assert min(evaluate.wilson(0, n)[0] for n in range(1, 300)) == 0
        assert evaluate.count_right([("b", 1), ("a", 0), ("b", 0)]) == {"a": (0, 1), "b": (1, 2)}
        error = evaluate.calibration_error([0.9, 0.9, 0.15, 1.0], [True, False, False, True])
        assert error == near((0.8 + 0.15) / 4)

    def test_shares_rates_and_the_prior(self):
        args = mock.Mock(synthetic=None, epochs=32, alphabet=ALPHABET, lr=1, warmup=300, decay=True)
        train.EPOCH_IMAGES = 20_000
        shares = [train.synthetic_share(crops, args) for crops in (0, 1140, 10**5)]
        assert shares == near([1, 1 - 80 * 1140 / 640_000, 0.5])
        rates = [train.learning_rate(step, 10**4, args) for step in (0, 5000)]
        assert rates == near([1 / 301, 0.5])
        args.decay = False
        assert train.learning_rate(5000, 10**4, args) == 1
        prior = train.province_prior(["浙A12345"] * 9 + ["皖A12345"], ALPHABET)
        zhe, wan, yue = (prior[1 + ALPHABET.index(char)].item() for char in "浙皖粤")
        assert zhe - wan == near(np.log(9.01 / 1.01)) and yue < wan < 0 < zhe
        assert not prior[:35].any() and not train.province_prior(["ab"], "ab").any()


class TestCommands:
    def test_what_is_wrong_with_a_folder_is_said(self, run):
        plates.render("set", 6)
        path = min(Path("set/train").iterdir())
        os.mkdir("set/test")
        shutil.copy(path, "set/test")  # a plate in both
        for name in ("image.jpg", "IMG-0042.jpg", "1-皖AR0O3T.jpg", "notes.md", "皖A12345.JFIF"):
            Path("set/train", name).touch()
        shutil.copy(min(Path("frames").iterdir()), "set/train")
        said = "3 files whose names hold no label; IMG-0042; 1 labels held O; 1 files passed"
        run("plates show x.png set", f"{said}; 2 files left out; 6 labelled")
        said += f"; 1 plates in train and test\n    {path.stem[8:]}; [256.  80.]; 1160.]"
        said += "; {'test': 1, 'train': 11}; '闽': 0; 4 files left out"
        run("data audit set", said, fails=True)

    def test_crop_cuts_plates_out_and_skips_what_it_cannot_cut(self, run):
        plate = plates.fixed_plates(1, 0, (140, 440))[0][0].float()
        Path("frames/IMG-1.jpg").touch()
        for option in ("", "--rectify", "--rectify"):  # crops are replaced
            run(f"data crop frames out {option}", "2 plates cut, 4 skipped")
            paths, texts = zip(*data.find_crops("out"))
            error = abs(data.load_image(paths[0], (140, 440)) - plate).mean()
            assert {*texts} == {"云BD12345", "皖AY339S"} and (error < 25) == bool(option)

    def test_every_way_to_read_gives_the_same(self, run):
        command = "evaluate ckpt.pth --data plates --split train --report . --precision fp32"
        score = float(re.search(r"accuracy +([\d.]+)", run(command, "54 images; unseen"))[1])
        head, *rows = Path("predictions.csv").read_text("utf-8-sig").splitlines()
        assert head == "filename,true,pred,confidence,same" and 0.4 < score < 1
        _, trues, reads, confidences, _ = zip(*(row.split(",") for row in rows))
        assert score == near(sum(map(str.__eq__, trues, reads)) / 54, abs=1e-4)
        assert sum(map(float, confidences)) == near(46.354, abs=5e-3)  # as measured
        paths = sorted(Path("plates/train").iterdir())
        lines = [f"{path}\t{plate}\t" for path, plate in zip(paths, reads)]
        run("predict ckpt.pth plates/train --precision fp32", "; ".join(lines))
        # the same from Python, in other batches; a camera fills its array again
        network, arrays = predict.load(), [np.array(Image.open(path)) for path in paths]
        buffer = arrays[0].copy()
        frames = (np.copyto(buffer, array) or buffer for array in arrays)
        watch(model, "images_at_once", lambda network: 3)
        for sources in (paths, frames):
            some = list(predict.read(network, sources, "fp32", top=3))
            assert [read.plate for read in some] == list(reads)
            assert [read.confidence for read in some] == near([*map(float, confidences)], abs=1e-4)
            assert max(len(read.alternatives) for read in some) <= 3
        for one in (str(paths[0]), paths[0].read_bytes(), Image.open(paths[0]), arrays[0]):
            assert [read.plate for read in predict.read(network, one, "fp32")] == [reads[0]]
        (failed,) = predict.read(network, [None])
        assert failed.error.startswith("NoneType: no readable") and failed.confidence == 0

    def test_label_explain_and_export(self, run):
        images = plates.fixed_plates(6, 9, SIZE)[0]
        for k, image in enumerate([*images, torch.zeros(3, *SIZE)]):
            to_pil_image(image).save(f"empty/{k}.png")
        run("predict empty --label fresh --above 0.5 --adapt", "7 read")
        fresh = [path.stem for path in Path("fresh").glob("*.png")]
        assert 2 < len(fresh) == 7 - len(os.listdir("fresh/unsure")) < 7
        assert sorted(text for _, text in data.find_crops("fresh")) == sorted(
            name[7:] for name in fresh
        )
        with mock.patch.object(model, "beam_search", return_value=[]):  # no plate fits
            run("predict crop.jpg --explain ctc.png", "1 read")
        run("predict crop.jpg --explain ctc.png --export model.pt2", "model.pt2: written")
        picture = np.asarray(Image.open("ctc.png"))
        assert picture.shape[1] == 32 * 28 and picture.mean() == near(158.7, abs=0.5)
        assert b"\\u7696" in Path("model.pt2").read_bytes()  # 皖 in JSON, so the alphabet
        answer = torch.export.load("model.pt2").module()(images)
        assert torch.allclose(answer, model.predict_logits(predict.load(), images), atol=1e-3)

    def test_odd_images_are_read_or_named(self, run):
        os.makedirs("odd/folder.jpg")
        os.symlink("nowhere.jpg", "odd/link.jpg")
        os.mkfifo("odd/pipe.jpg")
        Path("odd/zero.jpg").touch()
        Path("odd/cut.jpg").write_bytes(Path("crop.jpg").read_bytes()[:500])
        Image.new("1", (20000, 20000)).save("odd/bomb.png")
        for name in ("with space", "quo'te\"", "new\nline", "smile😀", "a\udcff"):
            shutil.copy("crop.jpg", f"odd/{name}.jpg")
        Image.new("L", (1, 1)).save("odd/pixel.png")
        Image.new("L", (10000, 1)).save("odd/line.png")
        picture = Image.open("crop.jpg")
        picture.save("odd/film.gif", save_all=True, append_images=[picture.rotate(9)])
        said = "new\\nline.jpg; zero.jpg; cut.jpg; bomb.png; link.jpg; pipe.jpg"
        run("predict odd", f"8 read, 5 unreadable; {said}", fails=True)
        run("data audit odd", fails=True)

    def test_the_report_shows_the_errors(self, run):
        for name in ("<b>皖A00000.jpg", "1-皖A00001.jpg", "皖A00002.jpg"):
            shutil.copy("crop.jpg", f"empty/{name}")
        said = "report       file://; errors       3"
        run("evaluate --data empty --report out --json x.json", said)
        page = Path("out/report.html").read_text("utf8")
        assert "&lt;b&gt;皖A00000.jpg" in page and "<b>" not in page
        assert page.count("<img") == 3 and page.count("<polyline") == 4  # three of the training
        assert Image.open("out/errors.png").width == 776 and page.count("<mark>") >= 6
        assert "1-皖A00001.jpg" in Path("out/predictions.csv").read_text("utf-8-sig")
        scores = "".join(Path("x.json").read_text().split())
        assert '"accuracy":0.0,' in scores and '"by_first":{"\\u7696":[0,3]}' in scores

    def test_plates_that_were_learnt_are_no_test(self, run):
        run(f"{TINY} --out flat.pth --data plates/train", "on 4; held out")
        learnt = len(torch.load("flat.pth", weights_only=True)["args"]["labels"])
        said = run("evaluate flat.pth", f"that training held out; {54 - learnt} images; unseen")
        assert " seen" not in said
        run("evaluate flat.pth --split train", "54 images;  seen; unseen")
        shutil.copytree("plates/train", "inner/a/b")
        run("evaluate flat.pth --data inner", f"of {learnt}; seen; unseen")
        run("evaluate flat.pth --data plates", "6 images; unseen")
        run(f"{TINY} --data inner --out all.pth --val 0", "0 crops held out")
        run("evaluate all.pth --data inner/a", "learnt from all of it", fails=True)

    def test_a_batch_its_learning_rate_and_its_prior(self, run, monkeypatch):
        camera, draw, groups = watch(data, "camera"), watch(plates, "draw_plates"), []
        loss, prior = watch(model, "ctc_loss"), watch(train, "province_prior")
        note = register_optimizer_step_pre_hook
        hook = note(lambda optimizer, *_: groups.append(dict(optimizer.param_groups[0])))
        command = f"{TUNE} --synthetic 0.7 --epochs 2 --lr 1e-9 --weight-decay 0.5"
        run(command, "70% of the images drawn; 2 epochs of 7 steps")
        hook.remove()
        rates = [group["lr"] for group in groups]
        assert groups[0]["weight_decay"] == 0.5 and rates[-1] < 1e-10
        assert max(rates) == near(1e-9, rel=0.1) and rates.index(max(rates)) == 2
        assert sorted(rates[2:], reverse=True) == rates[2:]
        crops = [call for call in camera.call_args_list if len(call.args) == 2]
        assert [len(call.args[0]) for call in crops] == 14 * [6]
        assert [call.args[0] for call in draw.call_args_list].count(14) == 14
        prior = train.province_prior(*prior.call_args.args)  # crops alone get it
        batches = [call.args[0] for call in loss.call_args_list if call.args[0].requires_grad]
        logits = torch.stack(batches).detach().mean((0, 1))
        shift = (logits[:6].mean(0) - logits[6:].mean(0)) @ prior / (prior @ prior)
        assert shift == near(1, abs=0.4) and prior.abs().max() > 1
        row = torch.load("ckpt.pth", weights_only=True)["history"][-1]
        # of a network that hardly learns; in the loss is dropout, which varies with torch's version
        assert row["val_loss"] == near(0.0362, abs=1e-3) and row["loss"] == near(0.295, abs=0.01)
        assert row["images"] == 280 and row["minutes"] < 5
        camera.reset_mock()
        run(f"{TUNE} --synthetic 0 --no-augment", "on 4; 0% of the images drawn")
        assert not camera.called
        train.EPOCH_IMAGES = 8
        options = "--size 32 64 --epochs 1 --batch-size 40"
        run(f"train --data plates --model notebook {options}", "notebook 32 x 64")
        half = "bf16" if hasattr(torch, "accelerator") else "fp32"  # no LSTM of torch 2.4 with AVX2
        small = f"--size 16 64 --batch-size 4 --epochs 1 --val 0 --precision {half}"
        run(f"train {small}", f"cpu {half}")

    @cases("scores, best", [((3, 1, 2), 2), ((2, 2, 2), 3)])
    def test_the_best_epoch_is_kept(self, run, scores, best):
        rows = [{"levenshtein": s, "val_loss": 0.0, "accuracy": 0.5, "cer": 0.5} for s in scores]
        seen = []

        def validate(network, validation, precision):
            assert not network.training and sum(len(texts) for _, texts in validation) > 20
            assert all(len(images) == len(texts) for images, texts in validation)
            seen.append(network.fc.weight.clone())
            return rows[len(seen) - 1]

        watch(train, "validate", validate)
        run(f"{TINY} --epochs 3")
        content = torch.load("ckpt.pth", weights_only=True)
        assert torch.equal(content["model"]["fc.weight"], seen[best - 1])
        assert [row["levenshtein"] for row in content["history"]] == list(scores)
        assert "resume" not in content

    def test_a_stopped_run_goes_on_bit_for_bit(self, run):
        train.EPOCH_IMAGES = 16
        command = f"{TINY} --batch-size 8 --epochs 3 --synthetic 0.5 --out"
        Path("a.pth").write_text("old")
        Path("a.pth.bak").write_text("older")
        run(f"{command} a.pth", "a.pth.bak.bak")
        assert Path("a.pth.bak.bak").read_text() == "old"
        run(f"{command} a.pth --resume", "has ended", fails=True)
        watch(train, "validate", [mock.DEFAULT, mock.DEFAULT, OSError, mock.DEFAULT])
        run(f"{command} b.pth", fails=True)
        run(f"{command} b.pth --resume --seed 3", "(seed)", fails=True)
        run(f"{command} b.pth --resume", "resumed after epoch 2")
        a, b = (torch.load(f"{name}.pth", weights_only=True) for name in "ab")
        assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
        assert [row["loss"] for row in a["history"]] == [row["loss"] for row in b["history"]]
        shutil.copy("crop.jpg", "plates/train/皖A99998.jpg")
        run(f"{command} b.pth --resume", "(labels)", fails=True)

    def test_a_run_ends_before_it_does_harm(self, run):
        ctc_loss, factors = model.F.ctc_loss, 9 * [1] + [np.nan, 1]
        watch(model.F, "ctc_loss", lambda *args: ctc_loss(*args) * factors.pop())
        assert "nan" not in run(f"{TINY} --out x.pth", "=== epoch 1")
        factors[:] = 9 * [np.nan]
        run(f"{TINY} --out x.pth", "not finite; lower --lr", fails=True)

    def test_it_learns_from_nothing(self, run):
        """Strings of one to three digits, all of them 0 or 1, within seconds."""
        for k in range(300):
            text = f"{k % 14 + 2:b}"[1:]
            to_pil_image(plates.text_picture(text, (32, 64))).save(f"empty/{k}-{text}.png")
        train.EPOCH_IMAGES = 400
        options = "--no-augment --epochs 2 --batch-size 8 --size 16 64 --precision fp32"
        said = run(f"train --data empty --alphabet 01 --val 0.1 {options}")
        losses = re.findall(r"=== epoch .*  loss ([\d.]+)", said)
        assert float(losses[-1]) < 0.25 < float(losses[0])

    def test_two_processes_train_one_network(self, capfd):
        """Each has its own half of the crops, and the first one speaks."""
        texts = [text for _, text in data.find_crops("plates/train")]
        learnt = [text for text in texts if not data.is_held_out(text, 0.2)]
        # one machine with two processes, started as torchrun starts them
        config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0")
        answers = elastic_launch(config, one_of_two)(f"{TINY} --synthetic 0")
        assert [answers[k][0] for k in (0, 1)] == [{*learnt[::2]}, {*learnt[1::2]}]
        assert answers[0][1] == answers[1][1] and capfd.readouterr().out.count("2 process(es)") == 1

    @cases("line", re.split(" [|] |\n", MISTAKES))
    def test_a_mistake_ends_with_one_sentence_that_names_it(self, run, line):
        words, commands = line.split(": ")
        before = sorted(Path().rglob("*"))
        for command in commands.split("; "):
            (sentence,) = re.findall("error: .*", run(command, words, fails=True))
            assert any(word in sentence for word in command.split()[1:] + ["PATH"])
        assert sorted(Path().rglob("*")) == before  # trap.pth would make a file

    @cases("command", sorted(COMMANDS))
    def test_commands_of_the_readme_work(self, run, command):
        command += " --epochs 1" * command.startswith("train.py")
        if "--label" in command:
            shutil.rmtree("named")
        assert "nan" not in run(command.replace("assets/plates", "plates").replace(".py", "", 1))

    def test_a_fault_of_the_program_shows_its_traceback(self, monkeypatch):
        monkeypatch.setattr(sys, "stdout", mock.Mock(spec=["write", "flush"]))  # as Jupyter's
        for target, name in ((data, "pil_to_tensor"), (model.CRNN, "__init__"), (model.F, "relu")):
            with mock.patch.object(target, name, side_effect=ValueError("a typo")):
                pytest.raises(ValueError, predict.main, ["crop.jpg"])

    def test_copied_scripts_work_alone(self):
        """Without assets/. Output may be full, or ASCII alone."""
        for name in ("data", "model", "train", "evaluate", "predict"):
            shutil.copy(HERE / f"{name}.py", f"empty/{name}.py")
        runs = []
        for command, _, words in (row.partition(": ") for row in ALONE.splitlines()):
            command = f"cd empty; PYTHONIOENCODING=ascii {sys.executable} {command}"
            runs.append((subprocess.Popen(command, shell=True, stderr=subprocess.PIPE), words))
        for process, words in runs:
            said = process.communicate()[1].decode()
            assert words in said and "Traceback" not in said and "Exception" not in said
            assert process.returncode == bool(words)
