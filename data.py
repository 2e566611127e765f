"""Lesson 1, data: from a file to a label and a picture, and a camera that makes new pictures.

    python data.py audit DIR                      # what a data set holds, and what is wrong
    python data.py crop FRAMES OUT [--rectify]    # CCPD photographs to crops for training

A label is read from a file's name, and all images get one size. The camera, simulated,
photographs the plates that assets/plates.py draws, and augments real crops. model.py (lesson 2)
reads these pictures, and train.py (lesson 3) learns from them.

Copy this file into any project; it imports no other of ours.
"""

import argparse
import contextlib
import errno
import functools
import io
import itertools
import math
import operator
import os
import random
import re
import shutil
import sys
import tempfile
import time
import unicodedata
import uuid
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import einsum, linspace, rand, randn
from torchvision.transforms.v2.functional import pil_to_tensor, resize, to_dtype

# ---------------------------------------------------------------------------------------
# The alphabet

DIGITS = "0123456789"
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # real plates hold no I and no O
PROVINCES = "云京冀吉宁川新晋桂沪津浙渝湘琼甘皖粤苏蒙藏豫贵赣辽鄂闽陕青鲁黑"
NOTEBOOK_ALPHABET = DIGITS + LETTERS + PROVINCES  # the baseline's
# police, driving schools, trailers, Hong Kong, Macau, embassies, consulates
ALPHABET = NOTEBOOK_ALPHABET + "警学挂港澳使领"
FUELS = "ABCDEFGHJK"  # the letters that tell how an electric car is driven


def seven_characters(*last, city=(PROVINCES, LETTERS)):
    """The plate patterns of seven characters: the city, digits and letters, and what is `last`.

    A plate pattern says for every position which characters may stand there: a tuple of strings.
    The standard (GA 36-2018) allows at most two letters behind the city's."""
    kinds = itertools.product((DIGITS, LETTERS), repeat=5 - len(last))
    return tuple((*city, *middle, *last) for middle in kinds if middle.count(LETTERS) <= 2)


SEVEN = seven_characters()
EIGHT = (
    (PROVINCES, LETTERS, FUELS) + 5 * (DIGITS,),
    (PROVINCES, LETTERS, FUELS, LETTERS) + 4 * (DIGITS,),
    (PROVINCES, LETTERS) + 5 * (DIGITS,) + (FUELS,),  # lorries and buses
)
EMBASSY = (("使",) + 6 * (DIGITS,),)
SPECIAL = seven_characters("警学挂领") + seven_characters("港澳", city="粤Z") + EMBASSY
PATTERNS = SEVEN + EIGHT + SPECIAL


@functools.lru_cache
def is_chinese(alphabet):
    """Whether what is read with `alphabet` are Chinese plates: ours, or that of an older reader."""
    return set(NOTEBOOK_ALPHABET) <= set(alphabet) <= set(ALPHABET)


# full-width letters, as Chinese keyboards type them, stand in the order of the plain ones
FULL_WIDTH = {code + 0xFEE0: code for code in range(33, 127)}


def normalise(text):
    """`text` with one form of each character, without invisible ones.

    Accents are joined to their letters, and full-width letters become plain ones. Raised or circled
    digits (² and ①) stay what they are: they are no part of a plate."""
    plain = unicodedata.normalize("NFC", text.translate(FULL_WIDTH))
    return "".join(filter(str.isprintable, plain))


def read_alphabet(text):
    """An argparse type: the characters of `text`, or of the UTF-8 file.txt that it names."""
    if text.endswith(".txt"):
        text = Path(text).read_text("utf-8-sig", errors="replace")
    characters = "".join(dict.fromkeys(normalise(text)))
    if not characters or "\ufffd" in characters:
        raise argparse.ArgumentTypeError("holds no characters of labels, or not as UTF-8")
    return characters


# ---------------------------------------------------------------------------------------
# Options, messages and files, for all scripts


class ImageError(OSError):
    """An image file is absent, locked, broken or odd: all others can still be read."""


def between(kind, low, high):
    """An argparse type: an int or a float from `low` to `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: give a number from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # argparse says: invalid float value
    return parse


def printable(path):
    """A path for one line of a terminal: each control character is a question mark."""
    return "".join(char if char.isprintable() else "?" for char in str(path))


def warn(why, paths):
    """Warn of `paths`, if there are any, naming the first five, or all where stderr is stdout: in
    the audit, whose answer the warnings are."""
    if paths:
        text = f"warning: {len(paths):,} {why}"
        named = paths if sys.stderr is sys.stdout else paths[:5]
        print(text, *map(printable, named), sep="\n    ", file=sys.stderr)


@contextlib.contextmanager
def one_sentence():
    """Every script runs in this. What the user can mend is an OSError, as Python's own for files
    are, and becomes one sentence on stderr; a fault of the program shows its traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # Jupyter's has no such method, and no need of it
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        yield
    except BrokenPipeError:  # `| head` has seen enough
        os._exit(1)  # at once: Python's own way out would print there again
    except OSError as error:
        sys.exit(f"error: {printable(error)}")
    except (MemoryError, torch.cuda.OutOfMemoryError):
        sys.exit("error: not enough memory; train with a smaller --batch-size or --size")
    except KeyboardInterrupt:
        sys.exit(130)


def check_output(path, suffix, inputs=()):
    """Raise OSError, before any work is done, unless a file `path` can be written.

    It must end in `suffix` and be none of `inputs`, so that no photograph is written over."""
    # not Path.resolve, which fails for links in a ring
    path = Path(os.path.realpath(path))
    is_free = path.is_file() or not os.path.lexists(path)  # no folder, device, or such a link
    is_good = is_free and path.suffix == suffix and os.access(path.parent, os.W_OK)
    if not is_good or str(path) in map(os.path.realpath, inputs):
        raise OSError(f"{path}: cannot be written; name a new file{suffix} in a folder of yours")


def write_file(path, content):
    """Write bytes, or text as UTF-8, to `path`: all of it or nothing. Folders on the way are made.
    Raises OSError."""
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    target = Path(os.path.realpath(path))  # a link is followed, not replaced
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        partial.write_bytes(content)
        partial.replace(target)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        partial.unlink(missing_ok=True)


def save_image(path, image):
    """Write a Pillow image to `path`, a .jpg or a .png: all of it or nothing. Raises OSError."""
    file = io.BytesIO()
    image.save(file, "JPEG" if Path(path).suffix == ".jpg" else "PNG", quality=95)
    write_file(path, file.getvalue())


def not_empty(text):
    """An argparse type: a text. An empty one is mostly a variable of the shell that was not set."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; give a name, or drop it")
    return text


def make_parser(text):
    """A parser of a script's options, and what adds one; `text` tells what the script does."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.register("type", None, not_empty)  # of all options that name no other
    return parser, parser.add_argument


PRECISIONS = ("fp32", "bf16", "fp16")


def machine_options(add):
    """Add the options that say what to compute with, the same in train, evaluate and predict."""
    add("--device", help="cuda or cpu (default: the first there is)")
    add("--precision", choices=PRECISIONS, help="(default: the device's fastest)")


# ---------------------------------------------------------------------------------------
# Labels from file names

# A plate that breaks a rule still teaches, so this is looser than PATTERNS. What ends in "~" is
# a guess that nobody has confirmed (predict.py --label).
PLATE = re.compile(
    rf"([{PROVINCES}][{LETTERS}]|使(?=[\W_]*\d{{6}}))[\W_]*"
    rf"([0-9A-Z]{{5,6}}|[0-9A-Z]{{4,5}}[警学挂港澳领])(?![0-9A-Z~警学挂港澳领])"
)
STANDARD = re.compile("|".join("".join(map("[{}]".format, row)) for row in PATTERNS))
REPAIR = str.maketrans("OI", "01")
REPAIRED = "labels held O or I, which plates do not; read as 0 and 1"
NO_PATTERN = "labels that fit no pattern of plates"
DROPPED = "names hold letters before the last -; if these are of the label, add - to --alphabet"


def unlabelled(alphabet):
    """The remark of parse_label on names without a label."""
    if not is_chinese(alphabet):
        return f"files whose names hold no label; a good one is 01-{alphabet[:6]}.jpg"
    return (
        "files whose names hold no label; a good one is 01-LABEL.jpg, such as 01-皖AX511H.jpg; "
        "plates with O as the city's letter cannot be learnt; "
        "photographs of CCPD are to be cut first: python data.py crop FRAMES OUT"
    )


def find_plates(text):
    """All plates in a name, in capitals or in small letters: {(city, number), ...}."""
    return {*PLATE.findall(text), *PLATE.findall(text.swapcase())}


def parse_label(path, alphabet=ALPHABET):
    """The label of a crop, from its file name: (text, remark). text is "" if there is none.

    With the alphabet of Chinese plates: the one plate that stands behind the last "-", or else in
    the whole name. Plates hold no O and no I, so these are read as 0 and 1. With any other
    alphabet: what stands behind the last "-", or the whole name if "-" is one of its characters.
    The remark says what was odd, in words for many files; mostly it is empty."""
    name = normalise(os.path.splitext(os.path.basename(path))[0])
    *before, last = [name] if "-" in alphabet else name.split("-")
    if is_chinese(alphabet):
        # people write 皖A·X511H, 皖a-x511h, 皖AX511H (1) and 皖AX511Hb
        plates = find_plates(last) or find_plates(name)
        # a guess has no label, whatever stands before it
        if len(plates) == 1 and "~" not in last:
            plate = "".join(plates.pop())
            text = plate.translate(REPAIR)
            if all(map(alphabet.__contains__, text)):  # that of an older reader has less
                odd = "" if STANDARD.fullmatch(text) else NO_PATTERN
                return text, REPAIRED if text != plate else odd
    elif last and set(last) <= set(alphabet):
        could_be_label = before and set(before[-1]) <= set(alphabet)
        return last, DROPPED if could_be_label and not before[-1].isdigit() else ""
    return "", unlabelled(alphabet)


# the names and Pillow's formats of photographs; others may start programs
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
FORMATS = ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF"]


def walk(folder):
    """Yield the paths of all files below `folder`, but for what begins with a dot. Links to folders
    are not followed. Raises OSError for a folder that cannot be read, which os.walk passes over."""
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from walk(entry.path)
        elif not entry.is_dir():
            yield entry.path


def list_images(folder):
    """All images below `folder`, sorted, by their names' ends. Raises OSError, see walk.

    stderr counts the files passed over."""
    files = sorted(walk(folder))
    images = [path for path in files if path.lower().endswith(SUFFIXES)]
    others = sorted({*files} - {*images})
    warn("files passed over, without a suffix of images", others)
    return list(map(Path, images))


# names that people give to the parts of a data set
SPLIT = re.compile("train(ing)?|val(id(ation)?)?|test(ing)?|eval(uation)?", re.IGNORECASE)


def split_folder(root, split):
    """The folder `split` in `root`, or for "train" and "test" `root` itself if it has no splits.

    Raises OSError if it is not clear which, or `root` is no folder."""
    entries = list(os.scandir(root))
    folders = [entry.name for entry in entries if entry.is_dir()]
    chosen = [name for name in folders if name.lower() == split]
    if len(chosen) == 1:
        loose = [entry.name for entry in entries if entry.name.lower().endswith(SUFFIXES)]
        warn(f"images passed over, beside the folder {chosen[0]}", loose)
        return Path(root, chosen[0])
    if any(map(SPLIT.fullmatch, folders)) or split not in ("train", "test"):
        raise OSError(
            f"{root}: has {len(chosen)} folders {split!r}; have one, or name a folder of crops"
        )
    return Path(root)


def label_images(folder, alphabet):
    """All images below `folder` with what parse_label says: [(path, text, remark), ...].

    stderr names the files without a label, and those whose label is odd."""
    labelled = [(path, *parse_label(path.name, alphabet)) for path in list_images(folder)]
    for why in sorted({remark for _, _, remark in labelled} - {""}):
        warn(why, [path for path, _, remark in labelled if remark == why])
    return labelled


def find_crops(folder, alphabet=ALPHABET):
    """The labelled crops among label_images: [(path, text), ...]. Raises OSError for none."""
    crops = [(path, text) for path, text, _ in label_images(folder, alphabet) if text]
    if not crops:
        raise OSError(f"{folder}: no labelled crops; name files such as 01-LABEL.jpg")
    return crops


def hash_label(text):
    """A number below 2**32, the same in all processes.

    Labels mix up O and 0, I and 1: these count as equal."""
    return zlib.crc32(text.upper().translate(REPAIR).encode())


def is_held_out(text, share):
    """Whether training leaves out the crops of this label, to choose weights by.

    True of about `share` of all labels. No plate is on both sides, whatever files come or go."""
    return hash_label(text) < share * 2**32


# ---------------------------------------------------------------------------------------
# Images


def open_image(source):
    """One image as an upright RGB Pillow image. Raises ImageError, or the system's OSError.

    source: a path, an open file or its bytes, a Pillow image, or a uint8 array (H, W, 3) or (H, W).
    An array is RGB; OpenCV's are BGR, so give array[:, :, ::-1]."""
    name = type(source).__name__
    try:
        if isinstance(source, (str, os.PathLike)):
            name = source
            if not os.path.isfile(source):  # to open a pipe would wait for ever
                raise ValueError("no such file, or a folder or a pipe")
            with open(source, "rb") as file:
                source = file.read(100_000_000)  # more is no photograph
        if isinstance(source, (bytes, bytearray, memoryview)):
            source = io.BytesIO(source)
        if hasattr(source, "read"):
            source = Image.open(source, formats=FORMATS)
        elif not isinstance(source, Image.Image):
            source = Image.fromarray(source)
        # larger ones fill the memory; convert() would clip 16 bits to white, and nobody knows
        # their scale
        is_large = math.prod(source.size) > 89_000_000 or max(source.size) > 65_535
        if is_large or 0 in source.size or source.mode[0] in "IF":
            raise ValueError(
                f"{source.width} x {source.height} pixels in mode {source.mode}; "
                "cut the plate out and save it with 8 bits"
            )
        return ImageOps.exif_transpose(source).convert("RGB")
    except MemoryError:  # no fault of the image, which has been measured
        raise
    except Exception as error:  # for broken files Pillow raises all kinds
        reason = error
        if isinstance(error, (UnidentifiedImageError, AttributeError, TypeError)):
            reason = (
                f"none of {', '.join(FORMATS)}, Pillow image or uint8 array (H, W, 3); save a "
                "HEIC as one of these, and of a tensor give tensor.permute(1, 2, 0).numpy()"
            )
        # what the system says of one file; all else, such as of a failing disk, ends the run
        of_the_file = (None, errno.ENOENT, errno.EACCES, errno.EPERM)
        kind = ImageError if getattr(error, "errno", None) in of_the_file else OSError
        raise kind(f"{name}: cannot be read ({reason})") from None


def fit(image, size):
    """A Pillow image in RGB as uint8 (3, *size): for training, scoring and reading alike."""
    return pil_to_tensor(resize(image, size))  # antialiased if it shrinks


def load_image(source, size):
    """An image (see open_image) as uint8 (3, *size)."""
    return fit(open_image(source), size)


def with_progress(items):
    """Yield the items of a list. What takes more than five seconds tells stderr how far it is: on a
    terminal in one line that renews itself, elsewhere every half minute."""
    total = operator.length_hint(items)  # 0 for a stream, whose end nobody knows
    stream = sys.__stderr__  # audit prints warnings elsewhere
    is_terminal = stream and stream.isatty()
    start = time.monotonic()
    due = start + 5
    for done, item in enumerate(items):
        now = time.monotonic()
        # of several processes one tells
        if 0 < done < total and now > due and os.getenv("RANK", "0") == "0":
            minutes = (now - start) / done * (total - done) / 60
            text = f"{done:,} of {total:,}, {minutes:.1f} min left"
            print(f"{text:40}", end="\r" if is_terminal else "\n", file=stream, flush=True)
            due = now + (1 if is_terminal else 30)
        yield item


def in_threads(function, items, *options):
    """Yield in order what the function returns for each item and the options. Items for which it
    raises an ImageError are left out, and stderr names them at the end. Of a list of items stderr
    tells how far it is.

    There are as many workers as torch has threads. Each computes with one, so that none waits for
    another's share. Few items are taken ahead: together they may be more than memory holds."""

    def submit():
        try:
            for item in with_progress(items):
                yield pool.submit(function, item, *options)
        except Exception as error:  # of the items: raised when those before it have been yielded
            broken = Future()
            broken.set_exception(error)
            yield broken

    threads = torch.get_num_threads()
    errors = []
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = submit()
            waiting = deque(itertools.islice(futures, threads + 2))
            while waiting:
                try:
                    yield waiting.popleft().result()
                except ImageError as error:
                    errors.append(str(error))  # itself it would keep the file's pixels
                waiting.extend(itertools.islice(futures, 1))
    finally:
        torch.set_num_threads(threads)  # or threads that start later would have one core too
    warn("files left out", errors)


def join_rows(image):
    """A plate of two rows as a plate of one: the upper part of a Pillow image beside the lower one,
    a Pillow image of 280 x 80 pixels.

    Each is as wide as its share of the seven characters. Above stand the province and a letter,
    with free space on both sides. No crop is exact: both parts hold what lies between the rows."""
    width, height = image.size
    upper = image.resize((80, 80), box=(0.2 * width, 0, 0.8 * width, 0.42 * height))
    lower = image.resize((200, 80), box=(0, 0.34 * height, width, height))
    return Image.fromarray(np.hstack((upper, lower)))


def load_crop(crop, size):
    """One of the crops of load_crops. Those of two rows are joined, see join_rows."""
    path, text = crop
    image = open_image(path)
    # so narrow were 7 of 1,200 crops of one row; in reading, where the label is not known, both
    # ways are tried for wider ones, too
    if text[0] in PROVINCES and len(text) == 7 and 1 < image.width / image.height < 1.5:
        image = join_rows(image)
    return fit(image, size), text


def load_crops(crops, size):
    """All crops that can be read, decoded once: (uint8 (N, 3, *size), their N texts).

    crops: [(path, text), ...]. stderr names those that cannot be read. Raises OSError if none
    can."""
    disk = tempfile.gettempdir()
    if shutil.disk_usage(disk).free < 3 * math.prod(size) * len(crops):
        raise OSError(f"{disk}: too small for the crops; set TMPDIR to a folder with more space")
    texts = []
    # On disk, so that there may be more than memory holds: the system caches what fits. The file
    # has no name, the map stays valid after it is closed, and it is gone when the process ends.
    with tempfile.TemporaryFile() as file:
        for image, text in in_threads(load_crop, crops, size):
            file.write(image.numpy().tobytes())
            texts.append(text)
        if not texts:
            raise OSError(
                f"{crops[0][0]}: neither it nor another of its part can be read; check the files"
            )
        images = np.memmap(file, np.uint8, shape=(len(texts), 3, *size))
    return torch.from_numpy(images), texts


def seed_all(*counters):
    """Seed all random numbers, so that they follow from `counters`, not from what ran before."""
    random.seed(repr(counters))
    torch.manual_seed(random.getrandbits(63))


# ---------------------------------------------------------------------------------------
# The simulated camera. It draws on torch's and Python's random numbers, which the caller seeds:
# single numbers come from Python, since to ask a GPU for one would make it wait.
#
# A random number in [0, 1] to the power of 2, 3 or more is mostly near 0: so most pictures are
# a little worse than perfect, and a few are very bad.


def lying_on(device):
    """The context in which new tensors lie on `device`. On a CPU they do without it, and faster."""
    return contextlib.nullcontext() if device.type == "cpu" else device


def pair(x, y):
    """A number along x and another along y, as a tensor (2, 1) on the device in use."""
    return linspace(x, y, 2).view(2, 1)


def warp(images, size, extent, strength):
    """The view: a plate seen from an angle and cut out. Float (B, 3, h, w) to (B, 3, *size).

    affine_grid asks for each pixel of the picture where on the plate it comes from. So all here is
    the inverse of what happens: from the picture back to the plate, both [-1, 1] in x and in y.
    `view` holds for each picture (2 rows, 3 columns) what to multiply x, y and 1 by:

                         x                  y                  1
        x on the plate   width of the box   slant of x         move to the side
        y on the plate   slant of y         height of the box  move up or down

    The plate hangs at an angle: in the photograph x is x + slant * y, and y is y + slant * x. A
    detector cut it out by the box around it, or nearly so: from 8% wider and 14% higher than the
    plate to 17% narrower and 32% lower. At last comes perspective: one end is nearer."""
    count = len(images)
    slant = strength * pair(0.06, 0.4) * randn(count, 2, 1)
    eye = torch.eye(2)
    turn = eye - slant * eye.flip(0)  # (B, 2, 2)
    box = turn * (1 + slant.abs()).mT  # larger than a slanted plate, in each direction by its slant
    tight = rand(count, 2, 1) ** pair(2, 1)
    zoom = pair(0.93, 0.88) + pair(0.27, 0.60) * tight
    move = 0.04 * randn(count, 2, 1)
    view = pair(*extent) * torch.cat((box / zoom, move), 2)  # (B, 2, 3)
    grid = F.affine_grid(view, (count, 3, *size), align_corners=False)  # (B, H, W, 2)
    nearer_x, nearer_y = 0.06 * strength * randn(2, count, 1, 1)
    x = linspace(-1, 1, size[1])
    y = linspace(-1, 1, size[0]).view(-1, 1)
    depth = 1 + nearer_x * x + nearer_y * y  # (B, H, W)
    grid = grid / depth.unsqueeze(3)  # divides both coordinates
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def relight(images, strength):
    """The light: its strength and colour, unevenness, and glare."""
    count = len(images)
    # a smooth field, which burns out where it is brightest
    light = resize(randn(count, 1, 2, 3), images.shape[2:], antialias=False)
    exposure = 0.45 * randn(count, 1, 1, 1) + 0.15 * randn(count, 3, 1, 1) + 0.3 * light
    glare = (0.5 * light - 0.5).clamp(min=0)
    return (images * (strength * exposure).exp() + strength * glare).clamp(0, 1)


def blur(images, strength):
    """The lens, one for all images: out of focus, moved along a line while it was open, and
    sharpened in the camera."""
    pixels = strength * images.shape[2] / 32  # the lengths are for a picture of 32 rows
    across = 0.15 + pixels * 2 * random.random() ** 4
    along = across + pixels * 4 * random.random() ** 4
    angle = random.uniform(0, math.pi)
    reach = math.ceil(max(3, 2 * along))
    x = torch.arange(-reach, reach + 1.0)
    y = x.view(-1, 1)
    u = (x * math.cos(angle) + y * math.sin(angle)) / along
    v = (y * math.cos(angle) - x * math.sin(angle)) / across
    # a Gaussian of sum 1, longer along the line
    kernel = (-(u**2) - v**2).div(2).flatten().softmax(0).view_as(u)
    padded = F.pad(images, 4 * [reach], mode="replicate")
    blurred = F.conv2d(padded, kernel.expand(3, 1, -1, -1), groups=3)
    # what differs from the surroundings is sharpened, which leaves a halo
    halo = images - F.avg_pool2d(images, 5, 1, 2, count_include_pad=False)
    return blurred + 1.4 * strength * random.random() ** 2 * halo


# By how much a file of quality 50 rounds each cosine wave in 8 x 8 pixels, from coarse to fine, for
# brightness and for colour (ITU-T T.81, annex K)
LUMA_STEPS = """
16 11 10 16  24  40  51  61
12 12 14 19  26  58  60  55
14 13 16 24  40  57  69  56
14 17 22 29  51  87  80  62
18 22 37 56  68 109 103  77
24 35 55 64  81 104 113  92
49 64 78 87 103 121 120 101
72 92 95 98 112 100 103  99
"""
COLOUR_STEPS = """
17 18 24 47 99 99 99 99
18 21 26 66 99 99 99 99
24 26 56 99 99 99 99 99
47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99
99 99 99 99 99 99 99 99
99 99 99 99 99 99 99 99
99 99 99 99 99 99 99 99
"""
# brightness, and how much bluer and redder than grey, from red, green and blue
YCC = ((0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081))


@functools.lru_cache
def jpeg_tables(device):
    """The cosine waves of 8 pixels, (8, 8), the steps, (2, 8, 1, 8), YCC and its inverse. To copy
    them to a GPU waits, so it is done once."""
    k = torch.arange(8.0).view(-1, 1)
    waves = (math.pi / 16 * k * (2 * k.T + 1)).cos() / 2
    waves[0] /= math.sqrt(2)  # now all have length 1, and the transpose is the inverse
    steps = torch.tensor(list(map(float, (LUMA_STEPS + COLOUR_STEPS).split())))
    ycc = torch.tensor(YCC)
    return [x.to(device) for x in (waves, steps.view(2, 8, 1, 8), ycc, ycc.inverse())]


def round_waves(planes, waves, steps):
    """Planes (B, C, H, W) whose blocks of 8 x 8 pixels were taken apart into cosine waves, and
    the amount of each rounded to a multiple of its step (B, 1, 8, 1, 8)."""
    # b: image, y and x: block, i and j: pixel in it, u and v: wave
    blocks = planes.reshape(len(planes), -1, 8, planes.shape[3] // 8, 8)
    amounts = einsum("ui,byixj,vj->byuxv", waves, blocks, waves)
    rounded = (amounts / steps).round() * steps
    return einsum("ui,byuxv,vj->byixj", waves, rounded, waves).view(planes.shape)


def jpeg(images, quality):
    """What a JPEG file keeps of images (B, 3, H, W) in [0, 255]; quality: (B, 1, 1, 1).

    It keeps little of what eyes hardly see: colours at half the size, fine waves roughly."""
    waves, tables, ycc, rgb = jpeg_tables(images.device)
    percent = torch.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    steps = [((table * percent.unsqueeze(1) + 50) // 100).clamp(1, 255) for table in tables]
    height, width = images.shape[2:]
    padded = F.pad(images - 128, (0, -width % 16, 0, -height % 16), mode="replicate")
    luma, colours = einsum("ij,bjhw->bihw", ycc, padded).split((1, 2), 1)
    luma = round_waves(luma, waves, steps[0])
    colours = round_waves(F.avg_pool2d(colours, 2), waves, steps[1])
    colours = resize(colours, padded.shape[2:], antialias=False)
    pixels = einsum("ij,bjhw->bihw", rgb, torch.cat((luma, colours), 1)) + 128
    return pixels[:, :, :height, :width].clamp(0, 255)


def photograph(images, size, extent):
    """One handful through the camera: the view, the light, the lens, the sensor, the file."""
    # how much harm is done: every third handful is as sharp and well lit as a good photograph, in
    # which the strokes of a character stand apart
    strength = random.choice([1.0, 1.0, 0.25])
    # fewer pixels than the network's input, in each direction by a factor of its own; the last
    # line enlarges again
    sensor = [round(side * (1 - 0.6 * strength * random.random() ** 2)) for side in size]
    images = warp(images, size, extent, strength)
    images = blur(relight(images, strength), strength)
    images = resize(images, sensor)
    noise = 0.05 * strength * rand(len(images), 1, 1, 1) ** 3
    images = 255 * (images + noise * randn(images.shape)).clamp(0, 1)
    images = jpeg(images, torch.randint(35, 96, (len(images), 1, 1, 1)))
    return resize(images, size, antialias=False).round().to(torch.uint8)


def camera(images, size, extent=(1.0, 1.0)):
    """Photograph `images`: (B, 3, h, w), uint8 or float32 in [0, 1], to uint8 (B, 3, *size).

    extent: the share of the picture's width and height that the plate takes."""
    images = to_dtype(images, scale=True)
    with lying_on(images.device):
        # images that share a lens: so few fit into a CPU's cache; large batches are of a GPU, for
        # which a few large handfuls are less work than many
        handfuls = images.split(max(16, len(images) // 4))
        return torch.cat([photograph(some, size, extent) for some in handfuls])


# ---------------------------------------------------------------------------------------
# Audit


def audit(folder, alphabet=ALPHABET):
    """Print what a data set holds and all that is wrong with it.

    Returns whether every name holds a label and every image can be read."""
    with contextlib.redirect_stderr(sys.stdout):  # here the warnings are the answer
        labelled = label_images(folder, alphabet)
        paths = [path for path, _, _ in labelled]
        sizes = list(in_threads(lambda path: open_image(path).size, paths))
        texts = [text for _, text, _ in labelled]
        counts = Counter("".join(texts))
        splits = defaultdict(list)
        for path, text, _ in labelled:
            # DIR/train/part1/x.jpg belongs to train
            splits["".join(path.relative_to(folder).parent.parts[:1]).lower()].append(text)
        print("images", {split: len(some) for split, some in splits.items()})
        print("lengths", dict(Counter(map(len, texts))))  # 0: no label
        print("characters", {char: counts[char] for char in alphabet})  # 0 for those never seen
        print("least, median, largest size", *np.quantile(sizes or [(0, 0)], (0, 0.5, 1), axis=0))
        both = {*splits["train"]} & {*splits["test"]} - {""}
        warn("plates in train and test", sorted(both))
    return all(texts) and len(sizes) == len(texts) > 0


# ---------------------------------------------------------------------------------------
# Crops from the whole photographs of CCPD (github.com/detectRecog/CCPD)

CCPD_PROVINCES = "皖沪津渝冀晋蒙辽吉黑苏浙京闽赣鲁豫鄂湘粤桂琼川贵云藏陕甘青宁新警学无"
CCPD_TABLES = [CCPD_PROVINCES, LETTERS + "无"] + 6 * [LETTERS + DIGITS + "无"]  # 无: no character


def cut_frame(path, frames, out, rectify):
    """Cut the plate out of one photograph, to `out` as it stands below `frames`. Raises ImageError.

    Its name is area-tilt-box-corners-indices-brightness-blur: the box of the plate from upper left
    to lower right, its corners from the lower right one on clockwise, the plate as indices."""
    image = open_image(path)
    fields = [list(map(int, re.findall(r"\d+", field))) for field in path.stem.split("-")]
    try:
        box, corners, indices = fields[2:5]
        points = np.reshape(box + corners, (6, 2))
        plate = "".join(CCPD_TABLES[place][k] for place, k in enumerate(indices))
        plate = plate.rstrip("无")
        is_inside = (points[0] < points[1]).all() and (points <= image.size).all()
        if not (is_inside and PLATE.fullmatch(plate)):
            raise ValueError
    except (ValueError, IndexError):
        raise ImageError(f"{path}: its name tells of no plate inside, as CCPD's do") from None
    plate_image = image.crop(box)
    if rectify:
        quad = points[[4, 3, 2, 5]].flatten()  # in the order of Pillow
        plate_image = image.transform(plate_image.size, Image.QUAD, quad, Image.BILINEAR)
    target = Path(out, f"{path.relative_to(frames)}-{plate}.jpg")  # a.jpg and a.png are two
    if target.exists() or len(os.fsencode(target.name)) > 255:
        raise ImageError(f"{target}: is there already, or is too long a name")
    save_image(target, plate_image)


def crop(frames, out, rectify):
    """Cut the plates out of all CCPD photographs below `frames`, to out/.../FRAME-PLATE.jpg.

    Cuts along the box in the name, or with `rectify` pulls the four corners straight."""
    paths = list_images(frames)
    cut = list(in_threads(cut_frame, paths, frames, out, rectify))
    print(f"{out}: {len(cut):,} plates cut, {len(paths) - len(cut):,} skipped")


@one_sentence()
def main(argv=None):
    parser, add = make_parser(__doc__)
    add("command", choices=["audit", "crop"])
    add("folder", help="crops to audit, or the photographs to cut them out of")
    add("out", nargs="?", default="crops", help="the folder to write crops to (%(default)s)")
    add("--alphabet", type=read_alphabet, default=ALPHABET, help="of the labels, or a .txt of it")
    add("--rectify", action="store_true", help="pull the four corners of a plate straight")
    args = parser.parse_args(argv)
    if args.command == "crop":
        crop(args.folder, args.out, args.rectify)
    elif not audit(args.folder, args.alphabet):
        sys.exit(1)


if __name__ == "__main__":
    main()
