"""Examples without photographs: synthetic Chinese plates, and pictures with captions.

    python assets/plates.py show OUT.png [DIR] [--augmented]    # 24 samples of DIR, or drawn ones
    python assets/plates.py render OUT --count 1000             # drawn plates as files

A plate is drawn head-on and evenly lit by the standard GA 36-2018, all lengths in mm. Then the
camera of data.py photographs it. The characters come from glyphs.png, see make_glyphs.py.
"""

import functools
import itertools
import random
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import linspace, rand
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data

CELL_W = 24  # pixels of one character in glyphs.png
CELL_H = 48
CHARACTER_WIDTH = 45  # mm, the same character
CHARACTER_HEIGHT = 90

# Blue plates are 440 mm wide and green ones 480, of which we draw 440 too, 11/12 as wide: the
# camera makes one size of all plates anyway.
WIDTH = 440
HEIGHT = 140
RIM = 20  # so much of the car is drawn around every plate
CANVAS_WIDTH = WIDTH + 2 * RIM
CANVAS_HEIGHT = HEIGHT + 2 * RIM
EXTENT = (WIDTH / CANVAS_WIDTH, HEIGHT / CANVAS_HEIGHT)


# Where characters stand: their left and upper edge, width and height in mm, and that of the dot.
BLUE_CELLS = tuple((x, 25, 45, 90) for x in (15.5, 72.5, 151.5, 208.5, 265.5, 322.5, 379.5))
GREEN_CELLS = tuple((x, 25, 40, 90) for x in (14, 63.5, 148, 195.5, 243.5, 291, 339, 386.5))
# Two rows, as data.join_rows puts them side by side: the upper characters are small, the lower
# ones as high as the plate.
TWO_ROWS = ((18, 22, 33, 89), (75, 22, 33, 89), *((145 + 57 * k, 3, 46, 120) for k in range(5)))


class PlateType(NamedTuple):
    """All that is special about one type of plate. Colours are RGB in [0, 1]."""

    share: float  # how many of the synthetic plates are of this type
    ground: tuple  # the colour of the background lies between these two
    ink: tuple = (0.0, 0.2)  # the darkest and the brightest grey of the characters and the border
    fade: float = 0.0  # how far the background turns white towards the top
    patterns: tuple = data.SEVEN
    cells: tuple = BLUE_CELLS
    dot: tuple = (129.5, 65)  # its left and upper edge
    faces: range = range(0, 5)  # rows of glyphs.png: one typeface in five widths of the pen


YELLOW = ((0.65, 0.45, 0.00), (1.00, 0.80, 0.35))
BRIGHT = (0.75, 1.0)
FOREIGN = data.seven_characters("港澳", city="粤Z") + data.seven_characters("领") + 5 * data.EMBASSY
PLATE_TYPES = (
    PlateType(0.71, ((0.05, 0.10, 0.40), (0.35, 0.50, 1.00)), BRIGHT),  # blue: cars
    # green: electric cars; one pattern in three is that of lorries and buses
    PlateType(
        0.11,
        ((0.10, 0.60, 0.20), (0.60, 0.85, 0.60)),
        fade=1.0,
        patterns=data.EIGHT,
        cells=GREEN_CELLS,
        dot=(120.75, 65),
        faces=range(5, 10),  # a typeface of their own
    ),
    # lorries, buses and driving schools; from behind, in two rows, and trailers
    PlateType(0.10, YELLOW, patterns=data.SEVEN + data.seven_characters("学")),
    PlateType(
        0.03,
        YELLOW,
        patterns=data.SEVEN + data.seven_characters("挂"),
        cells=TWO_ROWS,
        dot=(59, 60),
    ),
    PlateType(0.02, ((0.75, 0.75, 0.75), (1.0, 1.0, 1.0)), patterns=data.seven_characters("警")),
    PlateType(0.03, ((0.0, 0.0, 0.0), (0.15, 0.15, 0.20)), BRIGHT, patterns=FOREIGN),
)
RED_CHARACTERS = "警使领"
RED = (0.8, 0.1, 0.1)
PRACTICE = 0.8  # of the strings that training draws, see random_text
VALIDATION = (1000, "validation")  # how many, and their seed: training's seeds are no strings
TEST = (2000, "test")

# ---------------------------------------------------------------------------------------
# Drawing. Random numbers come from torch and from Python, as in the camera; B is the number of
# plates, mm the number of pixels in a millimetre.


@functools.lru_cache
def load_glyphs(height, device="cpu"):
    """All characters: float32 (faces, len(ALPHABET), height, height / 2) in [0, 1]."""
    sheet = Image.open(Path(__file__).with_name("glyphs.png"))
    rows = pil_to_tensor(sheet) / 255  # (1, faces * CELL_H, columns * CELL_W)
    cells = rows.view(-1, CELL_H, len(data.ALPHABET), CELL_W).transpose(1, 2)
    return resize(cells, (height, height // 2)).to(device)


def per_image(count, channels=1):
    """A number in [0, 1] for each image, or for each of its channels: (count, channels, 1, 1)."""
    return rand(count, channels, 1, 1)


def random_text(patterns, practice):
    """A random string of one of the patterns; every province is equally likely.

    A share `practice` of the strings are no plates: half of their places hold provinces. It is
    practice for the 31 characters that are hardest to tell apart, and stand only once a plate."""
    text = [random.choice(chars) for chars in random.choice(patterns)]
    if random.random() < practice:
        text[1:] = [random.choice([char, random.choice(data.PROVINCES)]) for char in text[1:]]
    return "".join(text)


def stamp(plate, mask, x, y, colour, mm):
    """Paint `colour` through a mask in [0, 1], its upper left corner at (x, y) mm."""
    left = round(x * mm)
    top = round(y * mm)
    plate[:, :, top : top + mask.shape[-2], left : left + mask.shape[-1]].lerp_(colour, mask)


def draw_surroundings(count, mm):
    """The car around the plate: a colour with soft or hard-edged blotches, which are no strokes."""
    size = (round(CANVAS_HEIGHT * mm), round(CANVAS_WIDTH * mm))
    mode = random.choice(["bilinear", "nearest"])
    blotches = F.interpolate(rand(count, 1, 2, 14) - 0.5, size, mode=mode)
    colour = per_image(count) - 0.25 + 0.5 * per_image(count, 3)
    return colour * per_image(count) + (0.3 + 0.7 * per_image(count)) * blotches


def draw_bolts(plate, mm):
    """Bolts at four places, on about half of the plates each: bright or dark, lit from one side."""
    count = len(plate)
    for top, left in itertools.product((8, 114), (100, 320)):
        side = round(random.uniform(8, 14) * mm)
        across = linspace(-1, 1, side)
        disc = across**2 + across.view(-1, 1) ** 2 < 1
        colour = per_image(count) + random.choice([-0.4, 0.4]) * across
        shown = disc * (per_image(count) < 0.5) * (0.4 + 0.6 * per_image(count))
        stamp(plate, shown, left + random.uniform(0, 18), top + random.uniform(0, 10), colour, mm)


def draw_characters(plate, kind, texts, ink, glyphs, mm):
    """Stamp every character into its cell, and the dot behind the second one."""
    faces = [random.choice(kind.faces) for _ in texts]
    for chars, (left, top, width, height) in zip(zip(*texts), kind.cells):
        masks = glyphs[faces, [data.ALPHABET.index(char) for char in chars]]  # (B, h, w)
        masks = resize(masks.unsqueeze(1), (round(height * mm), round(width * mm)))
        is_red = torch.tensor([char in RED_CHARACTERS for char in chars]).view(-1, 1, 1, 1)
        colour = torch.where(is_red, torch.tensor(RED).view(3, 1, 1), ink)
        # characters are not pressed exactly in place
        x = left + random.uniform(-1.5, 1.5)
        stamp(plate, masks, x, top + random.uniform(-1.5, 1.5), colour, mm)
    side = round(10 * mm)
    dot = per_image(len(texts)).expand(-1, 1, side, side)
    stamp(plate, dot, *kind.dot, ink, mm)


def paint(kind, texts, glyphs):
    """Plates of one type with a rim of car around them: float32 (B, 3, h, w), about in [0, 1]."""
    mm = glyphs.shape[2] / CHARACTER_HEIGHT
    count = len(texts)
    canvas = draw_surroundings(count, mm)
    rim = round(RIM * mm)
    plate = canvas[:, :, rim:-rim, rim:-rim]  # a view: what is drawn on it is on the canvas
    darkest, brightest = kind.ink
    ink = darkest + (brightest - darkest) * per_image(count)
    # the colour, on green plates white at the top
    height, width = plate.shape[2:]
    darkest, brightest = torch.tensor(kind.ground).view(2, 3, 1, 1)
    ground = darkest.lerp(brightest, per_image(count, 3))
    fade = kind.fade * per_image(count).sqrt() * linspace(1, 0, height).view(-1, 1)
    plate[:] = ground + (0.9 - ground) * fade
    # the thin line along the edge, fainter on some plates
    edge = round(random.uniform(3, 6) * mm)
    inner = edge + round(random.uniform(2, 5.5) * mm)
    line = torch.zeros(height, width)
    line[edge:-edge, edge:-edge] = 1
    line[inner:-inner, inner:-inner] = 0
    plate.lerp_(ink, line * per_image(count) ** 0.25)
    draw_characters(plate, kind, texts, ink, glyphs, mm)
    draw_bolts(plate, mm)
    return canvas


def draw_plates(count, size, practice=0.0, device="cpu"):
    """Pictures of `count` plates that do not exist: uint8 (count, 3, *size), and their strings.

    practice: see random_text."""
    # finer than the picture of it: a character of 90 mm takes 64% of a plate's height
    glyphs = load_glyphs(round(1.25 * size[0]), device)
    shares = [plate_type.share for plate_type in PLATE_TYPES]
    types = random.choices(PLATE_TYPES, shares, k=count)
    all_texts = []
    canvases = []
    with data.lying_on(torch.device(device)):
        for plate_type in dict.fromkeys(types):
            texts = [random_text(x.patterns, practice) for x in types if x == plate_type]
            all_texts += texts
            canvases.append(paint(plate_type, texts, glyphs))
        return data.camera(torch.cat(canvases), size, EXTENT), all_texts


def fixed_plates(count, seed, size):
    """`count` drawn plates, the same for the same seed. It seeds torch and Python anew."""
    data.seed_all(seed)
    parts = [draw_plates(min(64, count - k), size) for k in range(0, count, 64)]
    images, texts = zip(*parts)
    return torch.cat(images), sum(texts, [])


# ---------------------------------------------------------------------------------------
# Pictures with captions


def text_picture(text, size):
    """`text` on white, from the left, as much as fits: uint8 (3, *size)."""
    height, width = size
    step = height // 2 + 2
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(0.9 * height)  # in which no 1 looks like an I, as on plates
    for k, char in enumerate(text):
        if char in data.ALPHABET and not char.isascii():
            glyph = load_glyphs(height)[2, data.ALPHABET.index(char)]
            draw.bitmap((k * step, 0), to_pil_image(glyph), "black")
        else:
            draw.text((k * step + height // 4, height // 2), char, "black", font, "mm")
    return pil_to_tensor(page)


def save_sheet(path, images, captions, columns):
    """Write images in rows, uint8 (3, h, w), each above its caption, a text."""
    pictures = [
        torch.cat((image, text_picture(text, (image.shape[2] // 10, image.shape[2]))), 1)
        for image, text in zip(images, captions)
    ]
    data.save_image(path, to_pil_image(make_grid(pictures, columns, pad_value=255)))


def show(out, folder, augmented):
    """Write a sheet of 24 labelled samples of a folder, or of drawn plates if it is None."""
    size = (48, 192)
    crops = data.find_crops(data.split_folder(folder, "train")) if folder else []
    data.check_output(out, ".png", [path for path, _ in crops])
    if crops:
        random.shuffle(crops)
        images, texts = data.load_crops(crops[:24], size)
    else:
        images, texts = fixed_plates(24, "show", size)
    if augmented:
        images = data.camera(images, size)
    save_sheet(out, images, texts, 4)
    print(f"{out}: {len(texts)} labelled samples")


def render(out, count):
    """Write drawn plates as JPEG files: nine tenths to out/train, the rest to out/test."""
    for k in range(count):
        (image,), (text,) = fixed_plates(1, f"render {k}", (80, 256))
        folder = Path(out, "test" if k % 10 == 9 else "train")
        data.save_image(folder / f"{k:07}-{text}.jpg", to_pil_image(image))
    print(f"{out}: {count:,} drawn plates")


@data.one_sentence()
def main(argv=None):
    parser, add = data.make_parser(__doc__)
    add("command", choices=["show", "render"])
    add("out", help="the picture, or the folder, to write")
    add("folder", nargs="?", help="labelled crops to show (default: drawn plates)")
    add("--augmented", action="store_true", help="show them as training sees them")
    add("--count", type=int, default=1000, help="plates to render")
    args = parser.parse_args(argv)
    if args.command == "render":
        render(args.out, args.count)
    else:
        show(args.out, args.folder, args.augmented)


if __name__ == "__main__":
    main()
