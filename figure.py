"""Figures, drawn with Pillow only: heat maps, masks, clicked points, sheets of titled panels, line charts.

Arrays and tensors come in and pictures go out; nothing here knows of networks.  No text is ever cut off: what
is too long for its place is shortened in the middle, and the path of a file to its name.

Shapes: H x W pixels of a picture."""
import math
import re
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

Array = np.ndarray
Picture = Image.Image
Colour = tuple[int, int, int]
Range = tuple[float, float]              # lowest and highest value
Points = list[tuple[float, float]]

CELL = 300                               # the width of a panel of a sheet
NARROW = 120                             # and how narrow it may become where the sheet would be too large
PER_LINE = 8                             # a row with more panels than this goes on below
SIDE = 1600                              # a sheet is neither wider nor higher, so that it fits a screen
GAP = 10
LINE = 18                                # the height of a line of small text
SMALL = 13                               # sizes of text
BIG = 17
NAME = 240                               # the longest name in a legend, in pixels
FINE = 3                                 # curves are drawn so many times larger, to be smooth
SMOOTH = Image.Resampling.LANCZOS
TURNED = Image.Transpose.TRANSPOSE       # rows become columns

LEFT = 66                                # the axes of a chart, in its pixels
TOP = 78
RIGHT = 466
BOTTOM = 318

WHITE = (255, 255, 255)
BLACK = (0, 0, 0)
GREY = (85, 85, 85)
LIGHT = (222, 222, 222)
GREEN = (60, 220, 90)
RED = (235, 50, 50)


def colours_of(text: str) -> Array:
    colours = map(ImageColor.getrgb, text.split())
    return np.array(list(colours))


HEAT = colours_of("#0d083c #540f6d #a02d62 #dc5a3c #faa528 #fcf5a5")              # of evenly rising lightness
# A background, and Okabe and Ito's colours, which colour-blind readers can tell apart.
FIRST = colours_of("#404040 #0072b2 #d55e00 #009e73 #cc79a7 #56b4e9 #e69f00 #f0e442")


# ------------------------------------------------- colours
@cache
def palette(n: int = 256) -> Array:
    """(n, 3) uint8: a colour for each of the numbers 0 to n - 1, no two alike, n at most 500.  Number 0,
    the background, is dark grey.  Each colour after the FIRST is the one that is farthest from all before
    it, and from white and black."""
    colours = [WHITE, BLACK, *FIRST]
    cube = 36 * np.indices((8, 8, 8))
    cube = cube.reshape(3, -1).T                           # (512, 3)
    seen = np.array([2, 4, 3])                             # how strongly we see red, green and blue
    nearest = np.full(len(cube), 1e9)
    for i in range(n + 2):
        if i == len(colours):
            colours.append(cube[nearest.argmax()])
        distance = (cube - colours[i]) ** 2 @ seen
        nearest = np.minimum(nearest, distance)
    return np.array(colours[2:n + 2], np.uint8)


def voc_palette() -> list[int]:
    """The colours of PASCAL VOC's and DAVIS's masks, for `Image.putpalette`: 256 times red, green, blue.
    Bit 3j + c of a number is bit 7 - j of its channel c."""
    number = np.arange(256)[:, None]
    levels = np.zeros((256, 3), int)
    for j in range(3):
        bit = number >> (3 * j + np.arange(3)) & 1
        levels |= bit << (7 - j)
    return levels.flatten().tolist()


def heat(values: Tensor, low: float, high: float) -> Array:
    """(H, W) -> (H, W, 3) uint8: dark violet at `low` or below, light yellow at `high` or above."""
    share = (values.float().cpu() - low) / max(high - low, 1e-6)
    share = share.numpy()
    steps = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(share, steps, levels) for levels in HEAT.T]
    return np.stack(channels, -1).astype(np.uint8)


# ------------------------------------------------- on a photo
def cut_out(photo: Array, mask: Array) -> Array:
    """(H, W, 3) uint8, (H, W) bool -> the mask in colour with a white outline, all else grey and dark."""
    grey = photo.mean(-1, keepdims=True) * 0.35 + 15
    out = np.where(mask[..., None], photo, grey)
    inside = torch.from_numpy(mask)[None].float()
    grown = F.max_pool2d(inside, 5, stride=1, padding=2)
    outline = (grown > inside)[0].numpy()
    out[outline] = WHITE
    return out.astype(np.uint8)


def painted(photo: Array, numbers: Array) -> Array:
    """(H, W, 3) uint8, (H, W) ints from 0 to 255 -> the photo in grey, in the palette's colours."""
    grey = photo.mean(-1, keepdims=True)
    out = 0.3 * grey + 0.7 * palette()[numbers]
    return out.astype(np.uint8)


def marked(
    photo: Array, size: tuple[int, int],
    points: Points, background: Points,
) -> Array:
    """(H, W, 3) uint8 with a green dot at each point and a red one at each point of the background.  Points
    are (x, y) pixels of the original, whose (height, width) was `size`."""
    H, W = photo.shape[:2]
    height, width = size
    radius = max(H, W) / 70
    rows, columns = np.indices((H, W)) + 0.5
    out = photo.astype(float)
    dots = [(x, y, GREEN) for x, y in points]
    dots += [(x, y, RED) for x, y in background]
    for x, y, colour in dots:
        across = columns - (x + 0.5) * W / width
        down = rows - (y + 0.5) * H / height
        distance = np.hypot(across, down)[..., None]
        for reach, level in ((1.35 * radius, WHITE), (radius, colour)):
            share = np.clip(reach - distance + 0.5, 0, 1)                      # a soft edge
            out += share * (level - out)
    return out.astype(np.uint8)


# ------------------------------------------------- paper and text
def paper(width: int, height: int) -> Picture:
    return Image.new("RGB", (width, height), WHITE)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def fitted(text: str, width: float, size: int = SMALL) -> str:
    """The text as it fits into `width` pixels, shortened in its middle; of a file's path, the name alone."""
    text = re.sub(r"^.*/(?=[^/]*\.[A-Za-z])", "", text)
    short = text
    keep = len(text)
    while font(size).getlength(short) > width and keep > 2:
        keep -= 1
        start = text[:(keep + 1) // 2]
        end = text[len(text) - keep // 2:]
        short = f"{start}...{end}"
    return short


def write(
    out: Picture,
    x,
    y,
    text: str,
    width=math.inf,
    size=SMALL,
    colour=GREY,
    anchor="la",
):
    """Text of at most `width` pixels; (x, y) is its left and upper end, or what Pillow calls `anchor`."""
    text = fitted(text, width, size)
    draw = ImageDraw.Draw(out)
    draw.text((x, y), text, colour, font(size), anchor)


def beside(pictures: list[Picture]) -> Picture:
    """Pictures in a row, their upper edges in line."""
    width = sum(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    out = paper(width, height)
    x = 0
    for picture in pictures:
        out.paste(picture, (x, 0))
        x += picture.width
    return out


def below(pictures: list[Picture]) -> Picture:
    """Pictures below each other, their left edges in line."""
    turned = [picture.transpose(TURNED) for picture in pictures]
    return beside(turned).transpose(TURNED)


# ------------------------------------------------- sheets
def colour_bar(low: float, high: float, width: int) -> Picture:
    """The colours of `heat` between two numbers."""
    out = paper(width, LINE)
    write(out, 0, 1, f"{low:.2g}")
    write(out, width, 1, f"{high:.2g}", anchor="ra")
    ramp = torch.linspace(0, 1, width - 80)
    colours = heat(ramp.expand(10, -1), 0, 1)
    out.paste(Image.fromarray(colours), (40, 4))
    return out


def draw_panel(width: int, title: str, picture: Array, scale: Range = ()) -> Picture:
    """A picture (H, W, 3) uint8 below its title, with a gap on the left.  scale: the (low, high) given to
    `heat`, for a colour bar below it."""
    H, W = picture.shape[:2]
    height = math.ceil(width * H / W)
    resized = Image.fromarray(picture).resize((width, height), SMOOTH)
    foot = LINE + height
    out = paper(GAP + width, foot + GAP + LINE * bool(scale))
    write(out, GAP, 0, title, width)
    out.paste(resized, (GAP, LINE))
    if scale:
        bar = colour_bar(*scale, width)
        out.paste(bar, (GAP, foot + 4))
    return out


def draw_row(name: str, panels: list[tuple], width: int) -> Picture:
    """Panels beside each other, `width` pixels each, below their name; at most PER_LINE on a line."""
    drawn = [draw_panel(width, *panel) for panel in panels]
    lines = []
    for first in range(0, len(drawn), PER_LINE):
        line = drawn[first:first + PER_LINE]
        line = beside([*line, paper(GAP, 1)])
        lines.append(line)
    wide = lines[0].width
    head = paper(wide, LINE + 14 if name else 1)
    write(head, GAP, 8, name, wide - 2 * GAP, BIG, BLACK)
    return below([head, *lines])


def sheet(rows: list[tuple]) -> Picture:
    """Rows of (name, panels), all panels equally wide; a panel is (title, picture), or (title, picture,
    scale), see `draw_panel`.  A sheet that would not fit a screen has its rows in several columns, or
    narrower panels."""
    width = CELL
    while True:
        drawn = [draw_row(*row, width) for row in rows]
        most = SIDE // max(row.width for row in drawn)
        for columns in range(1, max(most, 1) + 1):
            deep = math.ceil(len(drawn) / columns)
            stacks = []
            for first in range(0, len(drawn), deep):
                stack = below(drawn[first:first + deep])
                stacks.append(stack)
            out = beside(stacks)
            if max(out.size) <= SIDE:
                return out
        if width < NARROW:
            return out
        width = round(0.85 * width)


# ------------------------------------------------- charts
def ticks(low: float, high: float) -> Array:
    """About five round numbers, evenly spaced, from `low` or below to `high` or above."""
    rough = (high - low or abs(high) or 1) / 5
    power = 10 ** math.floor(math.log10(rough))
    for factor in (1, 2, 5, 10):
        step = factor * power
        if step > 0.999 * rough:
            break
    first = math.floor(low / step + 1e-6)
    last = math.ceil(high / step - 1e-6)
    last = max(last, first + 1)
    return step * np.arange(first, last + 1)


def legend(colours: dict[str, Colour]) -> Picture:
    """Names below each other, each behind a square of its colour."""
    shown = [fitted(name, NAME) for name in colours]
    width = max(map(font(SMALL).getlength, shown), default=0)
    out = paper(math.ceil(width) + 40, len(shown) * LINE + GAP)
    y = 0
    for name, colour in zip(shown, colours.values(), strict=True):
        out.paste(colour, (GAP, y + 2, GAP + 12, y + 14))
        write(out, GAP + 18, y, name, colour=BLACK)
        y += LINE
    return out


def line_chart(
    series: dict[str, Points], title: str,
    x_label: str, y_label: str, note: str = "",
) -> Picture:
    """A line for each name through its points (x, y); the names stand on the right, in the order in which the
    lines end.  Points that are not finite are left out.  note: small, below the title."""
    lines = {}
    colours = {}
    darker = 0.85 * palette()                              # to be read on white
    for number, (name, points) in enumerate(series.items(), start=1):
        points = [point for point in points if np.isfinite(point).all()]
        if points:
            lines[name] = np.array(points)                 # (n, 2)
            colours[name] = tuple(darker[number].astype(int).tolist())
    every = np.concatenate([*lines.values()] or [[(0, 0), (1, 1)]])
    x_low, y_low = every.min(0)
    x_high, y_high = every.max(0)
    if 0 < y_low < y_high / 2:
        y_low = 0                                          # the axis begins there if that is near
    x_ticks = ticks(x_low, x_high)
    y_ticks = ticks(y_low, y_high)

    def across(x):                                         # its pixel
        return np.interp(x, x_ticks[[0, -1]], (LEFT, RIGHT))

    def down(y):
        return np.interp(y, y_ticks[[0, -1]], (BOTTOM, TOP))

    width = RIGHT + 3 * GAP
    height = BOTTOM + 46
    out = paper(FINE * width, FINE * height)
    draw = ImageDraw.Draw(out)
    for y in FINE * down(y_ticks):
        draw.line((FINE * LEFT, y, FINE * RIGHT, y), LIGHT, FINE)
    for name, points in lines.items():
        x, y = points.T
        places = np.stack([FINE * across(x), FINE * down(y)], 1)
        draw.line(places.flatten().tolist(), colours[name], 2 * FINE, joint="curve")
        if len(places) < 40:
            for place in places:
                draw.circle(place, 3 * FINE, colours[name])

    out = out.reduce(FINE)
    for x in x_ticks:
        write(out, across(x), BOTTOM + 8, f"{x:.6g}", anchor="ma")
    for y in y_ticks:
        write(out, LEFT - 8, down(y), f"{y:.6g}", anchor="rm")
    write(out, GAP, 7, title, RIGHT - GAP, BIG, BLACK)
    write(out, GAP, 29, note, RIGHT - GAP)
    write(out, LEFT, TOP - 10, y_label, anchor="ls")
    write(out, RIGHT, BOTTOM + 26, x_label, anchor="ra")

    ends = {name: -points[-1, 1] for name, points in lines.items()}
    order = sorted(ends, key=ends.get)
    names = legend({name: colours[name] for name in order})
    names = below([paper(1, TOP - 6), names])
    return beside([out, names])


def densities(
    p: Array, means: list, names: list[str],
    title: str, text: str,
) -> Picture:
    """Curves over [-1, 1], the rows of p (n, bins), each with its name and mean.  Rows with NaN are left
    out."""
    bins = p.shape[1]
    centres = np.arange(-bins + 1, bins, 2) / bins
    series = {}
    for shares, mean, name in zip(p, means, names, strict=True):
        series[f"{name}, mean {mean:.2f}"] = np.stack([centres, shares], 1)
    return line_chart(series, title, "cosine similarity", "share of the pairs", text)
