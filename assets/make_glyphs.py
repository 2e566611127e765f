"""Makes glyphs.png, the pictures of characters that synthetic plates are drawn from.

    python assets/make_glyphs.py

The sheet is grey, white characters on black. A column is a character, a row is a face (a typeface
in one width of the strokes), and a cell of 24 x 48 pixels is a character of 45 x 90 mm. The columns
stand in the order of strokes.txt, which must be the order of ALPHABET in data.py. The rows:

    rows 0 to 4    the characters of blue plates, strokes.txt, in five widths of the pen
    rows 5 to 9    the characters of green plates, strokes_green.txt, in five widths of the pen
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from plates import CELL_H, CELL_W
from plates import CHARACTER_HEIGHT as HEIGHT
from plates import CHARACTER_WIDTH as WIDTH

ASSETS = Path(__file__).parent
GRID = np.array([35, 80])  # the largest x and y in strokes.txt; the smallest are 0

BLUE_PENS = (5.5, 7, 9, 11, 13)  # mm; on real plates 11
GREEN_PENS = (5, 6.5, 8, 9.5, 11)  # mm; on real plates 9.5

# Characters are drawn large and then shrunk, so that their edges are smooth.
SCALE = 8  # pixels in a mm


# ---------------------------------------------------------------------------------------
# Characters from strokes


def read_strokes(name):
    """The characters of a file of strokes: a dict from each character to its paths, as text."""
    lines = (ASSETS / name).read_text("utf-8").splitlines()
    return {line[0]: line[2:] for line in lines if line and not line.startswith("#")}


def is_province(char):
    """Whether a character is one of the Chinese ones, which are drawn with thinner strokes."""
    return not char.isascii()


def province_pen(paths, pen):
    """The pen in mm for a province: the more paths it has, the thinner, or they would touch."""
    thinner = 0.8 - 0.025 * paths.count("/")
    return pen * max(0.4, thinner)


def grid_to_pixels(word, radius):
    """A point "x,y" of the grid, in pixels: float (2,). The pen has a `radius` in pixels.

    The pen's outer edge must touch the edges of the character, so a thicker pen moves less."""
    point = np.array([float(number) for number in word.split(",")])
    last_pixel = np.array([WIDTH, HEIGHT]) * SCALE - 1
    return point / GRID * (last_pixel - 2 * radius) + radius


def bezier(start, control, end):
    """Seven points between `start` and `end` on a quadratic Bezier curve, in order."""
    steps = np.arange(1, 8) / 8
    return [(1 - t) ** 2 * start + 2 * t * (1 - t) * control + t * t * end for t in steps]


def path_points(path, radius):
    """The points of one path in pixels, with straight lines between them: a list of (2,)."""
    points = []
    control = None
    for word in path.split():
        point = grid_to_pixels(word.rstrip("*"), radius)
        if word.endswith("*"):
            control = point
            continue
        if control is not None:
            points += bezier(points[-1], control, point)
            control = None
        points.append(point)
    return points


def stroke_glyph(paths, pen):
    """A character in a round pen of `pen` mm: a grey picture of SCALE pixels a mm."""
    glyph = Image.new("L", (WIDTH * SCALE, HEIGHT * SCALE))
    draw = ImageDraw.Draw(glyph)
    radius = pen * SCALE / 2
    for path in paths.split(" / "):
        points = path_points(path, radius)
        draw.line([tuple(point) for point in points], fill=255, width=round(2 * radius))
        for x, y in points:
            # a disc at every point makes corners and ends round
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return glyph


def stroke_row(strokes, pen):
    """One row of the sheet: the pictures of all characters of `strokes` in a pen of `pen` mm."""
    row = []
    for char, paths in strokes.items():
        own_pen = province_pen(paths, pen) if is_province(char) else pen
        row.append(stroke_glyph(paths, own_pen))
    return row


# ---------------------------------------------------------------------------------------
# The sheet


def read_green_strokes(blue):
    """The strokes of green plates, in the order of `blue`, which has what they lack.

    Raises ValueError for a character that has no column."""
    own = read_strokes("strokes_green.txt")
    unknown = own.keys() - blue.keys()
    if unknown:
        raise ValueError(f"strokes_green.txt: {''.join(unknown)} is not in strokes.txt")
    return {char: own.get(char, paths) for char, paths in blue.items()}


def paste_rows(rows):
    """The sheet: every picture shrunk to its cell of CELL_W x CELL_H pixels."""
    sheet = Image.new("L", (CELL_W * len(rows[0]), CELL_H * len(rows)))
    for y, row in enumerate(rows):
        for x, glyph in enumerate(row):
            cell = glyph.resize((CELL_W, CELL_H), Image.BOX)
            sheet.paste(cell, (x * CELL_W, y * CELL_H))
    return sheet


def main():
    blue = read_strokes("strokes.txt")
    green = read_green_strokes(blue)
    rows = [stroke_row(blue, pen) for pen in BLUE_PENS]
    rows += [stroke_row(green, pen) for pen in GREEN_PENS]
    paste_rows(rows).save(ASSETS / "glyphs.png", optimize=True)


if __name__ == "__main__":
    main()
