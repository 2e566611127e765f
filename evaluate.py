"""How well a checkpoint reads: plate accuracy, character error rate, mean Levenshtein distance.

    python evaluate.py ckpt.pth                      # the test split of the data it learnt from
    python evaluate.py ckpt.pth --data DIR --csv predictions.csv --json metrics.json
    python evaluate.py ckpt.pth --report DIR         # a page, DIR/report.html, with the errors

A checkpoint that learnt from drawn plates alone is, without --data, tested on 2,000 others.
If training learnt from a folder without train and test, the crops that it held out are scored.
"""

import base64
import csv
import html
import json
import math
import os
from collections import Counter, namedtuple
from difflib import SequenceMatcher
from pathlib import Path

from torchvision.io import encode_png

import data
import model
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
            # deleted, inserted, or substituted unless they are equal
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (char_a != char_b)))
    return row[-1]


def metrics(trues, preds):
    """The three scores of a list of reads, which must not be empty, as a dict.

    accuracy: the share of strings read without any error, in [0, 1]. cer: the character error
    rate, all edits over all true characters, in [0, inf). levenshtein: the edits per string."""
    edits = sum(map(levenshtein, preds, trues))
    return {
        "accuracy": sum(map(str.__eq__, trues, preds)) / len(trues),
        "cer": edits / sum(map(len, trues)),
        "levenshtein": edits / len(trues),
    }


def wilson(share, n):
    """The 95% interval (low, high) of a share seen in n > 0 trials (Wilson, 1927).

    Unlike the share and two deviations to either side, it is honest for few trials and for
    shares near 1."""
    k = 1.96**2 / n  # 1.96 deviations to either side hold 95% of a normal distribution
    centre = (share + k / 2) / (1 + k)
    spread = math.sqrt(share * (1 - share) * k + k * k / 4) / (1 + k)
    return centre - spread, centre + spread


def count_right(pairs):
    """Of pairs (key, is it right?): {key: (right ones, all)}, by key."""
    right = Counter()
    total = Counter()
    for key, is_right in pairs:
        right[key] += is_right
        total[key] += 1
    return {key: (right[key], total[key]) for key in sorted(total)}


def calibration_error(confidences, rights):
    """How far confidences are from the share of reads that are right, in [0, 1].

    The expected calibration error (Naeini et al., 2015): over bins of confidence, one around each
    tenth, the mean of this distance, each bin weighted by its reads."""
    excess = Counter()
    for confidence, is_right in zip(confidences, rights):
        # summed over a bin this is its confidences less its right reads
        excess[round(confidence, 1)] += confidence - is_right
    return sum(map(abs, excess.values())) / len(rights)


def compare(trues, preds):
    """[(place from 1 on, true character, character read), ...], over reads of the right length:
    with another length one cannot say which character stands for which."""
    return [
        (k, a, b)
        for true, pred in zip(trues, preds)
        if len(true) == len(pred)
        for k, (a, b) in enumerate(zip(true, pred), 1)
    ]


# ---------------------------------------------------------------------------------------
# Reading a data set


# one labelled image, and what was read from it; the source is a path, or an array
Result = namedtuple("Result", "name true pred confidence source")


def choose_images(root, split, content, learnt):
    """What to score: ([(source, true string), ...], what they are). content: that of the
    checkpoint; learnt: the hashes of the labels it learnt."""
    config = content["config"]
    learnt_from = content["args"]["data"]
    if not (root or learnt_from):
        if not plates:
            raise OSError("drawn plates need assets/; give --data")
        images, texts = plates.fixed_plates(*plates.TEST, config["size"])
        return list(zip(images.permute(0, 2, 3, 1).numpy(), texts)), "drawn plates"
    folder = data.split_folder(root or learnt_from, split)
    crops = data.find_crops(folder, config["alphabet"])
    title = f"images of {folder}"
    if split != "train" and learnt_from and os.path.isdir(learnt_from):
        learnt_folder = data.split_folder(learnt_from, "train").resolve()
        if folder.resolve().is_relative_to(learnt_folder):
            crops = [crop for crop in crops if data.hash_label(crop[1]) not in learnt]
            title += " that training held out"
    return crops, title


def evaluate(
    checkpoint, root=None, split="test", device=None, precision=None, grammar=None, adapt=False
):
    """All scores of one checkpoint on one split, as a dict. Raises OSError.

    root: a data set; without it the one the checkpoint learnt from, or drawn plates. The rest: see
    predict.read. The dict's "reads" is a list of Results, all else in it are plain types."""
    device = model.pick_device(device)
    network, content = model.load_checkpoint(checkpoint, device)
    learnt = set(content["args"]["labels"])
    crops, title = choose_images(root, split, content, learnt)
    sources = [crop[0] for crop in crops]
    # the very function that predict.py reads with: what is scored is what users get
    reads = list(predict.read(network, sources, precision, grammar, adapt=adapt))
    data.warn("files left out", [read.error for read in reads if read.error])
    results = [
        # an array has no file name
        Result(getattr(source, "name", true), true, read.plate, read.confidence, source)
        for (source, true), read in zip(crops, reads)
        if not read.error
    ]
    if not results:
        raise OSError(f"{title}: none, or none can be read; check the files, or add a test folder")
    _, trues, preds, confidences, _ = zip(*results)
    rights = list(map(str.__eq__, trues, preds))
    places = compare(trues, preds)
    seen = ["seen" if data.hash_label(true) in learnt else "unseen" for true in trues]
    patterns = predict.plate_patterns(network, grammar)
    decoding = "best plate, three views if unsure" if patterns else "greedy"
    scores = metrics(trues, preds)
    return scores | {
        "title": data.printable(f"{len(results):,} {title}, read by {checkpoint}"),
        "decoding": f"{device} {precision or model.pick_precision(device)}, {decoding}"
        f"{', adapted to the place' if adapt else ''}",
        "interval": wilson(scores["accuracy"], len(results)),
        "calibration_error": calibration_error(confidences, rights),
        "by_confidence": count_right((round(c, 1), right) for c, right in zip(confidences, rights)),
        "by_position": count_right((k, a == b) for k, a, b in places),
        "by_first": count_right((true[0], right) for true, right in zip(trues, rights)),
        "by_training": count_right(zip(seen, rights)),
        "confusions": Counter((a, b) for _, a, b in places if a != b).most_common(20),
        "history": content["history"],
        "reads": results,
    }


# ---------------------------------------------------------------------------------------
# What is printed and written


def wrong_reads(scores):
    """The wrong reads, the most confident first: these tell most, be it of a wrong label."""
    wrong = (result for result in scores["reads"] if result.true != result.pred)
    return sorted(wrong, key=lambda result: -result.confidence)


SCORES = """{title}
read with    {decoding}
accuracy     {accuracy:.4f}   95% interval {interval[0]:.4f} to {interval[1]:.4f}
CER          {cer:.5f}
Levenshtein  {levenshtein:.4f}
calibration  {calibration_error:.4f} expected error of the confidences"""


def describe(scores):
    """The three metrics, where the errors are, and the confusions: a text of some lines."""
    lines = [SCORES.format(**scores)]
    for name in ("position", "first", "training"):
        shares = "  ".join(
            f"{key} {right / n:.4f} of {n}" for key, (right, n) in scores[f"by_{name}"].items()
        )
        lines.append(f"{name:11}  {shares}")
    pairs = "  ".join(f"{a}-{b} {count}" for (a, b), count in scores["confusions"])
    wrong = wrong_reads(scores)
    lines += [f"confusions   {pairs}", f"errors       {len(wrong):,}"]
    for name, true, pred, confidence, _ in wrong[:5]:
        lines.append(f"  {data.printable(name)}  true {true}  read {pred}  {confidence:.3f}")
    return "\n".join(lines)


def write_table(path, results):
    """Write a CSV file: filename, true, pred, confidence, same."""
    # utf-8-sig: spreadsheets look for its mark; surrogateescape: a name may be no UTF-8
    with open(path, "w", newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(["filename", "true", "pred", "confidence", "same"])
        for name, true, pred, confidence, _ in results:
            table.writerow([name, true, pred, f"{confidence:.6f}", true == pred])


def mark(text, other):
    """`text` as HTML, in which what differs from `other` is marked."""
    marked = ""
    # aligned, so that after a missing character the others still match
    for kind, start, end, *_ in SequenceMatcher(None, text, other).get_opcodes():
        part = html.escape(text[start:end])
        marked += part if kind == "equal" else f"<mark>{part}</mark>"
    return marked


HEAD = """<!doctype html><html lang="zh"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>Report</title><style>
pre { white-space: pre-wrap }
svg { width: 420px; height: 150px; border: 1px solid }
polyline { fill: none; stroke: blue; vector-effect: non-scaling-stroke }
</style>"""


def chart(title, points):
    """A line through points (x, y) as SVG, scaled to the frame that HEAD names. Above y = 1 the
    frame cuts it off."""
    width = max(x for x, _ in points)
    line = " ".join(f"{x},{1 - y:.4f}" for x, y in points)
    return (
        f'<h2>{title}</h2><svg viewBox="0 0 {width} 1" preserveAspectRatio="none">'
        f'<polyline points="{line}"/></svg>'
    )


def write_report(folder, scores):
    """Write folder/report.html, predictions.csv and errors.png."""
    folder = Path(folder)
    os.makedirs(folder, exist_ok=True)
    write_table(folder / "predictions.csv", scores["reads"])
    page = f"{HEAD}<pre>{html.escape(describe(scores))}</pre>"
    points = [(key, right / n) for key, (right, n) in scores["by_confidence"].items()]
    page += chart("Share of right reads by confidence", points)
    for key in ("loss", "accuracy", "cer"):
        points = [(row["images"], row[key]) for row in scores["history"] if key in row]
        if points:
            page += chart(f"{key} by images seen, from 0 to 1", points)
    page += "<h2>Errors, the most confident first</h2><table>"
    wrong = wrong_reads(scores)[:500]
    pictures = [data.load_image(result.source, (64, 256)) for result in wrong]
    for (name, true, pred, confidence, _), picture in zip(wrong, pictures):
        image = base64.b64encode(encode_png(picture).numpy()).decode()
        page += f'<tr><td><img src="data:image/png;base64,{image}"><td>{html.escape(name)}'
        page += f"<br>true {mark(true, pred)}<br>read {mark(pred, true)}<br>{confidence:.4f}"
    (folder / "report.html").write_text(page, "utf8", "replace")
    (folder / "errors.png").unlink(missing_ok=True)  # that of an earlier report
    if pictures and plates:
        captions = [f"{result.true} {result.pred}" for result in wrong]
        plates.save_sheet(folder / "errors.png", pictures[:64], captions, 4)


@data.one_sentence()
def main(argv=None):
    parser, add = data.make_parser(__doc__)
    add("checkpoint", nargs="?", default=predict.READER, help="(default: the one in assets)")
    add("--data", dest="root", help="crops, or a folder of train and test; see above")
    add("--split", type=str.lower, default="test", help="folder of --data (default: %(default)s)")
    add("--csv", help="write a table here: filename, true, pred, confidence, same")
    add("--json", help="write the scores here")
    add("--report", help="a folder: write report.html and its pictures there")
    predict.reading_options(add)
    args = vars(parser.parse_args(argv))
    table, numbers, report = (args.pop(name) for name in ("csv", "json", "report"))
    if table:
        data.check_output(table, ".csv")
    if numbers:
        data.check_output(numbers, ".json")
    scores = evaluate(**args)
    print(describe(scores))
    if table:
        write_table(table, scores["reads"])
    if numbers:
        Path(numbers).write_text(json.dumps(scores | {"reads": len(scores["reads"])}, indent=1))
    if report:
        write_report(report, scores)
        print("report      ", Path(report, "report.html").resolve().as_uri())


if __name__ == "__main__":
    main()
