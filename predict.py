"""Read licence plates from image files.

    python predict.py ckpt.pth crop.jpg                     # path, plate and confidence, tab-separated
    python predict.py ckpt.pth FOLDER "more/*.png"          # folders and quoted patterns

In Python:

    from predict import load, read
    model = load("ckpt.pth")
    plates = read(model, ["crop.jpg", array])               # [("皖AX511H", 0.998), ...]

It reads crops of one plate each; a detector comes before it.
"""
import argparse
import glob
import itertools
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import data
import model as crnn


def load(path, device="auto"):
    """A checkpoint of train.py or of the notebook as a network ready to read. Raises ValueError if it is none."""
    model, _ = crnn.load_checkpoint(path, data.ALPHABET, crnn.pick_device(device))
    return model.fold()


def read(model, sources, precision="auto", batch_size=256, workers=None):
    """Yield (plate, confidence) for each of `sources` in order: paths, or arrays (H, W, 3) or (H, W) of uint8.

    The confidence, in [0, 1], is the exact probability of the string under the model. A source that cannot be read
    gives (None, reason)."""
    size, device = model.config["size"], next(model.parameters()).device
    precision, sources = crnn.pick_precision(precision, device), iter(sources)

    def decode(source):
        try:
            return data.read_image(source, size)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        fetch = lambda: list(pool.map(decode, itertools.islice(sources, batch_size)))
        with ThreadPoolExecutor(1) as ahead:                    # decodes the next batch while the network reads this one
            future = ahead.submit(fetch)
            while items := future.result():
                future = ahead.submit(fetch)
                images = [x for x in items if isinstance(x, torch.Tensor)]
                answers = iter(())
                if images:
                    logits = crnn.predict_logits(model, torch.stack(images), precision)
                    texts = crnn.greedy_decode(logits, model.config["alphabet"])
                    answers = zip(texts, crnn.probability(logits, texts, model.config["alphabet"]).tolist())
                yield from (next(answers) if isinstance(x, torch.Tensor) else (None, x) for x in items)


def find(arguments):
    """The image files that paths, folders and patterns name, in the order given, those of a folder or pattern sorted."""
    for argument in arguments:
        if os.path.isdir(argument):
            yield from data.list_images(argument)
        elif glob.has_magic(argument) and not os.path.lexists(argument):
            yield from sorted(Path(p) for p in glob.glob(argument, recursive=True) if Path(p).suffix.lower() in data.IMAGES) or [Path(argument)]
        else:
            yield Path(argument)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="image files, folders, quoted patterns")
    parser.add_argument("--batch-size", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, help="threads that decode files (default: one a core)")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="(default: the fastest the device computes)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the first there is)")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(encoding="utf8", errors="surrogateescape")
    try:
        model, paths = load(args.checkpoint, args.device), list(find(args.paths))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    failed, start = 0, time.time()
    answers = read(model, paths, args.precision, args.batch_size, args.workers)
    for path, (plate, confidence) in data.progress(zip(paths, answers), len(paths), "image"):
        if plate is None:
            failed += 1
            print(f"error: {confidence}", file=sys.stderr)
        else:
            name = str(path).replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
            print(f"{name}\t{plate}\t{confidence:.4f}")
    seconds = time.time() - start
    print(f"{len(paths) - failed:,} read, {failed:,} unreadable, {(len(paths) - failed) / seconds:.0f} images/s", file=sys.stderr)
    sys.exit(1 if failed or not paths else 0)


if __name__ == "__main__":
    main()
