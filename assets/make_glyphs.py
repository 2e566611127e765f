"""Makes glyphs.png, the pictures of characters that synthetic plates are drawn from.

The sheet is grey, white characters on black. A column is a character, a row is a face (a typeface
in one width of the strokes), and a cell of 24 x 48 pixels is a character of 45 x 90 mm. The columns
stand in the order of strokes.txt, which must be the order of ALPHABET in data.py. The rows:

    rows 0 to 3    the characters of blue plates, strokes.txt, in four widths of the pen
    rows 4 to 7    the characters of green plates, strokes_green.txt, in four widths of the pen
    rows 8 to 19   ordinary typefaces, two widths each

The repository's sheet was made like this, on Debian 12:

    apt-get update
    apt-get install -y fonts-noto-cjk fonts-noto-cjk-extra fonts-droid-fallback \\
        fonts-roboto-unhinted fonts-dejavu-extra
    D=/usr/share/fonts
    N=$D/opentype/noto/NotoSansCJK
    python assets/make_glyphs.py $N-Thin.ttc,2 $N-Regular.ttc,2 $N-Bold.ttc,2 \\
        $D/truetype/droid/DroidSansFallbackFull.ttf \\
        $D/truetype/roboto/unhinted/RobotoCondensed-Regular.ttf \\
        $D/truetype/dejavu/DejaVuSansCondensed.ttf

",2" chooses a typeface of a .ttc collection: here the one for simplified Chinese.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from plates import CELL_H, CELL_W
from plates import CHARACTER_HEIGHT as HEIGHT
from plates import CHARACTER_WIDTH as WIDTH

ASSETS = Path(__file__).parent
GRID = np.array([35, 80])  # the largest x and y in strokes.txt; the smallest are 0

BLUE_PENS = (7, 9, 11, 13)  # mm; on real plates 11
GREEN_PENS = (6, 8, 9.5, 11)  # mm; on real plates 9.5
FONT_PENS = (5, 8)  # mm, for provinces
EXTRA_PEN = 3  # mm by which a font's digits and letters are thicker than its provinces

# Characters are drawn large and then shrunk, so that their edges are smooth.
STROKE_SCALE = 8  # pixels in a mm
FONT_SCALE = 4


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
    thinner = 0.87 - 0.02 * paths.count("/")
    return pen * max(0.5, thinner)


def grid_to_pixels(word, radius):
    """A point "x,y" of the grid, in pixels: float (2,). The pen has a `radius` in pixels.

    The pen's outer edge must touch the edges of the character, so a thicker pen moves less."""
    point = np.array([float(number) for number in word.split(",")])
    last_pixel = np.array([WIDTH, HEIGHT]) * STROKE_SCALE - 1
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
    """A character in a round pen of `pen` mm: a grey picture of STROKE_SCALE pixels a mm."""
    glyph = Image.new("L", (WIDTH * STROKE_SCALE, HEIGHT * STROKE_SCALE))
    draw = ImageDraw.Draw(glyph)
    radius = pen * STROKE_SCALE / 2
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
# Characters from fonts


def load_font(text):
    """The font that PATH or PATH,N names: N is its number in a collection."""
    path, _, index = text.partition(",")
    return ImageFont.truetype(path, 200, index=int(index or 0))


def has_char(font, char):
    """Whether a font has a picture for `char`, and not only the box that means "missing"."""
    return bytes(font.getmask(char)) != bytes(font.getmask("\uffff"))


def draw_char(char, font):
    """A character of a font without any margin: a grey picture of any size."""
    x0, y0, x1, y1 = font.getbbox(char)
    glyph = Image.new("L", (x1 - x0, y1 - y0))
    ImageDraw.Draw(glyph).text((-x0, -y0), char, fill=255, font=font)
    return glyph


def thicken(glyph, radius):
    """A picture stretched to 45 x 90 mm, its strokes grown by `radius` pixels on every side.

    It is stretched first: a plate's strokes are equally wide in both directions, however narrow
    the character is."""
    width = WIDTH * FONT_SCALE
    height = HEIGHT * FONT_SCALE
    out = Image.new("L", (width, height))
    smaller = glyph.resize((width - 2 * radius, height - 2 * radius), Image.BILINEAR)
    out.paste(smaller, (radius, radius))
    return out.filter(ImageFilter.MaxFilter(2 * radius + 1))


def stroke_width(glyph):
    """The mean width of a picture's strokes in pixels: twice their area over their outline."""
    ink = np.asarray(glyph) > 127
    outline = sum(np.count_nonzero(np.diff(ink, axis=axis)) for axis in (0, 1))
    return 2 * ink.sum() / outline


def font_glyph(char, font, pen):
    """A character of a font in strokes of about `pen` mm: a grey picture of FONT_SCALE pixels a mm.

    It grows pixel by pixel until its strokes are that wide, by 19 pixels at most."""
    thin = draw_char(char, font)
    for radius in range(20):
        glyph = thicken(thin, radius)
        if stroke_width(glyph) >= pen * FONT_SCALE:
            break
    return glyph


def font_row(font, pen, alphabet, strokes_row):
    """One row of the sheet: all characters of a font.

    What the font lacks is taken from `strokes_row`. So is the 1, on a blue plate a plain bar."""
    row = []
    for char, stroke_picture in zip(alphabet, strokes_row):
        if char == "1" or not has_char(font, char):
            row.append(stroke_picture)
        elif is_province(char):
            row.append(font_glyph(char, font, pen))
        else:
            row.append(font_glyph(char, font, pen + EXTRA_PEN))
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


def all_rows(fonts):
    """The rows of the sheet, from top to bottom: lists of one picture a character."""
    blue = read_strokes("strokes.txt")
    green = read_green_strokes(blue)
    blue_rows = [stroke_row(blue, pen) for pen in BLUE_PENS]
    green_rows = [stroke_row(green, pen) for pen in GREEN_PENS]
    font_rows = []
    for font in fonts:
        for pen, strokes_row in zip(FONT_PENS, blue_rows):
            font_rows.append(font_row(font, pen, list(blue), strokes_row))
    return blue_rows + green_rows + font_rows


def paste_rows(rows):
    """The sheet: every picture shrunk to its cell of CELL_W x CELL_H pixels."""
    sheet = Image.new("L", (CELL_W * len(rows[0]), CELL_H * len(rows)))
    for y, row in enumerate(rows):
        for x, glyph in enumerate(row):
            cell = glyph.resize((CELL_W, CELL_H), Image.BOX)
            sheet.paste(cell, (x * CELL_W, y * CELL_H))
    return sheet


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fonts", nargs="+", metavar="FONT", help="a file of a typeface: PATH[,N]")
    parser.add_argument("--out", default=ASSETS / "glyphs.png", help="default: glyphs.png here")
    args = parser.parse_args()
    fonts = [load_font(text) for text in args.fonts]
    paste_rows(all_rows(fonts)).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
