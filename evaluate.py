"""How well a checkpoint reads: plate accuracy, character error rate, mean Levenshtein distance, confusions.

    python evaluate.py ckpt.pth                      # the test split of the data it was trained on
    python evaluate.py ckpt.pth --data DIR --csv predictions.csv --json metrics.json
    python evaluate.py ckpt.pth --report DIR         # a picture of the errors, and where they are

A checkpoint that was trained on drawn plates alone is, without --data, tested on 2,000 plates drawn from a seed that
training never uses.
"""
import argparse
import contextlib
import csv
import itertools
import json
import math
import os
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import model as crnn

DRAWN_BATCH = 250
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


def calibration_error(sure, right, bins=10):
    """The expected calibration error, in [0, 1]: how far confidences are from the share of reads that are right, the mean
    over ten bins of confidence weighted by what is in them (Naeini et al., 2015)."""
    groups = [[] for _ in range(bins)]
    for p, r in zip(sure, right):
        groups[min(int(p * bins), bins - 1)].append(p - r)
    return sum(abs(sum(group)) for group in groups) / max(1, len(sure))


def confusions(trues, preds):
    """How often which character was read as which: Counter of (true, read), over wrong reads of the right length."""
    return Counter((a, b) for t, p in zip(trues, preds) if len(t) == len(p) for a, b in zip(t, p) if a != b)


def drawn_batches(count, seed, size):
    """The same (images, texts) for the same arguments: `count` drawn plates in batches of DRAWN_BATCH."""
    generator, glyphs = torch.Generator().manual_seed(seed), data.load_glyphs(data.glyph_height(size))
    for k in range(0, count, DRAWN_BATCH):
        yield data.draw_plates(min(DRAWN_BATCH, count - k), size, generator, glyphs)


def read_batches(model, batches, precision, forms=()):
    """(trues, preds, confidences, losses), a list each, of (images, texts) batches; a loss is the CTC loss of the truth,
    in nats a character as the training loss is. forms: see model.decode."""
    alphabet, trues, preds, confidences, losses = model.config["alphabet"], [], [], [], []
    for images, texts in batches:
        logits = crnn.predict_logits(model, images, precision)
        read, sure = crnn.decode(logits, alphabet, forms)
        trues, preds, confidences = trues + texts, preds + read, confidences + sure
        losses += [loss / max(1, len(text)) for loss, text in zip(crnn.text_loss(logits, texts, alphabet).tolist(), texts)]
    return trues, preds, confidences, losses


def plate_forms(model, grammar=None):
    """The forms that reads must have: those of Chinese plates or none, as `grammar` says; where that is None, a checkpoint
    that reads such plates has them, but not the notebook's, which decoded greedily."""
    if grammar is None:
        grammar = model.config["alphabet"] == data.ALPHABET and model.config["preset"] != "notebook"
    return data.FORMS if grammar else ()


def read(model, sources, precision="auto", grammar=None, top=1, batch_size=None, workers=None):
    """Yield (plate, confidence) for each of `sources` in order: paths, or arrays (H, W, 3) or (H, W) of uint8.

    The confidence, in [0, 1], is the exact probability of the string under the model. grammar: take the likeliest string
    that is a plate (default: for checkpoints that read Chinese plates). With top > 1 it is a list of the likeliest pairs.
    A source that cannot be read gives (None, reason). batch_size: how many are read together (default: what the device
    does best), each batch by one of `workers` threads (default: one a core)."""
    size, alphabet, device = model.config["size"], model.config["alphabet"], next(model.parameters()).device
    precision, forms, sources = crnn.pick_precision(precision, device), plate_forms(model, grammar), iter(sources)
    batch_size, workers = batch_size or crnn.images_at_once(model), workers or os.cpu_count()
    turn = contextlib.nullcontext() if device.type == "cpu" else threading.Lock()       # a GPU serves one thread at a time

    def answer(batch):
        images, answers = [], [None] * len(batch)
        for k, source in enumerate(batch):
            try:
                images.append(data.read_image(source, size))
            except ValueError as error:
                answers[k] = (None, str(error))
        if images:
            with turn:
                logits = crnn.predict_logits(model, torch.stack(images), precision)
                if top == 1:
                    found = zip(*crnn.decode(logits, alphabet, forms))
                else:
                    found = (some[:top] for some in crnn.candidates(logits, alphabet, forms))
            answers = [a or next(found) for a in answers]
        return answers

    # A thread takes a batch from file to text by itself, so that none waits for another as threads that share a step do.
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            waiting = deque()
            while (batch := list(itertools.islice(sources, batch_size))) or waiting:
                if batch:
                    waiting.append(pool.submit(answer, batch))
                if len(waiting) > 2 * workers or not batch:
                    yield from waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)


def read_crops(model, folder, precision, grammar=None, workers=None):
    """The labelled crops below `folder` as four sequences: paths, trues, preds, confidences. Files that cannot be read are
    named on stderr and left out. Raises ValueError where none is left."""
    paths, trues = data.find_crops(folder, model.config["alphabet"])
    found, answers = [], read(model, paths, precision, grammar, workers=workers)
    for path, true, (pred, sure) in data.progress(zip(paths, trues, answers), len(paths), "image"):
        if pred is None:
            print(f"warning: {sure}", file=sys.stderr)
        else:
            found.append((path, true, pred, sure))
    if not found:
        raise ValueError(f"{folder}: no image in it can be read; check the files")
    return zip(*found)


def report(folder, names, trues, preds, sure, images):
    """Write folder/predictions.csv and folder/errors.png, the errors, the most confident first, with the truth above the
    read and differing characters in red. images: k to uint8 (3, H, W)."""
    os.makedirs(folder, exist_ok=True)
    write_table(os.path.join(folder, "predictions.csv"), names, trues, preds, sure)
    pictures = []
    for k in sorted((k for k in range(len(trues)) if trues[k] != preds[k]), key=lambda k: -sure[k])[:64]:
        colours = [(0, 0, 0) if a == b else (220, 0, 0) for a, b in itertools.zip_longest(preds[k], trues[k])][:len(preds[k])]
        captions = [data.text_picture(trues[k], 24), data.text_picture(preds[k][:18], 24, colours)]
        pictures.append(data.captioned(F.interpolate(images(k)[None], (64, 256))[0], captions))
    if pictures:
        data.save_sheet(pictures, os.path.join(folder, "errors.png"))


def write_table(path, names, trues, preds, sure):
    """Write the predictions as a CSV file: filename, true, pred, confidence, same."""
    with open(path, "w", encoding="utf8", newline="", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(["filename", "true", "pred", "confidence", "same"])
        table.writerows((name, t, p, f"{c:.6f}", t == p) for name, t, p, c in zip(names, trues, preds, sure))


def breakdown(trues, preds):
    """Two further lines for a list of reads: accuracy by position and by first character."""
    pairs = list(zip(trues, preds))
    lines = []
    aligned = [(t, p) for t, p in pairs if len(t) == len(p)]
    if aligned:
        places = range(max(len(t) for t, _ in aligned))
        at = lambda k: [t[k] == p[k] for t, p in aligned if len(t) > k]
        lines.append("by position  " + "  ".join(f"{k + 1} {sum(at(k)) / len(at(k)):.4f}" for k in places))
    first = Counter(t[0] for t in trues if t)
    right = Counter(t[0] for t, p in pairs if t and t == p)
    lines.append("by first     " + "  ".join(f"{c} {right[c]}/{n}" for c, n in first.most_common()))
    return lines


def evaluate(args):
    """Print, and write where asked, all scores of one checkpoint on one split. Raises ValueError for bad input."""
    device = crnn.pick_device(args.device)
    precision = crnn.pick_precision(args.precision, device)
    model, info = crnn.load_checkpoint(args.checkpoint, data.ALPHABET, device)
    alphabet, size = model.config["alphabet"], model.config["size"]
    model.fold()
    forms = plate_forms(model, args.grammar)
    root, start = args.data or info.get("args", {}).get("data"), time.time()
    if root:
        folder = data.split_folder(root, args.split)
        paths, trues, preds, sure = read_crops(model, folder, precision, args.grammar, args.workers)
        names, picture = [path.name for path in paths], lambda k: data.read_image(paths[k], size)
    else:
        batches = list(drawn_batches(*DRAWN_TEST, size))
        trues, preds, sure, _ = read_batches(model, batches, precision, forms)
        names, picture = trues, lambda k: batches[k // DRAWN_BATCH][0][k % DRAWN_BATCH]
    speed = len(trues) / (time.time() - start)

    scores = metrics(trues, preds)
    low, high = wilson(scores["accuracy"], len(trues))
    wrong = [k for k in range(len(trues)) if trues[k] != preds[k]]
    top = confusions(trues, preds).most_common(20)
    calibration = calibration_error(sure, [t == p for t, p in zip(trues, preds)])
    what = f"images of {folder}" if root else "drawn plates"
    print(f"{len(trues):,} {what}, {device.type} {precision}, {'best plate' if forms else 'greedy'}")
    print(f"accuracy     {scores['accuracy']:.4f}   95% interval {low:.4f} to {high:.4f}")
    print(f"CER          {scores['cer']:.5f}")
    print(f"Levenshtein  {scores['levenshtein']:.4f}")
    print(f"errors       {len(wrong):,}")
    for k in wrong[:5]:
        print(f"  {data.shown(names[k])}  true {trues[k]}  read {preds[k] or '(nothing)'}  confidence {sure[k]:.3f}")
    print("confusions   " + ("  ".join(f"{a}-{b} {n}" for (a, b), n in top) or "none"))
    print(f"speed        {speed:.0f} images/s, {'files read and decoded' if root else 'plates drawn'} included")
    if args.report:
        print(*breakdown(trues, preds), f"calibration  {calibration:.4f} expected error of the confidences", sep="\n")
        report(args.report, names, trues, preds, sure, picture)
    known = set()
    if root and args.split != "train" and Path(root, "train").is_dir():
        known = {data.parse_label(path, alphabet)[0] for path in data.list_images(Path(root, "train"))}
    for name, seen in (("seen", True), ("unseen", False)):
        right = [t == p for t, p in zip(trues, preds) if (t in known) == seen]
        if known and right:
            print(f"{name:12} {sum(right) / len(right):.4f} over {len(right):,} plates that are{'' if seen else ' not'} in train")
    if args.json:
        scores.update(images_per_second=speed, interval=[low, high], errors=len(wrong), precision=precision, grammar=bool(forms),
                      calibration_error=calibration, confusions=[[a, b, n] for (a, b), n in top],
                      left_out=len(data.list_images(folder)) - len(trues) if root else 0)
        Path(args.json).write_text(json.dumps(scores, ensure_ascii=False, indent=1), "utf8")
    if args.csv:
        write_table(args.csv, names, trues, preds, sure)


def reading_options(parser):
    """Add the options of every script that reads with a checkpoint."""
    parser.add_argument("--grammar", action=argparse.BooleanOptionalAction, help="take the likeliest string that is a plate (default: yes, but for the notebook's)")
    parser.add_argument("--workers", type=int, help="threads that read files (default: one a core)")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="(default: the fastest the device computes)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the first there is)")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", help="folder of crops, or one with a folder of the split inside (default: the one trained on)")
    parser.add_argument("--split", default="test", help="which split of --data (default: %(default)s)")
    parser.add_argument("--csv", help="write a table here: filename, true, pred, confidence, same")
    parser.add_argument("--json", help="write the scores here")
    parser.add_argument("--report", metavar="DIR", help="write predictions.csv and errors.png there, and print where the errors are")
    reading_options(parser)
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(encoding="utf8", errors="replace")
    crnn.keep_memory()
    try:
        evaluate(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
