"""Tests: python -m pytest -q test_smoke.py. They make their own data; no network, no GPU, a few minutes on two cores."""
import contextlib
import csv
import io
import itertools
import json
import math
import os
import re
import shlex
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


def script(*command, code=0):
    """A script as users run it; returns (stdout, stderr)."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=HERE, capture_output=True, encoding="utf8", errors="surrogateescape")
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done.stdout, done.stderr


def run(name, *arguments, code=0):
    """The same in this process, which spares the start-up."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf8", errors="surrogateescape") for _ in range(2))
    main, ended = {"data.py": data, "train.py": train, "evaluate.py": evaluate, "predict.py": predict}[name].main, 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(a) for a in arguments])
        except SystemExit as stop:
            ended = stop.code
            if isinstance(ended, str):
                print(ended, file=sys.stderr)
                ended = 1
    out.seek(0), err.seek(0)
    out, err = out.read(), err.read()
    assert int(ended or 0) == code, err
    return out, err


def drawn(n, seed=0, size=(32, 128), green=0.0):
    generator = torch.Generator().manual_seed(seed)
    return data.draw_plates(n, size, generator, data.load_glyphs(data.glyph_height(size)), green)


def save_crops(folder, n, seed=0):
    folder.mkdir(parents=True)
    images, texts = drawn(n, seed)
    for k, (image, text) in enumerate(zip(images, texts)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((220, 80)).save(folder / f"{k:04}-{text}.jpg", quality=95)
    return texts


@pytest.fixture(autouse=True)
def short_epochs(monkeypatch):
    monkeypatch.setattr(train, "EPOCH", 200)


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
    return out, run("train.py", "--epochs", 3, "--out", out)[0]


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


def test_province_prior():
    prior = train.province_prior(["浙A12345"] * 9 + ["皖A12345"], data.ALPHABET)
    of = lambda char: prior[1 + data.ALPHABET.index(char)].item()
    assert of("浙") - of("皖") == pytest.approx(math.log(9.01 / 1.01)) and of("粤") < of("皖") < 0 < of("浙")
    assert not prior[:1 + len(data.DIGITS + data.LETTERS)].any() and not train.province_prior([], data.ALPHABET).any()
    assert train.province_prior(["ab"], "ab").tolist() == [0, 0, 0]


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
    """60,000 drawn plates, two or three minutes: far above chance, which is nothing."""
    out, said = reader
    stdout, _ = script("evaluate.py", out, "--json", out.with_suffix(".json"))
    scores = json.loads(out.with_suffix(".json").read_text("utf8"))
    assert scores["n"] == evaluate.DRAWN_TEST[0] and scores["accuracy"] > 0.15 and scores["cer"] < 0.5, (said, stdout)


def test_train_evaluate_predict(crops, reader, tmp_path):
    out = tmp_path / "new folder" / "ckpt.pth"
    said, _ = run("train.py", "--data", crops, "--epochs", 1, "--init", reader[0], "--out", out)
    assert "38 crops" in said and "2 crops" in said
    with open(out.with_suffix(".csv"), encoding="utf8") as file:
        assert len(list(csv.DictReader(file))) == 1
    table, scores = tmp_path / "predictions.csv", tmp_path / "metrics.json"
    said, _ = run("evaluate.py", out, "--csv", table, "--json", scores, "--precision", "fp32")
    assert "20 images" in said and json.loads(scores.read_text("utf8"))["n"] == 20
    with open(table, encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20 and list(rows[0]) == ["filename", "true", "pred", "confidence", "same"]
    lines, summary = script("predict.py", out, crops / "test", "--precision", "fp32")
    reads = {Path(path).name: (plate, float(sure)) for path, plate, sure in (line.split("\t") for line in lines.splitlines())}
    assert [reads[row["filename"]][0] for row in rows] == [row["pred"] for row in rows] and summary.rstrip().endswith("images/s")
    # the same from Python, in batches of another size
    network = predict.load(out, "cpu")
    threads = torch.get_num_threads()
    answers = list(predict.read(network, sorted((crops / "test").iterdir()), "fp32", batch_size=3, workers=3))
    assert torch.get_num_threads() == threads       # each of the three took one, and gave it back
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


# ---------------------------------------------------------------------------------------------------- data tools

def test_audit_finds_what_is_wrong(crops, tmp_path):
    folder = tmp_path / "set"
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
    source = sorted((crops / "train").iterdir())
    for k, path in enumerate(source[:6]):
        (folder / "train" / path.name).write_bytes(path.read_bytes())
    script("data.py", "audit", folder)
    plate = source[0].stem.split("-")[1]
    (folder / "test" / f"copy-{plate}.jpg").write_bytes(source[0].read_bytes())             # a duplicate, and an overlap
    run("data.py", "audit", folder)                                                         # both only reported
    (folder / "test" / "1-皖AO0003.jpg").write_bytes(source[1].read_bytes()[:400])           # truncated, with a letter O
    (folder / "test" / "holiday.jpg").write_bytes(source[2].read_bytes())                   # no label, another duplicate
    out, _ = run("data.py", "audit", folder, "--json", tmp_path / "a.json", code=1)
    found = json.loads((tmp_path / "a.json").read_text("utf8"))
    assert found["plates in train and test"] == [plate] and len(found["copies"]) == 2 and "holiday.jpg" in found["names without a label"][0]
    assert "1-皖AO0003.jpg" in found["unreadable images"][0] and "1-皖AO0003.jpg" in found["labels with O or I"][0]
    assert found["lengths"] == {"7": 8} and "警" not in found["never seen"] and "images 6  plates 6" in out


@pytest.mark.parametrize("text, indices, area", [("皖AY339S", "0_0_22_27_27_33_16", "025"), ("云BD12345", "24_1_3_25_26_27_28_29", "1")])
def test_crop_cuts_the_plate_out_of_a_frame(tmp_path, text, indices, area):
    """A plate painted askew into a frame with an official name comes back with its label and its pixels."""
    generator = torch.Generator().manual_seed(0)
    plate = data.paint([text], data.load_glyphs(90), generator)[0]
    plate = (plate[:, 20:-20, 20:-20] * 255).to(torch.uint8)
    h, w = plate.shape[1:]
    frame = Image.new("RGB", (720, 1160), (90, 90, 90))
    upright = Image.fromarray(plate.permute(1, 2, 0).numpy())
    corners = [(500, 560), (200, 500), (205, 400), (505, 460)]                              # lower right, lower left, and on
    canvas = Image.new("RGB", frame.size)
    canvas.paste(upright)
    warped = data.perspective(canvas, [[w, h], [0, h], [0, 0], [w, 0]], [list(c) for c in corners])
    frame.paste(warped, mask=Image.eval(warped.convert("L"), lambda v: 255 * (v > 0)))
    folder = tmp_path / "frames" / "sub"
    folder.mkdir(parents=True)
    vertices = "_".join(f"{x}&{y}" for x, y in corners)
    frame.save(folder / f"{area}-95_113-200&400_505&560-{vertices}-{indices}-37-15.png")
    Image.new("RGB", (9, 9)).save(folder / "IMG-1.png")
    for options in ((), ("--rectify",)):
        out = tmp_path / f"crops{len(options)}"
        assert "1 cut" in run("data.py", "crop", tmp_path / "frames", out, *options)[0]
        assert "1 already there" in run("data.py", "crop", tmp_path / "frames", out, *options)[0]
        paths, texts = data.find_crops(out)
        assert texts == [text] and paths[0].parent.name == "sub"
    flat = data.read_image(paths[0], (h, w)).float()
    assert (flat - plate.float()).abs().mean() < 25
    assert Image.open(data.find_crops(tmp_path / "crops0")[0][0]).size == (305, 160)


def test_show_and_render(crops, tmp_path):
    for arguments in (("drawn", tmp_path / "a.png"), (crops / "train", tmp_path / "b.png", "--augmented")):
        run("data.py", "show", *arguments)
        assert Image.open(arguments[1]).size[0] > 700
    run("data.py", "render", tmp_path / "drawn", "--count", 20)
    assert [len(data.find_crops(tmp_path / "drawn" / split)[0]) for split in ("train", "test")] == [18, 2]


def test_another_alphabet(crops, tmp_path):
    (tmp_path / "train").mkdir()
    for k, path in enumerate(sorted((crops / "train").iterdir())[:12]):
        Image.open(path).save(tmp_path / "train" / f"{k}-{'oI' * (k % 3 + 1)}.png")
    out = tmp_path / "ckpt.pth"
    run("train.py", "--data", tmp_path, "--alphabet", "oI", "--epochs", 1, "--batch-size", 50, "--val", 0.4, "--out", out)
    assert crnn.load_checkpoint(out)[0].config["alphabet"] == "oI"
    run("evaluate.py", out, "--split", "train")


# --------------------------------------------------------------------------------------- decoding a plate as a plate

def test_alignment_equals_brute_force():
    generator = torch.Generator().manual_seed(0)
    for T, C, S in [(5, 4, 3), (4, 3, 2), (6, 3, 3), (3, 4, 3)] * 10:
        logits = torch.randn(T, 1, C, generator=generator) * 2
        slots = torch.rand(S, C, generator=generator) < 0.7
        slots[:, 0], slots[:, 1] = False, slots[:, 1] | ~slots[:, 1:].any(1)
        log_probs, best = logits.log_softmax(2)[:, 0], (-math.inf, None)
        for path in itertools.product(range(C), repeat=T):
            string = [k for k, _ in itertools.groupby(path) if k]
            if len(string) == S and all(slots[k, c] for k, c in enumerate(string)):
                best = max(best, (sum(log_probs[t, c].item() for t, c in enumerate(path)), string))
        read = crnn.aligned_decode(logits, slots)[0][0].tolist()
        assert best[1] is None or read == best[1]


def test_grammar_gives_plates_and_never_a_less_likely_one():
    generator = torch.Generator().manual_seed(1)
    texts = ["皖A12345", "皖A2345", "A12345皖", "粤BD12345", "皖AA1122"] * 4
    logits = torch.randn(32, len(texts), 66, generator=generator)
    for b, text in enumerate(texts):                # spikes where the text stands, of all strengths
        for k, c in enumerate(text):
            logits[3 * k + 2, b, 1 + data.ALPHABET.index(c)] += 3 + b / 4
        logits[:, b, 0] += 4
    greedy = crnn.greedy_decode(logits, data.ALPHABET)
    sure = crnn.probability(logits, greedy, data.ALPHABET)
    read, better = crnn.decode(logits, data.ALPHABET, data.FORMS)
    assert all(crnn.is_of_form(t, data.FORMS) for t in read) and not all(crnn.is_of_form(t, data.FORMS) for t in greedy)
    assert all(p >= q - 1e-6 for p, q, t in zip(better, sure.tolist(), greedy) if crnn.is_of_form(t, data.FORMS))
    assert torch.allclose(crnn.probability(logits, read, data.ALPHABET), torch.tensor(better), atol=1e-6)


# ------------------------------------------------------------------------------------------------ nothing is lost

FAST = ("--epochs", 3, "--batch-size", 50, "--precision", "fp32", "--device", "cpu", "--val", 0.2)


@pytest.mark.parametrize("drawn_share", [0.0, 0.5])
def test_resume_is_bit_for_bit(crops, tmp_path, monkeypatch, drawn_share):
    common = ["--data", str(crops), "--synthetic", str(drawn_share), *map(str, FAST)]
    train.main(common + ["--out", str(tmp_path / "whole.pth"), "--workers", "1"])
    average, calls = train.average, []

    def stop_in_the_second_epoch(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        average(*arguments)

    monkeypatch.setattr(train, "average", stop_in_the_second_epoch)
    with pytest.raises(SystemExit) as stop:
        train.main(common + ["--out", str(tmp_path / "parts.pth")])
    assert stop.value.code == 130 and crnn.load_checkpoint(tmp_path / "parts.pth")
    monkeypatch.setattr(train, "average", average)
    with pytest.raises(SystemExit, match="--lr"):
        train.main(common + ["--out", str(tmp_path / "parts.pth"), "--resume", "--lr", "0.5"])
    train.main(common + ["--out", str(tmp_path / "parts.pth"), "--resume", "--workers", "3"])
    whole, parts = (torch.load(tmp_path / f"{name}.state.pth", weights_only=True) for name in ("whole", "parts"))
    for what in ("model", "ema"):
        assert all(torch.equal(whole[what][k], parts[what][k]) for k in whole[what])
    (tmp_path / "parts.state.pth").write_bytes((tmp_path / "parts.state.pth").read_bytes()[:5000])
    with pytest.raises(SystemExit, match="not a whole state"):
        train.main(common + ["--out", str(tmp_path / "parts.pth"), "--resume"])
    assert whole["epoch"] == parts["epoch"] == 3 and [r["val_loss"] for r in whole["history"]] == [r["val_loss"] for r in parts["history"]]


def shard_gradients(rank, folder):
    """One of two ranks: the gradients of half a batch under DistributedDataParallel."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    images, texts, network = torch.load(f"{folder}/batch.pt", weights_only=False)
    network = torch.nn.parallel.DistributedDataParallel(network.eval())
    train.batch_loss(network(images[rank::2]), texts[rank::2], data.ALPHABET).backward()
    if rank == 0:
        torch.save([p.grad for p in network.module.parameters()], f"{folder}/gradients.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_give_the_gradients_of_one(tmp_path):
    torch.manual_seed(0)
    network, (images, texts) = crnn.CRNN(data.ALPHABET).eval(), drawn(8)
    torch.save((images, texts, network), tmp_path / "batch.pt")
    torch.multiprocessing.spawn(shard_gradients, (str(tmp_path),), nprocs=2)
    train.batch_loss(network(images), texts, data.ALPHABET).backward()
    for mine, theirs in zip(network.parameters(), torch.load(tmp_path / "gradients.pt")):
        assert torch.allclose(mine.grad, theirs, atol=1e-5)


def one_of_two_processes(rank, folder, crops):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT="29571")
    torch.set_num_threads(1)
    train.EPOCH = 200
    with open(f"{folder}/log{rank}", "w", encoding="utf8") as log, contextlib.redirect_stdout(log):
        train.main(["--data", crops, *map(str, FAST), "--out", f"{folder}/ckpt.pth"])


def test_a_run_on_two_processes(crops, tmp_path):
    torch.multiprocessing.spawn(one_of_two_processes, (str(tmp_path), str(crops)), nprocs=2)
    log = (tmp_path / "log0").read_text("utf8")
    assert "2 process(es)" in log and log.count("=== epoch") == 3 and not (tmp_path / "log1").read_text("utf8")
    assert crnn.load_checkpoint(tmp_path / "ckpt.pth")


def test_numbers_that_are_none_stop_the_run(crops, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "EPOCH", 4000)
    with pytest.raises(SystemExit, match="lower --lr"):
        train.main(["--data", str(crops), "--lr", "1e30", *map(str, FAST), "--out", str(tmp_path / "c.pth")])


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("trapped"),)


def hostile(folder, good):
    """Everything that breaks readers, by name."""
    folder.mkdir()
    picture = Image.open(good)
    (folder / "zero.jpg").touch()
    (folder / "cut.jpg").write_bytes(good.read_bytes()[:500])
    (folder / "text.jpg").write_text("no image")
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    (folder / "folder.jpg").mkdir()
    (folder / "link.jpg").symlink_to(folder / "nowhere.jpg")
    fine = ["with space.jpg", "quo'te\".jpg", "new\nline.jpg", "smile😀.jpg", "pixel.png", "line.png", "film.gif"]
    for name in fine[:4]:
        picture.save(folder / name, "JPEG")
    picture.resize((1, 1)).save(folder / "pixel.png")
    picture.resize((10000, 1)).save(folder / "line.png")
    picture.save(folder / "film.gif", save_all=True, append_images=[picture.rotate(9)])
    return fine


def test_hostile_images(reader, crops, tmp_path):
    fine = hostile(tmp_path / "in", sorted((crops / "test").iterdir())[0])
    lines, said = run("predict.py", reader[0], tmp_path / "in", tmp_path / "in" / "folder.jpg", code=1)
    assert len(lines.splitlines()) == len(fine) and "new\\nline.jpg" in lines and f"{len(fine)} read" in said
    assert all(name in said for name in ("zero.jpg", "cut.jpg", "text.jpg", "bomb.png", "link.jpg"))


def hostile_commands(folder, checkpoint, crops):
    (folder / "half.pth").write_bytes(checkpoint.read_bytes()[:5000])
    (folder / "zero.pth").touch()
    torch.save({"weights": 1}, folder / "other.pth")
    torch.save({"model": Trap()}, folder / "trap.pth")
    (folder / "empty").mkdir()
    (folder / "frames").mkdir()
    good = sorted((crops / "test").iterdir())[0]
    picture = Image.open(good)
    picture.save(folder / "frames" / "01-0_1-249&528_393&586-392&584_249&586_250&530_393&528-0_0_25_27_7_26_29-131-21.jpg")
    (folder / "long").mkdir()
    picture.save(folder / "long" / f"{'ab' * 30}.jpg")
    (folder / "file").touch()
    return [(("predict.py", folder / name, good), name) for name in ("half.pth", "zero.pth", "other.pth", "trap.pth", "absent.pth", "empty")] + [
        (("evaluate.py", checkpoint, "--data", folder / "empty"), "empty"),
        (("evaluate.py", checkpoint, "--data", folder / "frames"), "data.py crop"),
        (("evaluate.py", checkpoint, "--data", folder / "absent"), "absent"),
        (("evaluate.py", checkpoint, "--data", crops, "--json", folder / "absent" / "m.json"), "m.json"),
        (("train.py", "--data", folder / "empty", "--out", folder / "x.pth"), "empty"),
        (("train.py", "--data", folder / "long", "--alphabet", "ab", "--out", folder / "x.pth"), "time steps"),
        (("train.py", "--out", folder / "file" / "x.pth"), "file"),
        (("train.py", "--size", 50, 131, "--out", folder / "x.pth"), "--size"),
        (("train.py", "--init", folder / "other.pth", "--out", folder / "x.pth"), "other.pth"),
        (("predict.py", checkpoint, folder / "empty"), "no images"),
        (("predict.py", checkpoint, "--export", folder / "model.xyz"), ".pt2 or .onnx"),
        (("data.py", "show", folder / "empty", folder / "s.png"), "empty"),
        (("data.py", "glyphs", folder / "file"), "file")]


def test_hostile_commands(reader, crops, tmp_path):
    """One sentence on stderr that names the file and the fix, a code that is not 0, no traceback, and no code run."""
    for k, (command, name) in enumerate(hostile_commands(tmp_path, reader[0], crops)):
        said = (script if k == 3 else run)(*command, code=1)[1].strip().splitlines()
        assert name in "\n".join(said) and len(said) <= 2, (command, said)
    assert not Path(HERE, "trapped").exists()


def test_a_full_disk_keeps_what_there_was(tmp_path):
    """A limit on the size of files stands for a disk that fills up while a checkpoint is written."""
    code = ("import resource, torch, model; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); torch.save(1, 'a.pth'.replace('a', r'%s/a'));"
            "model.save_atomically(torch.zeros(9999), r'%s/a.pth')" % (tmp_path, tmp_path))
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, encoding="utf8")
    assert "a.pth: cannot be written" in done.stderr and torch.load(tmp_path / "a.pth") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_explain_and_export(reader, crops, tmp_path):
    image = sorted((crops / "test").iterdir())[0]
    run("predict.py", reader[0], image, "--explain", tmp_path / "ctc.png", "--top", 3)
    assert Image.open(tmp_path / "ctc.png").size[0] == 32 * 28
    said = run("predict.py", reader[0], "--export", tmp_path / "model.pt2")[0]
    assert "agrees" in said
    extra = {"facts.json": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra["facts.json"])["alphabet"] == data.ALPHABET


def test_report(reader, crops, tmp_path):
    said = run("evaluate.py", reader[0], "--data", crops, "--report", tmp_path / "report")[0]
    assert "by position" in said and "calibration" in said and "unseen" in said
    assert (tmp_path / "report" / "predictions.csv").exists() and Image.open(tmp_path / "report" / "errors.png").size[0] > 900
    run("evaluate.py", reader[0], "--report", tmp_path / "drawn")
    assert np.asarray(Image.open(tmp_path / "drawn" / "errors.png"))[4:68, 4:260].std() > 1          # the plate is there


# what the README's commands need and a clean clone lacks: fonts, the notebook's checkpoint, a GPU's patience
NOT_HERE = re.compile(r"FONT|\$|tinkoff|notebook|onnx")
COMMANDS = sorted(set(re.findall(r"python ((?:data|train|evaluate|predict)\.py[^`\n#|]*)", Path(HERE, "README.md").read_text("utf8"))))


def test_the_readme_has_commands():
    assert len([c for c in COMMANDS if not NOT_HERE.search(c)]) >= 12


@pytest.mark.parametrize("command", [c.strip() for c in COMMANDS if not NOT_HERE.search(c)])
def test_readme_commands(command, reader, crops, tmp_path):
    latin, frames = tmp_path / "latin" / "train", tmp_path / "frames"
    latin.mkdir(parents=True), frames.mkdir()
    for k, path in enumerate(sorted((crops / "test").iterdir())[:6]):
        Image.open(path).save(latin / f"{k}-A1{k}B.jpg")
    Image.new("RGB", (720, 1160)).save(frames / "025-95_113-154&383_386&473-386&473_177&454_154&383_363&402-0_0_22_27_27_33_16-37-15.jpg")
    image = sorted((crops / "test").iterdir())[0]
    here = {"ckpt.pth": reader[0], "DIR": crops, "plates": crops, "CCPD2019-dl1": crops, "photo.jpg": image, "FOLDER": crops / "test", "plates/train": crops / "train",
            "CCPD2019/ccpd_base": frames, "CCPD2019/ccpd_weather": frames}
    name, *words = shlex.split(command)
    if "--alphabet" in words:
        here["DIR"] = latin.parent
    # folders and files that exist, by the table; those to be written, below tmp_path
    words = [str(here.get(w, tmp_path / w if re.fullmatch(r"OUT|errors|.+\.(png|pt2)|CCPD2019-dl1/\w+", w) else w)) for w in words]
    run(name, *words, *(["--epochs", 1, "--out", tmp_path / "ckpt.pth"] if name == "train.py" else []))
