"""Licence-plate data: labels from file names, images from any format, synthetic plates.

    python data.py audit DIR [--json report.json]      # what a data set holds, and what is wrong
    python data.py show DIR sheet.png [--augmented]    # labelled samples as one picture
    python data.py show synthetic sheet.png            # the same for synthetic plates
    python data.py render OUT --count 1000             # synthetic plates as files
    python data.py crop FRAMES OUT [--rectify]         # CCPD photographs to crops for training

The file goes from labels to images to batches, and then to synthetic plates: they are drawn,
and a simulated camera photographs them. The same camera augments real crops.

Copy this file into any project; it imports no other of ours. Drawing and captions need assets/.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import random
import re
import stat
import sys
import time
import unicodedata
import warnings
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.io import decode_jpeg, encode_jpeg
from torchvision.transforms.functional import perspective, pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

# ---------------------------------------------------------------------------------------
# The alphabet and the types of plates

DIGITS = "0123456789"
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # real plates hold no I and no O
PROVINCES = "云京冀吉宁川新晋桂沪津浙渝湘琼甘皖粤苏蒙藏豫贵赣辽鄂闽陕青鲁黑"
ALPHABET = DIGITS + LETTERS + PROVINCES
FUELS = "ABCDEFGHJK"  # the letters that tell how an electric car is driven

# A plate pattern says for every place which characters may stand there: a tuple of strings.
# The standard (GA 36-2018) allows at most two letters among the last five characters.
SEVEN = tuple(
    (PROVINCES, LETTERS) + tuple(LETTERS if k in places else DIGITS for k in range(5))
    for count in range(3)
    for places in itertools.combinations(range(5), count)
)
EIGHT = (
    (PROVINCES, LETTERS, FUELS, DIGITS) + 4 * (DIGITS,),
    (PROVINCES, LETTERS, FUELS, LETTERS) + 4 * (DIGITS,),
)
EIGHT_LARGE = ((PROVINCES, LETTERS) + 5 * (DIGITS,) + (FUELS,),)
PATTERNS = SEVEN + EIGHT + EIGHT_LARGE

# (left edge, width) of every character in mm; behind the second one stands a dot
SEVEN_BOXES = (
    (15.5, 45),
    (72.5, 45),
    (151.5, 45),
    (208.5, 45),
    (265.5, 45),
    (322.5, 45),
    (379.5, 45),
)
EIGHT_BOXES = (
    (15.5, 45),
    (69.5, 43),
    (161.5, 43),
    (213.5, 43),
    (265.5, 43),
    (317.5, 43),
    (369.5, 43),
    (421.5, 43),
)

OWN_FACE = range(0, 4)  # rows of glyphs.png: the plates' own characters in four widths of the pen
GREEN_FACE = range(4, 8)  # green plates have a typeface of their own
OTHER_FACES = 8  # ordinary typefaces begin at this row

BRIGHT = (0.75, 1.0)
DARK = (0.0, 0.2)


class PlateType(NamedTuple):
    """All that is special about one type of plate. Lengths are in mm, colours RGB in [0, 1]."""

    name: str
    share: float  # how many of the synthetic plates are of this type
    ground: tuple  # the colour of the background lies between these two
    ink: tuple = DARK  # the darkest and the brightest grey of the characters and the border
    fade: float = 0.0  # how far the background turns white towards the top
    patterns: tuple = SEVEN
    width: float = 440  # every plate is 140 mm high, every character 90 mm
    boxes: tuple = SEVEN_BOXES
    faces: range = OWN_FACE


GREEN_SHAPE = {"width": 480, "boxes": EIGHT_BOXES, "faces": GREEN_FACE}
PLATE_TYPES = (
    PlateType(
        "blue",
        share=0.80,
        ground=((0.05, 0.10, 0.40), (0.35, 0.50, 1.00)),
        ink=BRIGHT,
    ),
    PlateType(
        "green",
        share=0.11,
        ground=((0.10, 0.60, 0.35), (0.35, 0.85, 0.60)),
        fade=1.0,
        patterns=EIGHT,
        **GREEN_SHAPE,
    ),
    PlateType(
        "large green",  # electric trucks and buses
        share=0.01,
        ground=((0.40, 0.60, 0.10), (0.80, 0.85, 0.45)),
        fade=1.0,
        patterns=EIGHT_LARGE,
        **GREEN_SHAPE,
    ),
    PlateType(
        "yellow",  # trucks and buses
        share=0.07,
        ground=((0.65, 0.45, 0.00), (1.00, 0.80, 0.35)),
    ),
    PlateType(
        "white",
        share=0.01,
        ground=((0.70, 0.70, 0.70), (1.00, 1.00, 1.00)),
    ),
)


def read_alphabet(text):
    """The alphabet that `text` gives: its characters, or those of the UTF-8 file it names.

    White space and repeated characters are dropped. An argparse type, and so its errors are."""
    if os.path.isfile(text):
        try:
            text = Path(text).read_text("utf-8-sig")
        except (UnicodeDecodeError, OSError):
            raise argparse.ArgumentTypeError(f"{text}: not UTF-8 text; save it as UTF-8") from None
    elif re.search(r"[/\\]|\.\w{1,4}$", text):
        raise argparse.ArgumentTypeError(f"{text}: no such file; name one or give the characters")
    characters = "".join(text.split())
    alphabet = "".join(dict.fromkeys(characters))
    if not alphabet:
        raise argparse.ArgumentTypeError("holds no characters; give those of the labels")
    if "-" in alphabet:
        print('warning: a label is only what follows the last "-" of a name', file=sys.stderr)
    return alphabet


# ---------------------------------------------------------------------------------------
# Labels from file names

# Labels are held against this alone, so that a plate which breaks a rule still teaches.
PLATE = re.compile(f"[{PROVINCES}][{LETTERS}][{LETTERS}{DIGITS}]{{5,6}}")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


def parse_label(path, alphabet=ALPHABET):
    """The label of a crop, from its file name: (text, repaired), or (None, False) if there is none.

    The label is what follows the last "-" of the name, or the whole name. With the default
    alphabet it must be a plate. Plates hold no O and no I, so these are read as 0 and 1, and
    `repaired` says so. With any other alphabet the label is taken as it stands."""
    text = Path(path).stem.rpartition("-")[2]
    if alphabet != ALPHABET:
        fits = bool(text) and set(text) <= set(alphabet)
        return (text if fits else None), False
    text = unicodedata.normalize("NFKC", text).upper()  # full-width characters too
    text = re.sub("[·•・‧]", "", text)  # people write 皖A·X511H
    number = text[2:].replace("O", "0").replace("I", "1")
    plate = text[:2] + number
    if not PLATE.fullmatch(plate):
        return None, False
    return plate, plate != text


def list_images(folder):
    """All image files below `folder`, sorted. Links are followed, but every folder only once."""
    if not os.path.isdir(folder):
        raise ValueError(f"{printable(folder)}: no such folder; give one with images inside")

    def fail(error):  # os.walk would pass over a folder that it may not read
        raise error

    paths = []
    visited = set()
    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real_folder = os.path.realpath(root)
        if real_folder in visited:
            folders.clear()  # a link that leads back would never end
            continue
        visited.add(real_folder)
        paths += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)


def split_folder(root, split):
    """The folder of `split` ("train" or "test") in `root`, or `root` itself if it has no splits."""
    has_splits = Path(root, "train").is_dir() or Path(root, "test").is_dir()
    if not has_splits:
        return Path(root)
    if not Path(root, split).is_dir():
        raise ValueError(f"{root}: has no folder {split!r}; add it, or name a folder of crops")
    return Path(root, split)


def split_validation(texts, share):
    """Split crops into two lists of indices, (train, validation), by a hash of the plate.

    About `share` of the plates go to validation. No plate is on both sides, and the same texts
    always give the same split."""
    # equal hashes are rare; then the text decides, the same in every process
    plates = sorted(set(texts), key=lambda text: (zlib.crc32(text.encode()), text))
    count = round(share * len(plates))
    if share > 0 and len(plates) > 1:
        count = max(1, count)
    chosen = set(plates[:count])
    train_ids = [k for k, text in enumerate(texts) if text not in chosen]
    val_ids = [k for k, text in enumerate(texts) if text in chosen]
    return train_ids, val_ids


def printable(path):
    """A path for one line of a terminal: control characters are escaped."""
    chars = [char if char.isprintable() else repr(char)[1:-1] for char in str(path)]
    return "".join(chars)


def warn_about(paths, why):
    """Name the first of `paths` on stderr, if there are any."""
    if paths:
        names = ", ".join(printable(path.name) for path in paths[:5])
        dots = ", ..." if len(paths) > 5 else ""
        print(f"warning: {len(paths):,} {why}: {names}{dots}", file=sys.stderr)


def is_frame(path):
    """Whether this is a whole photograph of CCPD: its name holds the corners of the plate."""
    return path.name.count("&") >= 6


def find_crops(folder, alphabet=ALPHABET, quiet=False):
    """The labelled crops below `folder`: (paths, texts). Raises ValueError if there are none.

    Unless `quiet`, says on stderr which files hold no label and how many labels were repaired."""
    paths = []
    texts = []
    unlabelled = []
    repairs = 0
    for path in list_images(folder):
        text, repaired = parse_label(path, alphabet)
        repairs += repaired
        if text is None:
            unlabelled.append(path)
        else:
            paths.append(path)
            texts.append(text)
    frames = [path for path in unlabelled if is_frame(path)]
    others = [path for path in unlabelled if not is_frame(path)]
    if not quiet:
        cure = "cut them first: python data.py crop FRAMES OUT"
        warn_about(frames, f"whole CCPD photographs left out; {cure}")
        warn_about(others, "files left out, their names hold no label")
        if repairs:
            note = f"note: {repairs:,} labels held the letter O or I, which plates do not"
            print(f"{note}: read as 0 and 1", file=sys.stderr)
    if not paths:
        example = "01-皖AX511H.jpg" if alphabet == ALPHABET else "01-LABEL.jpg, in its alphabet"
        raise ValueError(f"{folder}: no labelled crops; file names such as {example} are expected")
    return paths, texts


# ---------------------------------------------------------------------------------------
# Reading an image


def decode_image(source):
    """One image as an upright RGB Pillow image, however it is stored."""
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or not source.size:
            raise ValueError("an array is uint8 and not empty")
        image = Image.fromarray(source)
    elif stat.S_ISREG(os.stat(source).st_mode):
        image = Image.open(source)
    else:
        raise ValueError("not a regular file")  # a pipe would make the reader wait for ever
    with image:
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers")
        if image.mode.startswith("I"):  # 16 bits a pixel: convert() would clip instead of scale
            pixels = np.asarray(image).clip(0, 65535) >> 8
            image = Image.fromarray(pixels.astype(np.uint8))
        return image.convert("RGB")


def open_image(source):
    """An image file of any Pillow format, or a uint8 array, as an upright RGB Pillow image.

    Arrays are (H, W, 3) in the order RGB, or (H, W) grey. Raises ValueError with one sentence
    for anything else, and for a picture too large to be a crop."""
    try:
        with warnings.catch_warnings():
            # Pillow warns about huge pictures and broken tags; we say it in our own words
            warnings.simplefilter("ignore")
            return decode_image(source)
    except Exception as error:  # decoders raise all kinds of errors for broken files
        name = printable(source) if isinstance(source, (str, os.PathLike)) else "array"
        reason = printable(error)[:100] or type(error).__name__
        raise ValueError(f"{name}: not a readable image ({reason}); left out") from None


def read_image(source, size):
    """An image file or array as uint8 (3, *size): for training, evaluation and prediction alike."""
    height, width = size
    image = open_image(source)
    image = image.resize((width, height), Image.BILINEAR)  # antialiased if it shrinks
    return pil_to_tensor(image)


# ---------------------------------------------------------------------------------------
# Dataset and loader


class PlateDataset(torch.utils.data.Dataset):
    """Labelled crops; item k is (image uint8 (3, *size), text).

    Every epoch shows the same crops, so decoded images stay in memory up to `cache_bytes`.
    An item raises ValueError if its file cannot be read."""

    def __init__(self, paths, texts, size, cache_bytes=0):
        self.paths = paths
        self.texts = texts
        self.size = size
        image_bytes = 3 * size[0] * size[1]
        self.capacity = cache_bytes // image_bytes
        self.cache = {}
        self.unreadable = set()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, k):
        image = self.cache.get(k)
        if image is None:
            image = read_image(self.paths[k], self.size)
            if len(self.cache) < self.capacity:
                self.cache[k] = image
        return image, self.texts[k]

    def get(self, k):
        """Item k, or None if its file cannot be read, which is said once."""
        try:
            return self[k]
        except ValueError as error:
            if k not in self.unreadable:
                self.unreadable.add(k)
                print(f"warning: {error}", file=sys.stderr)
            return None


def load_batches(dataset, batches, threads):
    """Yield (images uint8 (B, 3, H, W), texts) for every list of indices in `batches`.

    Threads read the next batches while one is used; Pillow decodes outside Python's lock.
    Unreadable files are left out, so a batch may be short, or even empty."""

    def read(indices):
        items = [item for item in map(dataset.get, indices) if item]
        images = [image for image, _ in items]
        texts = [text for _, text in items]
        if not images:
            return torch.empty(0, 3, *dataset.size, dtype=torch.uint8), []
        return torch.stack(images), texts

    waiting = deque()
    with ThreadPoolExecutor(threads) as pool:
        for indices in batches:
            waiting.append(pool.submit(read, indices))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def count_cpus():
    """The processor cores this process may use: a container or a cluster may allow only a few."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_number(path, name=""):
    """The number behind `name` in a small system file, or infinity if there is none."""
    try:
        number = re.search(rf"{name}\s*(\d+)", Path(path).read_text())
    except OSError:
        number = None
    return int(number[1]) if number else math.inf


def free_memory():
    """Bytes of memory that are free for this process: in the machine and in its container."""
    machine = read_number("/proc/meminfo", "MemAvailable:") * 1024
    group = Path("/sys/fs/cgroup")
    container = read_number(group / "memory.max") - read_number(group / "memory.current")
    if math.isnan(container):  # no such files: no container, or one of the older kind
        container = read_number(group / "memory/memory.limit_in_bytes")
    free = min(machine, container)
    return int(free) if free < math.inf else 4 << 30


def in_batches(items, size):
    """A list cut into lists of `size`; the last one may be shorter."""
    return [items[k : k + size] for k in range(0, len(items), size)]


# ---------------------------------------------------------------------------------------
# Random numbers


class RandomNumbers:
    """Random numbers that follow from a seed alone: tensors, and `numbers` for single ones.

    Single numbers come from Python's own generator: to ask a GPU for one would make it wait."""

    def __init__(self, seed, device="cpu"):
        self.device = torch.device(device)
        self.tensors = torch.Generator(self.device).manual_seed(seed)
        self.numbers = random.Random(seed)

    def rand(self, *shape):
        return torch.rand(shape, generator=self.tensors, device=self.device)

    def randn(self, *shape):
        return torch.randn(shape, generator=self.tensors, device=self.device)

    def per_image(self, count):
        """A number in [0, 1) for each image: (count, 1, 1, 1)."""
        return self.rand(count, 1, 1, 1)

    def per_channel(self, count):
        """A number in [0, 1) for red, green and blue of each image: (count, 3, 1, 1)."""
        return self.rand(count, 3, 1, 1)

    def happens(self, probability):
        return self.numbers.random() < probability


def make_seed(*counters):
    """One seed for several counters, such as (seed, epoch, step, rank).

    So each step's random numbers follow from its place in the run, not from what ran before."""
    sequence = np.random.SeedSequence(counters)
    seed = sequence.generate_state(1, np.uint64)[0]
    return int(seed >> np.uint64(1))  # 63 bits fit a signed integer


def on_device(values, device, dtype=torch.float32):
    """A small tensor on `device`, copied without waiting for the device."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------
# Synthetic plates: drawn head-on and evenly lit, lengths in mm

GLYPHS = Path(__file__).with_name("assets") / "glyphs.png"
CELL_W = 24  # pixels of one character in glyphs.png, which is 45 x 90 mm
CELL_H = 48
PLATE_HEIGHT = 140
CHARACTER_TOP = 25
RIM = 20  # so much of the car is drawn around every plate
CANVAS_WIDTH = 480 + 2 * RIM  # fits the widest plate
CANVAS_HEIGHT = PLATE_HEIGHT + 2 * RIM
OWN_SHARE = 0.9  # of the plates have the characters of real plates, the others ordinary typefaces
PRACTICE = 0.5  # of the strings that training draws, see random_text
HANDFUL = {"cpu": 16, "cuda": 64}  # plates at a time: few fit a CPU's cache, many fill a GPU


@functools.lru_cache(maxsize=8)
def load_glyphs(height, device="cpu"):
    """The pictures of all characters: float32 (faces, len(ALPHABET), height, height / 2) in [0, 1].

    Raises ValueError if assets/glyphs.png is not there."""
    if not GLYPHS.is_file():
        raise ValueError(f"{GLYPHS}: not there; copy the folder assets beside data.py")
    with Image.open(GLYPHS) as image:
        sheet = pil_to_tensor(image.convert("L")) / 255  # (1, faces * CELL_H, 65 * CELL_W)
    faces = sheet.shape[1] // CELL_H
    cells = sheet.view(faces, CELL_H, len(ALPHABET), CELL_W)
    cells = cells.transpose(1, 2)  # (faces, characters, CELL_H, CELL_W)
    size = (height, height // 2)
    cells = F.interpolate(cells, size, mode="bilinear", antialias=True)
    return cells.clamp(0, 1).to(device)


def glyph_height(size):
    """The height in pixels of drawn characters: the drawing is finer than the picture of it."""
    return round(1.25 * size[0])


def random_text(plate_type, rng, practice):
    """A random string of one of the type's patterns; every province is equally likely.

    A share `practice` of the strings are no plates: half of their places hold provinces. It is
    practice for the 31 characters that are hardest to tell apart, and stand only once a plate."""
    pattern = rng.numbers.choice(plate_type.patterns)
    text = [rng.numbers.choice(chars) for chars in pattern]
    if rng.happens(practice):
        for k in range(1, len(text)):
            if rng.happens(0.5):
                text[k] = rng.numbers.choice(PROVINCES)
    return "".join(text)


def stamp(plate, mask, x, y, colour, mm):
    """Paint `colour` through a mask in [0, 1], its upper left corner at (x, y) mm."""
    left = max(0, round(x * mm))
    top = max(0, round(y * mm))
    right = left + mask.shape[-1]
    bottom = top + mask.shape[-2]
    part = plate[:, :, top:bottom, left:right]
    height, width = part.shape[2:]  # the mask may reach over the edge
    part.lerp_(colour.expand_as(part), mask[..., :height, :width])


def draw_surroundings(count, mm, rng):
    """The car around the plate: a colour with soft or hard-edged blotches, which are no strokes."""
    height = round(CANVAS_HEIGHT * mm)
    width = round(CANVAS_WIDTH * mm)
    mode = "bilinear" if rng.happens(0.7) else "nearest"
    blotches = rng.rand(count, 1, 2, 14) - 0.5
    blotches = F.interpolate(blotches, (height, width), mode=mode)
    grey, brightness, contrast = rng.rand(3, count, 1, 1, 1)
    colour = grey + 0.5 * (rng.per_channel(count) - 0.5)
    contrast = 0.3 + 0.7 * contrast
    return colour * brightness + contrast * blotches


def draw_background(plate, plate_type, rng):
    """Paint the whole plate (B, 3, h, w) in its colour; a green plate turns white at the top."""
    count, _, height, _ = plate.shape
    darkest, brightest = on_device(plate_type.ground, rng.device).view(2, 3, 1, 1)
    ground = darkest + (brightest - darkest) * rng.per_channel(count)
    downwards = torch.linspace(1, 0, height, device=rng.device)
    fade = plate_type.fade * rng.per_image(count).sqrt()
    fade = fade * downwards.view(-1, 1)
    plate.copy_(ground + (0.9 - ground) * fade)


def draw_border(plate, ink, mm, rng):
    """The thin line along the edge, fainter on some plates."""
    edge = rng.numbers.uniform(3, 6)
    thickness = rng.numbers.uniform(2, 5.5)
    line = max(1, round(thickness * mm))
    height, width = plate.shape[2:]
    inset = 2 * round(edge * mm)
    frame = torch.ones(height - inset, width - inset, device=rng.device)
    frame[line:-line, line:-line] = 0
    strength = rng.per_image(len(plate)) ** 0.25
    stamp(plate, frame * strength, edge, edge, ink, mm)


def choose_faces(plate_type, count, faces, rng):
    """A typeface for each plate, int64 (count, 1): mostly the plate's own, else an ordinary one."""
    chosen = []
    for _ in range(count):
        rows = plate_type.faces if rng.happens(OWN_SHARE) else range(OTHER_FACES, faces)
        chosen.append([rng.numbers.choice(rows)])
    return on_device(chosen, rng.device, torch.int64)


def draw_characters(plate, plate_type, texts, ink, glyphs, mm, rng):
    """Stamp every character at its place, and the dot behind the second one."""
    codes = [[ALPHABET.index(char) for char in text] for text in texts]
    codes = on_device(codes, rng.device, torch.int64)  # (B, length)
    face = choose_faces(plate_type, len(texts), len(glyphs), rng)  # (B, 1)
    masks = glyphs[face, codes]  # (B, length, h, w)
    for place, (x, width) in enumerate(plate_type.boxes):
        mask = masks[:, place : place + 1]  # (B, 1, h, w)
        size = (mask.shape[2], round(width * mm))
        mask = F.interpolate(mask, size, mode="bilinear", antialias=True)
        # characters are not pressed exactly in place
        x = x + rng.numbers.uniform(-1.5, 1.5)
        y = CHARACTER_TOP + rng.numbers.uniform(-1.5, 1.5)
        stamp(plate, mask, x, y, ink, mm)
    gap_start = sum(plate_type.boxes[1])
    gap_end = plate_type.boxes[2][0]
    gap_middle = (gap_start + gap_end) / 2
    side = max(2, round(10 * mm))
    strength = rng.per_image(len(texts))
    dot = strength.expand(-1, -1, side, side)
    stamp(plate, dot, gap_middle - 5, 65, ink, mm)


def draw_screws(plate, plate_type, mm, rng):
    """Screws or seals in some of the four holes; they may cover a part of a character."""
    size = rng.numbers.uniform(8, 16)
    pixels = max(3, round(size * mm))
    x = torch.linspace(-1, 1, pixels, device=rng.device)
    y = x.view(-1, 1)
    distance = x.square() + y.square()
    disc = (1.3 - distance).clamp(0, 1)  # with a soft edge
    hole_xs = (0.25 * plate_type.width, 0.75 * plate_type.width)
    hole_ys = (12, 128)
    for hole_x, hole_y in itertools.product(hole_xs, hole_ys):
        chance, brightness = rng.rand(2, len(plate), 1, 1, 1)
        middle_x = hole_x + rng.numbers.uniform(-8, 8)
        middle_y = hole_y + rng.numbers.uniform(-5, 5)
        left = middle_x - size / 2
        top = middle_y - size / 2
        tint = 0.4 * rng.per_channel(len(plate))
        colour = brightness * (1 - tint)
        is_there = chance < 0.4
        stamp(plate, disc * is_there, left, top, colour, mm)


def paint(plate_type, texts, glyphs, rng):
    """Plates of one type with a rim of car around them: float32 (B, 3, h, w), about in [0, 1].

    The picture shows CANVAS_WIDTH x CANVAS_HEIGHT mm, whatever the type."""
    mm = glyphs.shape[2] / 90  # pixels in a millimetre
    canvas = draw_surroundings(len(texts), mm, rng)
    left = round((CANVAS_WIDTH - plate_type.width) / 2 * mm)
    top = round(RIM * mm)
    right = left + round(plate_type.width * mm)
    bottom = top + round(PLATE_HEIGHT * mm)
    plate = canvas[:, :, top:bottom, left:right]  # a view: what is drawn on it is on the canvas
    darkest, brightest = plate_type.ink
    ink = darkest + (brightest - darkest) * rng.per_image(len(texts))
    ink = ink + 0.1 * (rng.per_channel(len(texts)) - 0.5)
    draw_background(plate, plate_type, rng)
    draw_border(plate, ink, mm, rng)
    draw_characters(plate, plate_type, texts, ink, glyphs, mm, rng)
    draw_screws(plate, plate_type, mm, rng)
    return canvas


def draw_plates(count, size, rng, glyphs, practice=0.0):
    """Pictures of `count` plates that do not exist: uint8 (count, 3, *size), and their strings.

    glyphs: load_glyphs(glyph_height(size), rng.device). practice: see random_text."""
    shares = [plate_type.share for plate_type in PLATE_TYPES]
    counts = Counter(rng.numbers.choices(PLATE_TYPES, shares, k=count))
    texts = []
    canvases = []
    extents = []
    for plate_type, number in counts.items():
        new_texts = []
        for _ in range(number):
            new_texts.append(random_text(plate_type, rng, practice))
        texts += new_texts
        canvases.append(paint(plate_type, new_texts, glyphs, rng))
        share_x = plate_type.width / CANVAS_WIDTH
        share_y = PLATE_HEIGHT / CANVAS_HEIGHT
        extents += [(share_x, share_y)] * number
    handful = HANDFUL[rng.device.type]
    canvases = torch.cat(canvases).split(handful)
    extents = on_device(extents, rng.device).split(handful)
    images = []
    for canvas, extent in zip(canvases, extents):
        images.append(camera(canvas, size, rng, 1.0, extent))
    return torch.cat(images), texts


def synthetic_batches(count, seed, size, batch_size=250):
    """Yield `count` synthetic plates as batches (images, texts); the same for the same seed."""
    rng = RandomNumbers(seed)
    glyphs = load_glyphs(glyph_height(size))
    for numbers in in_batches(range(count), batch_size):
        yield draw_plates(len(numbers), size, rng, glyphs)


# ---------------------------------------------------------------------------------------
# The simulated camera, which photographs synthetic plates and augments real crops
#
# A random number in [0, 1] to the power of 2, 3 or more is mostly near 0: so most pictures are
# a little worse than perfect, and a few are very bad.

CROP_STRENGTH = 0.5  # for real crops, which went through one camera already
CORNERS_X = (-1.0, 1.0, -1.0, 1.0)  # the corners of a picture, by rows
CORNERS_Y = (-1.0, -1.0, 1.0, 1.0)


def random_corners(count, rng, strength):
    """Where the corners of the crop lie on the plate, (B, 4, 2), the plate being [-1, 1] both ways.

    The plate hangs at an angle, and a detector cut it out by the box around it, or nearly so."""
    x = on_device(CORNERS_X, rng.device)  # (4,)
    y = on_device(CORNERS_Y, rng.device)
    tilt, shear = strength * rng.randn(2, count, 1)  # (B, 1)
    tilt = 0.3 * tilt
    shear = 0.06 * shear
    # in the photograph x is x + shear * y, and y is y + tilt * x; the box grows with both
    box_x = x * (1 + shear.abs())
    box_y = y * (1 + tilt.abs())
    # and back from the box's corners to the plate
    area = 1 - shear * tilt
    plate_x = (box_x - shear * box_y) / area
    plate_y = (box_y - tilt * box_x) / area
    on_plate = torch.stack((plate_x, plate_y), 2)  # (B, 4, 2)
    # from 5% wider and 11% higher than the plate to 9% narrower and 31% lower
    loosest = on_device((-0.05, -0.10), rng.device)
    tightest = on_device((0.10, 0.45), rng.device)
    tightness = loosest + (tightest - loosest) * rng.rand(count, 1, 2)
    zoom = 1 + strength * tightness
    moved = rng.randn(count, 1, 2)  # the whole box
    moved = moved + rng.randn(count, 4, 2)  # and each corner
    return on_plate / zoom + 0.04 * strength * moved


def warp(images, size, rng, strength, extent):
    """The view: a plate seen from an angle and cut out. Float (B, 3, h, w) to (B, 3, *size)."""
    count = len(images)
    corners = random_corners(count, rng, strength) * extent.unsqueeze(1)  # (B, 4, 2)
    corners = corners.transpose(1, 2)  # (B, 2, 4): x and y of each corner
    corners = corners.view(count, 2, 2, 2)  # two of the corners above, two below
    grid = F.interpolate(corners, size, mode="bilinear", align_corners=True)  # (B, 2, H, W)
    # every stroke is a little out of place, so that no exact shape is learnt by heart
    largest = on_device((0.010, 0.025), rng.device)  # across, and up or down
    bend = rng.randn(count, 2, 6, 20) * rng.per_image(count)
    bend = bend * largest.view(2, 1, 1)
    bend = F.interpolate(bend, size, mode="bilinear")  # (B, 2, H, W)
    grid = grid + strength * bend
    grid = grid.permute(0, 2, 3, 1)  # (B, H, W, 2)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def relight(images, rng, strength):
    """Light and colour: exposure, the camera's own colours, a slope of light, glare and haze."""
    count, _, height, width = images.shape
    exposure, slope_x, slope_y = rng.randn(3, count, 1, 1, 1)
    glare, spot_x, spot_y, haze, greyness = rng.rand(5, count, 1, 1, 1)
    tint = rng.randn(count, 3, 1, 1)
    light = 0.45 * exposure + 0.25 * tint
    images = images * (strength * light).exp()
    # all cameras see colour in their own way, and a few see little of it
    greyness = strength * greyness.squeeze(3) ** 2
    same_colours = torch.eye(3, device=rng.device)
    mix = (1 - greyness) * same_colours + greyness / 3
    mix = mix + 0.15 * strength * rng.randn(count, 3, 3)
    images = (mix @ images.flatten(2)).view_as(images)
    x = torch.linspace(-1, 1, width, device=rng.device)
    y = torch.linspace(-1, 1, height, device=rng.device)
    y = y.view(-1, 1)
    slope = 1 + 0.3 * strength * (slope_x * x + slope_y * y)
    slope = slope.clamp(min=0.2)
    # glare is a bright spot with soft edges: on half of the synthetic plates, on no crop
    distance_x = 2 * (x + 1 - 2 * spot_x)
    distance_y = y + 1 - 2 * spot_y
    distance = distance_x**2 + distance_y**2
    spot = (-2 * distance).exp()
    glare = (1.2 * strength * glare - 0.6).clamp(min=0)
    images = images * slope + glare * spot
    haze_colour = rng.per_channel(count).expand_as(images)
    images = images.lerp(haze_colour, 0.5 * strength * haze**4)
    return images.clamp(0, 1)


def blur(images, rng, strength):
    """Lens and movement blur each axis by itself, and sharpening in the camera leaves halos."""
    reach = torch.arange(-3, 4, device=rng.device)
    centre = (reach == 0).float()
    halo = centre - torch.softmax(-(reach**2) / 3, 0)
    halo = halo * strength * rng.numbers.random() ** 2
    paddings = {2: (0, 0, 3, 3), 3: (3, 3, 0, 0)}  # for the rows, and for the columns
    for axis, padding in paddings.items():
        defocus = 0.7 * rng.numbers.random() ** 3
        movement = 1.2 * rng.numbers.random() ** 10
        sigma = 0.15 + strength * images.shape[2] / 32 * (defocus + movement)
        kernel = torch.softmax(-(reach**2) / (2 * sigma**2), 0) + halo  # (7,)
        shape = [3, 1, 1, 1]
        shape[axis] = 7
        kernel = kernel.repeat(3).view(shape)  # one for each channel
        padded = F.pad(images, padding, mode="replicate")
        images = F.conv2d(padded, kernel, groups=3)
    return images


def compress(images, rng):
    """JPEG at a random quality. Float (B, 3, h, w) in [0, 1]."""
    quality = rng.numbers.randint(35, 95)
    images = 255 * images.clamp(0, 1)
    pictures = []
    for image in images.to("cpu", torch.uint8):  # the encoder is a CPU's
        file = encode_jpeg(image, quality)
        pictures.append(decode_jpeg(file))
    pixels = torch.stack(pictures)
    return pixels.to(images.device, non_blocking=True) / 255


def camera(images, size, rng, strength=1.0, extent=None):
    """Photograph `images`: (B, 3, h, w), uint8 or float32 in [0, 1], to uint8 (B, 3, *size).

    strength: 1 for synthetic plates, CROP_STRENGTH for crops. extent: (B, 2), the share of the
    picture's width and height that the plate takes; without it, all. The order is that of a real
    camera: the view, the light, the lens, the sensor, the file. Images of a call share the
    lens, the sensor and the file."""
    if images.dtype == torch.uint8:
        images = images / 255
    if extent is None:
        extent = torch.ones(len(images), 2, device=images.device)
    # each side has fewer pixels by itself; then the network's input size is an enlargement
    sensor = []
    for side in size:
        fewer = 0.55 * strength * rng.numbers.random() ** 2
        sensor.append(round(side * (1 - fewer)))
    # some programs shrink a picture without smoothing it first, which leaves jagged strokes
    is_smooth = rng.happens(0.5)
    images = warp(images, size if is_smooth else sensor, rng, strength, extent)
    images = relight(images, rng, strength)
    images = blur(images, rng, strength)
    if is_smooth:
        images = F.interpolate(images, sensor, mode="bilinear", antialias=True)
    noise = 0.05 * strength * rng.per_image(len(images)) ** 3
    images = images + noise * rng.randn(*images.shape)
    if rng.happens(0.6 * strength):
        images = compress(images, rng)
    images = F.interpolate(images, size, mode="bilinear")
    images = (255 * images).round().clamp(0, 255)
    return images.to(torch.uint8)


# ---------------------------------------------------------------------------------------
# Pictures with captions


@functools.lru_cache(maxsize=1000)
def character_picture(char, height):
    """One character, white on black: float32 (height, height / 2) in [0, 1]."""
    if char in ALPHABET:
        return load_glyphs(height)[0, ALPHABET.index(char)]
    cell = Image.new("L", (height // 2, height))
    font = ImageFont.load_default(height * 3 // 4)
    middle = (height // 4, height // 2)
    ImageDraw.Draw(cell).text(middle, char, 255, font, anchor="mm")
    return pil_to_tensor(cell)[0] / 255


def text_picture(text, height, colours=None):
    """`text` on white: uint8 (3, height, w). colours: one RGB colour in [0, 255] a character."""
    text = text or " "
    colours = colours or [(0, 0, 0)] * len(text)
    cells = []
    for char, colour in zip(text, colours):
        ink = torch.tensor(colour).view(3, 1, 1)
        cell = character_picture(char, height)
        cell = F.pad(cell, (1, 1))
        cells.append(255 - cell * (255 - ink))
    return torch.cat(cells, 2).to(torch.uint8)


def add_captions(image, captions):
    """A picture uint8 (3, h, w) with narrower ones centred below it, each under the other."""
    rows = [image]
    for caption in captions:
        spare = image.shape[2] - caption.shape[2]
        left = spare // 2
        right = spare - left
        rows.append(F.pad(caption, (left, right, 3, 0), value=255))
    return torch.cat(rows, 1)


def save_sheet(pictures, out, columns=4):
    """Write pictures uint8 (3, h, w) of one size as one image file, in rows."""
    sheet = make_grid(list(pictures), nrow=columns, padding=4, pad_value=255)
    write_file(out, encode_image(to_pil_image(sheet), "PNG"))


# ---------------------------------------------------------------------------------------
# Files that are written


def encode_image(image, kind, quality=95):
    """A Pillow image as the bytes of a file; kind: "PNG" or "JPEG", which alone has a quality."""
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=quality)
    return buffer.getvalue()


def write_file(path, content):
    """Write bytes to a file. The old file stays, or the whole new one, whatever happens meanwhile.

    Raises OSError with one sentence if it cannot be written."""
    partial = Path(f"{path}.part")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # on the disk itself before it takes the old one's place
        os.replace(partial, path)
    except OSError as error:
        reason = error.strerror or error
        advice = "free space, or choose another"
        raise OSError(f"{path}: cannot be written ({reason}); {advice}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_json(path, content):
    """Write a dict or a list."""
    text = json.dumps(content, ensure_ascii=False, indent=1)
    write_file(path, text.encode("utf8", "surrogateescape"))


def write_csv(path, heads, rows):
    """Write a table; heads: the names of its columns."""
    buffer = io.StringIO(newline="")
    table = csv.writer(buffer)
    table.writerow(heads)
    table.writerows(rows)
    # surrogateescape: a file name may hold bytes that are no UTF-8; they are written as they are
    write_file(path, buffer.getvalue().encode("utf8", "surrogateescape"))


def check_output(path, suffix):
    """Raise ValueError, before any work is done, unless a file with `suffix` can stand at `path`.

    The suffix is asked for so that a checkpoint or a photograph is never written over."""
    if Path(path).suffix.lower() != suffix:
        raise ValueError(f"{path}: give it a name that ends in {suffix}")
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{path}: not a file in a folder that is there; choose another")


# ---------------------------------------------------------------------------------------
# Tools


def positive_int(text):
    """An argparse type: a whole number from 1 to a million."""
    if not text.isdecimal() or not 1 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1 to 1,000,000")
    return int(text)


def not_empty(text):
    """An argparse type: any text; an empty one is a variable of the shell that was never set."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; give a name or leave the option out")
    return text


@contextlib.contextmanager
def plain_errors():
    """Every script runs in this: a user's mistake ends it with one sentence, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # Jupyter's has no such method, and no need of it
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {printable(error)}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        sys.exit("error: not enough memory; give a smaller --batch-size or --size")
    except KeyboardInterrupt:
        sys.exit(130)


def show_progress(items, total, unit):
    """Pass `items` on; on a terminal, stderr shows how many are done and the time left."""
    start = time.time()
    for k, item in enumerate(items, 1):
        yield item
        if sys.stderr.isatty() and (k % 50 == 0 or k == total):
            left = (time.time() - start) / k * (total - k)
            end = "\n" if k == total else ""
            line = f"\r{unit} {k:,}/{total:,}, {left:.0f} s left "
            print(line, end=end, file=sys.stderr, flush=True)


def look_at_file(path):
    """((width, height), hash) of an image file, or (None, why it cannot be read)."""
    try:
        size = open_image(path).size
    except ValueError as error:
        return None, str(error)
    return size, hashlib.blake2b(path.read_bytes()).digest()


def describe_images(texts, sizes, alphabet):
    """The statistics of audit: a dict of dicts, for printing and for JSON."""
    chars = Counter("".join(texts))
    firsts = Counter(text[0] for text in texts)
    facts = {
        "lengths": Counter(sorted(map(len, texts))),
        "characters": dict(sorted(chars.items())),
        "never seen": {char: 0 for char in alphabet if char not in chars},
        "first characters": dict(firsts.most_common()),
    }
    widths, heights = np.array(sizes or [(0, 0)]).T
    for name, side in (("widths", widths), ("heights", heights)):
        facts[name] = {
            "min": int(side.min()),
            "median": int(np.median(side)),
            "max": int(side.max()),
        }
    return facts


def sort_files(folder, paths, looks, alphabet):
    """(texts of each folder, problems of each kind): two dicts of lists, for audit."""
    texts_of = defaultdict(list)
    problems = {
        "photographs still to crop": [],
        "names without a label": [],
        "unreadable images": [],
        "labels with O or I": [],
        "copies": [],
    }
    first = {}  # the first file with this content
    for path, (size, digest) in zip(paths, looks):
        name = printable(path)
        text, repaired = parse_label(path, alphabet)
        if text is None:
            kind = "photographs still to crop" if is_frame(path) else "names without a label"
            problems[kind].append(name)
        else:
            # DIR/train/part1/x.jpg belongs to train
            parts = path.relative_to(folder).parent.parts
            texts_of[parts[0] if parts else "."].append(text)
        if repaired:
            problems["labels with O or I"].append(name)
        if size is None:
            problems["unreadable images"].append(digest)
        elif first.setdefault(digest, name) != name:
            problems["copies"].append(f"{name} is {first[digest]}")
    train = set(texts_of.get("train", []))
    test = set(texts_of.get("test", []))
    problems["plates in train and test"] = sorted(train & test)
    return texts_of, problems


def audit(folder, report=None, alphabet=ALPHABET):
    """Print what a data set holds and what is wrong with it; `report` gets all of it as JSON.

    Returns whether every name holds a label and every image can be read."""
    if report:
        check_output(report, ".json")
    paths = list_images(folder)
    if not paths:
        raise ValueError(f"{folder}: no images in it; give a folder of crops")
    with ThreadPoolExecutor(count_cpus()) as pool:
        looks = pool.map(look_at_file, paths)
        looks = list(show_progress(looks, len(paths), "image"))
    texts_of, problems = sort_files(folder, paths, looks, alphabet)
    facts = {}
    for split, texts in sorted(texts_of.items()):
        facts[f"images in {split}"] = {"images": len(texts), "plates": len(set(texts))}
    all_texts = sum(texts_of.values(), [])
    sizes = [size for size, _ in looks if size]
    facts |= describe_images(all_texts, sizes, alphabet)
    for name, fact in facts.items():
        pairs = [f"{key} {value}" for key, value in fact.items()]
        print(f"{name:26}", "  ".join(pairs))
    for name, offenders in problems.items():
        print(f"{name:26} {len(offenders):,}", *offenders[:3], sep="\n" + " " * 27)
    if report:
        write_json(report, facts | problems)
    bad = ("photographs still to crop", "names without a label", "unreadable images")
    return not any(problems[kind] for kind in bad)


def show(folder, out, augmented=False, alphabet=ALPHABET):
    """Write a sheet of 24 labelled samples of a folder, or of synthetic plates ("synthetic")."""
    check_output(out, ".png")
    rng = RandomNumbers(0)
    size = (48, 192)
    if folder in ("synthetic", "drawn"):  # its name in older commands
        images, texts = next(synthetic_batches(24, 0, size))
    else:
        paths, texts = find_crops(folder, alphabet)
        count = min(24, len(paths))
        chosen = rng.numbers.sample(range(len(paths)), count)
        dataset = PlateDataset(paths, texts, size)
        images, texts = next(load_batches(dataset, [chosen], 1))
        if not texts:
            raise ValueError(f"{folder}: none of {len(chosen)} images can be read; check the files")
        if augmented:
            images = camera(images, size, rng, CROP_STRENGTH)
    pictures = []
    for image, text in zip(images, texts):
        pictures.append(add_captions(image, [text_picture(text, 22)]))
    save_sheet(pictures, out)


def render(out, count, seed=0):
    """Write synthetic plates as JPEG files: nine tenths to out/train, the rest to out/test."""
    batches = synthetic_batches(count, seed, (80, 256), 64)
    plates = (plate for batch in batches for plate in zip(*batch))
    for number, (image, text) in enumerate(show_progress(plates, count, "plate")):
        folder = Path(out, "test" if number % 10 == 9 else "train")
        folder.mkdir(parents=True, exist_ok=True)
        content = encode_image(to_pil_image(image), "JPEG")
        write_file(folder / f"{number:07}-{text}.jpg", content)


# ---------------------------------------------------------------------------------------
# Crops from the whole photographs of CCPD (github.com/detectRecog/CCPD)

CCPD_PROVINCES = "皖沪津渝冀晋蒙辽吉黑苏浙京闽赣鲁豫鄂湘粤桂琼川贵云藏陕甘青宁新警学O"
CCPD_LETTERS = LETTERS + "O"  # O stands for no character
CCPD_NUMBERS = LETTERS + DIGITS + "O"


def parse_points(text):
    """CCPD writes points as 154&383_386&473: a list of (x, y)."""
    pairs = [pair.split("&") for pair in text.split("_")]
    return [(int(x), int(y)) for x, y in pairs]


def parse_frame(path):
    """A CCPD photograph's file name: (box, corners, plate).

    The name is area-tilt-box-corners-indices-brightness-blur. box is ((x0, y0), (x1, y1)); the
    four corners (x, y) begin at the lower right and go on to the lower left. Raises ValueError."""
    try:
        _, _, box, corners, indices, _, _ = Path(path).stem.split("-")
        (x0, y0), (x1, y1) = box = parse_points(box)
        lower_right, lower_left, upper_left, upper_right = corners = parse_points(corners)
        tables = [CCPD_PROVINCES, CCPD_LETTERS] + [CCPD_NUMBERS] * 6
        pairs = zip(tables, indices.split("_"))
        plate = "".join(table[int(k)] for table, k in pairs)
        plate = plate.replace("O", "")
    except (ValueError, IndexError):
        raise ValueError("the name is not that of a CCPD photograph") from None
    if not PLATE.fullmatch(plate):
        raise ValueError("the plate holds characters outside the alphabet")
    is_wide = x0 < x1 and lower_left[0] < lower_right[0] and upper_left[0] < upper_right[0]
    is_high = y0 < y1 and upper_left[1] < lower_left[1] and upper_right[1] < lower_right[1]
    if not (is_wide and is_high):
        raise ValueError("the box or the corners in its name enclose no area")
    return box, corners, plate


def straighten(image, corners, margin):
    """Pull the four corners to a rectangle: (image, box of the plate in it)."""
    lower_right, lower_left, upper_left, upper_right = corners
    widths = (math.dist(lower_left, lower_right), math.dist(upper_left, upper_right))
    heights = (math.dist(upper_left, lower_left), math.dist(upper_right, lower_right))
    x0 = round(margin * max(widths))
    y0 = round(margin * max(heights))
    x1 = x0 + round(max(widths))
    y1 = y0 + round(max(heights))
    targets = [(x1, y1), (x0, y1), (x0, y0), (x1, y0)]  # in the same order
    image = perspective(image, corners, targets)
    return image, ((x0, y0), (x1, y1))


def cut_frame(path, target_folder, rectify, margin):
    """Cut the plate out of one photograph. Returns "cut" or "already there"; raises ValueError."""
    box, corners, plate = parse_frame(path)
    target = Path(target_folder, f"{path.stem}-{plate}.jpg")
    if target.exists():
        return "already there"
    image = open_image(path)
    (x0, y0), (x1, y1) = box
    if x0 < 0 or y0 < 0 or x1 > image.width or y1 > image.height:
        raise ValueError("the box in its name lies outside the photograph")
    if rectify:
        image, ((x0, y0), (x1, y1)) = straighten(image, corners, margin)
    margin_x = round(margin * (x1 - x0))
    margin_y = round(margin * (y1 - y0))
    left = max(0, x0 - margin_x)
    top = max(0, y0 - margin_y)
    right = min(image.width, x1 + margin_x)
    bottom = min(image.height, y1 + margin_y)
    image = image.crop((left, top, right, bottom))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, encode_image(image, "JPEG"))
    return "cut"


def crop(frames, out, rectify=False, margin=0.0):
    """Cut the plates out of all CCPD photographs below `frames`, to out/.../FRAME-PLATE.jpg.

    Cuts along the box in the name, or with `rectify` pulls its four corners straight.
    margin: a share of the plate's size that is added on every side."""
    if not 0 <= margin <= 1:
        raise ValueError(f"--margin {margin}: give a share of the plate's size, from 0 to 1")

    def cut(path):
        try:
            folder = Path(out, path.relative_to(frames).parent)
            return cut_frame(path, folder, rectify, margin)
        except ValueError as error:
            print(f"warning: {printable(path)}: skipped, {error}", file=sys.stderr)
            return "skipped"

    # the crops of an earlier run are no photographs
    own = Path(out).resolve()
    paths = list_images(frames)
    paths = [path for path in paths if own not in path.resolve().parents]
    if not paths:
        raise ValueError(f"{frames}: no photographs in it, outside {out}; name another folder")
    with ThreadPoolExecutor(count_cpus()) as pool:
        results = pool.map(cut, paths)
        counts = Counter(show_progress(results, len(paths), "photograph"))
    words = [f"{count:,} {result}" for result, count in counts.most_common()]
    print(f"{out}: " + ", ".join(words))


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = {}
    for tool in (audit, show, render, crop):
        first_line = (tool.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(tool.__name__, help=first_line)
        command.set_defaults(tool=tool)
        add[tool] = command.add_argument
    for tool in (audit, show):
        help_text = "the characters of the labels, or a file of them"
        add[tool]("folder", help="a folder of crops; for show also the word synthetic")
        add[tool]("--alphabet", type=read_alphabet, default=ALPHABET, help=help_text)
    add[audit]("--json", dest="report", metavar="FILE", help="write all of it here")
    add[show]("out", help="the picture to write")
    add[show]("--augmented", action="store_true", help="as training sees them")
    add[render]("out", help="the folder to write to")
    add[render]("--count", type=positive_int, default=1000, help="(default: %(default)s)")
    add[render]("--seed", type=int, default=0, help="(default: %(default)s)")
    add[crop]("frames", help="the folder of photographs")
    add[crop]("out", help="the folder to write to")
    add[crop]("--rectify", action="store_true", help="pull the four corners straight")
    add[crop]("--margin", type=float, default=0.0, help="a share added on every side")
    return vars(parser.parse_args(argv))


def main(argv=None):
    arguments = parse_arguments(argv)
    tool = arguments.pop("tool")
    with plain_errors():
        is_clean = tool(**arguments)
        if is_clean is False:
            sys.exit(1)


if __name__ == "__main__":
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    main()
