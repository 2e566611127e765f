"""Licence-plate data: labels from file names, images from any format, plates drawn from scratch.

    python data.py audit DIR [--json report.json]        what is in a data set, and what is wrong with it
    python data.py show DIR sheet.png [--augmented]      labelled samples as one picture (DIR may be: drawn)
    python data.py render OUT --count 1000               drawn plates as files, in OUT/train and OUT/test
    python data.py crop FRAMES OUT [--rectify]           CCPD photographs to crops named as training expects
    python data.py glyphs FONT... --out glyphs.png       the character pictures that drawn plates are made of

Copy this file (and glyphs.png, if plates are to be drawn) into any project; it imports no other of ours.
"""
import argparse
import hashlib
import json
import logging
import math
import os
import re
import sys
import time
import unicodedata
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torchvision.transforms.functional import perspective, pil_to_tensor, to_pil_image
from torchvision.utils import save_image

DIGITS, LETTERS = "0123456789", "ABCDEFGHJKLMNPQRSTUVWXYZ"          # real plates hold no I and no O
PROVINCES = "云京冀吉宁川新晋桂沪津浙渝湘琼甘皖粤苏蒙藏豫贵赣辽鄂闽陕青鲁黑"
ALPHABET = DIGITS + LETTERS + PROVINCES             # index 0 is the CTC blank, so character k has index k + 1
FORMS = [[PROVINCES, LETTERS] + [LETTERS + DIGITS] * n for n in (5, 6)]        # blue and green plates, place by place
PLATE = re.compile(f"[{PROVINCES}][{LETTERS}][{LETTERS}{DIGITS}]{{5,6}}")
CCPD_PROVINCES = "皖沪津渝冀晋蒙辽吉黑苏浙京闽赣鲁豫鄂湘粤桂琼川贵云藏陕甘青宁新警学O"        # in the order of CCPD's file names
IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)       # a picture too large to be a crop
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")           # broken files are named once, by us,
logging.getLogger("PIL").addHandler(logging.NullHandler())                      # not in Pillow's words as well

GENTLE = 0.5                                        # the camera's strength for crops that went through one already

# --------------------------------------------------------------------------------------------------------------
# Labels and files


def parse_label(path, alphabet=ALPHABET):
    """The label in a file name, what stands after its last "-" or all of it: (text, repaired), or (None, False).

    With the default alphabet the text is a plate, and a letter O or I in its number was read as 0 or 1 if `repaired`;
    with any other alphabet it is taken as it stands."""
    text = Path(path).stem.rpartition("-")[2]
    if alphabet != ALPHABET:
        return (text, False) if text and set(text) <= set(alphabet) else (None, False)
    text = unicodedata.normalize("NFKC", text).upper().translate(dict.fromkeys(map(ord, "·•・‧")))
    plate = text[:2] + text[2:].replace("O", "0").replace("I", "1")
    return (plate, plate != text) if PLATE.fullmatch(plate) else (None, False)


def list_images(folder):
    """All image files below `folder`, sorted; hidden files are passed over."""
    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: no such folder; give one with images, or with train and test folders inside")
    found = (Path(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted(p for p in found if p.suffix.lower() in IMAGES and not p.name.startswith("."))


def split_folder(root, split):
    """The folder of `split` ("train" or "test") in `root`; a root without such folders is itself the split."""
    root = Path(root)
    if (root / split).is_dir():
        return root / split
    if (root / "train").is_dir() or (root / "test").is_dir():
        raise ValueError(f"{root}: has no folder {split!r}; add it, or name a folder of crops")
    return root


def shown(path):
    """A path for one line of a terminal, control characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(path))


def find_crops(folder, alphabet=ALPHABET, quiet=False):
    """The labelled crops below `folder` as (paths, texts); unless `quiet`, says on stderr what was left out or repaired.

    Raises ValueError if there are none."""
    labels = [(path, *parse_label(path, alphabet)) for path in list_images(folder)]
    bad = [path for path, text, _ in labels if text is None]
    frames = [path for path in bad if path.name.count("&") >= 6]           # whole CCPD photographs, by their vertices
    for some, why in ((frames, "whole CCPD photographs left out; cut them first: python data.py crop FRAMES OUT"),
                      ([path for path in bad if path.name.count("&") < 6], "files left out, their names hold no label")):
        if some and not quiet:
            names = [shown(path.name) for path in some[:5]] + ["..."] * (len(some) > 5)
            print(f"warning: {len(some):,} {why}: {', '.join(names)}", file=sys.stderr)
    repaired = sum(mended for _, _, mended in labels)
    if repaired and not quiet:
        print(f"note: {repaired:,} labels held the letter O or I, which plates do not: read as 0 and 1", file=sys.stderr)
    if len(bad) == len(labels):
        names = "01-皖AX511H.jpg or 皖AX511H.jpg" if alphabet == ALPHABET else "01-LABEL.jpg, LABEL in characters of the alphabet"
        raise ValueError(f"{folder}: no labelled crops; file names such as {names} are expected")
    return [path for path, text, _ in labels if text is not None], [text for _, text, _ in labels if text is not None]


def open_image(source, least=None):
    """An image file of any Pillow format and mode, or a uint8 array (H, W, 3) or (H, W), as an upright RGB Pillow image.

    least: (width, height) that the JPEG decoder may shrink a far larger file to. Raises ValueError for what cannot be read."""
    try:
        with Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(source) as image:
            if least:
                image.draft("RGB", least)
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):                      # 16 bits a pixel; convert() would clip, not scale
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:                                  # Pillow's decoders raise all sorts for broken files
        name = "array" if isinstance(source, np.ndarray) else shown(source)
        raise ValueError(f"{name}: not a readable image ({shown(error)[:100] or type(error).__name__}); left out") from None


def read_image(source, size):
    """What open_image reads as uint8 (3, *size), antialiased when shrinking, bilinear when growing: the one way images take
    into training, evaluation and prediction."""
    return pil_to_tensor(open_image(source, size[::-1]).resize(size[::-1], Image.BILINEAR, reducing_gap=1.5))


def free_memory():
    """Bytes of memory that are free, or a guess of 4 GB where the system does not say."""
    try:
        return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):
        return 4 << 30


class PlateDataset(torch.utils.data.Dataset):
    """Labelled crops; item k is (uint8 (3, H, W), text). Threads decode (Pillow frees the GIL) and each file is decoded
    once: one uint8 array keeps them all where that takes at most half of the free memory.

    A file that cannot be read is named on stderr once; `__getitems__`, which DataLoader calls, leaves it out."""

    def __init__(self, paths, texts, size, workers=None):
        self.paths, self.texts, self.size, self.bad = paths, texts, tuple(size), set()
        self.pool = ThreadPoolExecutor(workers or os.cpu_count())
        self.bytes = len(paths) * 3 * size[0] * size[1]
        self.cached = self.bytes <= free_memory() / 2
        self.cache = torch.empty((len(paths) if self.cached else 0, 3, *size), dtype=torch.uint8)
        self.filled = np.zeros(len(paths), dtype=bool)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, k):
        if not self.filled[k]:
            image = read_image(self.paths[k], self.size)
            if not self.cached:
                return image, self.texts[k]
            self.cache[k] = image
            self.filled[k] = True
        return self.cache[k], self.texts[k]

    def __getitems__(self, indices):
        def get(k):
            try:
                return self[k]
            except ValueError as error:
                if k not in self.bad:
                    self.bad.add(k)
                    print(f"warning: {error}", file=sys.stderr)
        cached = all(self.filled[k] for k in indices)
        return [item for item in (map if cached else self.pool.map)(get, indices) if item]


def loader(dataset, batches):
    """(uint8 (B, 3, H, W), texts) for each list of indices in `batches`, the next one loading while one is used."""
    collate = lambda items: (torch.stack([image for image, _ in items]), [text for _, text in items]) if items else None
    items = iter(torch.utils.data.DataLoader(dataset, batch_sampler=batches, collate_fn=collate, pin_memory=torch.cuda.is_available()))
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(next, items, False)
        while (batch := future.result()) is not False:
            future = thread.submit(next, items, False)
            if batch:
                yield batch


def in_batches(indices, size):
    """A sequence of indices as lists of `size`, the last one shorter."""
    return [list(indices[k:k + size]) for k in range(0, len(indices), size)]


def progress(items, total, what):
    """Pass `items` on; on a terminal, stderr shows how many are done and the time left."""
    start = shown_at = time.time()
    for k, item in enumerate(items, 1):
        yield item
        if sys.stderr.isatty() and (time.time() - shown_at > 0.5 or k == total):
            shown_at = time.time()
            left = (shown_at - start) / k * (total - k)
            print(f"\r{what} {k:,}/{total:,}, {left:.0f} s left ", end="\n" if k == total else "", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------------
# Drawn plates. A glyph is a 45 x 90 mm character as a small grey picture; glyphs.png holds one row a typeface.

CELL_W, CELL_H = 24, 48                             # pixels of one character in glyphs.png
OWN_ROWS = 4                                        # its first rows: the plate's own shapes, in four pens


def stroke_glyph(paths, pen):
    """A line of strokes.txt drawn with a round pen of `pen` mm: a grey picture of 45 x 90 mm at 8 pixels a mm."""
    glyph = Image.new("L", (45 * 8, 90 * 8))
    draw, r = ImageDraw.Draw(glyph), pen * 4
    for path in paths.split(" / "):
        points, control = [], None
        for word in path.split():
            # the pen's outer edge touches the 45 x 90 box, so the grid shrinks as the pen grows
            end = np.array([float(v) for v in word.rstrip("*").split(",")]) / (35, 80) * (359 - 2 * r, 719 - 2 * r) + r
            if word.endswith("*"):
                control = end
                continue
            if control is not None:
                start = points[-1]
                points += [(1 - t) ** 2 * start + 2 * t * (1 - t) * control + t * t * end for t in np.arange(1, 8) / 8]
            points.append(end)
            control = None
        draw.line([tuple(p) for p in points], fill=255, width=round(2 * r))
        for x, y in points:
            draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    return glyph


def font_glyph(char, font, pen):
    """`char` of a typeface stretched to 45 x 90 mm, its strokes thickened to about `pen` mm; None if it lacks it."""
    x0, y0, x1, y1 = font.getbbox(char)
    if bytes(font.getmask(char)) == bytes(font.getmask("\uffff")):
        return None
    glyph = Image.new("L", (x1 - x0, y1 - y0))
    ImageDraw.Draw(glyph).text((-x0, -y0), char, fill=255, font=font)
    # Stretched first and thickened after: a plate's strokes are equally wide both ways, however narrow the character.
    for r in range(20):
        out = Image.new("L", (45 * 4, 90 * 4))
        out.paste(glyph.resize((out.width - 2 * r, out.height - 2 * r), Image.BILINEAR), (r, r))
        out = out.filter(ImageFilter.MaxFilter(2 * r + 1))
        ink = np.asarray(out) > 127
        edges = sum(np.count_nonzero(np.diff(ink, axis=axis)) for axis in (0, 1))
        if 2 * ink.sum() >= edges * pen * 4:        # a stroke's width is twice its area over its outline
            break
    return out


def glyphs(fonts, out):
    """Write glyphs.png: a row of CELL_W x CELL_H cells in ALPHABET's order for each face and pen.

    The first rows are strokes.txt in OWN_ROWS pens; a face that lacks a character has it from them.
    fonts: paths, with `,N` behind it the N-th face of a .ttc collection."""
    lines = Path(__file__).with_name("strokes.txt").read_text("utf8").splitlines()
    strokes = {line[0]: line[2:] for line in lines if not line.startswith("#")}
    # the more strokes a province has, the thinner they are
    thin = lambda char: max(0.65, 0.925 - 0.025 * strokes[char].count("/")) if char in PROVINCES else 1
    rows = [[stroke_glyph(strokes[c], pen * thin(c)) for c in ALPHABET] for pen in (7, 9, 11, 13)]
    for name in fonts:
        path, _, index = name.partition(",")
        font = ImageFont.truetype(path, 200, index=int(index or 0))
        for pen, own in ((5, rows[0]), (8, rows[1])):
            # a plate's 1 is a plain bar, whatever the typeface
            rows.append([c != "1" and font_glyph(c, font, pen if c in PROVINCES else pen + 3) or mine for c, mine in zip(ALPHABET, own)])
    sheet = Image.new("L", (CELL_W * len(ALPHABET), CELL_H * len(rows)))
    for y, row in enumerate(rows):
        for x, glyph in enumerate(row):
            sheet.paste(glyph.resize((CELL_W, CELL_H), Image.BOX), (x * CELL_W, y * CELL_H))
    sheet.save(out, optimize=True)


def load_glyphs(height, device="cpu"):
    """glyphs.png as float32 (rows, len(ALPHABET), height, height / 2) in [0, 1], resized with antialiasing."""
    sheet = np.array(Image.open(Path(__file__).with_name("glyphs.png")).convert("L"), dtype=np.float32) / 255
    cells = sheet.reshape(-1, CELL_H, len(ALPHABET), CELL_W).transpose(0, 2, 1, 3)
    cells = F.interpolate(torch.from_numpy(cells.copy()), (height, height // 2), mode="bilinear", antialias=True)
    return cells.clamp(0, 1).to(device)


def random_plates(n, generator, green=0.0, odd=0.0):
    """n strings, a share `green` of them, the first, with the eight characters of green plates; every province equally often.

    A share `odd`, the last, are no plates: provinces stand at half of all places, for practice."""
    def pick(chars, k):
        return [[chars[i] for i in row] for row in torch.randint(len(chars), (n, k), generator=generator, device=generator.device).tolist()]
    plates = zip(pick(PROVINCES, 1), pick(LETTERS, 1), pick(DIGITS * 7 + LETTERS, 6))     # three digits to a letter, as on real ones
    texts = ["".join(p + a + tail[:6 if k < green * n else 5]) for k, (p, a, tail) in enumerate(plates)]
    strange = pick(PROVINCES + "." * len(PROVINCES), 6)
    return [text if k < n - odd * n else text[0] + "".join(a if b == "." else b for a, b in zip(text[1:], strange[k]))
            for k, text in enumerate(texts)]


def paint(texts, glyphs, generator):
    """Plates of one length, head on and evenly lit: float32 (B, 3, h, w) in [0, 1] with a rim of bumper around them.

    Blue plates are 440 x 140 mm with 45 mm characters 12 mm apart, green ones 480 x 140 mm with 43 mm characters
    9 mm apart, and a dot in the wider gap after the second character (GA 36-2018)."""
    device, B, green = glyphs.device, len(texts), len(texts[0]) == 8
    rand = lambda *shape: torch.rand(B, *shape, generator=generator, device=device)
    one = lambda lo, hi: lo + (hi - lo) * torch.rand((), generator=generator, device=device).item()
    mm = glyphs.shape[2] / 90                                   # pixels in a millimetre
    width, gap, dot_gap, rim = (480, 9, 49, 20) if green else (440, 12, 34, 20)
    px = lambda v: round((v + rim) * mm)
    # the bumper: a colour with blotches, soft or with hard edges that must not be read as strokes
    blotches = F.interpolate(rand(1, 2, 14) - 0.5, (px(140 + rim), px(width + rim)), mode="bilinear" if one(0, 1) < 0.7 else "nearest")
    canvas = (rand(1, 1, 1) + 0.5 * (rand(3, 1, 1) - 0.5)) * rand(1, 1, 1) + (0.3 + 0.7 * rand(1, 1, 1)) * blotches
    plate = canvas[:, :, px(0):px(140), px(0):px(width)]
    if green:
        ground = torch.tensor([0.1, 0.6, 0.35], device=device).view(3, 1, 1) + 0.25 * rand(3, 1, 1)
        down = torch.linspace(1, 0, plate.shape[2], device=device).view(-1, 1) * rand(1, 1, 1).sqrt()
        plate.copy_(ground + (0.9 - ground) * down)
        ink = 0.2 * rand(3, 1, 1)
    else:
        dark, more = torch.tensor([[0.05, 0.1, 0.4], [0.3, 0.4, 0.6]], device=device).view(2, 3, 1, 1)
        plate.copy_(dark + more * rand(3, 1, 1))
        ink = 0.75 + 0.25 * rand(1, 1, 1) + 0.1 * (rand(3, 1, 1) - 0.5)

    def stamp(mask, x, y, colour):                              # lay `mask` with its upper left corner at x, y mm
        h, w = mask.shape[-2:]
        part = canvas[:, :, px(y):px(y) + h, px(x):px(x) + w]
        part.lerp_(colour.expand_as(part), mask[..., :part.shape[2], :part.shape[3]])

    # the thin border, fainter on some
    edge, line = one(3, 6), max(1, round(one(2, 5.5) * mm))
    border, strength = plate[:, :, round(edge * mm):-round(edge * mm), round(edge * mm):-round(edge * mm)], rand(1, 1, 1) ** 0.25
    for side in (border[:, :, :line], border[:, :, -line:], border[..., :line], border[..., -line:]):
        side.lerp_(ink.expand_as(side), strength)

    # one typeface for the province and one for the rest: the plate's own strokes, which are the first rows, mostly
    faces = [(torch.where(rand() < share, OWN_ROWS, len(glyphs)) * rand()).long() for share in (0.6, 0.8)]
    codes = torch.tensor([[ALPHABET.index(c) for c in text] for text in texts], device=device)
    x = 15.5
    for k in range(codes.shape[1]):
        face = torch.where(codes[:, k] < len(DIGITS + LETTERS), faces[1], faces[0])
        mask = glyphs[face, codes[:, k]].unsqueeze(1)           # (B, 1, h, w)
        wide = 43 if green and k else 45
        if wide == 43:
            mask = F.interpolate(mask, (mask.shape[2], round(43 * mm)), mode="bilinear", antialias=True)
        stamp(mask, x + one(-1.5, 1.5), 25 + one(-1.5, 1.5), ink)
        x += wide + (dot_gap if k == 1 else gap)
        if k == 1:
            disc = torch.ones(1, 1, max(2, round(10 * mm)), max(2, round(10 * mm)), device=device)
            stamp(disc * rand(1, 1, 1), x - dot_gap / 2 - 5, 65, ink)
    # screws and seals at the four holes
    size = one(8, 16)
    r = torch.linspace(-1, 1, max(3, round(size * mm)), device=device)
    disc = (1.3 - r.square() - r.square().view(-1, 1)).clamp(0, 1)
    for hx in (width / 4, width * 3 / 4):
        for hy in (12, 128):
            there = rand(1, 1, 1) < 0.4
            x, y = hx - size / 2 + one(-8, 8), hy - size / 2 + one(-5, 5)
            stamp(disc * there, x, y, rand(1, 1, 1) * (1 - 0.4 * rand(3, 1, 1)))
    return canvas


def camera(images, size, generator, strength=1.0, rim=0.0):
    """Photograph `images` anew: uint8 (B, 3, h, w) or float32 in [0, 1] to uint8 (B, 3, *size).

    In the order of a real camera: the plate hangs askew and is cut out by the box around it, light falls on it,
    lens and motion blur it, few and noisy pixels record it. strength 1 is for drawings; about 0.5 suits crops that
    went through a camera already. rim: the share of the image's width and height that is margin on every side,
    as (x, y)."""
    B, H, W, device = len(images), *size, images.device
    rand = lambda *shape: torch.rand(B, *shape, generator=generator, device=device)
    randn = lambda *shape: torch.randn(B, *shape, generator=generator, device=device)
    images = images / 255 if images.dtype == torch.uint8 else images

    # where the four corners of the plate come to lie in the crop, both as [-1, 1]
    square = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]], device=device)
    tilt, shear = 0.3 * strength * randn(1), 0.06 * strength * randn(1)
    quad = square + torch.stack((shear * square[:, 1], tilt * square[:, 0]), 2) + 0.04 * strength * randn(4, 2)
    low, high = quad.amin(1, keepdim=True), quad.amax(1, keepdim=True)
    quad = (2 * quad - low - high) / (high - low)               # its bounding box fills the crop ...
    loose, tight = torch.tensor([-0.05, -0.1], device=device), torch.tensor([0.1, 0.45], device=device)
    quad = quad * (1 + strength * (loose + (tight - loose) * rand(1, 2))) + strength * 0.04 * (randn(1, 2))
    # ... and the homography from crop to picture follows from the corners (Hartley and Zisserman, 4.1)
    target = (square * (1 - 2 * torch.as_tensor(rim, device=device))).expand(B, 4, 2)
    (x, y), (u, v) = quad.unbind(2), target.unbind(2)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    rows = torch.cat((torch.stack((x, y, one, zero, zero, zero, -u * x, -u * y), 2),
                      torch.stack((zero, zero, zero, x, y, one, -v * x, -v * y), 2)), 1)
    matrix = torch.cat((torch.linalg.solve(rows, torch.cat((u, v), 1)), one[:, :1]), 1).view(B, 3, 3)
    middles = [(torch.arange(n, device=device) * 2 + 1) / n - 1 for n in (H, W)]         # of the pixels
    ys, xs = torch.meshgrid(*middles, indexing="ij")
    points = torch.einsum("hwk,bjk->bhwj", torch.stack((xs, ys, torch.ones_like(xs)), 2), matrix)
    grid = points[..., :2] / points[..., 2:].clamp(min=0.1)
    # every stroke a little out of place, so that no exact shape is learnt by heart
    bend = torch.tensor([0.010, 0.025], device=device).view(2, 1, 1) * randn(2, 6, 20) * rand(1, 1, 1)
    grid = grid + strength * F.interpolate(bend, (H, W), mode="bilinear").permute(0, 2, 3, 1)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)

    # light: its strength and colour, a slope across the plate, haze, a glare
    gain = (strength * (0.45 * randn(1, 1, 1) + 0.25 * randn(3, 1, 1))).exp()
    grey = strength * rand(1, 1) ** 2                           # some cameras see little colour, all see it their own way
    mix = (1 - grey) * torch.eye(3, device=device) + grey / 3 + 0.15 * strength * randn(3, 3)
    images = (mix @ images.flatten(2)).view(B, 3, H, W)
    slope = strength * 0.3 * (randn(1, 1, 1) * xs + randn(1, 1, 1) * ys)
    spot = ((xs - 2 * rand(1, 1, 1) + 1) * (1 + 2 * rand(1, 1, 1))).square() + (ys - 2 * rand(1, 1, 1) + 1).square()
    glare = (strength * 1.2 * rand(1, 1, 1) - 0.6).clamp(min=0) * (-2 * spot).exp()
    images = images * gain * (1 + slope).clamp(min=0.2) + glare
    haze = 0.5 * strength * rand(1, 1, 1) ** 4
    images = images.lerp(rand(3, 1, 1).expand_as(images), haze).clamp(0, 1)

    # blur, wider along one axis when something moved, and sharpening
    reach = torch.arange(-3, 4, device=device)
    sharp = strength * rand(1) ** 2                             # phones sharpen what they blurred, with a dark rim
    halo = (reach == 0).float() - torch.softmax(-reach ** 2 / 3, 0)
    for axis in (2, 3):
        sigma = 0.15 + strength * (H / 32) * (0.7 * rand(1) ** 3 + 1.2 * rand(1) ** 10)
        kernel = torch.softmax(-reach ** 2 / (2 * sigma ** 2), 1) + sharp * halo
        kernel = kernel.repeat_interleave(3, 0)
        kernel, pad = (kernel.view(-1, 1, 7, 1), (0, 0, 3, 3)) if axis == 2 else (kernel.view(-1, 1, 1, 7), (3, 3, 0, 0))
        images = F.conv2d(F.pad(images, pad, mode="replicate").flatten(0, 1).unsqueeze(0), kernel, groups=3 * B).view(B, 3, H, W)

    # few pixels, with noise
    few = 1 - strength * 0.55 * torch.rand(2, generator=generator, device=device) ** 3
    noise = 0.04 * strength * rand(1, 1, 1) ** 3
    small = F.interpolate(images, (round(H * few[0].item()), round(W * few[1].item())), mode="bilinear", antialias=True)
    small = small + noise * torch.randn(3, *small.shape[2:], generator=generator, device=device)
    images = F.interpolate(small, (H, W), mode="bilinear")
    return (images * 255).round_().clamp_(0, 255).to(torch.uint8)


def glyph_height(size):
    """The glyph height in pixels that plates of `size` are painted with: a little finer than the picture of them."""
    return round(1.25 * size[0])


def draw_plates(n, size, generator, glyphs, green=0.0, odd=0.0):
    """n photographs of plates that do not exist: uint8 (n, 3, *size) and their n strings, all drawn from `generator`.

    glyphs: load_glyphs(glyph_height(size), generator.device)."""
    texts, images = random_plates(n, generator, green, odd), []
    for k in range(0, n, 16):                       # each handful has a resolution of its own
        for length in (8, 7):                      # the order random_plates has them in
            some = [t for t in texts[k:k + 16] if len(t) == length]
            if some:
                canvas = paint(some, glyphs, generator)
                images.append(camera(canvas, size, generator, rim=(20 / (480 if length == 7 else 520), 20 / 180)))
    return torch.cat(images), texts


# --------------------------------------------------------------------------------------------------------------
# Tools


def audit(folder, report=None):
    """Print what `folder` holds and what is wrong with it, all offenders into the JSON file `report`. Returns whether every
    name holds a label and every image can be read."""
    def look(path):
        try:
            return open_image(path).size, hashlib.blake2b(path.read_bytes()).digest()
        except ValueError as error:
            return None, str(error)

    paths = list_images(folder)
    with ThreadPoolExecutor() as pool:
        looks = list(progress(pool.map(look, paths), len(paths), "image"))
    labels, texts, sizes = [parse_label(path) for path in paths], {}, [size for size, _ in looks if size]
    for path, (text, _) in zip(paths, labels):
        if text:
            texts.setdefault(path.relative_to(folder).parts[0] if path.parent != Path(folder) else ".", []).append(text)
    first = {digest: path for path, (_, digest) in zip(reversed(paths), reversed(looks))}
    found = {"names without a label": [shown(path) for path, (text, _) in zip(paths, labels) if not text],
             "unreadable images": [why for size, why in looks if not size],
             "labels with O or I": [shown(path) for path, (_, repaired) in zip(paths, labels) if repaired],
             "copies": [f"{shown(path)} is {shown(first[digest])}" for path, (size, digest) in zip(paths, looks)
                        if size and first[digest] != path],
             "plates in train and test": sorted(set(texts.get("train", ())) & set(texts.get("test", ())))}

    everything = [text for some in texts.values() for text in some]
    chars, provinces = Counter("".join(everything)), Counter(text[0] for text in everything)
    facts = {f"images in {split}": {"images": len(some), "plates": len(set(some))} for split, some in sorted(texts.items())}
    facts |= {"lengths": dict(sorted(Counter(map(len, everything)).items())), "characters": dict(sorted(chars.items())),
              "never seen": {c: 0 for c in ALPHABET if c not in chars},
              "provinces": {p: f"{n / len(everything):.1%}" for p, n in provinces.most_common()}}
    for name, side in (("widths", 0), ("heights", 1)):
        facts[name] = {f.__name__: int(f([size[side] for size in sizes])) for f in (min, np.median, max) if sizes}
    for name, fact in facts.items():
        print(f"{name:26} " + "  ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in fact.items()))
    for name, some in found.items():
        print(f"{name:26} {len(some):,}", *some[:3], sep="\n" + " " * 27)
    if report:
        Path(report).write_text(json.dumps(facts | found, ensure_ascii=False, indent=1), "utf8")
    return not found["names without a label"] and not found["unreadable images"]


def text_picture(text, height, colours=None):
    """`text` drawn with glyphs.png, no font needed: uint8 (3, height, w), black on white or in one (r, g, b) a character."""
    row = F.pad(load_glyphs(height)[0], (1, 1))                 # the plate's own shapes
    cells = [row[ALPHABET.index(c)] if c in ALPHABET else torch.zeros_like(row[0]) for c in text or " "]
    colours = colours or [(0, 0, 0)] * len(cells)
    return torch.cat([255 - cell * (255 - torch.tensor(colour).view(3, 1, 1)) for cell, colour in zip(cells, colours)], 2).to(torch.uint8)


def captioned(image, captions):
    """uint8 (3, h, w) with pictures of text, no wider than it, centred one below another under it."""
    rows = [F.pad(c, ((image.shape[2] - c.shape[2]) // 2, -(-(image.shape[2] - c.shape[2]) // 2), 3, 0), value=255) for c in captions]
    return torch.cat([image, *rows], 1)


def save_sheet(pictures, out, columns=4):
    """Write uint8 (3, h, w) pictures of one size as one image file, in rows."""
    save_image([picture / 255 for picture in pictures], out, nrow=columns, padding=4, pad_value=1)


def show(folder, out, augmented=False, count=24, size=(48, 192)):
    """Write a sheet of samples of a folder, or of drawn plates where that is "drawn", each with its label under it."""
    generator = torch.Generator().manual_seed(0)
    if folder == "drawn":
        images, texts = draw_plates(count, size, generator, load_glyphs(glyph_height(size)))
    else:
        paths, texts = find_crops(folder)
        chosen = torch.randperm(len(paths), generator=generator)[:count].tolist()
        batch = next(loader(PlateDataset(paths, texts, size), [chosen]), None)
        if not batch:
            raise ValueError(f"{folder}: none of {len(chosen)} images in it can be read; check the files")
        images, texts = batch
        images = camera(images, size, generator, GENTLE) if augmented else images
    save_sheet([captioned(image, [text_picture(text, 22)]) for image, text in zip(images, texts)], out)


def render(out, count, seed=0, size=(80, 256)):
    """Write `count` drawn plates as JPEG files, nine tenths to out/train and the rest to out/test."""
    generator, glyphs = torch.Generator().manual_seed(seed), load_glyphs(glyph_height(size))
    for split in ("train", "test"):
        Path(out, split).mkdir(parents=True, exist_ok=True)
    for k in progress(range(0, count, 64), -(-count // 64), "batch"):
        images, texts = draw_plates(min(64, count - k), size, generator, glyphs)
        for i, (image, text) in enumerate(zip(images, texts), k):
            to_pil_image(image).save(Path(out, "test" if i % 10 == 9 else "train", f"{i:07}-{text}.jpg"), quality=90)


def parse_frame(path):
    """A CCPD photograph's name to (box (x0, y0, x1, y1), four vertices (x, y) from the lower right on, plate).

    Raises ValueError where the name is none of CCPD's, or its plate holds characters that ALPHABET lacks (警, 学)."""
    try:
        parts = Path(path).stem.split("-")[2:5]
        box, vertices, indices = ([[int(n) for n in item.split("&")] for item in part.split("_")] for part in parts)
        (x0, y0), (x1, y1) = box
        tables = [CCPD_PROVINCES, LETTERS + "O"] + [LETTERS + DIGITS + "O"] * (len(indices) - 2)
        plate = "".join(table[i] for table, (i,) in zip(tables, indices)).replace("O", "")      # O: no character
        corners = [(x, y) for x, y in vertices]
    except (ValueError, IndexError):
        raise ValueError("the name is not a CCPD photograph's") from None
    if not PLATE.fullmatch(plate) or len(corners) != 4:
        raise ValueError("the plate holds characters outside the alphabet")
    return (x0, y0, x1, y1), corners, plate


def crop(frames, out, rectify=False, margin=0.0):
    """Cut the plates out of CCPD photographs to out/.../FRAME-PLATE.jpg, files already there being kept: by the box in the
    name, or with `rectify` the four vertices pulled straight. margin: a share of the plate's size added on every side."""
    def cut(path):
        try:
            (x0, y0, x1, y1), vertices, plate = parse_frame(path)
            target = Path(out) / path.relative_to(frames).parent / f"{path.stem}-{plate}.jpg"
            if target.exists():
                return "already there"
            image = open_image(path)
        except ValueError as error:
            return f"skipped, {str(error).removeprefix(f'{shown(path)}: ').split(' (')[0]}"
        if rectify:
            side = lambda a, b: math.dist(vertices[a], vertices[b])
            x1, y1 = round(max(side(0, 1), side(2, 3))), round(max(side(0, 3), side(1, 2)))
            x0, y0 = round(margin * x1), round(margin * y1)     # the plate's place in the picture pulled straight
            image = perspective(image, vertices, [[x0 + x1, y0 + y1], [x0, y0 + y1], [x0, y0], [x0 + x1, y0]])
            x1, y1 = x0 + x1, y0 + y1
        mx, my = round(margin * (x1 - x0)), round(margin * (y1 - y0))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".part")
        image = image.crop((max(0, x0 - mx), max(0, y0 - my), min(image.width, x1 + mx), min(image.height, y1 + my)))
        image.save(partial, "JPEG", quality=95)
        partial.replace(target)
        return "cut"

    paths = list_images(frames)
    with ThreadPoolExecutor() as pool:
        counts = Counter(progress(pool.map(cut, paths), len(paths), "photograph"))
    print(f"{out}: " + ", ".join(f"{n:,} {what}" for what, n in counts.most_common()))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run, *arguments):
        sub = commands.add_parser(run.__name__, help=re.split(r"[.:;]\s", run.__doc__)[0], description=run.__doc__)
        sub.set_defaults(run=run)
        for name, options in arguments:
            sub.add_argument(name, **options)

    flag = dict(action="store_true")
    command(audit, ("folder", {}), ("--json", dict(dest="report", metavar="FILE")))
    command(show, ("folder", {}), ("out", {}), ("--augmented", flag))
    command(render, ("out", {}), ("--count", dict(type=int, default=1000)), ("--seed", dict(type=int, default=0)))
    command(crop, ("frames", {}), ("out", {}), ("--rectify", flag), ("--margin", dict(type=float, default=0.0)))
    command(glyphs, ("fonts", dict(nargs="+")), ("--out", dict(default="glyphs.png")))
    arguments = vars(parser.parse_args(argv))
    sys.stdout.reconfigure(encoding="utf8", errors="replace")
    try:
        sys.exit(arguments.pop("run")(**arguments) is False)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {shown(error)}")


if __name__ == "__main__":
    main()
