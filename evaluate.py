"""How well a checkpoint reads: plate accuracy, character error rate, mean Levenshtein distance, confusions.

    python evaluate.py ckpt.pth                      # the test split of the data it was trained on
    python evaluate.py ckpt.pth --data DIR --csv predictions.csv --json metrics.json

A checkpoint that was trained on drawn plates alone is, without --data, tested on 2,000 plates drawn from a seed that
training never uses.
"""
import argparse
import csv
import json
import math
import sys
import time
from collections import Counter

import torch

import data
import model as crnn

DRAWN_TEST, DRAWN_VAL = (2000, 2 ** 40 + 1), (1000, 2 ** 40)       # (plates, seed); training's seeds differ by construction


def levenshtein(a, b):
    """The fewest insertions, deletions and substitutions that make `b` of `a` (Levenshtein, 1966), row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def cer(trues, preds):
    """Character error rate: all edits over all true characters, in [0, inf); 0 where there are no characters."""
    return sum(map(levenshtein, preds, trues)) / max(1, sum(map(len, trues)))


def accuracy(trues, preds):
    """The share of strings read without any error, in [0, 1]."""
    return sum(t == p for t, p in zip(trues, preds)) / max(1, len(trues))


def wilson(share, n, z=1.96):
    """The 95% interval of a share seen in n trials (Wilson, 1927): (low, high) in [0, 1]."""
    if not n:
        return 0.0, 1.0
    centre, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def metrics(trues, preds):
    """The three scores of a list of reads, as a dict."""
    return dict(accuracy=accuracy(trues, preds), cer=cer(trues, preds),
                levenshtein=sum(map(levenshtein, preds, trues)) / max(1, len(trues)), n=len(trues))


def confusions(trues, preds):
    """How often which character was read as which: Counter of (true, read), over wrong reads of the right length."""
    return Counter((a, b) for t, p in zip(trues, preds) if len(t) == len(p) for a, b in zip(t, p) if a != b)


def drawn_batches(count, seed, size, batch=250):
    """The same (images, texts) for the same arguments: `count` drawn plates in batches."""
    generator, glyphs = torch.Generator().manual_seed(seed), None
    glyphs = data.load_glyphs(data.glyph_height(size))
    for k in range(0, count, batch):
        yield data.draw_plates(min(batch, count - k), size, generator, glyphs)


def read_batches(model, batches, precision):
    """(trues, preds, confidences, losses), a list each, of (images, texts) batches; a loss is the CTC loss of the truth."""
    alphabet, trues, preds, confidences, losses = model.config["alphabet"], [], [], [], []
    for images, texts in batches:
        logits = crnn.predict_logits(model, images, precision)
        read = crnn.greedy_decode(logits, alphabet)
        trues, preds = trues + texts, preds + read
        confidences += crnn.probability(logits, read, alphabet).tolist()
        losses += crnn.text_loss(logits, texts, alphabet).tolist()
    return trues, preds, confidences, losses


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", help="folder of crops, or one with a folder of the split inside (default: the one trained on)")
    parser.add_argument("--split", default="test", help="which split of --data (default: %(default)s)")
    parser.add_argument("--csv", help="write a table here: filename, true, pred, confidence, same")
    parser.add_argument("--json", help="write the scores here")
    parser.add_argument("--batch-size", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, help="threads that decode files (default: one a core)")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="(default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the first there is)")
    args = parser.parse_args(argv)
    try:
        evaluate(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def evaluate(args):
    """Print, and write where asked, all scores of one checkpoint on one split. Raises ValueError for bad input."""
    device = crnn.pick_device(args.device)
    precision = crnn.pick_precision(args.precision, device)
    model, info = crnn.load_checkpoint(args.checkpoint, data.ALPHABET, device)
    model.fold()
    alphabet, size = model.config["alphabet"], model.config["size"]
    folder = args.data or info.get("args", {}).get("data")
    if folder:
        dataset = data.PlateDataset(*data.find_crops(data.split_folder(folder, args.split), alphabet), size, args.workers)
        unknown = set("".join(dataset.texts)) - set(alphabet)
        if unknown:
            raise ValueError(f"{folder}: labels hold {''.join(sorted(unknown))}, which the checkpoint's alphabet lacks")
        batches = data.loader(dataset, data.in_batches(range(len(dataset)), args.batch_size))
        batches = data.progress(batches, math.ceil(len(dataset) / args.batch_size), "batch")
    else:
        batches = drawn_batches(*DRAWN_TEST, size)
    start = time.time()
    trues, preds, confidences, _ = read_batches(model, batches, precision)
    seconds = time.time() - start
    names = [dataset.paths[k].name for k in range(len(dataset)) if k not in dataset.bad] if folder else trues
    if not trues:
        raise ValueError(f"{folder}: no readable image; check the files")

    scores = metrics(trues, preds)
    low, high = wilson(scores["accuracy"], len(trues))
    wrong = [k for k in range(len(trues)) if trues[k] != preds[k]]
    print(f"{len(trues):,} {'images of ' + str(data.split_folder(folder, args.split)) if folder else 'drawn plates'}, {device.type} {precision}")
    print(f"accuracy     {scores['accuracy']:.4f}   95% interval {low:.4f} to {high:.4f}")
    print(f"CER          {scores['cer']:.5f}")
    print(f"Levenshtein  {scores['levenshtein']:.4f}")
    print(f"errors       {len(wrong):,}")
    for k in wrong[:5]:
        print(f"  {data.shown(names[k])}  true {trues[k]}  read {preds[k] or '(nothing)'}  confidence {confidences[k]:.3f}")
    top = confusions(trues, preds).most_common(20)
    if top:
        print("confusions   " + "  ".join(f"{a}-{b} {n}" for (a, b), n in top))
    print(f"speed        {len(trues) / seconds:.0f} images/s, files read and decoded included" if folder else "")
    if args.json:
        scores.update(images_per_second=len(trues) / seconds, interval=[low, high], errors=len(wrong), precision=precision,
                      confusions=[[a, b, n] for (a, b), n in top], left_out=len(dataset.bad) if folder else 0)
        with open(args.json, "w", encoding="utf8") as file:
            json.dump(scores, file, ensure_ascii=False, indent=1)
    if args.csv:
        with open(args.csv, "w", encoding="utf8", newline="", errors="surrogateescape") as file:
            table = csv.writer(file)
            table.writerow(["filename", "true", "pred", "confidence", "same"])
            table.writerows((names[k], trues[k], preds[k], f"{confidences[k]:.6f}", trues[k] == preds[k]) for k in range(len(trues)))


if __name__ == "__main__":
    main()
