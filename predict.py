"""Read licence plates from image files.

    python predict.py crop.jpg                              # path, plate, confidence, by tabs
    python predict.py ckpt.pth crop.jpg                     # the same with your own checkpoint
    python predict.py ckpt.pth FOLDER "more/*.png"          # folders and quoted patterns
    python predict.py FOLDER --adapt                        # photographs of one place
    python predict.py FOLDER --adapt --label OUT            # name crops by their plates
    python predict.py ckpt.pth crop.jpg --explain ctc.png   # how CTC read it, as a picture
    python predict.py ckpt.pth --export model.onnx          # for use without these files

In Python:

    from predict import load, read
    network = load("ckpt.pth")
    for plate, confidence, alternatives, error in read(network, ["crop.jpg", array]):
        print(plate, confidence)

It reads crops of one plate each; a detector comes before it. Without a checkpoint it takes the
pretrained model in assets, which learnt from drawn plates alone.
"""

import argparse
import functools
import glob
import io
import json
import os
import shutil
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.transforms.functional import InterpolationMode, affine, to_pil_image

import data
import model as crnn

READER = Path(__file__).with_name("assets") / "reader.pth"  # where no checkpoint is named
SURE = 0.8  # a read less probable than this gets two more views
STARTING = threading.Lock()
SURE_ADAPTED = 0.99  # the same with adaptation, which needs the candidates

# ---------------------------------------------------------------------------------------
# Reading


class Read(NamedTuple):
    """What was read from one image."""

    plate: str  # "" if there is an error; an image without a plate gets some plate as well
    confidence: float  # its probability, in [0, 1]; if unsure, the mean of three views
    alternatives: list  # [(plate, confidence), ...], the likeliest first: the read itself
    error: str  # "" unless the image could not be read


def load(path=READER, device=None):
    """A checkpoint of train.py as a network ready to read. Raises model.CheckpointError."""
    return crnn.fold_norms(crnn.load_checkpoint(path, crnn.pick_device(device))[0])


def plate_patterns(network, grammar=None):
    """The plate patterns that reads must match: Chinese plates' if `grammar`, else none.

    grammar None: yes for networks that read Chinese plates; no for the baseline's, which decoded
    greedily."""
    if grammar is None:
        config = network.config
        grammar = config["alphabet"] == data.ALPHABET and config["model"] == "small"
    return data.PATTERNS if grammar else ()


def more_views(images):
    """Two more views of each image: (B, 3, H, W) to (2 * B, 3, H, W), uint8.

    They come a little closer and tilt the image to either side. What is misread at first sight
    is often read well from another angle (test-time augmentation; Krizhevsky et al., 2012)."""
    tilted = [
        affine(images, 0.0, [0, 0], 1.04, [0.0, degrees], InterpolationMode.BILINEAR)
        for degrees in (2.5, -2.5)
    ]
    return torch.stack(tilted, 1).flatten(0, 1)


def read_images(get_logits, images, alphabet, patterns, top=1, adapt=False):
    """Strings for each image of uint8 (B, 3, H, W): B lists of (text, probability), the best first.

    get_logits: from images to logits (T, B, C). Greedy; but with `patterns`, a read that is no
    plate or not sure gives way to the likeliest plates in three views. With top > 1 every image
    goes through the beam search."""
    logits = get_logits(images)  # (T, B, C)
    texts = crnn.greedy_decode(logits, alphabet)
    answers = [[pair] for pair in zip(texts, crnn.probabilities(logits, texts, alphabet))]
    views = list(logits.split(1, 1))  # (T, 1, C) of each image
    unsure = []
    for k, ((text, probability),) in enumerate(answers):
        is_sure = probability > (SURE_ADAPTED if adapt else SURE)
        if patterns and not (is_sure and crnn.is_plate(text, patterns)):
            unsure.append(k)
    if unsure:
        more_logits = get_logits(more_views(images[unsure]))  # (T, 2 * len(unsure), C)
        for k, two in zip(unsure, more_logits.split(2, 1)):
            views[k] = torch.cat((views[k], two), 1)  # (T, 3, C)
    for k in range(len(images)) if top > 1 else unsure:
        log_probs = views[k][:, 0].log_softmax(1)  # (T, C)
        strings = crnn.beam_search(log_probs, alphabet, patterns)
        if adapt:  # the search drops most provinces of a blurred plate
            strings += [char + text[1:] for text in strings[:3] for char in data.PROVINCES]
        strings = list(dict.fromkeys(strings))
        answers[k] = crnn.candidates(views[k], strings, alphabet)[:40] or answers[k]
    return answers


def read_batch(sources, network, precision, patterns, top, adapt):
    """A Read with all its candidates for each of a list of sources, see read()."""
    get_logits = functools.partial(crnn.predict_logits, network, precision=precision)
    config = network.config
    loaded = [data.attempt(data.load_image, source, config["size"]) for source in sources]
    images = [image for image in loaded if isinstance(image, torch.Tensor)]
    answers = []
    if images:
        stack = torch.stack(images)
        answers = read_images(get_logits, stack, config["alphabet"], patterns, top, adapt)
    reads = [Read(*pairs[0], pairs, "") for pairs in answers]
    for k, image in enumerate(loaded):
        if isinstance(image, data.InputError):
            reads.insert(k, Read("", 0.0, [], str(image)))
    return reads


def start_workers(count):
    """Threads that compute with one core each, so that none waits for another's share of a batch.

    torch keeps a number of threads for itself, and one for each thread: the former is as before."""
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    with STARTING:
        threads = torch.get_num_threads()
        together = threading.Barrier(count)  # so that each starts
        list(pool.map(lambda _: together.wait(), range(count)))
        torch.set_num_threads(threads)
    return pool


def read_all(sources, batch_size, network, *options):
    """Yield the reads of read_batch, in order. Each worker takes its own batch.

    If `sources` raises an error, the reads of what it gave before come first."""
    count = torch.get_num_threads() if network.fc.weight.device.type == "cpu" else 1
    pool = start_workers(count)
    sources = iter(sources)
    ended = None  # by StopIteration, or by another error
    waiting = deque()
    try:
        while waiting or not ended:
            batch = []
            while not ended and len(batch) < batch_size:
                try:
                    source = next(sources)
                    # a camera may fill its array again
                    batch.append(source.copy() if isinstance(source, np.ndarray) else source)
                except Exception as error:
                    ended = error
            if batch:
                waiting.append(pool.submit(read_batch, batch, network, *options))
            if waiting and (ended or len(waiting) > count):
                yield from waiting.popleft().result()
        if not isinstance(ended, StopIteration):
            raise ended
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def adapt_to_place(reads, rounds=20):
    """Reads weighed by how common their provinces and cities are among all the reads of a place.

    A network that learnt from all provinces alike gives a posterior under an even prior. Where a
    camera stands, few provinces are common. EM finds which, without a label: the prior weighs the
    candidates of each image, and is the mean of these posteriors (label shift; Saerens, Latinne
    and Decaestecker, 2002). The confidence becomes the adapted posterior."""
    reads = list(reads)
    if len(reads) < 5:  # of which nobody can tell what is common
        return reads
    cities = Counter()  # the expected number of plates that begin with these two characters
    for _ in range(rounds):
        last = cities
        cities = Counter()
        provinces = Counter()
        for city, number in last.items():
            provinces[city[:1]] += number
        total = sum(provinces.values())
        adapted = []
        for read in reads:
            weights = {}
            for text, probability in read.alternatives:
                # as if each province had been seen half a time before, and each city two times
                in_province = provinces[text[:1]]
                province = (in_province + 0.5) / (total / len(data.PROVINCES) + 0.5)
                city = (last[text[:2]] + 2) / (in_province / len(data.LETTERS) + 2)
                weights[text] = probability * province * city
            # all strings that are no candidates keep their weight
            rest = 1 - sum(probability for _, probability in read.alternatives)
            norm = rest + sum(weights.values())
            pairs = sorted(weights.items(), key=lambda pair: -pair[1])
            pairs = [(text, weight / norm) for text, weight in pairs]
            for text, share in pairs:
                cities[text[:2]] += share
            adapted.append(Read(*pairs[0], pairs, "") if pairs else read)
    return adapted


def read(network, sources, precision=None, grammar=None, top=1, adapt=False, batch_size=None):
    """An iterator over a Read for each of `sources`, in order.

    sources: one image or many: paths, bytes, Pillow images, or uint8 arrays (H, W, 3) or (H, W).
    Arrays are RGB: turn OpenCV's BGR round first, with array[:, :, ::-1]. A batch for each
    core is taken before the first answer; for a live camera call next(read(network, frame)).

    precision: "fp32", "bf16" or "fp16" (default: the device's fastest). grammar: see
    plate_patterns. top: how many alternatives to give. adapt: see adapt_to_place; a read then
    depends on all the others, and the first comes after the last image. batch_size: images read
    together (default: what the device does best)."""
    precision = precision or crnn.pick_precision(network.fc.weight.device)
    patterns = plate_patterns(network, grammar)
    if adapt and not patterns:
        raise data.InputError("--adapt: only Chinese plates have provinces; drop it")
    options = (network, precision, patterns, top, adapt)
    one = (str, os.PathLike, bytes, Image.Image, type(None))
    if isinstance(sources, one) or isinstance(sources, np.ndarray) and sources.ndim < 4:
        reads = read_batch([sources], *options)
    else:
        reads = read_all(sources, batch_size or crnn.images_at_once(network), *options)
    reads = adapt_to_place(reads) if adapt else reads
    return (read._replace(alternatives=read.alternatives[:top]) for read in reads)


# ---------------------------------------------------------------------------------------
# What else the command line does


def find_images(arguments):
    """The image files that paths, folders and patterns name, in the order given."""
    for argument in arguments:
        if os.path.isdir(argument):
            yield from data.list_images(argument)
        elif os.path.lexists(argument):  # so that a file may be called [1].jpg
            yield argument
        else:  # one that does not exist is reported when it is read
            yield from sorted(glob.glob(argument, recursive=True)) or [argument]


def explain(network, path, out, precision=None, grammar=None):
    """Write a picture of CTC at work on one image: the crop, below it for each time step the
    likeliest class ("-" is blank) and how likely it is, and the best strings."""
    from assets import plates

    data.check_output(out, ".png", [path])
    alphabet = network.config["alphabet"]
    precision = precision or crnn.pick_precision(network.fc.weight.device)
    get_logits = functools.partial(crnn.predict_logits, network, precision=precision)
    get_logits = functools.lru_cache(get_logits)  # the first view is computed once
    image = data.load_image(path, network.config["size"])
    images = image[None]
    (pairs,) = read_images(get_logits, images, alphabet, plate_patterns(network, grammar), top=4)
    probabilities, classes = get_logits(images)[:, 0].softmax(1).max(1)  # (T,) each
    step = 28  # pixels of a time step in the picture
    width = step * len(classes)  # every time step stands below the columns it comes from
    crop = to_pil_image(image).resize((width, width * image.shape[1] // image.shape[2]))
    bars = Image.new("RGB", (width, 180), "white")
    draw = ImageDraw.Draw(bars)
    for left, best, share in zip(range(0, width, step), classes.tolist(), probabilities.tolist()):
        is_blank = best == crnn.BLANK
        bar = (left + 3, 140 - 130 * share, left + step - 4, 140)
        draw.rectangle(bar, "silver" if is_blank else "royalblue")
        char = "-" if is_blank else alphabet[best - 1]
        bars.paste(plates.text_picture(char, 32), (left + 5, 146))
    strings = [plates.text_picture(f"{text} {share:.4f}", 32) for text, share in pairs[:4]]
    plates.sheet([crop, bars, *strings], 1).save(out)


def export(network, out):
    """Write a network on the CPU for use without these files, as .pt2 or .onnx.

    It takes uint8 (B, 3, H, W) with B at least 1 and gives logits (T, B, C). The file also holds
    what the reader of its logits needs: the alphabet, the size, the blank."""
    is_onnx = Path(out).suffix == ".onnx"
    data.check_output(out, ".onnx" if is_onnx else ".pt2")
    facts = {key: str(network.config[key]) for key in ("alphabet", "size")} | {"blank": "0"}
    example = torch.zeros(2, 3, *network.config["size"], dtype=torch.uint8)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(network, (example,), dynamic_shapes=shapes)
    file = io.BytesIO()
    if is_onnx:  # needs onnx and onnxscript, and says so
        names = {"input_names": ["images"], "output_names": ["logits"]}
        onnx = torch.onnx.export(program, dynamo=True, **names)
        onnx.model.metadata_props.update(facts)
        file.write(onnx.model_proto.SerializeToString())
    else:
        torch.export.save(program, file, extra_files={"facts.json": json.dumps(facts)})
    data.write_file(out, file.getvalue())
    print(f"{out}: written")


def reading_options(add):
    """Add the options of every script that reads with a checkpoint."""
    switch = argparse.BooleanOptionalAction
    add("--grammar", action=switch, help="read only plates (default: not for other alphabets)")
    add(
        "--adapt", action="store_true", help="5 images or more of one place: each helps to read all"
    )
    data.machine_options(add)


def keep(path, result, folder, number, above):
    """Copy a crop to `folder`, named by its plate; to folder/unsure if it is less sure."""
    is_sure = result.confidence >= above
    # "~" marks a guess, which training leaves out until a person corrects the name
    name = f"{number:06}-{result.plate}{'' if is_sure else '~'}{Path(path).suffix}"
    target = Path(folder, "" if is_sure else "unsure", name)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


def main(argv=None):
    parser = data.make_parser("predict.py", __doc__)
    add = parser.add_argument
    add("paths", nargs="*", metavar="[CKPT.pth] PATH", help="images, folders, quoted patterns")
    add("--top", type=data.number(int, 1, 1000), default=1, help="print the K likeliest plates")
    add("--label", metavar="OUT", help="copy the crops to OUT, named by what was read")
    add("--above", type=float, default=0.9, help="those less sure go to OUT/unsure (%(default)s)")
    add("--explain", metavar="OUT.png", help="draw how the first image was read")
    add("--export", metavar="OUT", help="write the network as .pt2 or .onnx")
    reading_options(add)
    with data.one_sentence():
        args = parser.parse_intermixed_args(argv)  # options may stand between the paths
        is_named = args.paths and args.paths[0].endswith(".pth")
        checkpoint = args.paths.pop(0) if is_named else READER
        paths = list(find_images(args.paths))
        if args.export:
            export(load(checkpoint, "cpu"), args.export)
            if not paths:
                return
        if not paths:
            raise data.InputError(f"{' '.join(args.paths) or 'PATH'}: no images there; name some")
        network = load(checkpoint, args.device)
        if args.explain:
            explain(network, paths[0], args.explain, args.precision, args.grammar)
        start = time.perf_counter()
        failures = 0
        reads = read(network, paths, args.precision, args.grammar, args.top, args.adapt)
        for number, (path, result) in enumerate(zip(paths, reads)):
            if result.error:
                failures += 1
                print(f"error: {result.error}", file=sys.stderr)
                continue
            cells = [f"{plate}\t{confidence:.4f}" for plate, confidence in result.alternatives]
            print(data.printable(path), *cells, sep="\t")
            if args.label:
                keep(path, result, args.label, number, args.above)
        good = len(paths) - failures
        speed = good / max(1e-9, time.perf_counter() - start)
        print(f"{good:,} read, {failures:,} unreadable, {speed:.0f} images/s", file=sys.stderr)
        if failures:
            sys.exit(1)


if __name__ == "__main__":
    main()
