"""Lesson 5, evaluate: how well a checkpoint reads, how sure we can be of that, and where it errs:
plate accuracy, character error rate (CER), mean Levenshtein distance.

    python evaluate.py ckpt.pth                      # the test split of the data it learnt from
    python evaluate.py ckpt.pth --data DIR --csv predictions.csv --json metrics.json
    python evaluate.py ckpt.pth --report DIR         # a page, DIR/report.html, with the errors

It reads with predict.py's own function, so what is scored is what users get; train.py takes its
metrics from here. A checkpoint that learnt from drawn plates alone is, without --data, tested on
2,000 others.

A plate that was learnt is no test: wherever --split is not train, crops with a label that the
checkpoint has learnt are left out, in whatever folder they lie, and their number is said. Of a
folder without train and test this leaves the crops that training held out. These also chose which
weights to keep, so they flatter a little, and the title says so.
"""

import base64
import csv
import html
import io
import itertools
import json
import math
import os
from collections import Counter, namedtuple
from pathlib import Path

import data
import model
import predict

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


def count_right(keys, rights):
    """{key: (right ones, all)}, by key. rights: which of the keys stand for what is right."""
    right = Counter(itertools.compress(keys, rights))
    total = Counter(keys)
    return {key: (right[key], total[key]) for key in sorted(total)}


def align(true, pred):
    """What was read for each true character, by the fewest edits: a list of strings.

    One is "" if its character is missing, and longer if the read has some too many."""
    if true == pred:
        return list(true)
    # the longest start of the read that costs no more edits than any other
    k = min(
        reversed(range(len(pred) + 1)),
        key=lambda k: levenshtein(true[0], pred[:k]) + levenshtein(true[1:], pred[k:]),
    )
    return [pred[:k], *align(true[1:], pred[k:])]


def calibration_error(confidences, rights):
    """How far confidences are from the share of reads that are right, in [0, 1].

    The expected calibration error (Naeini et al., 2015): over bins of confidence, one around each
    tenth, the mean of this distance, each bin weighted by its reads."""
    excess = Counter()
    for confidence, is_right in zip(confidences, rights):
        # summed over a bin this is its confidences less its right reads
        excess[round(confidence, 1)] += confidence - is_right
    return sum(map(abs, excess.values())) / len(rights)


# ---------------------------------------------------------------------------------------
# Reading a data set


# One labelled image, and what was read from it. name: its path below the folder given;
# source: a path, or an array.
Result = namedtuple("Result", "name true source pred confidence")


def choose_images(root, split, content):
    """What to score: ([(name, true string, source), ...], what they are, how many were there).

    content: that of the checkpoint; without `root` it is what this learnt from."""
    args = content["args"]
    whose = "" if root else "the checkpoint's folder "
    root = root or args["data"]
    if not root:
        try:
            from assets import plates
        except ImportError:  # this file was copied without assets/: it can score crops
            raise OSError("drawn plates need assets/; give --data") from None
        images, texts = plates.fixed_plates(*plates.TEST, content["config"]["size"])
        arrays = images.permute(0, 2, 3, 1).numpy()
        return list(zip(texts, texts, arrays)), "drawn plates", len(texts)
    folder = data.split_folder(root, split)
    labelled = data.label_images(folder, content["config"]["alphabet"])
    crops = [(str(path.relative_to(root)), text, path) for path, text, _ in labelled if text]
    title = f"images of {whose}{folder}"
    if "train" not in split:
        # by labels, since folders are moved, copied and added to
        learnt = set(args["labels"])
        tests = [crop for crop in crops if data.hash_label(crop[1]) not in learnt]
        if len(tests) < len(crops):
            title += (
                f" without {len(crops) - len(tests):,} that were learnt; those held out helped to "
                "choose the weights"
            )
        crops = tests
    return crops, title, len(labelled)


def evaluate(
    checkpoint, root=None, split="test", device=None, precision=None, grammar=None, adapt=False
):
    """All scores of one checkpoint on one split, as a dict. Raises OSError.

    root: a data set; without it the one the checkpoint learnt from, or drawn plates. The rest: see
    predict.read. The dict's "reads" is a list of Results, all else in it are plain types."""
    device = model.pick_device(device)
    network, content = model.load_checkpoint(checkpoint, device)
    crops, title, total = choose_images(root, split, content)
    sources = [source for _, _, source in crops]
    # the very function that predict.py reads with: what is scored is what users get
    reads = list(predict.read(network, sources, precision, grammar, adapt=adapt))
    data.warn("files left out", [read.error for read in reads if read.error])
    results = [
        Result(*crop, read.plate, read.confidence)
        for crop, read in zip(crops, reads)
        if not read.error
    ]
    if not results:
        raise OSError(f"{title}: no labelled crops but those learnt, or none can be read; add some")
    _, trues, _, preds, confidences = zip(*results)
    predict.warn_if_no_plates(confidences)
    rights = list(map(str.__eq__, trues, preds))
    positions = [position for true in trues for position, _ in enumerate(true, 1)]
    chars = "".join(trues)
    char_reads = [read for pair in zip(trues, preds) for read in align(*pair)]
    char_rights = list(map(str.__eq__, chars, char_reads))
    decoding = "best plate of four views" if predict.plate_patterns(network, grammar) else "greedy"
    if adapt and predict.can_adapt(reads):
        decoding += ", adapted to the location"
    scores = metrics(trues, preds)
    return scores | {
        "title": data.printable(f"{len(results):,} {title}, read by {checkpoint}"),
        "decoding": f"{device} {precision or model.pick_precision(device)}, {decoding}",
        "left_out": total - len(results),
        "errors": rights.count(False),
        "interval": wilson(scores["accuracy"], len(results)),
        "calibration_error": calibration_error(confidences, rights),
        "by_confidence": count_right([round(confidence, 1) for confidence in confidences], rights),
        "by_position": count_right(positions, char_rights),
        "by_first": count_right([true[0] for true in trues], rights),
        "by_character": count_right(chars, char_rights),
        "confusions": Counter(
            (char, read) for char, read in zip(chars, char_reads) if char != read
        ).most_common(20),
        "history": content["history"],
        "reads": results,
    }


# ---------------------------------------------------------------------------------------
# What is printed and written


def telling_reads(scores):
    """The wrong reads, the most confident first: these tell most, be it of a wrong label. If
    nothing is wrong: all reads, the least sure first."""
    reads = sorted(scores["reads"], key=lambda result: result.confidence)
    return [result for result in reversed(reads) if result.true != result.pred] or reads


SCORES = """{title}
read with    {decoding}
left out     {left_out:,}
accuracy     {accuracy:.4f}   95% interval {interval[0]:.4f} to {interval[1]:.4f}
CER          {cer:.5f}
Levenshtein  {levenshtein:.4f}
calibration  {calibration_error:.4f} expected error of the confidences"""


def describe(scores):
    """The three metrics, where the errors are, and the confusions: a text of some lines."""
    text = SCORES.format(**scores)
    for name in ("position", "first"):
        shares = sorted(
            f"{right / n:.4f} {key} ({n:,})" for key, (right, n) in scores[f"by_{name}"].items()
        )
        text += f"\n{name:11}  {'  '.join(shares)}"
    confusions = [f"{a}-{b or 'none'} {count}" for (a, b), count in scores["confusions"]]
    text += f"\nconfusions   {'  '.join(confusions)}\nerrors       {scores['errors']:,}"
    for result in telling_reads(scores)[:5]:
        text += f"\n  {data.printable(result.name)}  true {result.true}  read {result.pred}"
        text += f"  {result.confidence:.3f}"
    return text


# of full width as well, which spreadsheets in East Asia take for the plain ones
FORMULAS = "=+-@\t\r＝＋－＠"


def write_table(path, results):
    """Write a CSV file: filename, true, pred, confidence, same.

    What a spreadsheet would run as a formula gets an apostrophe in front."""
    file = io.StringIO()
    # spreadsheets look for the mark in front
    file.write("\ufefffilename,true,pred,confidence,same\r\n")
    table = csv.writer(file)
    for name, true, _, pred, confidence in results:
        cells = [f"'{x}" if x.startswith(tuple(FORMULAS)) else x for x in (name, true, pred)]
        table.writerow([*cells, f"{confidence:.6f}", true == pred])
    data.write_file(path, file.getvalue())


HEAD = """<!doctype html><!-- by evaluate.py --><html lang="zh"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>Report</title>
<style> pre { white-space: pre-wrap } td { padding: 0 1em } </style>"""


def check_report(folder):
    """The page of a report, whose folder is made. Raises OSError for one that holds other files
    and no earlier report."""
    os.makedirs(folder, exist_ok=True)
    page = Path(folder, "report.html")
    is_ours = page.is_file() and b"<!-- by evaluate.py -->" in page.read_bytes()
    if os.listdir(folder) and not is_ours:
        raise OSError(f"{folder}: holds something else than a report; name a new folder")
    data.check_output(page, ".html")
    return page


def write_report(path, scores):
    """Write the scores, tables of where the errors are, and their pictures as a page of HTML."""
    page = f"{HEAD}<pre>{html.escape(describe(scores))}</pre><h2>Epochs</h2><table>"
    for row in scores["history"]:
        page += "<tr>"
        for name, value in row.items():
            text = html.escape(f"{name} {value:.6g}")
            bar = f'<meter value="{value}"></meter>' if "accuracy" in text else ""
            page += f"<td>{text} {bar}"
    for name in ("confidence", "first", "position", "character"):
        page += f"</table><h2>Right by {name}</h2><table>"
        for key, (right, n) in scores[f"by_{name}"].items():
            page += f'<tr><td>{html.escape(str(key))}<td><meter value="{right / n}"></meter>'
            page += f" {right / n:.4f}<td>{right:,} of {n:,}"
    page += "</table><h2>Errors, the surest first, or the least sure reads</h2><table>"
    for result in telling_reads(scores)[:500]:
        file = io.BytesIO()
        data.open_image(result.source).resize((256, 64)).save(file, "PNG")
        image = base64.b64encode(file.getvalue()).decode()
        page += f'<tr><td><img src="data:image/png;base64,{image}"><td>{html.escape(result.name)}'
        page += f"<br>{result.confidence:.4f}<pre>true {html.escape(result.true)}\n"
        page += f"read {html.escape(result.pred)}</pre>"
    data.write_file(path, page)


@data.one_sentence()
def main(argv=None):
    parser, add = data.make_parser(__doc__)
    add("checkpoint", nargs="?", default=predict.READER, help="(default: the one in assets)")
    add("--data", dest="root", help="crops, or a folder of train and test; see above")
    add("--split", type=str.lower, default="test", help="folder of --data (default: %(default)s)")
    add("--csv", help="write a table here: filename, true, pred, confidence, same")
    add("--json", help="write the scores here")
    add("--report", help="a new folder: write report.html there")
    predict.reading_options(add)
    args = vars(parser.parse_args(argv))
    csv_path = args.pop("csv")
    json_path = args.pop("json")
    report = args.pop("report")
    if report:
        page = check_report(report)
    if csv_path:
        data.check_output(csv_path, ".csv")
    if json_path:
        data.check_output(json_path, ".json")
    scores = evaluate(**args)
    print(describe(scores))
    if csv_path:
        write_table(csv_path, scores["reads"])
    if json_path:
        data.write_file(json_path, json.dumps(scores | {"reads": len(scores["reads"])}, indent=1))
    if report:
        write_report(page, scores)
        print(f"report       {page.resolve().as_uri()}")


if __name__ == "__main__":
    main()
