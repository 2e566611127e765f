"""Tests: python -m pytest -q test_smoke.py

They make their own data and need no network and no GPU; three minutes on two cores."""

import argparse
import csv
import itertools
import json
import math
import os
import re
import shlex
import socket
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
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.functional import perspective, to_pil_image

import data
import evaluate
import model as crnn
import predict
import train

HERE = Path(__file__).parent
SIZE = (32, 128)
FAST = shlex.split("--precision fp32 --device cpu --epochs 1 --batch-size 20 --val 0.2")
pytestmark = pytest.mark.filterwarnings("ignore")
cases = pytest.mark.parametrize


@pytest.fixture
def run(capsys):
    """A function that calls a script's main, and returns what it printed, on stderr last."""

    def call(module, *words, code=0):
        ended = 0
        try:
            module.main([str(word) for word in words])
        except SystemExit as stop:
            ended = stop.code or 0
        said = "".join(capsys.readouterr())
        if isinstance(ended, str):  # Python prints it, and ends with 1
            said += ended
            ended = 1
        assert ended == code, said
        return said

    return call


def drawn(count, seed=0, size=SIZE):
    """Drawn plates and their strings."""
    return next(data.synthetic_batches(count, seed, size, count))


def save_crops(folder, count, seed):
    folder.mkdir(parents=True)
    for k, (image, text) in enumerate(zip(*drawn(count, seed))):
        to_pil_image(image).resize((220, 80)).save(folder / f"{k:04}-{text}.jpg", quality=95)
    return data.find_crops(folder)


@pytest.fixture(autouse=True)
def small_numbers(monkeypatch):
    monkeypatch.setattr(train, "EPOCH", 100)
    monkeypatch.setattr(evaluate, "SYNTHETIC_VAL", (20, 2**40))
    monkeypatch.setattr(evaluate, "SYNTHETIC_TEST", (500, 2**40 + 1))


@pytest.fixture(scope="session")
def crops(tmp_path_factory):
    """A data set on disk: DIR/train with 40 drawn plates and DIR/test with 20."""
    folder = tmp_path_factory.mktemp("crops")
    save_crops(folder / "train", 40, seed=1)
    save_crops(folder / "test", 20, seed=2)
    return folder


@pytest.fixture(scope="session")
def reader(tmp_path_factory):
    """A checkpoint after a minute of training on synthetic plates alone."""
    out = tmp_path_factory.mktemp("reader") / "ckpt.pth"
    train.main(["--epochs", "1", "--batch-size", "32", "--out", str(out)])
    return out


def test_alphabets(tmp_path, capsys):
    assert crnn.encode(["浙E2", "皖AN"], data.ALPHABET)[0].tolist() == [46, 15, 3, 51, 11, 23]
    chinese = "".join(map(chr, range(0x4E00, 0x4E00 + 90)))
    path = tmp_path / "alphabet.txt"
    path.write_bytes(b"\xef\xbb\xbfa\nb\nc\n")
    for text, alphabet in ((chinese, chinese), ("abcab", "abc"), (str(path), "abc")):
        assert data.read_alphabet(text) == alphabet
    assert not capsys.readouterr().err
    data.read_alphabet("ab-")
    assert "warning" in capsys.readouterr().err
    for content in (b"", b" \n", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(argparse.ArgumentTypeError):
            data.read_alphabet(str(path))


GOOD = ((500, 560), (200, 500), (205, 400), (505, 460))  # lower right, lower left, and on


def frame_name(corners=GOOD, box="200&400_505&560", indices="0_0_22_27_27_33_16"):
    """The name of a CCPD photograph, of the plate 皖AY339S."""
    points = "_".join(f"{x}&{y}" for x, y in corners)
    return f"025-95_113-{box}-{points}-{indices}-37-15.jpg"


LABELS = {
    "皖AX511H": "01-皖AX511H.jpg 皖AX511H.jpg a-b-皖ax511h.JPG 皖A·X511H.png 1-皖ＡX５11H.jpg",
    "粤BD12345": "粤BD12345.jpg",
    "皖AR0031": "0225502873564-皖AR0O3I.jpg",
    None: "image.jpg IMG-0042.jpg 皖OX511H.jpg 皖AX511.jpg 皖AX511H223.jpg AAX511H.jpg",
}


def test_labels_and_what_is_left_out(tmp_path, capsys):
    for label, names in LABELS.items():
        for name in names.split():
            assert data.parse_label(name) == (label, label == "皖AR0031"), name
    for name in ["image.jpg", "IMG-0042.jpg", "1-皖AR0O3T.jpg", frame_name()]:
        (tmp_path / name).touch()
    paths, texts = data.find_crops(tmp_path)
    assert texts == ["皖AR003T"]
    said = capsys.readouterr().err
    for fact in ("2 files left out", "IMG-0042.jpg", "1 whole CCPD", "data.py crop", "1 labels"):
        assert fact in said
    paths[0].unlink()
    with pytest.raises(ValueError, match="皖AX511H"):
        data.find_crops(tmp_path)


def test_images_of_every_mode(tmp_path):
    pixels = np.zeros((40, 160, 3), np.uint8)
    pixels[:, 80:] = 255  # black left half, white right half
    source = Image.fromarray(pixels)
    for mode in ("L", "RGB", "RGBA", "P", "CMYK", "1", "LA"):
        source.convert(mode).save(tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257).save(tmp_path / "16.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    source.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif)
    for file in [pixels, pixels[:, :, 0], *tmp_path.iterdir()]:
        image = data.read_image(file, SIZE)
        assert (image.dtype, image.shape) == (torch.uint8, (3, *SIZE))
        assert image[:, :, :60].float().mean() < 15, file
        assert image[:, :, 68:].float().mean() > 240, file


def test_dataset_decodes_once_and_survives_bad_files(tmp_path, capsys):
    paths, texts = save_crops(tmp_path / "crops", 20, seed=3)
    paths[0].write_bytes(paths[0].read_bytes()[:300])
    dataset = data.PlateDataset(paths, texts, SIZE, cache_bytes=10**6)
    for _ in range(2):
        batches = list(data.load_batches(dataset, data.in_batches(range(20), 8), threads=3))
        assert [text for _, some in batches for text in some] == texts[1:]
        for path in paths[1:]:
            path.unlink(missing_ok=True)  # the second round needs no file
    assert capsys.readouterr().err.count("not a readable image") == 1


def test_validation_shares_no_plate_and_province_prior():
    texts = [f"皖A{k % 70:05}" for k in range(200)]
    train_ids, val_ids = data.split_validation(texts, 0.1)
    assert sorted(train_ids + val_ids) == list(range(200))
    assert not {texts[k] for k in train_ids} & {texts[k] for k in val_ids}
    assert len({texts[k] for k in val_ids}) == 7
    prior = train.province_prior(["浙A12345"] * 9 + ["皖A12345"], data.ALPHABET)
    zhe, wan, yue = (prior[1 + data.ALPHABET.index(char)].item() for char in "浙皖粤")
    assert zhe - wan == pytest.approx(math.log(9.01 / 1.01))
    assert yue < wan < 0 < zhe
    assert not prior[: 1 + len(data.DIGITS + data.LETTERS)].any()
    assert not train.province_prior(["ab"], "ab").any()


def test_synthetic_plates_and_camera():
    glyphs = data.load_glyphs(40)
    seeds = (5, 5, 6)
    runs = [data.draw_plates(400, SIZE, data.RandomNumbers(seed), glyphs) for seed in seeds]
    images, texts = runs[0]
    assert (images.dtype, images.shape) == (torch.uint8, (400, 3, *SIZE))
    assert torch.equal(images, runs[1][0])
    assert texts == runs[1][1]
    assert not torch.equal(images, runs[2][0])
    assert {text[0] for text in texts} == set(data.PROVINCES)
    assert {len(text) for text in texts} == {7, 8}
    assert glyphs.amax((2, 3)).amin() > 0.5  # every character is there in every typeface
    for char in "OIaq皖A0":  # and on sheets those of other alphabets too
        assert 0.02 < data.character_picture(char, 22).mean() < 0.9, char
    image = torch.arange(128.0).expand(1, 3, *SIZE).to(torch.uint8)
    photo = data.camera(image, SIZE, data.RandomNumbers(0), strength=0.0)  # only a resize
    assert (photo.int() - image.int()).abs().max() <= 3


def collapse(path, alphabet):
    """CTC's map from a path to a string as its definition reads: merge repeats, drop blanks."""
    return "".join(alphabet[k - 1] for k, _ in itertools.groupby(path) if k != crnn.BLANK)


def all_probabilities(log_probs, alphabet):
    """Every string with its probability, as the sum over all paths (T, C) that spell it."""
    totals = Counter()
    for path in itertools.product(range(len(alphabet) + 1), repeat=len(log_probs)):
        log_p = sum(log_probs[t, k].item() for t, k in enumerate(path))
        totals[collapse(path, alphabet)] += math.exp(log_p)
    return totals


@cases("patterns", [(), (("ab", "a"), ("abc", "bc", "ab"))])
def test_decoding_and_probabilities_equal_brute_force(patterns):
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(4, 1, 4, generator=generator)
        log_probs = logits[:, 0].log_softmax(1)
        totals = all_probabilities(log_probs, "abc")
        answer = crnn.string_log_probs(logits.expand(-1, len(totals), -1), list(totals), "abc")
        assert answer.exp().tolist() == pytest.approx(list(totals.values()), rel=1e-4)
        texts = [text for text, _ in totals.most_common()]
        texts = [text for text in texts if not patterns or crnn.is_plate(text, patterns)]
        beams = crnn.beam_search(log_probs, "abc", patterns, 10**6, 10**6)
        assert beams[: len(texts)] == texts  # what follows needs too many steps
    paths = torch.randint(0, 4, (9, 300))  # few symbols: many repeats
    texts = [collapse(path, "abc") for path in paths.T.tolist()]
    assert crnn.greedy_decode(torch.nn.functional.one_hot(paths, 4), "abc") == texts
    assert [crnn.steps_needed(text) for text in ("", "ab", "aab", "aaa")] == [0, 2, 4, 5]
    assert crnn.ctc_loss(torch.zeros(4, 1, 4), ["aaa"], "abc").isinf()


def test_patterns_give_plates_and_never_a_less_likely_one():
    texts = ["皖A12345", "皖A2345", "A12345皖", "粤BD12345", "皖AA1122"] * 4
    logits = torch.randn(32, len(texts), 66, generator=torch.Generator().manual_seed(1))
    logits[:, :, crnn.BLANK] += 7
    for b, text in enumerate(texts):  # spikes where the text stands, of all strengths
        for k, char in enumerate(text):
            logits[3 * k + 2, b, 1 + data.ALPHABET.index(char)] += 5 + b / 4
    greedy, low = crnn.decode(logits, data.ALPHABET)
    plates, high = crnn.decode(logits, data.ALPHABET, data.PATTERNS)
    for b, plate in enumerate(plates):  # unless nothing looks like a plate
        found = crnn.candidates(logits[:, b : b + 1], data.ALPHABET, data.PATTERNS)
        assert crnn.is_plate(plate, data.PATTERNS) or not found
        assert high[b] >= low[b] - 1e-6 or not crnn.is_plate(greedy[b], data.PATTERNS)
    exact = crnn.string_log_probs(logits, plates, data.ALPHABET).exp()
    assert high == pytest.approx(exact.tolist(), abs=1e-6)


SIZES = {"notebook lstm": 6_046_286, "notebook gru": 5_717_582, "small lstm": 1_385_060}


@cases("name", SIZES)
def test_networks(name):
    """Shapes and numbers; folding batch-norms changes nothing, nor do an image's neighbours."""
    preset, rnn = name.split()
    build = crnn.NETWORKS[preset]
    network = build(data.ALPHABET, rnn=rnn)
    assert sum(parameter.numel() for parameter in network.parameters()) == SIZES[name]
    images = drawn(4, size=network.default_size)[0]
    with torch.no_grad():
        network(images)  # moves the batch-norm statistics off their start
        whole = network.eval()(images)
        assert whole.shape == (20 if preset == "notebook" else 32, 4, 66)
        alone = torch.cat([network(image[None]) for image in images], 1)
        assert torch.allclose(alone, whole, atol=1e-4)
        assert torch.allclose(crnn.fold_norms(network)(images), whole, atol=1e-4)
    other = build("ab", (64, 256), rnn, preset == "notebook", hidden_size=8).eval()
    assert other(torch.zeros(1, 3, 64, 256, dtype=torch.uint8)).shape == (other.steps, 1, 3)


def test_notebook_checkpoint(tmp_path):
    """The notebook's names, shapes and channel order: blocks of conv1, bn1, conv2, bn2."""
    network = crnn.NotebookCRNN(data.ALPHABET, None, "gru", True, hidden_size=64).eval()
    state = {}
    for name, value in network.state_dict().items():
        layer = re.fullmatch(r"cnn\.(\d)\.(conv|norm)\.(.+)", name)
        if layer:
            block, half = divmod(int(layer[1]), 2)
            name = f"cnn.{block}.{layer[2].replace('norm', 'bn')}{half + 1}.{layer[3]}"
        owner = "sequence_predictor" if name[:2] in ("rn", "fc") else "features_extractor"
        state[f"{owner}.{name}"] = value[:, :, None, None] if name == "proj.weight" else value
    first = "features_extractor.cnn.0.conv1.weight"
    state[first] = state[first].flip(1)  # trained on BGR
    torch.save({"state_dict": state, "optimizer": {}}, tmp_path / "notebook.pth")
    loaded, _ = crnn.load_checkpoint(tmp_path / "notebook.pth", data.ALPHABET)
    assert loaded.config == network.config
    images = drawn(2, size=(96, 448))[0]
    with torch.no_grad():
        assert torch.allclose(loaded(images), network(images), atol=1e-5)


def test_checkpoint_is_a_copy(tmp_path):
    network = crnn.CRNN(data.ALPHABET)
    before = network.fc.bias.clone()
    content = crnn.make_checkpoint(network, args="no dict")
    with torch.no_grad():
        network.fc.bias += 1
    torch.save(content, tmp_path / "a.pth")
    assert torch.equal(crnn.load_checkpoint(tmp_path / "a.pth")[0].fc.bias, before)


MISFITS = [
    ("model", "fc.bias", torch.full((66,), math.nan), "not numbers"),
    ("model", "fc.bias", torch.full((66,), math.inf), "not numbers"),
    ("model", "fc.bias", torch.zeros(3), "fc.bias"),
    ("model", "fc.bias", 7, "not a checkpoint"),
    ("model", "other.bias", torch.zeros(3), "other.bias"),
    ("config", "hidden_size", 8000, "does not fit"),
    ("config", "size", [32, 400_000], "not a checkpoint"),
    ("config", "alphabet", list(data.ALPHABET), "not a checkpoint"),
    ("config", "preset", "large", "not a checkpoint"),
]


@cases("part, name, value, says", MISFITS)
def test_checkpoints_that_do_not_fit(tmp_path, part, name, value, says):
    content = crnn.make_checkpoint(crnn.CRNN(data.ALPHABET), args={})
    torch.save({**content, part: {**content[part], name: value}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=says):
        crnn.load_checkpoint(tmp_path / "x.pth")


@cases("start", [b"", b"\x80\x02", b"\x80\x04\x95", b"PK\x03\x04", b"(dp0\n."])
def test_checkpoints_of_random_bytes(tmp_path, start):
    for seed in range(5):
        (tmp_path / "x.pth").write_bytes(start + np.random.default_rng(seed).bytes(3000))
        with pytest.raises(ValueError, match="x.pth: not a"):
            crnn.load_checkpoint(tmp_path / "x.pth")


class Recorder(TorchDispatchMode):
    """Notes the names of all operations that are not mere views."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names = getattr(self, "names", "") + " " * operation.is_view + f"{operation}\n"
        return operation(*args, **(kwargs or {}))


def test_drawing_gives_a_gpu_few_operations_and_rarely_waits(monkeypatch):
    monkeypatch.setitem(data.HANDFUL, "cpu", data.HANDFUL["cuda"])
    for seed in range(3):
        with Recorder() as recorder:
            data.draw_plates(128, SIZE, data.RandomNumbers(seed), data.load_glyphs(40))
        assert len(re.findall("^aten", recorder.names, re.M)) < 1100
        assert len(re.findall("_local_scalar|nonzero|_to_copy", recorder.names)) <= 16


@pytest.mark.skipif(not hasattr(torch, "accelerator"), reason="torch before 2.6 cannot imitate")
def test_no_tensor_is_on_the_wrong_device(monkeypatch):
    """On an imitated GPU, whose tensors have a device and no content."""
    monkeypatch.setattr(data, "compress", lambda images, rng: images)
    sums = mock.Mock(side_effect=lambda log_probs, *_, **options: log_probs.sum((0, 2)))
    monkeypatch.setattr(torch.nn.functional, "ctc_loss", sums)
    glyphs = data.load_glyphs(40)
    rng = data.RandomNumbers(0)
    rng.device = torch.device("cuda")
    rng.tensors = None
    with FakeTensorMode() as mode:
        with rng.device:
            network = crnn.CRNN(data.ALPHABET)
            prior = torch.zeros(66)
        images, texts = data.draw_plates(70, SIZE, rng, mode.from_tensor(glyphs).to("cuda"))
        images = data.camera(images, SIZE, rng, data.CROP_STRENGTH)
        logits = crnn.predict_logits(network, images.cpu(), "bf16")
        loss = train.batch_loss(logits, texts, data.ALPHABET, 20, prior)
        train.move_average(network, network, 0.5)
    assert images.device.type == loss.device.type == "cuda"


def naive(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(naive(a[1:], b) + 1, naive(a, b[1:]) + 1, naive(a[1:], b[1:]) + (a[0] != b[0]))


def test_metrics():
    words = ["".join(word) for n in range(4) for word in itertools.product("ab", repeat=n)]
    for a, b in itertools.product([*words, "kitten", "皖A27N53"], words):
        assert evaluate.levenshtein(a, b) == naive(a, b)
    trues = ["皖A27N53", "皖A12345"]
    preds = ["皖A7N53", "皖B12346"]
    assert evaluate.metrics(trues, preds)["cer"] == pytest.approx(3 / 14)
    assert evaluate.metrics(trues, [trues[0], preds[1]])["accuracy"] == 0.5
    assert evaluate.metrics(trues, preds)["levenshtein"] == 1.5
    assert evaluate.confusions(trues, preds) == {("A", "B"): 1, ("5", "6"): 1}
    assert evaluate.wilson(0.9, 100) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert {f"{evaluate.wilson(0, n)[0]:.1f}" for n in range(300)} == {"0.0"}
    assert evaluate.calibration_error([0.9, 0.9], ["a", "b"], ["a", "c"]) == pytest.approx(0.4)


def read_table(path):
    with open(path, encoding="utf8") as file:
        return list(csv.DictReader(file))


def test_drawings_alone_teach_reading(reader, tmp_path, run):
    run(evaluate, reader, "--json", tmp_path / "scores.json", "--report", tmp_path)
    scores = json.loads((tmp_path / "scores.json").read_text("utf8"))
    assert scores["accuracy"] > 0.15  # chance reads nothing
    assert scores["n"] == 500
    sheet = np.asarray(Image.open(tmp_path / "errors.png"))
    assert sheet[4:68, 4:260].std() > 1  # the plate is there


def test_train_evaluate_predict(crops, reader, tmp_path, run):
    out = tmp_path / "new folder" / "ckpt.pth"
    said = run(train, "--data", crops, *FAST, "--init", reader, "--out", out)
    assert "on 32 crops" in said
    assert "validation: 8 crops" in said
    assert len(read_table(out.with_suffix(".csv"))) == 1
    said = run(evaluate, out, "--report", tmp_path, *FAST[:2])
    for fact in ("20 images", "by position", "by first", "calibration", "unseen"):
        assert fact in said
    rows = read_table(tmp_path / "predictions.csv")
    assert list(rows[0]) == ["filename", "true", "pred", "confidence", "same"]
    paths = sorted((crops / "test").iterdir())
    lines = run(predict, out, *paths, *FAST[:2]).splitlines()
    plates = [row["pred"] for row in rows]
    assert [line.split("\t")[:2] for line in lines[:20]] == list(
        map(list, zip(map(str, paths), plates))
    )
    # the same from Python, as files and as arrays, in batches of another size
    network = predict.load(out, "cpu")
    for sources in (paths, [np.asarray(Image.open(path)) for path in paths]):
        reads = list(predict.read(network, sources, "fp32", batch_size=3, workers=3))
        assert [read.plate for read in reads] == plates
        sure = [float(row["confidence"]) for row in rows]
        assert [read.confidence for read in reads] == pytest.approx(sure, abs=1e-4)


def test_audit_finds_what_is_wrong(tmp_path, run):
    source, texts = save_crops(tmp_path / "train", 6, seed=1)
    test = tmp_path / "test"
    test.mkdir()
    (test / f"copy-{texts[0]}.jpg").write_bytes(source[0].read_bytes())  # a copy, and an overlap
    run(data, "audit", tmp_path)  # both are only reported
    (test / "1-皖AO0003.jpg").write_bytes(source[1].read_bytes()[:400])
    (test / "holiday.jpg").write_bytes(source[2].read_bytes())
    run(data, "audit", tmp_path, "--json", tmp_path / "a.json", code=1)
    found = json.loads((tmp_path / "a.json").read_text("utf8"))
    assert found["plates in train and test"] == texts[:1]
    assert len(found["copies"]) == 2
    assert "holiday.jpg" in found["names without a label"][0]
    assert "1-皖AO0003.jpg" in found["unreadable images"][0]
    assert "1-皖AO0003.jpg" in found["labels with O or I"][0]


@cases("rectify", [[], ["--rectify"]])
def test_crop(tmp_path, run, rectify):
    """Plates pasted askew into photographs come back; what cannot be cut is skipped."""
    plate = drawn(1, size=(140, 440))[0][0]
    photo = Image.new("RGB", (720, 1160), (90, 90, 90))
    photo.paste(to_pil_image(plate))
    photo = perspective(photo, [(440, 140), (0, 140), (0, 0), (440, 0)], GOOD)
    outside = frame_name([(x + 400, y) for x, y in GOOD], "600&400_905&560")
    turned, flat, reverse = (
        frame_name(GOOD[::-1]),
        frame_name(GOOD[:1] * 4),
        frame_name(box="9&9_1&1"),
    )
    eight = frame_name(indices="24_1_3_25_26_27_28_29")
    for name in (frame_name(), eight, outside, turned, flat, reverse, "IMG-1.jpg"):
        photo.save(tmp_path / name, quality=95)
    for result in ("2 cut", "2 already there"):  # its own crops are no photographs
        assert result in run(data, "crop", tmp_path, tmp_path / "out", *rectify)
    paths, texts = data.find_crops(tmp_path / "out")
    assert sorted(texts) == ["云BD12345", "皖AY339S"]
    error = (data.read_image(paths[0], (140, 440)).float() - plate).abs().mean()
    assert (error < 25) == bool(rectify)


def test_another_alphabet(crops, tmp_path, run):
    for k, path in enumerate(sorted((crops / "train").iterdir())[:12]):
        Image.open(path).save(tmp_path / f"{k}-{'oI' * (k % 3 + 1)}.png")
    alphabet = ("--alphabet", "oI")
    assert "I 24" in run(data, "audit", tmp_path, *alphabet)
    run(train, "--data", tmp_path, *alphabet, *FAST, "--val", 0.5, "--out", tmp_path / "x.pth")
    assert crnn.load_checkpoint(tmp_path / "x.pth")[0].config["alphabet"] == "oI"
    run(data, "show", tmp_path, tmp_path / "c.png", *alphabet)
    run(data, "render", tmp_path / "drawn", "--count", 20)
    assert len(data.find_crops(tmp_path / "drawn" / "train")[0]) == 18


def test_explain_and_export(reader, crops, tmp_path, run):
    run(predict, reader, crops / "test", "--explain", tmp_path / "ctc.png", "--top", 3)
    assert Image.open(tmp_path / "ctc.png").width == 32 * predict.STEP
    assert "agrees" in run(predict, reader, "--export", tmp_path / "model.pt2")
    facts = {"facts.json": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=facts)
    assert json.loads(facts["facts.json"])["alphabet"] == data.ALPHABET


def test_from_a_notebook_on_one_folder(crops, tmp_path, run, monkeypatch):
    out = str(tmp_path / "ckpt.pth")
    flat = str(crops / "train")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", mock.Mock(spec=["write", "flush"]))  # all it can do there
        assert train.main(["--data", flat, *FAST, "--out", out]) is None
        assert evaluate.main([out]) is None
        assert predict.main([out, flat]) is None
    said = run(evaluate, out)
    assert said.startswith("8 images")
    assert "training left out" in said


def interrupted(name, calls):
    """Within this context a function of train.py is interrupted, as by Ctrl-C, after `calls`."""
    effects = [mock.DEFAULT] * calls + [KeyboardInterrupt]
    return mock.patch.object(train, name, wraps=getattr(train, name), side_effect=effects)


def test_a_bf16_run_goes_on_in_fp16(tmp_path, run):
    out = tmp_path / "c.pth"
    common = ("--batch-size", 20, "--device", "cpu", "--epochs", 1, "--out", out)
    run(train, *common, "--precision", "bf16")
    path = crnn.companion(out, ".state.pth")
    state = torch.load(path, weights_only=True)
    torch.save(state | {"epoch": 0}, path)  # as if it had been stopped
    said = run(train, *common, "--precision", "fp16", "--resume")
    assert "cpu fp16" in said
    assert "=== epoch   1" in said


@cases("share", [0.0, 0.5])
def test_resume_is_bit_for_bit(crops, tmp_path, run, share):
    whole = ["--data", crops, *FAST, "--synthetic", share, "--epochs", 3, "--out", tmp_path / "a"]
    parts = [*whole[:-1], tmp_path / "b.pth", "--workers", 3]
    run(train, *whole, "--workers", 1)
    with interrupted("move_average", 7):
        run(train, *parts, code=130)
    crnn.load_checkpoint(tmp_path / "b.pth")
    parts.append("--resume")
    assert "--lr" in run(train, *parts, "--lr", 0.5, code=1)
    path = tmp_path / "b.state.pth"
    torch.save({**torch.load(path), "minutes": 60.0}, path)
    run(train, *parts)
    a, b = (torch.load(tmp_path / f"{name}.state.pth") for name in "ab")
    for part, name in itertools.product(("model", "ema"), a["model"]):
        assert torch.equal(a[part][name], b[part][name]), name
    assert [row["val_loss"] for row in a["history"]] == [row["val_loss"] for row in b["history"]]
    assert float(read_table(tmp_path / "b.csv")[-1]["minutes"]) > 60
    torch.save({"epoch": 1}, path)
    assert "not a state" in run(train, *parts, code=1)


def test_an_earlier_checkpoint_is_kept(crops, tmp_path, run, monkeypatch):
    out = tmp_path / "ckpt.pth"
    command = ["--data", crops, *FAST, "--out", out]
    out.write_bytes(b"old")
    with interrupted("take_step", 2):
        assert "nothing was written" in run(train, *command, code=130)
    monkeypatch.setattr(train, "BAD_STEPS", 3)
    assert "lower --lr" in run(train, *command, "--lr", 1e30, code=1)
    assert out.read_bytes() == b"old"
    assert "ckpt.pth.bak" in run(train, *command)
    assert Path(f"{out}.bak").read_bytes() == b"old"
    names = ["lr0.001", "lr0.002", "x.csv", "y.pth"]  # every run has files of its own
    names += [str(crnn.companion(name, end)) for name in names for end in (".csv", ".state.pth")]
    assert len(set(names)) == 12


def test_crops_that_cannot_be_read(tmp_path, run):
    for path in save_crops(tmp_path / "crops", 40, seed=1)[0]:
        path.write_text("no image")
    common = ["--data", tmp_path / "crops", *FAST, "--out", tmp_path / "out" / "x.pth"]
    assert "no crop in it can be read" in run(train, *common, "--synthetic", 0, code=1)
    assert not list((tmp_path / "out").iterdir())
    assert "nan" not in run(train, *common)
    crnn.load_checkpoint(tmp_path / "out" / "x.pth")


@cases("options", ["--val 0", "--synthetic 1", "--model notebook --size 32 128"])
def test_rare_options(crops, tmp_path, run, options):
    said = run(train, "--data", crops, *FAST, *options.split(), "--out", tmp_path / "x.pth")
    assert "nan" not in said
    assert "1 epochs of 5 steps" in said


def one_of_two(rank, folder, options, port):
    """One process of a run on two; saves the strings it trained on and its weights."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    train.EPOCH = 100
    losses = mock.patch.object(train, "batch_loss", wraps=train.batch_loss)
    steps = mock.patch.object(train, "take_step", wraps=train.take_step)
    with losses as losses, steps as steps:
        train.main([*options, "--out", f"{folder}/ckpt.pth"])
    texts = {text for call in losses.call_args_list for text in call.args[1]}
    network = steps.call_args.args[0].network
    torch.save((texts, list(network.parameters())), f"{folder}/{rank}.pt")


@cases("broken", [False, True])
def test_a_run_on_two_processes(tmp_path, capfd, broken):
    """Each trains on its own half of the crops; in the second run one of the two has none."""
    paths, texts = save_crops(tmp_path / "crops", 40, seed=1)
    train_ids, _ = data.split_validation(texts, 0.2)
    for k in train_ids[1::2] if broken else []:
        paths[k].write_text("no image")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--data", str(tmp_path / "crops"), *FAST, "--synthetic", "0"]
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path), options, port), nprocs=2)
    said = capfd.readouterr().out
    assert "2 process(es)" in said
    assert said.count("=== epoch") == 1
    shards = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert shards[0][0] == {texts[k] for k in train_ids[::2]}
    assert shards[1][0] == ({""} if broken else {texts[k] for k in train_ids[1::2]})
    assert all(map(torch.equal, shards[0][1], shards[1][1]))


def test_hostile_images(reader, crops, tmp_path, run):
    image = min((crops / "test").iterdir())
    picture = Image.open(image)
    (tmp_path / "zero.jpg").touch()
    (tmp_path / "cut.jpg").write_bytes(image.read_bytes()[:500])
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.jpg" / "loop").symlink_to(tmp_path)
    for name in ("with space.jpg", "quo'te\".jpg", "new\nline.jpg", "smile😀.jpg", "a\udcff.jpg"):
        picture.save(tmp_path / name, "JPEG")
    picture.resize((1, 1)).save(tmp_path / "pixel.png")
    picture.resize((10000, 1)).save(tmp_path / "line.png")
    picture.save(tmp_path / "film.gif", save_all=True, append_images=[picture.rotate(9)])
    said = run(predict, reader, tmp_path, code=1)
    for fact in ("new\\nline.jpg", "zero.jpg", "cut.jpg", "bomb.png", "link.jpg", "pipe.jpg"):
        assert fact in said
    assert "8 read, 5 unreadable" in said
    run(data, "audit", tmp_path, code=1)


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("trapped"),)


# What the one sentence must name has a ! before it.
HOSTILE = """
predict !{dir}/half.pth {image}; predict !{dir}/zero.pth {image}; predict !{dir}/other.pth {image};
predict !{dir}/trap.pth {image}; predict !{dir}/absent.pth {image};
predict {ckpt} !{dir}/empty; predict {ckpt} !{dir}/*.xyz; predict {ckpt} --export !{dir}/x.xyz;
predict {ckpt} --export !{dir}/no/x.pt2; predict {ckpt} {image} --explain !{dir}/no/x.png;
predict {ckpt} {image} !--top 0; predict {ckpt} {image} !--workers -3;
predict {ckpt} {image} !--device {gpu}; predict {ckpt} {image} !--device nonsense;
evaluate {ckpt} --data !{dir}/empty; evaluate {ckpt} --data !{dir}/frames;
evaluate {ckpt} --data !{dir}/absent; evaluate {ckpt} --data {crops} --split !other;
evaluate {ckpt} --data {crops} --json !{dir}/no/m.json; evaluate {ckpt} --report !{dir}/file;
evaluate {ckpt} --data {crops} --csv !{dir}/no/p.csv; train --data !{dir}/empty;
train --data !{dir}/long --alphabet ab; train !--alphabet {dir}/absent.txt; train !--alphabet ab;
train !--alphabet {dir}/file; train !--size 50 131; train !--size 32 28; train !--lr inf;
train !--lr nan; train !--val 1; train !--synthetic 1.5; train !--seed -1; train !--epochs 0;
train !--batch-size 1; train !--workers -3; train !--device {gpu}; train !--device nonsense;
train --init !{dir}/other.pth; train --init {ckpt} !--size 48 128; train --init {ckpt} !--rnn gru;
train --init {ckpt} !--model notebook; train --init {ckpt} !--alphabet ab;
train --out !{dir}/file/x.pth; train --out !{dir}/empty; data show !{dir}/empty {tmp}/s.png;
data show {crops} !{dir}/no/s.png; data audit !{dir}/absent; data render !{dir}/file --count 1;
data crop !{dir}/absent {tmp}/x.pth; data crop {dir}/frames {tmp}/x.pth !--margin -1;
data crop {dir}/frames {tmp}/x.pth !--margin nan; data audit !{dir}/empty;
data crop !{dir}/empty {tmp}/x.pth; data audit {crops} --json !{image};
data show {crops} !{image}; predict {ckpt} {image} --explain !{image};
evaluate {ckpt} --data {crops} --csv !{ckpt}; evaluate {ckpt} --data {crops} --json !{ckpt};
predict {ckpt} --export !{ckpt}; train --out !{dir}/new/; train !--seed 9223372036854775808"""


@pytest.fixture(scope="session")
def places(reader, crops, tmp_path_factory):
    """Paths for commands, by name."""
    folder = tmp_path_factory.mktemp("places")
    image = min((crops / "test").iterdir())
    for name in (
        "zero.pth",
        "file",
        "empty/a.txt",
        f"frames/{frame_name()}",
        f"long/{'ab' * 30}.jpg",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(image.read_bytes() if name.endswith(".jpg") else b"")
    (folder / "half.pth").write_bytes(reader.read_bytes()[:5000])
    torch.save({"weights": 1}, folder / "other.pth")
    torch.save({"model": Trap()}, folder / "trap.pth")
    gpu = "mps" if torch.cuda.is_available() else "cuda"  # that is not there
    return {"dir": folder, "ckpt": reader, "crops": crops, "image": image, "gpu": gpu}


@cases("command", [" ".join(command.split()) for command in HOSTILE.split(";")])
def test_hostile_commands(places, tmp_path, capsys, command):
    name, *words = command.format(**places, tmp=tmp_path).split()
    named = next(word[1:] for word in words if word[0] == "!")
    words = [word.removeprefix("!") for word in words]
    if name == "train":
        words = ["--epochs", "1", "--out", f"{tmp_path}/x.pth", *words]
    with pytest.raises(SystemExit) as stop:
        sys.modules[name].main(words)
    said = f"{capsys.readouterr().err}\n{stop.value.code}".splitlines()
    (sentence,) = (line for line in said if "error: " in line)
    assert named in sentence
    assert not Path("trapped").exists()
    assert not (tmp_path / "x.pth").exists()


def test_a_full_disk_keeps_what_there_was(tmp_path):
    """A limit on the size of files stands for a disk that fills up."""
    torch.save(1, tmp_path / "a.pth")
    resource = pytest.importorskip("resource")  # Windows has none
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
    try:
        with pytest.raises(OSError, match="a.pth: cannot be written"):
            data.write_file(tmp_path / "a.pth", bytes(99999))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.load(tmp_path / "a.pth") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


@cases("kind", ["full", "closed", "ascii"])
def test_output_that_is_full_closed_or_ascii(reader, crops, kind):
    """Also the one test that starts a script as users do."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    streams = {"full": os.open("/dev/full", os.O_WRONLY), "closed": write_end, "ascii": -1}
    command = [sys.executable, HERE / "predict.py", reader, crops / "test"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, stdout=streams[kind], stderr=subprocess.PIPE, env=environment)
    assert done.returncode == (kind == "full"), done.stderr
    assert b"Traceback" not in done.stderr
    assert (b"No space" in done.stderr) == (kind == "full")


# The README's commands are tests. A clean clone lacks the notebook's checkpoint and some packages.
README = Path(HERE, "README.md").read_text("utf8")
CODE = r"(?:^ {4}|`)python ((?:data|train|evaluate|predict)\.py[^`#]*?)(?=`| *#|\n {4}|\n\n)"
COMMANDS = sorted({" ".join(command.split()) for command in re.findall(CODE, README, re.M)})
COMMANDS = [command for command in COMMANDS if not re.search("notebook|tinkoff|onnx", command)]


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 12


@cases("command", COMMANDS)
def test_readme_commands(command, places, tmp_path, run):
    name, *words = shlex.split(command)
    crops = places["crops"]
    for k in range(6):
        Image.open(places["image"]).save(tmp_path / f"{k}-A1{k}B.jpg")
    here = {"ckpt.pth": places["ckpt"], "plates": crops, "CCPD2019-dl1": crops}
    here |= {"photo.jpg": places["image"], "crop.jpg": places["image"], "FOLDER": crops / "test"}
    frames = ("FRAMES", "CCPD2019/ccpd_base", "CCPD2019/ccpd_weather")
    here |= dict.fromkeys(frames, places["dir"] / "frames")
    here["DIR"] = tmp_path if "--alphabet" in words else crops
    writes = re.compile(r"OUT|errors|(?!assets).+\.(png|pt2|json|csv)|CCPD2019-dl1/\w+")
    words = [tmp_path / word if writes.fullmatch(word) else here.get(word, word) for word in words]
    if name == "train.py":
        words += ["--epochs", 1, "--out", tmp_path / "x.pth"]
    run(sys.modules[name.removesuffix(".py")], *words)
