"""Read licence plates from image files.

    python predict.py crop.jpg                              # path, plate, confidence, by tabs
    python predict.py ckpt.pth crop.jpg                     # the same with your own checkpoint
    python predict.py ckpt.pth FOLDER "more/*.png"          # folders and quoted patterns
    python predict.py ckpt.pth crop.jpg --explain ctc.png   # how CTC read it, as a picture
    python predict.py ckpt.pth --export model.onnx          # for use without these files

In Python:

    from predict import load, read
    network = load("ckpt.pth")
    for plate, confidence, alternatives, error in read(network, ["crop.jpg", array]):
        print(plate, confidence)

It reads crops of one plate each; a detector comes before it. Without a checkpoint it takes the
reader in assets, which learnt from synthetic plates alone.
"""

import argparse
import copy
import glob
import io
import itertools
import json
import os
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torchvision.transforms.functional import InterpolationMode, affine, to_pil_image

import data
import model as crnn

SURE = 0.8  # a read less probable than this gets two more looks
READER = Path(__file__).with_name("assets") / "reader.pth"  # where no checkpoint is named

# ---------------------------------------------------------------------------------------
# Reading


class Read(NamedTuple):
    """What was read from one image."""

    plate: str  # "" if the image holds no character, or if there is an error
    confidence: float  # the probability of `plate`, in [0, 1]; if unsure, the mean of three looks
    alternatives: list  # [(plate, confidence), ...], the likeliest first: the read itself
    error: str  # "" unless the image could not be read


def load(path, device="auto"):
    """A checkpoint of train.py or of the notebook, as a network ready to read.

    Raises ValueError with one sentence if it is none."""
    device = crnn.pick_device(device)
    network, _ = crnn.load_checkpoint(path, data.ALPHABET, device)
    return crnn.fold_norms(network)


def plate_patterns(network, grammar=None):
    """The plate patterns that reads must match: Chinese plates' if `grammar`, else none.

    grammar None: yes for networks that read Chinese plates; no for the notebook's, which decoded
    greedily."""
    if grammar is None:
        reads_plates = network.config["alphabet"] == data.ALPHABET
        grammar = reads_plates and network.config["preset"] != "notebook"
    return data.PATTERNS if grammar else ()


def look_again(images):
    """Two more looks at each image: (B, 3, H, W) to (2 * B, 3, H, W), uint8.

    They come a little closer and tilt the image to either side. What is misread at first sight
    is often read well from another angle (test-time augmentation; Krizhevsky et al., 2012)."""
    zoom = 1.04
    looks = []
    for tilt in (2.5, -2.5):  # degrees
        shear = [0.0, tilt]
        look = affine(images, 0.0, [0, 0], zoom, shear, InterpolationMode.BILINEAR)
        looks.append(look)
    return torch.stack(looks, 1).flatten(0, 1)


def read_images(get_logits, images, alphabet, patterns, top):
    """One Read for each image of uint8 (B, 3, H, W). get_logits: from images to logits (T, B, C).

    Greedy; but with `patterns`, a read that is no plate or not sure gives way to the likeliest
    plate in three looks. With top > 1 every image goes through the beam search."""
    logits = get_logits(images)  # (T, B, C)
    greedy = list(zip(*crnn.decode(logits, alphabet)))
    unsure = []
    for b, (text, probability) in enumerate(greedy):
        is_sure = probability > SURE and crnn.is_plate(text, patterns)
        if patterns and not is_sure:
            unsure.append(b)
    looks = list(logits.split(1, 1))  # (T, 1, C) of each image
    if unsure:
        more_looks = get_logits(look_again(images[unsure]))  # (T, 2 * len(unsure), C)
        for b, two_looks in zip(unsure, more_looks.split(2, 1)):
            looks[b] = torch.cat((looks[b], two_looks), 1)  # (T, 3, C)
    reads = []
    for b, pair in enumerate(greedy):
        pairs = [pair]
        if b in unsure or top > 1:
            pairs = crnn.candidates(looks[b], alphabet, patterns)[:top] or pairs
        plate, confidence = pairs[0]
        reads.append(Read(plate, confidence, pairs, ""))
    return reads


def read(network, sources, precision="auto", grammar=None, top=1, batch_size=None, workers=None):
    """Yield a Read for each of `sources`, in order: paths, or uint8 arrays (H, W, 3) or (H, W).

    Arrays are RGB: turn OpenCV's BGR round first, with array[:, :, ::-1]. grammar: see
    plate_patterns. top: how many alternatives to give. batch_size: images read together
    (default: what the device does best). workers: threads (default: one a core)."""
    if isinstance(sources, (str, os.PathLike)):
        sources = [sources]
    device = next(network.parameters()).device
    precision = crnn.pick_precision(precision, device)
    patterns = plate_patterns(network, grammar)
    batch_size = batch_size or crnn.images_at_once(network)
    workers = workers or data.count_cpus()
    alphabet = network.config["alphabet"]
    size = network.config["size"]
    # a GPU serves one thread at a time, each core of a CPU its own
    device_free = threading.Semaphore(workers if device.type == "cpu" else 1)

    def get_logits(images):
        with device_free:
            return crnn.predict_logits(network, images, precision).cpu()

    def read_batch(batch):
        images = {}
        reads = {}
        for k, source in enumerate(batch):
            try:
                images[k] = data.read_image(source, size)
            except ValueError as error:
                reads[k] = Read("", 0.0, [], str(error))
        if images:
            pixels = torch.stack(list(images.values()))
            good = read_images(get_logits, pixels, alphabet, patterns, top)
            reads |= zip(images, good)
        return [reads[k] for k in range(len(batch))]

    # Each thread takes its own batch from file to text, with one core for its arithmetic: so
    # none waits for another, as threads do that share the work of one batch.
    torch_threads = torch.get_num_threads()
    sources = iter(sources)  # may be endless; 2 * workers + 1 batches are read ahead
    waiting = deque()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            while batch := list(itertools.islice(sources, batch_size)):
                waiting.append(pool.submit(read_batch, batch))
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
    finally:
        torch.set_num_threads(torch_threads)  # a pool's setting may be that of the whole process


def names_checkpoint(argument):
    """Whether an argument names a checkpoint, and not an image, a folder or a pattern."""
    is_image = Path(argument).suffix.lower() in data.IMAGE_SUFFIXES
    is_pattern = glob.has_magic(argument) and not os.path.isfile(argument)
    return not is_image and not is_pattern and not os.path.isdir(argument)


def find_images(arguments):
    """The image files that paths, folders and patterns name, in the order given."""
    for argument in arguments:
        if os.path.isdir(argument):
            yield from data.list_images(argument)
            continue
        paths = [Path(argument)]  # one that does not exist is reported when it is read
        if not os.path.lexists(argument):  # so that a file may be called [1].jpg
            matches = glob.glob(argument, recursive=True)
            matches = sorted(map(Path, matches))
            images = [path for path in matches if path.suffix.lower() in data.IMAGE_SUFFIXES]
            paths = images or paths
        yield from paths


# ---------------------------------------------------------------------------------------
# CTC at work, as a picture

STEP = 28  # pixels of a time step in the picture
BARS = 130  # pixels of a bar for probability 1
ROW = 38  # pixels from one string to the next


def draw_steps(page, logits, alphabet, top):
    """For each time step, from `top` down: a bar as high as its best class is probable, and that
    class, "-" for blank. A line in the crop above marks each step that is no blank."""
    draw = ImageDraw.Draw(page)
    floor = top + BARS + 20
    probabilities = logits[:, 0].softmax(1)  # (T, C)
    highest, classes = probabilities.max(1)  # (T,) each
    left = 0
    for probability, best in zip(highest.tolist(), classes.tolist()):
        char = "-"
        colour = "silver"
        if best != crnn.BLANK:
            char = alphabet[best - 1]
            colour = "royalblue"
            middle = left + STEP // 2
            draw.line((middle, 0, middle, top), "gold")
        bar_top = floor - round(probability * BARS)
        bar = (left + 3, bar_top, left + STEP - 4, floor)
        draw.rectangle(bar, colour)
        picture = to_pil_image(data.text_picture(char, 32))
        page.paste(picture, (left + 5, floor + 6))
        left += STEP


def explain(network, path, out, precision="auto", grammar=None):
    """Write a picture of CTC at work on one image: the crop, the time steps, the best strings."""
    image = data.read_image(path, network.config["size"])
    device = next(network.parameters()).device
    precision = crnn.pick_precision(precision, device)
    logits = crnn.predict_logits(network, image[None], precision).cpu()  # (T, 1, C)
    (result,) = read(network, [path], precision, grammar, top=4)
    pairs = result.alternatives
    width = STEP * len(logits)  # every time step stands below the columns it comes from
    crop = to_pil_image(image)
    height = width * crop.height // crop.width
    crop = crop.resize((width, height))
    y = crop.height + BARS + 72  # where the strings begin
    height = y + 8 + ROW * len(pairs)
    page = Image.new("RGB", (width, height), "white")
    page.paste(crop)
    draw_steps(page, logits, network.config["alphabet"], crop.height)
    draw = ImageDraw.Draw(page)
    for text, probability in pairs:
        picture = to_pil_image(data.text_picture(text, 32))
        page.paste(picture, (8, y))
        place = (picture.width + 24, y + 8)
        draw.text(place, f"{probability:.4f}", "grey", font_size=16)
        y += ROW
    data.write_file(out, data.encode_image(page, "PNG"))


# ---------------------------------------------------------------------------------------
# For other runtimes


def save_onnx(program, test, facts, out):
    """Write an exported program as .onnx. Returns what onnxruntime answers to `test`."""
    names = {"input_names": ["images"], "output_names": ["logits"]}
    try:
        onnx_program = torch.onnx.export(program, dynamo=True, **names)
        onnx_program.model.metadata_props.update(facts)
        answer = onnx_program(test)[0]
    except ImportError as error:
        packages = "pip install onnx onnxscript onnxruntime"
        raise ValueError(f"{out}: needs {error.name}; install all with: {packages}") from None
    data.write_file(out, onnx_program.model_proto.SerializeToString())
    return answer


def export(network, out):
    """Write the network for use without these files, as .pt2 or .onnx, and check that it agrees.

    Takes uint8 (B, 3, H, W) and gives logits (T, B, C), for B from 1 to 4096. The file also holds
    what the reader of its logits needs: the alphabet, the size, the blank. Raises ValueError if
    `out` is no such file or the file gives other logits."""
    suffix = Path(out).suffix
    if suffix not in (".pt2", ".onnx"):
        raise ValueError(f"{out}: name it .pt2 or .onnx")
    data.check_output(out, suffix)
    network = copy.deepcopy(network).cpu()
    height, width = network.config["size"]
    facts = {
        "alphabet": network.config["alphabet"],
        "size": f"{height} {width}",
        "blank": str(crnn.BLANK),
    }
    # batches of two sizes, to see that the number of images is not built in
    shape = (3, height, width)
    example = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    test = torch.randint(0, 256, (5, *shape), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=4096)
    shapes = ({0: batch},)
    program = torch.export.export(network, (example,), dynamic_shapes=shapes)
    if suffix == ".onnx":
        answer = save_onnx(program, test, facts, out)
    else:
        buffer = io.BytesIO()
        extra_files = {"facts.json": json.dumps(facts)}
        torch.export.save(program, buffer, extra_files=extra_files)
        data.write_file(out, buffer.getvalue())
        answer = torch.export.load(out).module()(test)
    with torch.no_grad():
        errors = (answer - network(test)).abs()
    difference = errors.max().item()
    if difference > 1e-3:
        raise ValueError(f"{out}: differs from the network by {difference:.1e}; do not use it")
    print(f"{out}: written; agrees with the network to {difference:.1e}")


# ---------------------------------------------------------------------------------------


def machine_options(parser):
    """Add the options that say what to compute with, the same in train, evaluate and predict."""
    add = parser.add_argument
    add("--workers", type=data.positive_int, help="threads that read files (default: one a core)")
    add("--device", default="auto", help="cuda, mps or cpu (default: the first there is)")
    add(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16", "fp16"],
        help="(default: the fastest the device computes)",
    )


def reading_options(parser):
    """Add the options of every script that reads with a checkpoint."""
    parser.add_argument(
        "--grammar",
        action=argparse.BooleanOptionalAction,
        help="read only what is a plate (default: yes; no for the notebook's and other alphabets)",
    )
    machine_options(parser)


def print_reads(paths, reads):
    """Print a line for each image that was read. Returns how many were not."""
    failures = 0
    pairs = zip(paths, reads)
    for path, result in data.show_progress(pairs, len(paths), "image"):
        if result.error:
            failures += 1
            print(f"error: {result.error}", file=sys.stderr)
            continue
        cells = [f"{plate}\t{confidence:.4f}" for plate, confidence in result.alternatives]
        print(data.printable(path), *cells, sep="\t")
    return failures


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", nargs="?", metavar="CKPT", help="(default: the reader in assets)")
    add("paths", nargs="*", metavar="PATH", help="image files, folders, quoted patterns")
    add(
        "--top", type=data.positive_int, default=1, metavar="K", help="print the K likeliest plates"
    )
    add("--explain", metavar="OUT.png", help="draw how the first image was read")
    add("--export", metavar="OUT", help="write the network as .pt2 or .onnx")
    reading_options(parser)
    args = parser.parse_intermixed_args(argv)  # options may stand between the paths
    if args.checkpoint and not names_checkpoint(args.checkpoint):
        args.paths.insert(0, args.checkpoint)
        args.checkpoint = None
    return args


def main(argv=None):
    args = parse_arguments(argv)
    with data.plain_errors():
        if args.explain:
            data.check_output(args.explain, ".png")
        if not args.checkpoint:
            print(f"reading with {READER}", file=sys.stderr)
        network = load(args.checkpoint or READER, args.device)
        if args.export:
            export(network, args.export)
        paths = list(find_images(args.paths))
        if args.export and not args.paths:
            return
        if not paths:
            names = " ".join(args.paths) or "PATH"
            raise ValueError(f"{names}: no images there; name files, folders or quoted patterns")
        if args.explain:
            explain(network, paths[0], args.explain, args.precision, args.grammar)
        start = time.time()
        reads = read(network, paths, args.precision, args.grammar, args.top, workers=args.workers)
        failures = print_reads(paths, reads)
        good = len(paths) - failures
        speed = good / (time.time() - start)
        print(f"{good:,} read, {failures:,} unreadable, {speed:.0f} images/s", file=sys.stderr)
        if failures:
            sys.exit(1)


if __name__ == "__main__":
    main()
