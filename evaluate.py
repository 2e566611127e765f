"""How well a checkpoint reads: plate accuracy, character error rate, mean Levenshtein distance.

    python evaluate.py ckpt.pth                      # the test split of the data it learnt from
    python evaluate.py ckpt.pth --data DIR --csv predictions.csv --json metrics.json
    python evaluate.py ckpt.pth --report DIR         # a page, DIR/report.html, with the errors

A checkpoint that learnt from synthetic plates alone is, without --data, tested on 2,000 others,
drawn from a seed that training never uses. Crops without a test folder are scored on those that
training left out for validation.
"""

import argparse
import base64
import csv
import html
import itertools
import math
import os
import sys
import time
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import data
import model as crnn
import predict

# (plates, seed). Training's seeds are hashes of 63 bits: that one equals these will not happen.
SYNTHETIC_TEST = (2000, 2**40 + 1)
SYNTHETIC_VAL = (1000, 2**40)


class Result(NamedTuple):
    """One labelled image, and what was read from it."""

    name: str
    true: str
    pred: str
    confidence: float
    source: object  # the image: a path, or an array

    @property
    def is_right(self):
        return self.true == self.pred


# ---------------------------------------------------------------------------------------
# Metrics. trues and preds are lists of strings, the true ones and those read.


def levenshtein(a, b):
    """The fewest insertions, deletions and substitutions that turn `a` into `b`.

    Levenshtein, 1966. Dynamic programming: row[j] is the distance of a[:i] and b[:j]."""
    row = list(range(len(b) + 1))
    for i, char_a in enumerate(a, 1):
        above = row
        row = [i]  # i deletions make the empty string of a[:i]
        for j, char_b in enumerate(b, 1):
            substituted = above[j - 1] + (char_a != char_b)
            row.append(min(above[j] + 1, row[j - 1] + 1, substituted))
    return row[-1]


def cer(trues, preds):
    """Character error rate: all edits over all true characters, in [0, inf)."""
    edits = sum(map(levenshtein, preds, trues))
    characters = sum(map(len, trues))
    return edits / max(1, characters)


def accuracy(trues, preds):
    """The share of strings read without any error, in [0, 1]."""
    right = sum(map(str.__eq__, trues, preds))
    return right / max(1, len(trues))


def wilson(share, n):
    """The 95% interval (low, high) of a share seen in n trials (Wilson, 1927), in [0, 1].

    Unlike the share and two deviations to either side, it is honest for few trials and for
    shares near 1."""
    if not n:
        return 0.0, 1.0
    k = 1.96**2 / n  # 1.96 deviations to either side hold 95% of a normal distribution
    centre = (share + k / 2) / (1 + k)
    variance = share * (1 - share) * k + k * k / 4
    spread = math.sqrt(variance) / (1 + k)
    return max(0.0, centre - spread), min(1.0, centre + spread)


def metrics(trues, preds):
    """The three scores of a list of reads, and their number `n`, as a dict."""
    distances = list(map(levenshtein, preds, trues))
    return {
        "accuracy": accuracy(trues, preds),
        "cer": cer(trues, preds),
        "levenshtein": sum(distances) / max(1, len(distances)),
        "n": len(trues),
    }


def confidence_bin(confidence):
    """Which tenth of [0, 1] a confidence lies in: 0 to 9."""
    return min(int(10 * confidence), 9)


def calibration_error(confidences, trues, preds):
    """How far confidences are from the share of reads that are right, in [0, 1].

    The expected calibration error (Naeini et al., 2015): over ten bins of confidence, the mean
    of this distance, each bin weighted by its reads."""
    excess = [0.0] * 10
    for confidence, true, pred in zip(confidences, trues, preds):
        k = confidence_bin(confidence)
        # summed over a bin this is its confidences less its right reads, so too high and too
        # low a confidence cancel within a bin, and do not between bins
        excess[k] += confidence - (true == pred)
    return sum(map(abs, excess)) / max(1, len(trues))


def match_characters(trues, preds):
    """Yield (place, true character, character read), over reads of the right length.

    With another length one cannot say which character stands for which."""
    for true, pred in zip(trues, preds):
        if len(true) == len(pred):
            yield from zip(itertools.count(1), true, pred)


def confusions(trues, preds):
    """Counter of (true, read) characters, over wrong reads of the right length."""
    matches = match_characters(trues, preds)
    return Counter((a, b) for _, a, b in matches if a != b)


def count_right(pairs):
    """Of pairs (key, is it right?): {key: (right ones, all)}, the commonest key first."""
    total = Counter()
    right = Counter()
    for key, is_right in pairs:
        total[key] += 1
        right[key] += is_right
    return {key: (right[key], count) for key, count in total.most_common()}


# ---------------------------------------------------------------------------------------
# Reading a data set


def read_batches(network, batches, precision):
    """(trues, preds, confidences, losses), four lists, from batches of (images, texts).

    For validation: greedy, since the plate patterns would hide what the network does not know
    yet. A loss is the CTC loss of the true string in nats a character, as in training."""
    alphabet = network.config["alphabet"]
    results = ([], [], [], [])
    for images, texts in batches:
        if not texts:  # no file of this batch could be read
            continue
        logits = crnn.predict_logits(network, images, precision)
        preds, confidences = crnn.decode(logits, alphabet)
        losses = crnn.ctc_loss(logits, texts, alphabet).tolist()
        for column, values in zip(results, (texts, preds, confidences, losses)):
            column += values
    return results


def choose_crops(root, split, args, alphabet):
    """The crops to score: (paths, texts, what they are). args: those of the training.

    Where the checkpoint learnt from the very same folder, that is the validation share, which
    training left out, by the same hash."""
    folder = data.split_folder(root, split)
    paths, texts = data.find_crops(folder, alphabet)
    title = f"images of {folder}"
    learnt_from = args.get("data")
    # that folder may be gone, or on another machine: then there is nothing to compare with
    if not learnt_from or not os.path.isdir(learnt_from):
        return paths, texts, title
    train_folder = Path(learnt_from, "train")
    if not train_folder.is_dir():
        train_folder = learnt_from
    if not os.path.samefile(folder, train_folder):
        return paths, texts, title
    if split == "train":  # asked for by name
        return paths, texts, f"{title}, which the network learnt from"
    _, val_ids = data.split_validation(texts, args.get("val") or 0)
    if not val_ids:
        raise ValueError(f"{folder}: the network learnt from all of it; add a test folder")
    paths = [paths[k] for k in val_ids]
    texts = [texts[k] for k in val_ids]
    return paths, texts, f"{title} that training left out to choose its weights by"


def draw_synthetic(size):
    """SYNTHETIC_TEST as (arrays, texts), drawn in the size that the network reads."""
    arrays = []
    texts = []
    for images, new_texts in data.synthetic_batches(*SYNTHETIC_TEST, size):
        images = images.permute(0, 2, 3, 1)  # (B, 3, H, W) to (B, H, W, 3)
        arrays += list(images.numpy())
        texts += new_texts
    return arrays, texts


def read_labelled(network, sources, texts, precision, grammar, workers):
    """A Result for each of `sources`: paths or arrays, whose true strings are `texts`.

    Files that cannot be read are named on stderr and left out; raises ValueError if all are."""
    results = []
    # the very function that predict.py reads with: what is scored is what users get
    reads = predict.read(network, sources, precision, grammar, workers=workers)
    rows = zip(sources, texts, reads)
    for source, true, read in data.show_progress(rows, len(texts), "image"):
        if read.error:
            print(f"warning: {read.error}", file=sys.stderr)
            continue
        name = getattr(source, "name", true)  # an array has no file name
        results.append(Result(name, true, read.plate, read.confidence, source))
    if not results:
        raise ValueError("no image can be read; check the files")
    return results


def count_seen(results, train_folder, alphabet):
    """The right reads of "seen" and "unseen" plates, see count_right; {} without that folder.

    A plate that was photographed twice can be in train as well: was it read, or known by heart?"""
    if not train_folder.is_dir():
        return {}
    paths = data.list_images(train_folder)
    known = {data.parse_label(path, alphabet)[0] for path in paths}
    pairs = []
    for result in results:
        pairs.append(("seen" if result.true in known else "unseen", result.is_right))
    return count_right(pairs)


def evaluate(
    checkpoint, root=None, split="test", device="auto", precision="auto", grammar=None, workers=None
):
    """All scores of one checkpoint on one split, as a dict. Raises ValueError for bad input.

    root: a data set; without it the one the checkpoint learnt from, or synthetic plates.
    The dict's "reads" is a list of Results, all else in it are plain types."""
    device = crnn.pick_device(device)
    precision = crnn.pick_precision(precision, device)
    network, info = crnn.load_checkpoint(checkpoint, data.ALPHABET, device)
    crnn.fold_norms(network)
    alphabet = network.config["alphabet"]
    args = info.get("args", {})
    root = root or args.get("data")
    if root:
        sources, texts, title = choose_crops(root, split, args, alphabet)
    else:
        sources, texts = draw_synthetic(network.config["size"])
        title = "synthetic plates"
    start = time.time()
    results = read_labelled(network, sources, texts, precision, grammar, workers)
    seconds = time.time() - start
    _, trues, preds, confidences, _ = zip(*results)
    scores = metrics(trues, preds)
    seen = {}
    if args.get("data") and split != "train":
        seen = count_seen(results, Path(args["data"], "train"), alphabet)
    return scores | {
        "checkpoint": str(checkpoint),
        "source": title,
        "device": device.type,
        "precision": precision,
        "grammar": bool(predict.plate_patterns(network, grammar)),
        "images_per_second": len(results) / seconds,
        "interval": wilson(scores["accuracy"], len(results)),
        "calibration_error": calibration_error(confidences, trues, preds),
        "confusions": confusions(trues, preds).most_common(20),
        "left_out": len(sources) - len(results),
        "in_train": seen,
        "reads": results,
    }


# ---------------------------------------------------------------------------------------
# What is printed and written


def describe_reading(scores):
    """What was read, and by which checkpoint."""
    return f"{scores['n']:,} {scores['source']}, read by {scores['checkpoint']}"


def print_scores(scores):
    """The three metrics, the errors and the confusions."""
    low, high = scores["interval"]
    decoding = "best plate" if scores["grammar"] else "greedy"
    print(describe_reading(scores))
    print(f"read with    {scores['device']} {scores['precision']}, {decoding}")
    print(f"accuracy     {scores['accuracy']:.4f}   95% interval {low:.4f} to {high:.4f}")
    print(f"CER          {scores['cer']:.5f}")
    print(f"Levenshtein  {scores['levenshtein']:.4f}")
    errors = [result for result in scores["reads"] if not result.is_right]
    print(f"errors       {len(errors):,}")
    for name, true, pred, confidence, _ in errors[:5]:
        name = data.printable(name)
        print(f"  {name}  true {true}  read {pred or '(nothing)'}  confidence {confidence:.3f}")
    if len(errors) > 5:
        print("  ...")
    pairs = "  ".join(f"{a}-{b} {count}" for (a, b), count in scores["confusions"])
    print(f"confusions   {pairs or 'none in reads of the right length'}")
    print(f"speed        {scores['images_per_second']:.0f} images/s")
    for name, (right, total) in scores["in_train"].items():
        where = "in train" if name == "seen" else "not in train"
        print(f"{name:12} {right / total:.4f} over {total:,} images whose plate is {where}")


def by_position(results):
    """{place: (right characters, all)}, over reads of the right length."""
    trues = [result.true for result in results]
    preds = [result.pred for result in results]
    pairs = match_characters(trues, preds)
    return count_right((place, a == b) for place, a, b in pairs)


def by_first(results):
    """{first character: (right reads, all)}: on Chinese plates that is the province."""
    return count_right((result.true[:1], result.is_right) for result in results)


def print_breakdown(scores):
    """Where the errors are: by place in the string, by first character, by confidence."""
    places = by_position(scores["reads"]).items()
    print("by position ", *(f" {place} {right / total:.4f}" for place, (right, total) in places))
    firsts = by_first(scores["reads"]).items()
    print("by first    ", *(f" {char} {right}/{total}" for char, (right, total) in firsts))
    print(f"calibration  {scores['calibration_error']:.4f} expected error of the confidences")


def write_table(path, results):
    """Write a CSV file: filename, true, pred, confidence, same."""
    rows = []
    for name, true, pred, confidence, _ in results:
        rows.append([name, true, pred, f"{confidence:.6f}", true == pred])
    data.write_csv(path, ["filename", "true", "pred", "confidence", "same"], rows)


BLACK = (0, 0, 0)
RED = (220, 0, 0)


def compared_picture(text, other):
    """A picture of `text` in which the characters that `other` lacks are red."""
    colours = [RED] * len(text)
    # it aligns the two, so that after a missing character the others still match
    for start, _, length in SequenceMatcher(None, text, other).get_matching_blocks():
        colours[start : start + length] = [BLACK] * length
    return data.text_picture(text, 24, colours)


def error_picture(result):
    """The image, under it the truth, and under that the read; differences are red."""
    truth = compared_picture(result.true, result.pred)
    read = compared_picture(result.pred, result.true)
    image = data.read_image(result.source, (64, 256))
    return data.add_captions(image, [truth, read])


# ---------------------------------------------------------------------------------------
# The report: one page for any browser, with its pictures inside

PAGE = """<!doctype html>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>TITLE</title>
<style>
body { font: 16px sans-serif; max-width: 64em; margin: 1em auto; padding: 0 1em }
h1 { overflow-wrap: anywhere }
img { max-width: 100%; height: auto }
div { overflow-x: auto }
td, th { padding: 2px 12px 2px 0; text-align: left; white-space: nowrap }
td img { max-width: none }
#errors th { cursor: pointer; text-decoration: underline }
</style>
<h1>TITLE</h1>
BODY
<script>
// a click on the head of a column sorts the errors by it, the next click the other way round
const body = document.querySelector("#errors tbody")
document.querySelectorAll("#errors th").forEach((head, k) => head.onclick = () => {
  const text = row => row.cells[k].textContent
  const compare = (a, b) => text(a).localeCompare(text(b), undefined, {numeric: true})
  const rows = [...body.rows].sort(compare)
  if (rows[0] === body.rows[0]) rows.reverse()
  body.append(...rows)
})
</script>
"""


def image_tag(picture):
    """A picture uint8 (3, h, w) as HTML that holds the whole of it."""
    content = data.encode_image(to_pil_image(picture), "PNG")
    text = base64.b64encode(content).decode()
    return f'<img src="data:image/png;base64,{text}">'


def html_table(name, heads, rows):
    """Rows of cells as HTML."""
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    table = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div><table id="{name}">{table}</table></div>'


def draw_chart(title, xs, ys, largest_x, largest_y):
    """A line through the points (x, y), both axes from 0 on: a picture uint8 (3, 220, 420)."""
    page = Image.new("RGB", (420, 220), "white")
    draw = ImageDraw.Draw(page)
    draw.line(((40, 40), (40, 190), (400, 190)), "silver")
    draw.text((40, 10), f"{title}, 0 to {largest_y:.4g}", "black", font_size=16)
    draw.text((400, 194), f"{largest_x:,.7g}", "grey", font_size=14, anchor="ra")
    points = []
    for x, y in zip(xs, ys):
        right = 360 * x / largest_x
        up = 150 * y / largest_y
        points.append((40 + right, 190 - up))
    draw.line(points, "royalblue", 3)
    for point in points:
        draw.circle(point, 4, "royalblue")
    return pil_to_tensor(page)


def draw_curves(checkpoint):
    """Charts of the run that made a checkpoint, from the history beside it; none if it is gone."""
    path = crnn.companion(checkpoint, ".csv")
    if not path.is_file():
        return []
    with open(path, encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    images = [float(row["images"]) for row in rows]
    charts = []
    for name in ("loss", "accuracy", "cer"):
        values = [float(row[name]) for row in rows]
        largest = max(1, *values)
        title = f"{name} by images seen"
        charts.append(draw_chart(title, images, values, images[-1], largest))
    return charts


def draw_reliability(results):
    """A chart of the share of right reads by confidence.

    Where a confidence can be trusted, the share is as large as the confidence."""
    bins = count_right((confidence_bin(r.confidence), r.is_right) for r in results)
    centres = []
    shares = []
    for k, (right, total) in sorted(bins.items()):
        centres.append((k + 0.5) / 10)
        shares.append(right / total)
    return draw_chart("right reads by confidence", centres, shares, 1, 1)


def draw_confusions(results, commonest):
    """An error picture of each of the `commonest` confusions [(pair, count), ...]."""
    example = {}
    for result in results:
        for pair in confusions([result.true], [result.pred]):
            example.setdefault(pair, result)
    pictures = []
    for pair, count in commonest:
        picture = error_picture(example[pair])
        caption = data.text_picture(f"{'-'.join(pair)} {count}", 24)
        pictures.append(data.add_captions(picture, [caption]))
    return pictures


ERROR_HEADS = ("picture", "true", "read", "confidence", "first character", "wrong place", "file")


def error_row(result, picture):
    """The cells of an error, in the order of ERROR_HEADS."""
    wrong = "length"
    for place, a, b in match_characters([result.true], [result.pred]):
        if a != b:
            wrong = place
            break
    confidence = f"{result.confidence:.4f}"
    texts = (result.true, result.pred, confidence, result.true[:1], wrong, result.name)
    cells = [html.escape(str(text)) for text in texts]
    return [image_tag(picture), *cells]


def make_page(scores, charts, confusion_pictures, errors):
    """The page as text: scores, charts, confusions, and the rows of the errors."""
    results = scores["reads"]
    low, high = scores["interval"]
    facts = [(name, f"{scores[name]:.4f}") for name in ("accuracy", "cer", "levenshtein")]
    facts.append(("accuracy, 95% interval", f"{low:.4f} to {high:.4f}"))
    facts.append(("calibration error", f"{scores['calibration_error']:.4f}"))
    firsts = [(char, right, total) for char, (right, total) in by_first(results).items()]
    places = [(place, right, total) for place, (right, total) in by_position(results).items()]
    parts = [
        html_table("scores", (), facts),
        *map(image_tag, charts),
        "<h2>Confusions</h2>",
        *map(image_tag, confusion_pictures),
        "<h2>By first character</h2>",
        html_table("first", ("character", "right", "of"), firsts),
        "<h2>By place, over reads of the right length</h2>",
        html_table("place", ("place", "right", "of"), places),
        "<h2>Errors</h2>",
        html_table("errors", ERROR_HEADS, errors),
    ]
    title = html.escape(describe_reading(scores))
    return PAGE.replace("TITLE", title).replace("BODY", "\n".join(parts))


def write_report(folder, scores):
    """Write folder/report.html, predictions.csv, and the pictures of the page as files."""
    results = scores["reads"]
    write_table(Path(folder, "predictions.csv"), results)
    # confident errors tell the most: a wrong label, or something the network never learnt
    errors = [result for result in results if not result.is_right]
    errors = sorted(errors, key=lambda result: -result.confidence)[:500]
    pictures = [error_picture(result) for result in errors]
    sheets = {
        "curves.png": draw_curves(scores["checkpoint"]),
        "reliability.png": [draw_reliability(results)],
        "confusions.png": draw_confusions(results, scores["confusions"]),
        "errors.png": pictures[:64],
    }
    for name, sheet in sheets.items():
        Path(folder, name).unlink(missing_ok=True)  # that of an earlier report
        if sheet:
            data.save_sheet(sheet, Path(folder, name))
    charts = sheets["curves.png"] + sheets["reliability.png"]
    page = make_page(scores, charts, sheets["confusions.png"], map(error_row, errors, pictures))
    data.write_file(Path(folder, "report.html"), page.encode("utf8", "replace"))


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", nargs="?", default=predict.READER, help="(default: the reader in assets)")
    add(
        "--data",
        type=data.not_empty,
        help="crops, or a folder with train and test (default: what it learnt from)",
    )
    add("--split", default="test", help="which folder of --data (default: %(default)s)")
    add("--csv", help="write a table here: filename, true, pred, confidence, same")
    add("--json", help="write the scores here")
    add("--report", metavar="DIR", help="write report.html and its pictures there")
    predict.reading_options(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    with data.plain_errors():
        if args.csv:
            data.check_output(args.csv, ".csv")
        if args.json:
            data.check_output(args.json, ".json")
        if args.report:
            os.makedirs(args.report, exist_ok=True)
        reading = (args.device, args.precision, args.grammar, args.workers)
        scores = evaluate(args.checkpoint, args.data, args.split, *reading)
        print_scores(scores)
        if args.report:
            print_breakdown(scores)
            write_report(args.report, scores)
        if args.csv:
            write_table(args.csv, scores["reads"])
        if args.json:
            del scores["reads"]  # they may hold arrays, and --csv writes them
            data.write_json(args.json, scores)


if __name__ == "__main__":
    main()
