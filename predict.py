"""Lesson 4, predict: read licence plates, and what to do where the best path is wrong.

    python predict.py crop.jpg                              # path, plate, confidence, by tabs
    python predict.py ckpt.pth crop.jpg                     # the same with your own checkpoint
    python predict.py ckpt.pth FOLDER "more/*.png"          # folders and quoted patterns
    python predict.py FOLDER --adapt                        # photographs of one place
    python predict.py FOLDER --adapt --label OUT            # name crops by their plates
    python predict.py ckpt.pth crop.jpg --explain ctc.png   # how CTC read it, as a picture
    python predict.py ckpt.pth --export model.pt2           # for use without these files

In Python:

    from predict import load, read
    network = load("ckpt.pth")
    for plate, confidence, alternatives, error in read(network, ["crop.jpg", array]):
        print(plate, confidence)

A sure read is greedy. An unsure one is looked at in four views, searched for plates alone, and
perhaps cut in two rows; --adapt weighs it by the other images of the place. model.py (lesson 2) has
the search, and evaluate.py (lesson 5) scores what this file reads.

It reads crops of one plate each; a detector comes before it. Without a checkpoint it takes the
pretrained model in assets, which learnt from drawn plates alone.
"""

import argparse
import contextlib
import glob
import io
import itertools
import json
import os
import sys
import warnings
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.functional import InterpolationMode, affine, resize, to_pil_image

import data
import model

READER = Path(__file__).parent / "assets/reader.pth"  # where no checkpoint is named

# ---------------------------------------------------------------------------------------
# Reading


# What was read from one image.
# plate: "" if there is an error, or if only plates are read and the image shows none
# confidence: its probability, in [0, 1]; if unsure, the mean of four views; with adapt, the
#     adapted posterior
# alternatives: [(plate, confidence), ...], the likeliest first: the read itself
# error: "" unless the image could not be read
Read = namedtuple("Read", "plate confidence alternatives error")


def load(path=READER, device=None):
    """A checkpoint of train.py as a network ready to read. Raises OSError with one sentence."""
    return model.load_checkpoint(path, model.pick_device(device))[0]


def plate_patterns(network, grammar):
    """The plate patterns that reads must match: Chinese plates' if `grammar`, else none.

    grammar None: yes for networks that read Chinese plates. The baseline's reads were greedy."""
    if grammar is None:
        grammar = data.is_chinese(network.config["alphabet"])
    return data.PATTERNS if grammar else ()


# What is misread at first sight is often read well from another angle or nearer by: how much
# larger the image is seen, and by how many degrees it is tilted (test-time augmentation;
# Krizhevsky et al., 2012)
VIEWS = ((1.04, 4.0), (1.04, -4.0), (1.12, 0.0))


def read_batch(sources, network, precision, patterns, top, adapt):
    """A Read with all its candidates for each of a list of sources.

    Greedy; but with `patterns`, a read that is no plate or not sure gives way to the likeliest
    plates in four views, or to a plate of two rows. What is no plate then gets no read: "", with
    confidence 0. With top > 1 every image goes through the beam search."""
    size = network.config["size"]
    alphabet = network.config["alphabet"]
    images = torch.zeros(len(sources), 3, *size, dtype=torch.uint8)  # black if unreadable
    joined = {}
    errors = {}
    for k, source in enumerate(sources):
        try:
            image = data.open_image(source)
            images[k] = data.fit(image, size)
            # so narrow are two rows, or one in a loose crop
            if patterns and 1 < image.width / image.height < 1.9:
                joined[k] = data.join_rows(image)
        except data.ImageError as error:
            errors[k] = Read("", 0.0, [], str(error))
    logits = model.predict_logits(network, images, precision)  # (T, B, C)
    texts = model.greedy_decode(logits, alphabet)
    shares = model.probabilities(logits, texts, alphabet).tolist()
    threshold = 0.99 if adapt else 0.8  # adaptation needs the candidates
    reads = []
    for k, answer in enumerate(zip(texts, shares)):
        if k in errors:
            reads.append(errors[k])
            continue
        text, share = answer
        answers = [answer]
        views = logits[:, k : k + 1]  # (T, 1, C)
        is_sure = not patterns or (share > threshold and model.is_plate(text, patterns))
        if not is_sure:
            seen = [
                affine(images[k], 0.0, [0, 0], scale, [0.0, degrees], InterpolationMode.BILINEAR)
                for scale, degrees in VIEWS
            ]
            more = model.predict_logits(network, torch.stack(seen), precision)
            views = torch.cat((views, more), 1)  # (T, 4, C)
        if top > 1 or not is_sure:
            strings = []
            for view in views.unbind(1):
                strings += model.beam_search(view.log_softmax(1), alphabet, patterns)
            if adapt:  # the search drops most provinces of a blurred plate
                likely = [plate for plate in strings[:3] if plate[0] in data.PROVINCES]
                strings += [char + plate[1:] for plate in likely for char in data.PROVINCES]
            strings = list(dict.fromkeys(strings))
            answers = model.candidates(views, strings, alphabet) if strings else []
        read = Read(*(answers or [("", 0.0)])[0], answers[:40], "")
        if k in joined and not is_sure:
            others = read_batch([joined[k]], network, precision, patterns, top, adapt)
            read = max(read, *others, key=lambda read: read.confidence)
        reads.append(read)
    return reads


def can_adapt(reads):
    """Whether reads are of five plates or more. Those that differ in the province alone are one."""
    return len({read.plate[1:] for read in reads if read.plate}) >= 5


def adapt_to_place(reads):
    """Reads weighed by how common their provinces and cities are among all the reads of a place.

    A network that learnt from all provinces alike gives a posterior under an even prior. Where a
    camera stands, few provinces are common. Which, the posteriors of all images together tell,
    without a label; this prior then weighs the candidates of each image (the first step of the EM
    of Saerens, Latinne and Decaestecker, 2002: more steps make a weak reader's errors common, and
    a good one no better). The confidence becomes the adapted posterior. Where 50 plates of 60 are
    of all the cities of Anhui (皖), and nine of four other provinces, an unsure read becomes:

        candidate    alone    in that place
        浙A12345      0.55     0.19
        皖A12345      0.43     0.80

    Ten frames of one car are one plate, so that its misread province does not become common.
    With fewer than five plates nobody can tell what is common: these reads stay as they are."""
    reads = list(reads)
    if not can_adapt(reads):
        print("note: --adapt needs five plates; these are read without it", file=sys.stderr)
        return reads
    # how many reads have a candidate that ends so: among them it counts as one plate
    frames = Counter()
    for read in reads:
        for text, share in read.alternatives:
            frames[text[1:]] += share
    provinces = Counter()
    cities = Counter()
    for read in reads:
        for text, share in read.alternatives:
            once = share / max(1, frames[text[1:]])
            provinces[text[0]] += once
            cities[text[:2]] += once
    even = sum(provinces.values()) / len(data.PROVINCES)  # if no province were common
    adapted = []
    for read in reads:
        total = 1.0  # all strings that are no candidates keep their weight
        weights = Counter()
        for text, share in read.alternatives:
            # as if each province, and each city, had been seen five times before
            in_province = provinces[text[0]]
            province = (in_province + 5) / (even + 5)
            city = (cities[text[:2]] + 5) / (in_province / len(data.LETTERS) + 5)
            # more cautious than the full factor: it loses fewer reads and wins as many
            weights[text] = share * (province * city) ** 0.7
            total += weights[text] - share
        pairs = [(text, weight / total) for text, weight in weights.most_common()]
        adapted.append(Read(*pairs[0], pairs, "") if pairs else read)
    return adapted


def in_batches(sources, size):
    """Lists of `size` sources, the last one of what is left. If a source raises an error, as a
    camera does that was unplugged, those before it come first."""
    batch = []
    try:
        for source in sources:
            # a camera may fill its array, or its picture, again; what cannot be copied, such as
            # a broken picture that is not decoded yet, is reported when it is read
            with contextlib.suppress(Exception):
                source = source.copy()
            batch.append(source)
            if len(batch) == size:
                yield batch
                batch = []
    except Exception:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def read(network, sources, precision=None, grammar=None, top=1, adapt=False):
    """An iterator over a Read for each of `sources`, in order.

    sources: one image or many: paths, bytes, open files, Pillow images, or uint8 arrays (H, W, 3)
    or (H, W). Arrays are RGB: turn OpenCV's BGR round first, with array[:, :, ::-1]. A batch for
    each core and two more are taken before the first answer; for a live camera call
    next(read(network, frame)).

    precision: "fp32", "bf16" or "fp16" (default: the device's fastest). grammar: see
    plate_patterns. top: how many alternatives to give. adapt: see adapt_to_place; a read then
    depends on all the others, and the first comes after the last image."""
    patterns = plate_patterns(network, grammar)
    if adapt and not patterns:
        raise OSError("--adapt: only Chinese plates have provinces; drop it")
    precision = precision or model.pick_precision(next(network.parameters()).device)
    if precision not in data.PRECISIONS:
        raise ValueError(f"precision {precision!r}: give one of {data.PRECISIONS}, or None")
    # paths, Pillow images and None, which OpenCV gives for what it cannot read, are not iterable
    is_one = isinstance(sources, (str, bytes, bytearray, memoryview)) or hasattr(sources, "read")
    if is_one or not np.iterable(sources) or getattr(sources, "ndim", 1) in (2, 3):
        sources = [sources]
    batches = in_batches(data.with_progress(sources), model.images_at_once(network))
    reads = itertools.chain.from_iterable(
        data.in_threads(read_batch, batches, network, precision, patterns, top, adapt)
    )
    reads = adapt_to_place(reads) if adapt else reads
    return (read._replace(alternatives=read.alternatives[:top]) for read in reads)


# ---------------------------------------------------------------------------------------
# What else the command line does


def find_images(arguments):
    """The image files that paths, folders and patterns name, in the order given: pairs of a path
    and its part below the folder."""
    for argument in arguments:
        found = [argument]  # one that does not exist is reported when it is read
        if not os.path.lexists(argument):  # what exists is itself, whatever its name
            found = sorted(glob.glob(argument, recursive=True)) or found
        for path in found:
            if not os.path.isdir(path):
                yield path, Path(path).name
                continue
            for image in data.list_images(path):
                yield image, image.relative_to(path)


def explain(network, paths, out, *options):
    """Write a picture of CTC at work on the first image: the crop, below it for each time step how
    likely its likeliest class is, and which ("-" is blank), and what `read` makes of it.

    options: the precision and the grammar of `read`."""
    from assets import plates

    data.check_output(out, ".png", paths)
    image = data.load_image(paths[0], network.config["size"])
    logits = model.predict_logits(network, image[None])  # (T, 1, C)
    shares, classes = logits[:, 0].softmax(1).max(1)  # (T,) each
    greys = torch.where(classes == model.BLANK, 210, 70)
    bars = greys.where(torch.linspace(1, 0, 130)[:, None] <= shares, 255)  # (130, T)
    # each time step stands below the columns it comes from: (3, 130, width)
    bars = bars.byte().repeat_interleave(28, 1).expand(3, -1, -1)
    width = bars.shape[2]
    names = "-" + network.config["alphabet"]
    line = "".join(names[k] for k in classes)
    # whatever ratio the network's input has, a crop is shown about as wide as plates are
    rows = [resize(image, [width // 4, width]), bars, plates.text_picture(line, (52, width))]
    (result,) = read(network, paths[0], *options, top=4)
    for text, confidence in result.alternatives:
        rows.append(plates.text_picture(f"{text} {confidence:.4f}", (32, width)))
    data.save_image(out, to_pil_image(torch.cat(rows, 1)))


def export(network, out):
    """Write a network on the CPU for use without these files: a .pt2 that torch.export.load loads.

    It takes uint8 (B, 3, H, W) with at least one image and gives logits (T, B, C). What the reader
    of its logits needs, such as the alphabet, the size and the blank, is in the file as
    facts.json."""
    data.check_output(out, ".pt2")
    facts = json.dumps(network.config | {"blank": model.BLANK})
    example = torch.zeros(2, 3, *network.config["size"], dtype=torch.uint8)
    shapes = ({0: torch.export.Dim("batch")},)  # any number of images
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are in the file all the same
        program = torch.export.export(network, (example,), dynamic_shapes=shapes)
        torch.export.save(program, file, extra_files={"facts.json": facts})
    data.write_file(out, file.getvalue())
    print(f"{out}: written")


def reading_options(add):
    """Add the options of every script that reads with a checkpoint."""
    add(
        "--grammar",
        action=argparse.BooleanOptionalAction,
        help="read only plates (default: not for other alphabets)",
    )
    add(
        "--adapt", action="store_true", help="5 plates or more of one place: each helps to read all"
    )
    data.machine_options(add)


def warn_if_no_plates(confidences):
    """Say on stderr if no read is surer than reads are of what is no plate."""
    if confidences and max(confidences) < 0.01:
        print("note: no confidence reaches .01: is each a crop of one plate?", file=sys.stderr)


def keep(path, name, result, folder, above):
    """Copy a crop to folder/name, with its plate behind; to folder/unsure if it is less sure."""
    mark = ""
    if result.confidence < above:
        folder = Path(folder, "unsure")
        mark = "~"  # a guess, which training leaves out until a person corrects the name
    target = Path(folder, name)
    target = target.with_name(f"{target.stem}-{result.plate}{mark}{target.suffix}")
    data.write_file(target, Path(path).read_bytes())


@data.one_sentence()
def main(argv=None):
    parser, add = data.make_parser(__doc__)
    add("paths", nargs="*", metavar="[CKPT.pth] PATH", help="images, folders, quoted patterns")
    add("--top", type=data.between(int, 1, 12), default=1, help="print the K likeliest plates")
    add("--label", help="a new folder: copy the crops there, named by what was read")
    add(
        "--above",
        type=data.between(float, 0, 1),
        default=0.9,
        help="those less sure go to LABEL/unsure (%(default)s)",
    )
    add("--explain", help="a .png: draw what CTC sees in the first image")
    add("--export", help="a .pt2: write the network for torch.export.load")
    reading_options(add)
    args = parser.parse_intermixed_args(argv)  # options may stand between the paths
    checkpoint = READER
    first, *others = args.paths or [""]
    if ".pth" in Path(first).suffixes or model.is_checkpoint(first):
        checkpoint = first
        args.paths = others
    images = list(find_images(args.paths))
    if args.export:
        export(load(checkpoint, "cpu"), args.export)
        if not (args.paths or args.explain or args.label):
            return
    if not images:
        raise OSError(f"{' '.join(args.paths) or 'PATH'}: no images there; name some")
    paths, names = zip(*images)
    network = load(checkpoint, args.device)
    if args.explain:
        explain(network, paths, args.explain, args.precision, args.grammar)
    if args.label:
        ((name, count),) = Counter(map(str, names)).most_common(1)
        if count > 1:
            raise OSError(f"--label: {count} images are called {name}; name their folder, not them")
        if max(len(os.fsencode(Path(path).name)) for path in paths) > 200:
            raise OSError("--label: a name of over 200 bytes has no room for a plate; shorten it")
        if set("-~") & set(network.config["alphabet"]):
            raise OSError("--label: with - or ~ in the alphabet no name tells a label; drop it")
        os.makedirs(args.label)  # now, or the work would be done in vain
    confidences = []
    reads = read(network, paths, args.precision, args.grammar, args.top, args.adapt)
    for path, name, result in zip(paths, names, reads):
        if result.error:
            print(f"error: {data.printable(result.error)}", file=sys.stderr)
            continue
        confidences.append(result.confidence)
        row = data.printable(path)
        for plate, confidence in result.alternatives:
            row += f"\t{plate}\t{confidence:.4f}"
        # each row has as many columns
        print(row + (args.top - len(result.alternatives)) * "\t\t0.0000")
        if args.label:
            keep(path, name, result, args.label, args.above)
    warn_if_no_plates(confidences)
    good = len(confidences)
    print(f"{good:,} read, {len(paths) - good:,} unreadable", file=sys.stderr)
    if good < len(paths):
        sys.exit(1)


if __name__ == "__main__":
    main()
