"""Tests: python -m pytest -q test_smoke.py. Two minutes on two cores, no network and no GPU."""

import os
import re
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
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
TINY = f"{FAST} --size 16 64"
PARAMETERS = {"notebook --rnn gru": 5_717_582, "small": 774_194, "wide --rnn gru": 1_320_242}
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
# Words of the one sentence that ends a command, and such commands. It also names what is wrong.
MISTAKES = f"""not a checkpoint: predict half.pth crop.jpg; evaluate trap.pth; train --init crop.jpg
not a checkpoint: predict absent.pth.bak crop.jpg; predict misfit.pth crop.jpg
no readable path: predict a.jfif; predict zero.jpg; predict pipe.jpg | no images there: predict
name a new file: predict crop.jpg --export x.xyz; predict crop.png --explain crop.png
name a new file: evaluate --csv half.pth; evaluate --json no/x.json; train --out empty
give a number: predict --top 0; predict --above 2; train --epochs 0; train --lr nan; train --val 2
not on this machine: predict crop.jpg --device cuda:99 | none can be read: evaluate --data bad
drop yours: train --init ckpt.pth --size 48 128; train --init ckpt.pth --rnn gru
no labelled: evaluate --data frames; plates show x.png empty | give --data: train --alphabet ab
multiples of: train --size 50 131; train --size 32 28 | holds no char: train --alphabet empty.txt
cannot be listed: evaluate --data absent; train --data absent; data audit absent; data crop no x
No such file: train --alphabet absent.txt | Not a directory: data crop frames crop.jpg/out
neither it nor another: {FAST} --data bad --synthetic 0 | no images there: predict empty
has no folder 'xyz': evaluate --data DIR --split xyz | no / in: train --alphabet a/
name a new folder: predict crop.jpg --label DIR | drop it: predict crop.jpg --adapt --no-grammar"""
ALONE = [("predict.py ../ckpt.pth ../crop.jpg > /dev/full", "No space"), ("train.py", "assets/")]
ALONE += [("evaluate.py ../ckpt.pth --data no", "listed"), ("evaluate.py ../ckpt.pth", "assets/")]
# The README's commands are tests, but for those that take long or need what a clone lacks.
CODE = r"(?:^ {4}|`)python ([\w/]+\.py[^`#]*?)(?=`| *#|\n {4}|\n\n)"
COMMANDS = re.findall(CODE, Path(HERE, "README.md").read_text("utf8"), re.M)
COMMANDS = {" ".join(command.split()) for command in COMMANDS if "notebook" not in command}
assert len(COMMANDS) >= 12  # or CODE no longer finds them


def watch(target, name, effect=None):
    """Until the test ends calls of target.name are noted, and done unless `effect` says else."""
    return mock.patch.object(target, name, wraps=getattr(target, name), side_effect=effect).start()


def one_of_two(command):  # one process of a run on two
    train.EPOCH_IMAGES = 40
    loss, optimizer = watch(model, "ctc_loss"), watch(torch.optim, "AdamW")
    train.main(command.split()[1:])
    texts = sum([call.args[1] for call in loss.call_args_list if call.args[0].requires_grad], [])
    return set(texts), [weight.sum().item() for weight in optimizer.call_args.args[0]]


@pytest.fixture(scope="session")
def originals(tmp_path_factory):  # a folder with all that the commands name
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
    for folder in ("frames", "CCPD2019/ccpd_base", "CCPD2019/ccpd_weather", "FOLDER", "empty"):
        os.makedirs(folder)
        for name in FRAMES.split() * (folder[0] in "fC"):
            photo.save(f"{folder}/025-95_113-{name}-37-15.jpg", quality=95)
    for name in ("crop.jpg", "crop.png", *(f"FOLDER/{k}.jpg" for k in range(5))):
        shutil.copy(min(Path("plates/test").iterdir()), name)
    os.mkfifo("pipe.jpg")
    for path in [*Path("bad").rglob("*.jpg"), Path("zero.jpg"), Path("empty.txt")]:
        path.write_text("")
    Path("half.pth").write_bytes(Path("ckpt.pth").read_bytes()[:5000])
    torch.save(torch.load("ckpt.pth") | {"model": {"x": torch.zeros(3)}}, "misfit.pth")
    Path("trap.pth").write_bytes(b"cos\nsystem\n(S'touch trapped'\ntR.")  # if loaded with trust
    return os.getcwd()


@pytest.fixture(autouse=True)
def run(originals, tmp_path, capfd):
    """In a folder with links to the originals: runs a command, finds words in what it says."""

    def call(command, words="", fails=False):
        name, *arguments = command.replace('"', "").split()
        with pytest.raises(SystemExit) as stop:
            sys.exit(SCRIPTS[name].main(arguments))
        said = "".join(capfd.readouterr()) + f"\n{stop.value.code}"
        assert bool(stop.value.code) == fails, said
        assert not [word for word in words.split("; ") if word not in said], said
        return said

    shutil.copytree(originals, tmp_path, copy_function=os.symlink, dirs_exist_ok=True)
    os.chdir(tmp_path)
    mock.patch.object(train, "EPOCH_IMAGES", 60).start()
    mock.patch.multiple(plates, VALIDATION=(20, "validation"), TEST=(100, "test")).start()
    yield call
    mock.patch.stopall()


class Test:
    def test_labels_come_from_file_names(self):
        for label, names in (line.split(": ") for line in LABELS.splitlines()):
            assert {data.parse_label(f"{name}.jpg")[0] for name in names.split()} == {label}, names
        names = ("AB-12", "01-AB", "AB-12", "AB_1", "u\u0308")  # ü in two characters
        alphabets = map(data.read_alphabet, ("AB12", "AB", "AB12-", "AB1", "ü"))
        answers = [("12", ""), ("AB", ""), ("AB-12", ""), ("", data.UNLABELLED), ("ü", "")]
        assert list(map(data.parse_label, names, alphabets)) == answers
        assert 160 < sum(data.is_held_out(f"皖A{k:05}", 0.05) for k in range(4000)) < 240
        assert data.is_held_out("AO", 0.5) == data.is_held_out("A0", 0.5)

    def test_images_of_every_kind_are_read_alike(self):
        pixels = np.uint8(255 * (np.indices((40, 160, 3))[1] >= 80))  # left black, right white
        grey, source = pixels[:, :, 0], Image.fromarray(pixels)
        for name in ("L.png", "RGBA.png", "P.png", "1.png", "LA.png", "CMYK.jpg"):
            source.convert(name[:-4]).save(f"empty/{name}")
        exif = Image.Exif()
        exif[0x0112] = 6  # stored lying on its side
        source.rotate(90, expand=True).save("empty/turned.jpg", exif=exif)
        for image in (pixels, grey, grey > 0, source, *Path("empty").iterdir()):
            image = data.load_image(image, (40, 160)).permute(1, 2, 0).numpy()
            assert abs(image - pixels.astype(int)).mean() < 2, image
        assert data.load_image(np.uint8([[[255, 0, 7]]]), (1, 1)).flatten().tolist() == [255, 0, 7]
        for image in (3, pixels[:0], pixels / 255, b"no path", np.uint16(grey), pixels.T):
            assert "no readable path" in str(pytest.raises(OSError, data.open_image, image).value)

    def test_a_seed_draws_the_same_plates_on_every_machine(self):
        images, texts = plates.fixed_plates(200, "golden", SIZE)
        assert all(model.is_plate(text, PATTERNS) for text in texts) and texts[0] == "陕TH0G70"
        assert {text[0] for text in texts} == set(data.PROVINCES) and {*map(len, texts)} == {7, 8}
        found = []  # mean, deviation, difference of rows and of columns: drawn, photographed again
        for x in (images.float(), data.camera(images, SIZE).float()):
            found += [x.mean(), x.std(), x.diff(dim=2).abs().mean(), x.diff(dim=3).abs().mean()]
        golden = (121.269, 76.204, 14.640, 12.196, 115.914, 78.702, 8.372, 7.253)
        assert torch.stack(found).tolist() == near(golden, abs=0.01)
        texts = plates.draw_plates(200, SIZE, plates.PRACTICE)[1]
        assert 130 < sum(bool({*text[1:]} & {*data.PROVINCES}) for text in texts) < 180

    @pytest.mark.skipif(not hasattr(torch, "accelerator"), reason="torch before 2.6 cannot")
    def test_no_tensor_is_on_the_wrong_device(self):
        watch(data, "jpeg", lambda images, quality: images)
        glyphs = plates.load_glyphs(40)
        with torch._subclasses.FakeTensorMode() as mode:  # a GPU without content
            watch(plates, "load_glyphs", [mode.from_tensor(glyphs).cuda()])
            assert plates.draw_plates(70, SIZE, 0.5, "cuda")[0].device.type == "cuda"

    @cases("patterns", [(), (("ab", "a"), ("abc", "bc", "ab"))])
    @cases("seed", range(5))
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
        pairs = model.candidates(logits[:, :1], list(totals), "abc")
        assert dict(pairs) == near(totals, rel=1e-4)
        best = [text for text, _ in pairs if not patterns or model.is_plate(text, patterns)]
        beams = model.beam_search(log_probs, "abc", patterns, 10**6)
        assert beams[: len(best)] == best  # what follows needs too many steps
        assert len(model.beam_search(log_probs, "abc", (), 2)) == 2
        assert [model.steps_needed(text) for text in ("", "ab", "aab", "aaa")] == [0, 2, 4, 5]
        sharp = torch.tensor([[-9.0, 0, -20], [-9, -20, 0]])  # spells ab, or by a blank a
        assert model.beam_search(sharp, "ab", (("a",),)) == ["a"]

    @cases("name", PARAMETERS)
    def test_a_network_reads_each_image_alone_folded_or_saved(self, name):
        _, config = train.parse_arguments(f"--model {name}".split())
        network = model.build_network(**config).requires_grad_(False)
        assert sum(weight.numel() for weight in network.parameters()) == PARAMETERS[name]
        images = plates.fixed_plates(4, 0, config["size"])[0]
        moving, whole = network(images), network.eval()(images)  # training moves the batch-norms
        assert not torch.allclose(moving, whole, atol=0.01)
        assert whole.shape == (20 if "notebook" in name else 32, 4, len(config["alphabet"]) + 1)
        in_the_dark = torch.allclose(network(images // 2), whole, atol=1)
        assert in_the_dark or "notebook" in name
        torch.save({"model": network.state_dict(), "config": config, "args": {"labels": []}}, "x")
        loaded = model.load_checkpoint("x")[0]
        alone = torch.cat([network(image[None]) for image in images], 1)
        for logits in (alone, loaded(images), model.predict_logits(loaded, images)):
            assert torch.allclose(logits, whole, atol=1e-4)

    def test_scores_shares_and_rates_are_right(self):
        for a, b, edits in (("kitten", "sitting", 3), ("", "皖A", 2), ("ab", "ba", 2)):
            assert evaluate.levenshtein(a, b) == evaluate.levenshtein(b, a) == edits
        pair = (["皖A27N53", "皖A12345", "ab"], ["皖A7N53", "皖B12346", "ab"])
        assert evaluate.metrics(*pair) == near({"accuracy": 1 / 3, "cer": 3 / 16, "levenshtein": 1})
        aligned = evaluate.align("皖A27N53", "A27NN5")
        assert [read for _, read in aligned] == ["", "A", "2", "7N", "N", "5", ""]
        assert evaluate.wilson(0.9, 100) == near((0.8256, 0.9448), abs=1e-4)
        assert evaluate.count_right("bab", [1, 0, 0]) == {"a": (0, 1), "b": (1, 2)}
        assert evaluate.calibration_error([0.9, 0.9, 0.15, 1], [1, 0, 0, 1]) == near(0.95 / 4)
        watch(model.timeit, "repeat", [[3.0], [1.0], [1.0], [1.0]])  # seconds: fp32, bf16, again
        precisions = [model.pick_precision.__wrapped__(torch.device("cpu")) for _ in "ab"]
        assert precisions == ["bf16", "fp32"]
        args, _ = train.parse_arguments(["--lr", "1", "--epochs", "32"])
        assert [train.synthetic_share(n, args) for n in (0, 6, 10**5)] == [1, 0.75, 0.5]
        assert [train.learning_rate(k, 10**4, args) for k in (0, 5000)] == near([1 / 301, 0.5])
        prior = train.province_prior(["浙A12345"] * 9 + ["皖A12345"], ALPHABET)
        zhe, wan, yue = (prior[1 + ALPHABET.index(char)].item() for char in "浙皖粤")
        assert zhe - wan == near(np.log(9.01 / 1.01)) and yue < wan < 0 < zhe
        assert not prior[:35].any() and not train.province_prior(["ab"], "ab").any()

    def test_audit_names_what_is_wrong_and_crop_skips_it(self, run):
        plates.render("set", 10)
        path = min(Path("set/train").iterdir())
        shutil.copy(path, "set/test")  # a plate in both
        for name in ("image.jpg", "IMG-0042.jpg", "1-皖AR0O3T.jpg", "notes.md", "皖A12345.JFIF"):
            Path("set/train", name).touch()
        said = "2 files whose names hold no label; IMG-0042; 1 labels held O; 1 files passed"
        run("plates show x.png set", f"{said}; 2 files left out; 9 labelled")
        said += f"; 1 plates in train and test\n    {path.stem[8:]}; [256.  80.]"
        said += "; {'test': 2, 'train': 13}; '云': 0; 4 files left out"
        run("data audit set", said, fails=True)
        plate = plates.fixed_plates(1, 0, (140, 440))[0][0].float()
        for option in ("", "--rectify"):  # crops are replaced
            run(f"data crop frames out {option}", "2 plates cut, 3 skipped")
            paths, texts = zip(*data.find_crops("out"))
            error = abs(data.load_image(paths[0], (140, 440)) - plate).mean()
            assert {*texts} == {"云BD12345", "皖AY339S"} and (error < 25) == bool(option)

    @cases("options, total", [("--adapt", 42.415), ("", 42.921)])
    def test_every_way_to_read_gives_the_same(self, run, options, total):
        options += " --precision fp32"
        said = run(f"evaluate --data plates --split train --csv x.csv {options}", "54 images")
        head, *rows = Path("x.csv").read_text("utf-8-sig").splitlines()
        assert head == "filename,true,pred,confidence,same"
        _, trues, reads, confidences, rights = zip(*(row.split(",") for row in rows))
        confidences = [float(confidence) for confidence in confidences]
        assert sum(confidences) == near(total, abs=5e-3)  # as measured: all of predict.py is in it
        assert f"accuracy     {rights.count('True') / 54:.4f}" in said and rights.count("True") > 40
        assert [str(pair[0] == pair[1]) for pair in zip(trues, reads)] == list(rights)
        paths = sorted(Path("plates/train").iterdir())
        lines = [f"{path}\t{plate}\t" for path, plate in zip(paths, reads)]
        run(f"predict ckpt.pth plates/train {options}", "; ".join(lines))
        network, buffer = predict.load(), np.zeros((80, 256, 3), np.uint8)  # one, as cameras have
        frames = (np.copyto(buffer, Image.open(path)) or buffer for path in paths)
        watch(model, "images_at_once", lambda network: 3)
        some = list(predict.read(network, frames, "fp32", top=3, adapt="--adapt" in options))
        assert [read.plate for read in some] == list(reads)
        assert [read.confidence for read in some] == near(confidences, abs=2e-3)
        sources = (paths[0].read_bytes(), np.array(paths[:1], str))
        assert {next(predict.read(network, source)).plate for source in sources} == {reads[0]}

    def test_label_explain_and_export(self, run):
        images = plates.fixed_plates(6, 9, SIZE)[0]
        names = ("a", "b", "new\nline", "quo'te\"", "smile😀", "\udcff", "black")
        for name, image in zip(names, [*images, torch.zeros(3, *SIZE)]):
            to_pil_image(image).save(f"empty/{name}.png")
        run("predict empty --label fresh --above 0.5 --adapt", "7 read; new\\nline.png")
        names = [path.stem[7:] for path in Path("fresh").glob("*.png")]
        assert 2 < len(names) == 7 - len(os.listdir("fresh/unsure")) < 7
        assert sorted(text for _, text in data.find_crops("fresh")) == sorted(names)
        run("predict crop.jpg --explain ctc.png --export model.pt2", "model.pt2: written")
        assert np.asarray(Image.open("ctc.png")).mean() == near(120.4, abs=0.5)
        assert b"\\u7696" in Path("model.pt2").read_bytes()  # 皖 in JSON, so the alphabet
        answer = torch.export.load("model.pt2").module()(images)
        assert torch.allclose(answer, model.predict_logits(predict.load(), images), atol=1e-3)

    def test_the_report_shows_errors_and_no_plate_that_was_learnt_is_a_test(self, run):
        for name in ("<b>皖A00000.jpg", "1-皖A00001.jpg", "皖A00002.jpg"):
            shutil.copy("crop.jpg", f"empty/{name}")
        run("evaluate --data empty --report out --json x.json", "file://; errors       3")
        page = Path("out/report.html").read_text("utf8")
        assert "&lt;b&gt;皖A00000.jpg" in page and "<b>" not in page
        assert [page.count(tag) for tag in ("<img", "<h2>")] == [3, 6] and "<mark>" in page
        assert '"by_first":{"\\u7696":[0,3]}' in "".join(Path("x.json").read_text().split())
        run(f"{TINY} --out flat.pth --data plates/train", "on 4; held out")
        learnt = len(torch.load("flat.pth", weights_only=True)["args"]["labels"])
        said = f"{54 - learnt} images; without {learnt} learnt; held out chose the weights"
        run("evaluate flat.pth", said)
        run("evaluate flat.pth --split Train", "54 images")
        run("evaluate flat.pth --data plates", "6 images")
        run(f"{TINY} --init flat.pth --data plates --out tuned.pth --val 0.9")
        run("evaluate tuned.pth --data plates/train", f"{54 - learnt} images; without {learnt}")

    def test_a_batch_its_learning_rate_and_its_prior(self, run):
        camera, draw = watch(data, "camera"), watch(plates, "draw_plates")
        watch(train, "province_prior", lambda _, chars: 50 * (torch.arange(len(chars) + 1) == 40))
        rates, optimizer = watch(train, "learning_rate"), watch(torch.optim, "AdamW")
        command = f"{FAST} --synthetic 0.7 --epochs 2 --lr 1e-9 --weight-decay 0.5"
        run(f"{command} --init assets/reader.pth", "70% of the images drawn; 2 epochs of 8 steps")
        assert optimizer.call_args.kwargs["weight_decay"] == 0.5
        assert [call.args[:2] for call in rates.call_args_list] == [(k, 16) for k in range(16)]
        crops = [len(call.args[0]) for call in camera.call_args_list if len(call.args) == 2]
        assert crops == 16 * [6] and [call.args[0] for call in draw.call_args_list].count(14) == 16
        row = torch.load("ckpt.pth")["history"][-1]  # with a senseless prior for the crops alone
        assert row["val_loss"] == near(0.0433, abs=1e-3) and row["loss"] == near(41.4, rel=0.05)
        assert row["images"] == 320 and row["minutes"] < 5
        # torch 2.4 has no LSTM in bf16 for AVX2
        train.EPOCH_IMAGES, half = 8, "bf16" if hasattr(torch, "accelerator") else "fp32"
        small = "train --batch-size 4 --epochs 1 --val 0 --precision"
        run(f"{small} {half} --size 16 64", f"cpu {half}")
        run(f"{small} fp32 --size 32 64 --data DIR --model notebook", "notebook 32 x 64")

    def test_a_stopped_run_goes_on_bit_for_bit_and_keeps_the_best_epoch(self, run):
        train.EPOCH_IMAGES = 16
        validate, seen, scores = train.validate, [], iter((3, 1, 1, 2, 3, 1, None, 1, 2))

        def stop(network, *others):
            seen.append(network.fc.weight.clone())
            score = next(scores) or os.listdir("stopped")
            return validate(network, *others) | {"levenshtein": score, "val_loss": 0}

        watch(train, "validate", stop)
        command = f"{TINY} --batch-size 8 --epochs 4 --synthetic 0.5 --out"
        Path("a.pth").write_text("old")
        run(f"{command} a.pth", "a.pth.bak")
        assert Path("a.pth.bak").read_text() == "old"
        run(f"{command} a.pth --resume", "has ended", fails=True)
        run(f"{command} b.pth", "stopped", fails=True)
        run(f"{command} b.pth --resume --seed 3", "(seed)", fails=True)
        run(f"{command} b.pth --resume", "resumed after epoch 2")
        a, b = (torch.load(f"{name}.pth", weights_only=True) for name in "ab")
        assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
        assert torch.equal(a["model"]["fc.weight"], seen[2]) and "resume" not in a
        assert [row["loss"] for row in a["history"]] == [row["loss"] for row in b["history"]]

    def test_it_learns_from_nothing_and_skips_what_is_not_finite(self, run):
        for k in range(300):
            text = f"{k % 14 + 2:b}"[1:]
            to_pil_image(plates.text_picture(text, (32, 64))).save(f"empty/{k}-{text}.png")
        train.EPOCH_IMAGES, factors = 400, 200 * [1] + [np.nan, 1]
        camera, ctc_loss = watch(data, "camera"), model.F.ctc_loss
        watch(model.F, "ctc_loss", lambda *args: ctc_loss(*args) * factors.pop())
        command = "train --data empty --alphabet 01 --val 0.1 --no-augment --epochs 2"
        command += " --batch-size 8 --size 16 64 --precision fp32"
        losses = re.findall(r"=== epoch .*  loss ([\d.]+)", run(command))
        assert float(losses[-1]) < 0.25 < float(losses[0]) and not camera.called
        factors[:] = 200 * [np.nan]
        run(command, "not finite; lower --lr", fails=True)

    def test_two_processes_train_one_network(self, capfd):
        config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0")
        answers = elastic_launch(config, one_of_two)(f"{TINY} --synthetic 0").values()
        (crops, weights), (other_crops, same_weights) = answers
        assert len(crops) > 20 and not crops & other_crops and weights == same_weights
        assert capfd.readouterr().out.count("2 process(es)") == 1

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
        command = command.replace("assets/plates", "plates").replace("--label named", "--label new")
        assert not re.search(r"\bnan\b", run(command.replace(".py", "", 1)))

    def test_a_fault_of_the_program_shows_its_traceback(self):
        mock.patch.object(sys, "stdout", mock.Mock(spec=["write", "flush"])).start()  # as Jupyter's
        for target, name in ((data, "pil_to_tensor"), (model.CRNN, "__init__"), (model.F, "relu")):
            with mock.patch.object(target, name, side_effect=ValueError("a typo")):
                pytest.raises(ValueError, predict.main, ["crop.jpg"])

    @cases("command, words", ALONE)
    def test_copied_scripts_work_alone(self, command, words):
        for name in ("data", "model", "train", "evaluate", "predict"):
            shutil.copy(HERE / f"{name}.py", f"empty/{name}.py")
        command = f"cd empty; PYTHONIOENCODING=ascii {sys.executable} {command}"
        code, said = os.system(f"{command} 2> said"), Path("empty/said").read_text()
        assert words in said and "Traceback" not in said and bool(code) == bool(words)
