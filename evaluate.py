"""How well a checkpoint reads: plate accuracy, character error rate, mean Levenshtein distance.

    python evaluate.py ckpt.pth                      # the test split of the data it learnt from
    python evaluate.py ckpt.pth --data DIR --csv predictions.csv --json metrics.json
    python evaluate.py ckpt.pth --report DIR         # a page, DIR/report.html, with the errors

A checkpoint that learnt from drawn plates alone is, without --data, tested on 2,000 others.
Crops without a test folder are scored on those that training held out.
"""

import base64
import csv
import html
import io
import json
import math
import os
import time
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path
from string import Template
from typing import NamedTuple

from torchvision.transforms.functional import to_pil_image

import data
import model as crnn
import predict

try:
    from assets import plates
except ImportError:  # this file was copied without assets/: it can score crops
    plates = None

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


def metrics(trues, preds):
    """The three scores of a list of reads, as a dict.

    accuracy: the share of strings read without any error, in [0, 1]. cer: the character error
    rate, all edits over all true characters, in [0, inf). levenshtein: the edits per string."""
    edits = sum(map(levenshtein, preds, trues))
    return {
        "accuracy": sum(map(str.__eq__, trues, preds)) / max(1, len(trues)),
        "cer": edits / max(1, sum(map(len, trues))),
        "levenshtein": edits / max(1, len(trues)),
    }


def wilson(share, n):
    """The 95% interval (low, high) of a share seen in n > 0 trials (Wilson, 1927), in [0, 1].

    Unlike the share and two deviations to either side, it is honest for few trials and for
    shares near 1."""
    k = 1.96**2 / n  # 1.96 deviations to either side hold 95% of a normal distribution
    centre = (share + k / 2) / (1 + k)
    spread = math.sqrt(share * (1 - share) * k + k * k / 4) / (1 + k)
    return max(0.0, centre - spread), min(1.0, centre + spread)


def count_right(pairs):
    """Of pairs (key, is it right?): {key: (right ones, all)}, by key."""
    pairs = list(pairs)
    total = Counter(key for key, _ in pairs)
    right = Counter(key for key, is_right in pairs if is_right)
    return {key: (right[key], total[key]) for key in sorted(total)}


def confidence_bin(confidence):
    """Which tenth of [0, 1] a confidence lies in: 0 to 9."""
    return min(9, int(10 * confidence))


def calibration_error(confidences, rights):
    """How far confidences are from the share of reads that are right, in [0, 1].

    The expected calibration error (Naeini et al., 2015): over ten bins of confidence, the mean
    of this distance, each bin weighted by its reads."""
    excess = Counter()
    for confidence, is_right in zip(confidences, rights):
        # summed over a bin this is its confidences less its right reads
        excess[confidence_bin(confidence)] += confidence - is_right
    return sum(map(abs, excess.values())) / max(1, len(rights))


def matches(trues, preds):
    """(place, true character, character read), over reads of the right length: with another
    length one cannot say which character stands for which."""
    for true, pred in zip(trues, preds):
        if len(true) == len(pred):
            yield from zip(range(1, len(true) + 1), true, pred)


def confusions(trues, preds):
    """Counter of (true, read) characters, over wrong reads of the right length."""
    return Counter((a, b) for _, a, b in matches(trues, preds) if a != b)


# ---------------------------------------------------------------------------------------
# Reading a data set


class Result(NamedTuple):
    """One labelled image, and what was read from it."""

    name: str
    true: str
    pred: str
    confidence: float
    source: object  # the image: a path, or an array


class Results(list):
    """A list of Results, which a notebook does not print whole."""

    def __repr__(self):
        return f"<{len(self)} reads>"


def choose_images(root, split, alphabet, size, learnt_from, learnt):
    """What to score: (sources, true strings, what they are). learnt_from: the folder that the
    network learnt from, or None; learnt: the hashes of these labels."""
    if not (root or learnt_from):
        images, texts = plates.fixed_plates(*plates.TEST, size)
        return list(images.permute(0, 2, 3, 1).numpy()), texts, "drawn plates"
    folder = data.split_folder(root or learnt_from, split)
    paths, texts = data.find_crops(folder, alphabet)
    is_training_set = False
    if split != "train" and learnt_from and os.path.isdir(learnt_from):
        train_folder = data.split_folder(learnt_from, "train")
        is_training_set = folder.resolve().is_relative_to(train_folder)
    if not is_training_set:
        return paths, texts, f"images of {folder}"
    crops = [crop for crop in zip(paths, texts) if data.hash_label(crop[1]) not in learnt]
    if not crops:
        raise data.InputError(f"{folder}: the network learnt from all of it; add a test folder")
    return *zip(*crops), f"images of {folder} that training held out"


def evaluate(
    checkpoint, root=None, split="test", device=None, precision=None, grammar=None, adapt=False
):
    """All scores of one checkpoint on one split, as a dict. Raises data.InputError or OSError.

    root: a data set; without it the one the checkpoint learnt from, or drawn plates. The rest: see
    predict.read. The dict's "reads" is a list of Results, all else in it are plain types."""
    device = crnn.pick_device(device)
    precision = precision or crnn.pick_precision(device)
    network, content = crnn.load_checkpoint(checkpoint, device)
    config = network.config
    learnt_from = content["args"]["data"]
    learnt = set(content["learnt"].tolist())
    sources, texts, title = choose_images(
        root, split, config["alphabet"], config["size"], learnt_from, learnt
    )
    start = time.perf_counter()
    # the very function that predict.py reads with: what is scored is what users get
    network = crnn.fold_norms(network)
    reads = list(predict.read(network, sources, precision, grammar, adapt=adapt))
    data.warn("files left out", [read.error for read in reads if read.error])
    results = Results()
    for source, true, read in zip(sources, texts, reads):
        if not read.error:
            name = getattr(source, "name", true)  # an array has no file name
            results.append(Result(name, true, read.plate, read.confidence, source))
    if not results:
        raise data.InputError(f"{title}: none can be read; check the files")
    _, trues, preds, confidences, _ = zip(*results)
    rights = list(map(str.__eq__, trues, preds))
    seen = ["seen" if data.hash_label(true) in learnt else "unseen" for true in trues]
    bins = map(confidence_bin, confidences)
    has_grammar = bool(predict.plate_patterns(network, grammar))
    decoding = "best plate, three views if unsure" if has_grammar else "greedy"
    scores = metrics(trues, preds)
    return scores | {
        "title": f"{len(results):,} {title}, read by {checkpoint}",
        "decoding": f"{device} {precision}, {decoding}{', adapted to the place' * adapt}",
        "speed": len(results) / max(1e-9, time.perf_counter() - start),
        "interval": wilson(scores["accuracy"], len(results)),
        "calibration_error": calibration_error(confidences, rights),
        "by_confidence": count_right(zip(bins, rights)),
        "by_position": count_right((place, a == b) for place, a, b in matches(trues, preds)),
        "by_first": count_right((true[0], right) for true, right in zip(trues, rights)),
        "by_training": count_right(zip(seen, rights)),
        "confusions": confusions(trues, preds).most_common(20),
        "history": content["history"],
        "reads": results,
    }


# ---------------------------------------------------------------------------------------
# What is printed and written


def wrong_reads(scores):
    """The wrong reads, the most confident first: these tell most, be it of a wrong label."""
    wrong = [result for result in scores["reads"] if result.true != result.pred]
    return sorted(wrong, key=lambda result: -result.confidence)


def describe(scores):
    """The three metrics, where the errors are, and the confusions: a text of some lines."""
    low, high = scores["interval"]
    wrong = wrong_reads(scores)
    lines = [
        data.printable(scores["title"]),
        f"read with    {scores['decoding']}, {scores['speed']:.0f} images/s",
        f"accuracy     {scores['accuracy']:.4f}   95% interval {low:.4f} to {high:.4f}",
        f"CER          {scores['cer']:.5f}",
        f"Levenshtein  {scores['levenshtein']:.4f}",
        f"calibration  {scores['calibration_error']:.4f} expected error of the confidences",
    ]
    for name in ("position", "first", "training"):
        counts = scores[f"by_{name}"].items()
        lines.append(
            "  ".join([f"{name:11}", *(f"{k} {a / n:.4f} of {n}" for k, (a, n) in counts)])
        )
    pairs = [f"{a}-{b} {count}" for (a, b), count in scores["confusions"]]
    lines.append("  ".join(["confusions ", *pairs]))
    lines.append(f"errors       {len(wrong):,}")
    for name, true, pred, confidence, _ in wrong[:5]:
        lines.append(f"  {data.printable(name)}  true {true}  read {pred}  {confidence:.3f}")
    return "\n".join(lines)


def write_table(path, results):
    """Write a CSV file: filename, true, pred, confidence, same."""
    file = io.StringIO(newline="")
    table = csv.writer(file)
    table.writerow(["filename", "true", "pred", "confidence", "same"])
    for *cells, confidence, _ in results:
        # a spreadsheet would take these for a formula
        safe = ["'" * (cell[:1] in {*"=+-@"}) + cell for cell in cells]
        table.writerow([*safe, f"{confidence:.6f}", cells[1] == cells[2]])
    # utf-8-sig: spreadsheets look for its mark; surrogateescape: a name may be no UTF-8
    data.write_file(path, file.getvalue().encode("utf-8-sig", "surrogateescape"))


def error_picture(result):
    """The image, under it the truth, and under that the read; differences are red."""
    _, true, pred, _, source = result
    pictures = [to_pil_image(data.load_image(source, (64, 256)))]
    for text, other in ((true, pred), (pred, true)):
        # aligned, so that after a missing character the others still match
        blocks = SequenceMatcher(None, text, other).get_matching_blocks()
        same = {start + k for start, _, length in blocks for k in range(length)}
        pictures.append(plates.text_picture(text, 24, set(range(len(text))) - same))
    return plates.sheet(pictures, 1)


PAGE = Template("""<!doctype html>
<html lang="zh"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Report</title>
<style>
body { font: 16px sans-serif; max-width: 60em; margin: 1em auto; padding: 0 1em }
pre { white-space: pre-wrap } img, svg { max-width: 100% }
td { padding: 2px 12px 2px 0; overflow-wrap: anywhere }
</style>
<pre>$scores</pre>
$charts
<h2>Errors, the most confident first</h2><table>$errors</table>
""")


def chart(title, points):
    """A line through points (x, y, caption), y in [0, 1], as SVG."""
    largest = max(x for x, _, _ in points)
    places = [(20 + 380 * x / largest, 180 - 150 * min(1, y), text) for x, y, text in points]
    line = " ".join(f"{x:.0f},{y:.0f}" for x, y, _ in places)
    texts = "".join(f'<text x="{x:.0f}" y="{y - 6:.0f}">{text}</text>' for x, y, text in places)
    return (
        f'<h2>{title}</h2><svg viewBox="0 0 420 200" width="420" font-size="11">'
        '<path d="M20 30V180H400" fill="none" stroke="silver"/>'
        f'<polyline points="{line}" fill="none" stroke="royalblue"/>{texts}</svg>'
    )


def write_report(folder, scores):
    """Write folder/report.html, predictions.csv and errors.png."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "predictions.csv", scores["reads"])
    rows = []
    pictures = []
    for result in wrong_reads(scores)[:500]:
        file = io.BytesIO()
        pictures.append(error_picture(result))
        pictures[-1].save(file, "png")
        image = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        name, true, pred = map(html.escape, result[:3])
        texts = f"{true}<br>{pred}<br>{result.confidence:.4f}"
        rows.append(f'<tr><td><img src="{image}"><td>{texts}<td>{name}\n')
    (folder / "errors.png").unlink(missing_ok=True)  # that of an earlier report
    if pictures:
        plates.sheet(pictures[:64]).save(folder / "errors.png")
    bins = [((k + 0.5) / 10, right / n, n) for k, (right, n) in scores["by_confidence"].items()]
    charts = [chart("Share of right reads by confidence, and how many these are", bins)]
    for key in ("loss", "accuracy", "cer"):
        points = [(row["images"], row[key], "") for row in scores["history"] if key in row]
        if points:
            charts.append(chart(f"{key} by images seen, from 0 to 1", points))
    text = html.escape(describe(scores))
    page = PAGE.substitute(scores=text, charts="".join(charts), errors="".join(rows))
    data.write_file(folder / "report.html", page.encode("utf8", "replace"))


def main(argv=None):
    parser = data.make_parser("evaluate.py", __doc__)
    add = parser.add_argument
    add("checkpoint", nargs="?", default=predict.READER, help="(default: the one in assets)")
    add("--data", help="crops, or a folder with train and test (default: what it learnt from)")
    add("--split", default="test", help="which folder of --data (default: %(default)s)")
    add("--csv", help="write a table here: filename, true, pred, confidence, same")
    add("--json", help="write the scores here")
    add("--report", metavar="DIR", help="write report.html and its pictures there")
    predict.reading_options(add)
    with data.one_sentence():
        args = parser.parse_args(argv)
        for path, suffix in ((args.csv, ".csv"), (args.json, ".json")):
            if path:
                data.check_output(path, suffix)
        reading = (args.device, args.precision, args.grammar, args.adapt)
        scores = evaluate(args.checkpoint, args.data, args.split, *reading)
        print(describe(scores))
        if args.report:
            write_report(args.report, scores)
            print("report      ", Path(args.report, "report.html").resolve().as_uri())
        if args.csv:
            write_table(args.csv, scores["reads"])
        if args.json:
            del scores["reads"]
            data.write_file(args.json, json.dumps(scores, indent=1).encode())


if __name__ == "__main__":
    main()
