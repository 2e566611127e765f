"""Tests: python -m pytest -q test_smoke.py. They make their own data; no network, no GPU, a few minutes on two cores."""
import csv
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import model as crnn
import predict
import train

HERE = Path(__file__).parent


def run(*command, code=0):
    """A script as users run it; returns (stdout, stderr)."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=HERE, capture_output=True, encoding="utf8", errors="surrogateescape")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout, done.stderr


def drawn(n, seed=0, size=(32, 128), green=0.0):
    generator = torch.Generator().manual_seed(seed)
    return data.draw_plates(n, size, generator, data.load_glyphs(data.glyph_height(size)), green)


def save_crops(folder, n, seed=0):
    folder.mkdir(parents=True)
    images, texts = drawn(n, seed)
    for k, (image, text) in enumerate(zip(images, texts)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((220, 80)).save(folder / f"{k:04}-{text}.jpg", quality=95)
    return texts


@pytest.fixture(scope="session")
def crops(tmp_path_factory):
    """A data set on disk: DIR/train with 40 drawn plates and DIR/test with 20."""
    folder = tmp_path_factory.mktemp("crops")
    save_crops(folder / "train", 40, seed=1)
    save_crops(folder / "test", 20, seed=2)
    return folder


@pytest.fixture(scope="session")
def reader(tmp_path_factory):
    """A checkpoint after one short run on drawn plates alone, and what the run printed."""
    out = tmp_path_factory.mktemp("reader") / "ckpt.pth"
    return out, run("train.py", "--epochs", 2, "--out", out)[0]


# ------------------------------------------------------------------------------------------------------ data.py

def test_alphabet_and_encoding():
    assert len(data.ALPHABET) == 65 and len(set(data.ALPHABET)) == 65 and not set("IO") & set(data.ALPHABET)
    targets, lengths = crnn.encode(["浙ENQ032", "皖AN8732"], data.ALPHABET)
    assert targets.tolist() == [[46, 15, 23, 25, 1, 4, 3], [51, 11, 23, 9, 8, 4, 3]] and lengths.tolist() == [7, 7]


@pytest.mark.parametrize("name, label", [
    ("01-皖AX511H.jpg", "皖AX511H"), ("皖AX511H.jpg", "皖AX511H"), ("a-b-皖ax511h.JPG", "皖AX511H"), ("皖A·X511H.png", "皖AX511H"),
    ("1-皖ＡX５11H.jpg", "皖AX511H"), ("粤BD12345.jpg", "粤BD12345"), ("0225502873564-皖AR0O3I.jpg", "皖AR0031"),
    ("image.jpg", None), ("IMG-0042.jpg", None), ("皖OX511H.jpg", None), ("皖AX511.jpg", None), ("皖AX511H223.jpg", None), ("AAX511H.jpg", None)])
def test_labels(name, label):
    assert data.parse_label(name)[0] == label
    assert data.parse_label(name)[1] == (label == "皖AR0031")


def test_what_is_left_out_is_said(tmp_path, capsys):
    image = Image.new("RGB", (8, 8))
    for name in ["image.jpg", "IMG-0042.jpg", "1-皖AR0O3T.jpg", "01-0_1-249&528_393&586-392&584_249&586_250&530_393&528-0_0_25_27_7_26_29-131-21.jpg"]:
        image.save(tmp_path / name)
    paths, texts = data.find_crops(tmp_path)
    said = capsys.readouterr().err
    assert texts == ["皖AR003T"] and "2 files left out" in said and "IMG-0042.jpg" in said and "1 whole CCPD" in said and "1 labels held the letter O or I" in said
    paths[0].unlink()
    with pytest.raises(ValueError, match="皖AX511H"):
        data.find_crops(tmp_path)


def test_images_of_every_mode(tmp_path):
    wide = np.zeros((40, 160, 3), np.uint8)
    wide[:, 80:] = 255                              # black left half, white right half
    source = Image.fromarray(wide)
    for mode in ("L", "RGB", "RGBA", "P", "CMYK", "1", "LA"):
        source.convert(mode).save(tmp_path / f"川{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    Image.fromarray(wide[:, :, 0].astype(np.uint16) * 257).save(tmp_path / "川16.png")
    exif = Image.Exif()
    exif[0x0112] = 6                                # stored lying on its side
    source.rotate(90, expand=True).save(tmp_path / "川E.jpg", exif=exif)
    Image.fromarray(wide[:1, ::160]).save(tmp_path / "川pixel.png")
    source.resize((1600, 400)).save(tmp_path / "川big.jpg")
    for path in sorted(tmp_path.iterdir()):
        image = data.read_image(path, (32, 128))
        assert image.shape == (3, 32, 128) and image.dtype == torch.uint8, path
        if "pixel" not in path.name:
            assert image[:, :, :60].float().mean() < 15 and image[:, :, 68:].float().mean() > 240, path
    assert torch.equal(data.read_image(wide, (32, 128)), data.read_image(tmp_path / "川RGB.png", (32, 128)))


def test_dataset_decodes_once_and_survives_bad_files(crops, tmp_path, capsys):
    paths, texts = data.find_crops(crops / "train")
    broken = tmp_path / "1-皖AX511H.jpg"
    broken.write_bytes(paths[0].read_bytes()[:300])
    dataset = data.PlateDataset([broken] + paths, ["皖AX511H"] + texts, (32, 128))
    image, text = dataset[3]
    assert image.shape == (3, 32, 128) and text == texts[2] and len(dataset) == 41
    for _ in range(2):
        read = [t for _, batch in data.loader(dataset, data.in_batches(range(41), 16)) for t in batch]
        assert read == texts
    assert capsys.readouterr().err.count("not a readable image") == 1
    assert dataset.filled[1:].all() and torch.equal(dataset[3][0], data.read_image(paths[2], (32, 128)))


def test_validation_shares_no_plate():
    texts = [f"皖A{k % 70:05}" for k in range(200)]
    train_ids, val_ids = train.split_validation(texts, 0.1)
    assert sorted(train_ids + val_ids) == list(range(200)) and not {texts[k] for k in train_ids} & {texts[k] for k in val_ids}
    assert 7 <= len({texts[k] for k in val_ids}) <= 7 and train.split_validation(["皖A00000"], 0.1) == ([0], [])


def test_drawn_plates():
    images, texts = drawn(400, seed=5, green=0.25)
    again, same = drawn(400, seed=5, green=0.25)
    assert images.dtype == torch.uint8 and images.shape == (400, 3, 32, 128) and torch.equal(images, again) and texts == same
    assert not torch.equal(images, drawn(400, seed=6, green=0.25)[0])
    assert all(data.PLATE.fullmatch(t) for t in texts) and sum(len(t) == 8 for t in texts) == 100
    assert {t[0] for t in texts} == set(data.PROVINCES)
    glyphs = data.load_glyphs(48)
    assert glyphs[:, :, 8:-8].amax((2, 3)).amax(0).min() > 0.5          # every character is there in some typeface


def test_camera_at_strength_zero_is_a_resize():
    image = torch.arange(128.0).expand(1, 3, 32, 128).round().to(torch.uint8)
    again = data.camera(image, (32, 128), torch.Generator().manual_seed(0), strength=0.0)
    assert (again.int() - image.int()).abs().max() <= 3


# ----------------------------------------------------------------------------------------------------- model.py

def collapse(path, alphabet):
    """CTC's map from a path to a string as its definition reads: merge repeats, then drop blanks."""
    return "".join(alphabet[k - 1] for k, _ in itertools.groupby(path) if k != crnn.BLANK)


def test_greedy_decode_equals_the_definition():
    paths = torch.randint(0, 4, (9, 300), generator=torch.Generator().manual_seed(0))         # few symbols: many repeats
    logits = torch.nn.functional.one_hot(paths, 4).float()
    assert crnn.greedy_decode(logits, "abc") == [collapse(p, "abc") for p in paths.T.tolist()]
    assert crnn.greedy_decode(logits[:, :0], "abc") == []


def test_probability_sums_over_all_alignments():
    logits = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(0)) * 2
    texts = ["ab", "aa", ""]
    probs = logits.softmax(2)
    for b, text in enumerate(texts):
        total = sum(math.prod(probs[t, b, k].item() for t, k in enumerate(path))
                    for path in itertools.product(range(3), repeat=5) if collapse(path, "ab") == text)
        assert crnn.probability(logits, texts, "ab")[b].item() == pytest.approx(total, rel=1e-4)


def test_labels_that_need_too_many_steps():
    assert [crnn.steps_needed(t) for t in ("", "ab", "aab", "aaa")] == [0, 2, 4, 5]
    assert crnn.text_loss(torch.zeros(4, 1, 3), ["aaa"], "ab").isinf()


@pytest.mark.parametrize("preset, rnn, parameters", [("notebook", "lstm", 6_046_286), ("notebook", "gru", 5_717_582), ("small", "lstm", None)])
def test_presets(preset, rnn, parameters):
    network = crnn.CRNN(data.ALPHABET, preset, rnn=rnn).eval()
    count = sum(p.numel() for p in network.parameters())
    assert count == parameters or preset == "small" and 0.5e6 < count < 2e6
    h, w = crnn.SIZES[preset]
    logits = network(torch.randint(0, 256, (2, 3, h, w), dtype=torch.uint8))
    assert logits.shape == (20 if preset == "notebook" else 32, 2, 66) == (network.steps, 2, 66)
    assert crnn.CRNN(data.ALPHABET, preset, rnn=rnn, bidirectional=preset == "notebook", size=(64, 256)).eval()(
        torch.zeros(1, 3, 64, 256, dtype=torch.uint8)).shape[1:] == (1, 66)
    with pytest.raises(ValueError, match="multiples"):
        crnn.CRNN(data.ALPHABET, preset, size=(50, 133))


@pytest.mark.parametrize("preset", ["small", "notebook"])
def test_folding_changes_nothing_nor_do_neighbours(preset):
    torch.manual_seed(0)
    network = crnn.CRNN(data.ALPHABET, preset)
    images = drawn(8, size=crnn.SIZES[preset])[0]
    with torch.no_grad():
        network(images)                             # moves the batch-norm statistics off their start
        whole = network.eval()(images)
        assert torch.allclose(torch.cat([network(images[k:k + 1]) for k in range(8)], 1), whole, atol=1e-4)
        assert torch.allclose(network.fold()(images), whole, atol=1e-4)


def test_notebook_checkpoint(tmp_path):
    """The notebook's names, shapes and channel order, from its description: five blocks of conv1, bn1, conv2, bn2."""
    network = crnn.CRNN(data.ALPHABET, "notebook", rnn="gru", bidirectional=True, hidden=64).eval()
    state = {}
    for key, value in network.state_dict().items():
        top, _, rest = key.partition(".")
        if top == "cnn":
            k, kind, name = rest.split(".")
            key = f"features_extractor.cnn.{int(k) // 2}.{'conv' if kind == 'conv' else 'bn'}{int(k) % 2 + 1}.{name}"
        else:
            key = ("features_extractor." if top == "proj" else "sequence_predictor.") + key
        state[key] = value[:, :, None, None] if key == "features_extractor.proj.weight" else value
    first = "features_extractor.cnn.0.conv1.weight"
    state[first] = state[first].flip(1)             # trained on BGR
    torch.save({"state_dict": state, "optimizer": {}}, tmp_path / "notebook.pth")
    loaded, _ = crnn.load_checkpoint(tmp_path / "notebook.pth", data.ALPHABET)
    assert loaded.config["rnn"] == "gru" and loaded.config["bidirectional"] and loaded.config["hidden"] == 64
    images = drawn(2, size=(96, 448))[0]
    with torch.no_grad():
        assert torch.allclose(loaded(images), network(images), atol=1e-5)


# -------------------------------------------------------------------------------------------------- evaluate.py

def naive(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(naive(a[1:], b) + 1, naive(a, b[1:]) + 1, naive(a[1:], b[1:]) + (a[0] != b[0]))


def test_metrics():
    words = ["".join(w) for n in range(4) for w in itertools.product("ab", repeat=n)] + ["kitten", "皖A27N53"]
    assert all(evaluate.levenshtein(a, b) == naive(a, b) for a in words for b in words[:15]) and evaluate.levenshtein("kitten", "sitting") == 3
    trues, preds = ["皖A27N53", "皖A12345"], ["皖A7N53", "皖B12346"]
    assert evaluate.cer(trues, preds) == pytest.approx(3 / 14) and evaluate.accuracy(trues, trues[:1] + preds[1:]) == 0.5
    assert evaluate.confusions(trues, preds) == {("A", "B"): 1, ("5", "6"): 1}
    low, high = evaluate.wilson(0.9, 100)
    assert low == pytest.approx(0.8256, abs=1e-4) and high == pytest.approx(0.9448, abs=1e-4)


# --------------------------------------------------------------------------------------------------- the scripts

def test_drawings_alone_teach_reading(reader):
    """40,000 drawn plates, a minute or two: far above chance, which is nothing."""
    out, said = reader
    stdout, _ = run("evaluate.py", out, "--json", out.with_suffix(".json"))
    scores = json.loads(out.with_suffix(".json").read_text("utf8"))
    assert scores["n"] == evaluate.DRAWN_TEST[0] and scores["accuracy"] > 0.15 and scores["cer"] < 0.5, (said, stdout)


def test_train_evaluate_predict(crops, reader, tmp_path):
    out = tmp_path / "new folder" / "ckpt.pth"
    said, _ = run("train.py", "--data", crops, "--epochs", 1, "--init", reader[0], "--batch-size", 500, "--out", out)
    assert "38 crops" in said and "2 crops" in said
    with open(out.with_suffix(".csv"), encoding="utf8") as file:
        assert len(list(csv.DictReader(file))) == 1
    table, scores = tmp_path / "predictions.csv", tmp_path / "metrics.json"
    said, _ = run("evaluate.py", out, "--csv", table, "--json", scores, "--precision", "fp32")
    assert "20 images" in said and json.loads(scores.read_text("utf8"))["n"] == 20
    with open(table, encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20 and list(rows[0]) == ["filename", "true", "pred", "confidence", "same"]
    lines, summary = run("predict.py", out, crops / "test", "--precision", "fp32")
    reads = {Path(path).name: (plate, float(sure)) for path, plate, sure in (line.split("\t") for line in lines.splitlines())}
    assert [reads[row["filename"]][0] for row in rows] == [row["pred"] for row in rows] and summary.rstrip().endswith("images/s")
    # the same from Python, in batches of another size
    network = predict.load(out, "cpu")
    answers = list(predict.read(network, sorted((crops / "test").iterdir()), "fp32", batch_size=3))
    assert [a[0] for a in answers] == [row["pred"] for row in rows]
    assert all(a[1] == pytest.approx(float(row["confidence"]), abs=1e-4) for a, row in zip(answers, rows))


def test_checkpoint_is_a_copy(tmp_path):
    network = crnn.CRNN(data.ALPHABET).eval()
    content = crnn.checkpoint(network, args={}, metrics={})
    crnn.save_atomically(content, tmp_path / "a.pth")
    images = drawn(2)[0]
    before = network(images)
    with torch.no_grad():
        network.fc.bias += 1
    assert not torch.equal(content["model"]["fc.bias"], network.fc.bias)
    assert torch.equal(crnn.load_checkpoint(tmp_path / "a.pth")[0](images), before)


def test_bad_input(crops, reader, tmp_path):
    """One sentence on stderr that names the file, a code that is not 0, and no traceback."""
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "half.pth").write_bytes(reader[0].read_bytes()[:5000])
    torch.save({"weights": 1}, tmp_path / "other.pth")
    good = sorted((crops / "test").iterdir())[0]
    lines, said = run("predict.py", reader[0], tmp_path / "text.jpg", good, tmp_path / "absent.jpg", code=1)
    assert len(lines.splitlines()) == 1 and "text.jpg" in said and "absent.jpg" in said and "1 read, 2 unreadable" in said
    for command, name in [(("predict.py", tmp_path / "half.pth", good), "half.pth"), (("evaluate.py", tmp_path / "other.pth"), "other.pth"),
                          (("evaluate.py", reader[0], "--data", tmp_path / "empty"), "empty"), (("evaluate.py", tmp_path / "no.pth"), "no.pth"),
                          (("train.py", "--data", tmp_path / "empty", "--out", tmp_path / "x.pth"), "empty"),
                          (("train.py", "--size", 50, 131, "--out", tmp_path / "x.pth"), "--size")]:
        assert name in run(*command, code=1)[1]
