"""Figures, drawn with Pillow only: heat maps, masks, clicked points, sheets of titled panels, line charts.

Arrays and tensors come in and pictures go out; nothing here knows of networks.  No text is ever cut off: what
is too long for its place is shortened in the middle, and the path of a file to its name.

Shapes: H x W pixels of a picture."""
import math
import re
from collections.abc import Iterable
from functools import cache
from itertools import chain, product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Array = np.ndarray
Picture = Image.Image
Colour = tuple[int, int, int]
Points = list[tuple[float, float]]

CELL = 300                               # the width of a panel of a sheet
NARROWER = (250, 210, 180, 150, 120)     # and the widths to try where the sheet would be too large
PER_LINE = 8                             # a row with more panels than this goes on below
SIDE = 1600                              # a sheet is neither wider nor higher, so that it fits a screen
GAP = 10
LINE = 18                                # the height of a line of small text
SMALL = 13                               # sizes of text
BIG = 17
NAME = 240                               # the longest name in a legend, in pixels
FINE = 3                                 # curves and dots are drawn so many times larger, to be smooth
SMOOTH = Image.Resampling.LANCZOS

LEFT = 66                                # the axes of a chart, in its pixels
TOP = 78
RIGHT = 466
BOTTOM = 318

WHITE = (255, 255, 255)
BLACK = (0, 0, 0)
GREY = (85, 85, 85)
LIGHT = (222, 222, 222)

HEAT = np.array([                        # of evenly rising lightness
    (13, 8, 60),
    (84, 15, 109),
    (160, 45, 98),
    (220, 90, 60),
    (250, 165, 40),
    (252, 245, 165),
])
FIRST = [                                # Okabe and Ito's colours, which colour-blind readers can tell apart
    (64, 64, 64),                        # the background
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (230, 159, 0),
    (240, 228, 66),
]


# ------------------------------------------------- colours
@cache
def palette(n: int = 256) -> Array:
    """(n, 3) uint8: a colour for each of the numbers 0 to n - 1, no two alike, n at most 500.  Number 0,
    the background, is dark grey.  Each colour after the FIRST is the one that is farthest from all before
    it, and from white and black."""
    colours = [WHITE, BLACK, *FIRST]
    cube = np.array(list(product(range(0, 256, 36), repeat=3)))
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
    levels = []
    for number in range(256):
        for c in range(3):
            level = 0
            for j in range(3):
                bit = number >> (3 * j + c) & 1
                level |= bit << (7 - j)
            levels.append(level)
    return levels


def heat(values: Tensor, low: float, high: float) -> Array:
    """(H, W) -> (H, W, 3) uint8: dark violet at `low` or below, light yellow at `high` or above."""
    share = (values.float().cpu() - low) / max(high - low, 1e-6)
    place = share.clamp(0, 1) * (len(HEAT) - 1)
    out = np.empty((*values.shape, 3), np.uint8)
    for c in range(3):
        out[..., c] = np.interp(place.numpy(), range(len(HEAT)), HEAT[:, c])
    return out


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


def dot(radius: float, colour: Colour) -> Picture:
    """A smooth disk with a white rim, on a transparent square."""
    side = 2 * math.ceil(1.35 * radius + 1)
    out = Image.new("RGBA", (side * FINE, side * FINE))
    draw = ImageDraw.Draw(out)
    centre = (out.width / 2, out.height / 2)
    draw.circle(centre, 1.35 * radius * FINE, WHITE)
    draw.circle(centre, radius * FINE, colour)
    return out.resize((side, side), SMOOTH)


def marked(photo: Array, size: tuple[int, int], points: Points, background: Points) -> Array:
    """(H, W, 3) uint8 with a green dot at each point and a red one at each point of the background.  Points
    are (x, y) pixels of the original, whose (height, width) was `size`."""
    picture = Image.fromarray(photo)
    radius = max(picture.size) / 70
    green = dot(radius, (60, 220, 90))
    red = dot(radius, (235, 50, 50))
    pairs = [(point, green) for point in points]
    pairs += [(point, red) for point in background]
    for (x, y), mark in pairs:
        x = (x + 0.5) * picture.width / size[1]
        y = (y + 0.5) * picture.height / size[0]
        corner = round(x - mark.width / 2), round(y - mark.height / 2)
        picture.paste(mark, corner, mark)
    return np.asarray(picture)


# ------------------------------------------------- paper and text
def paper(width: float, height: float) -> Picture:
    return Image.new("RGB", (math.ceil(width), math.ceil(height)), WHITE)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def widest(texts: Iterable[str], size: int) -> float:
    """Pixels across the longest of the texts, 0 if there is none."""
    lengths = [font(size).getlength(text) for text in texts]
    return max(lengths, default=0)


def fitted(text: str, width: float, size: int) -> str:
    """The text as it fits into `width` pixels, shortened in its middle; of a file's path, the name alone."""
    text = re.sub(r"^.*/(?=[^/]*\.[A-Za-z])", "", text)
    short = text
    keep = len(text)
    while widest([short], size) > width and keep > 2:
        keep -= 1
        start = text[:(keep + 1) // 2]
        end = text[len(text) - keep // 2:]
        short = f"{start}...{end}"
    return short


def write(out: Picture, x: float, y: float, text: str, width: float = math.inf, size: int = SMALL,
          colour: Colour = GREY, anchor: str = "la") -> None:
    """Text of at most `width` pixels; (x, y) is its left and upper end, or what Pillow calls `anchor`."""
    text = fitted(text, width, size)
    ImageDraw.Draw(out).text((x, y), text, colour, font(size), anchor)


def below(pictures: list[Picture]) -> Picture:
    """Pictures below each other, their left edges in line."""
    out = paper(max(p.width for p in pictures), sum(p.height for p in pictures))
    y = 0
    for picture in pictures:
        out.paste(picture, (0, y))
        y += picture.height
    return out


def beside(pictures: list[Picture]) -> Picture:
    """Pictures in a row, their upper edges in line."""
    out = paper(sum(p.width for p in pictures), max(p.height for p in pictures))
    x = 0
    for picture in pictures:
        out.paste(picture, (x, 0))
        x += picture.width
    return out


# ------------------------------------------------- sheets
class Panel(NamedTuple):
    """A picture of a sheet, (H, W, 3) uint8.  scale: the (low, high) given to `heat`, for a colour bar."""
    title: str
    picture: Array
    scale: tuple[float, float] | None = None


def colour_bar(low: float, high: float, width: int) -> Picture:
    """The colours of `heat` between two numbers."""
    start = f"{low:.2g}"
    end = f"{high:.2g}"
    out = paper(width, LINE)
    write(out, 0, 1, start)
    write(out, width, 1, end, anchor="ra")
    left = math.ceil(widest([start], SMALL)) + 6
    right = width - math.ceil(widest([end], SMALL)) - 6
    ramp = torch.linspace(0, 1, right - left)
    colours = heat(ramp.expand(10, -1), 0, 1)
    out.paste(Image.fromarray(colours), (left, 4))
    return out


def legend(colours: dict[str, Colour], width: int = 0) -> Picture:
    """Names, each behind a square of its colour, in as many columns as this width allows, or in one."""
    names = [fitted(name, NAME, SMALL) for name in colours]
    column = math.ceil(widest(names, SMALL)) + 40
    per_line = max(1, width // column)
    lines = math.ceil(len(names) / per_line)
    out = paper(per_line * column, lines * LINE + GAP)
    for i, colour in enumerate(colours.values()):
        row, place = divmod(i, per_line)
        x = GAP + place * column
        y = row * LINE
        out.paste(tuple(colour), (x, y + 2, x + 12, y + 14))
        write(out, x + 18, y, names[i], colour=BLACK)
    return out


def resized(picture: Picture, width: int) -> Picture:
    height = round(width * picture.height / picture.width)
    return picture.resize((width, max(1, height)), SMOOTH)


def draw_panel(title: str, picture: Picture, scale: tuple[float, float] | None) -> Picture:
    """A picture with its title above it and its colour bar below it, and a gap on the left."""
    foot = LINE + GAP if scale else GAP
    out = paper(GAP + picture.width, LINE + picture.height + foot)
    write(out, GAP, 0, title, picture.width)
    out.paste(picture, (GAP, LINE))
    if scale:
        bar = colour_bar(*scale, picture.width)
        out.paste(bar, (GAP, LINE + picture.height + 4))
    return out


def draw_row(name: str, panels: list[tuple], width: int) -> Picture:
    """Panels beside each other, `width` pixels each, below their name."""
    drawn = []
    for title, picture, scale in panels:
        drawn.append(draw_panel(title, resized(picture, width), scale))
    row = beside([*drawn, paper(GAP, 1)])
    head = paper(row.width, LINE + 14 if name else 1)
    write(head, GAP, 8, name, row.width - 2 * GAP, BIG, BLACK)
    return below([head, row])


def in_columns(rows: list[Picture], columns: int) -> Picture:
    """Rows below each other, in columns of equally many."""
    deep = math.ceil(len(rows) / columns)
    stacks = []
    for first in range(0, len(rows), deep):
        stack = below(rows[first:first + deep])
        stacks.append(stack)
    return beside(stacks)


def sheet(rows: list[tuple[str, list]], colours: dict[str, Colour] | None = None) -> Picture:
    """Rows of (name, panels), all panels equally wide; a panel is a `Panel` or the tuple of its fields.  A
    sheet that would not fit a screen has narrower panels, and its rows stand in several columns.
    colours: a legend of what the colours mean."""
    lines = []
    for name, panels in rows:
        ready = []
        for title, picture, scale in [Panel(*panel) for panel in panels]:
            ready.append((title, resized(Image.fromarray(picture), CELL), scale))
        for first in range(0, len(ready), PER_LINE):
            lines.append((name, ready[first:first + PER_LINE]))
            name = ""                                      # is written once

    for width in (CELL, *NARROWER):
        drawn = [draw_row(name, panels, width) for name, panels in lines]
        widest_row = max(row.width for row in drawn)
        for columns in range(1, SIDE // widest_row + 1):
            out = in_columns(drawn, columns)
            if colours:
                out = below([out, legend(colours, out.width)])
            if max(out.size) <= SIDE:
                return out
    return out


# ------------------------------------------------- charts
def ticks(low: float, high: float) -> list[float]:
    """About five round numbers, evenly spaced, from `low` or below to `high` or above."""
    rough = (high - low or abs(high) or 1) / 5
    power = 10 ** math.floor(math.log10(rough))
    for factor in (1, 2, 2.5, 5, 10):
        step = factor * power
        if step > 0.999 * rough:
            break
    first = math.floor(low / step + 1e-6)
    last = math.ceil(high / step - 1e-6)
    last = max(last, first + 1)
    return [i * step for i in range(first, last + 1)]


class Axes(NamedTuple):
    """The numbers along the lower and the left edge of a chart."""
    x_ticks: list[float]
    y_ticks: list[float]

    def at(self, x, y):
        """The pixel of a point, or arrays of both for arrays."""
        columns = np.linspace(LEFT, RIGHT, len(self.x_ticks))
        rows = np.linspace(BOTTOM, TOP, len(self.y_ticks))
        return np.interp(x, self.x_ticks, columns), np.interp(y, self.y_ticks, rows)


def axes_around(points: Points) -> Axes:
    """Axes with round numbers that hold all the points.  The y axis begins at 0 if that is near."""
    x_low, y_low = np.min(points, axis=0)
    x_high, y_high = np.max(points, axis=0)
    if 0 < y_low < y_high / 2:
        y_low = 0
    return Axes(ticks(x_low, x_high), ticks(y_low, y_high))


def draw_axes(out: Picture, axes: Axes) -> None:
    draw = ImageDraw.Draw(out)
    for tick in axes.x_ticks:
        x, _ = axes.at(tick, 0)
        write(out, x, BOTTOM + 8, f"{tick:.6g}", anchor="ma")
    for tick in axes.y_ticks:
        _, y = axes.at(0, tick)
        draw.line((LEFT, y, RIGHT, y), LIGHT)
        write(out, LEFT - 8, y, f"{tick:.6g}", anchor="rm")


def curve(axes: Axes, points: Points, colour: Colour, mean: float | None = None) -> Picture:
    """A line through the points, with dots if they are few, on a transparent picture.  With a mean, what is
    below the line is filled, and an upright stands there."""
    out = Image.new("RGBA", (FINE * (RIGHT + GAP), FINE * (BOTTOM + GAP)))
    draw = ImageDraw.Draw(out)
    across, down = axes.at(*np.transpose(points))
    places = list(zip(FINE * across, FINE * down, strict=True))
    if mean is not None:
        x, _ = axes.at(mean, 0)
        start = (places[0][0], FINE * BOTTOM)
        end = (places[-1][0], FINE * BOTTOM)
        draw.polygon([start, *places, end], (*colour, 60))
        draw.line((FINE * x, FINE * TOP, FINE * x, FINE * BOTTOM), colour, FINE)
    draw.line(places, colour, 2 * FINE, joint="curve")
    if len(places) < 40:
        for place in places:
            draw.circle(place, 3 * FINE, colour)
    return out.resize((RIGHT + GAP, BOTTOM + GAP), SMOOTH)


def line_chart(series: dict[str, Points], title: str, x_label: str, y_label: str, note: str = "",
               means: dict[str, float] | None = None) -> Picture:
    """A line for each name through its points (x, y); the names stand on the right, in the order in which the
    lines end.  Points that are not finite are left out.  note: small, below the title.  means: each line is
    filled down to the axis and has an upright at this x."""
    lines = {}
    for name, points in series.items():
        points = [point for point in points if np.isfinite(point).all()]
        if points:
            lines[name] = points
    every = list(chain(*lines.values()))
    axes = axes_around(every or [(0, 0), (1, 1)])

    out = paper(RIGHT + 3 * GAP, BOTTOM + 46)
    draw_axes(out, axes)
    colours = {}
    for number, name in enumerate(series, 1):
        if name in lines:
            colour = palette()[number] * 0.85              # a little darker, to be read on white
            colours[name] = tuple(colour.astype(int).tolist())
            drawn = curve(axes, lines[name], colours[name], means and means[name])
            out.paste(drawn, mask=drawn)
    write(out, GAP, 7, title, RIGHT - GAP, BIG, BLACK)
    write(out, GAP, 29, note, RIGHT - GAP)
    write(out, LEFT, TOP - 10, y_label, anchor="ls")
    write(out, RIGHT, BOTTOM + 26, x_label, anchor="ra")

    names = sorted(lines, key=lambda name: -lines[name][-1][1])
    names = legend({name: colours[name] for name in names})
    return beside([out, below([paper(1, TOP - 6), names])])


def densities(p: Array, means: list[float], names: list[str], title: str, text: str) -> Picture:
    """Filled curves over [-1, 1], the rows of p (n, bins), each with its name and an upright at its mean.
    Rows with NaN are left out."""
    bins = p.shape[1]
    centres = np.arange(-bins + 1, bins, 2) / bins
    series = {}
    uprights = {}
    for shares, mean, name in zip(p, means, names, strict=True):
        label = f"{name}, mean {mean:.2f}"
        series[label] = list(zip(centres, shares, strict=True))
        uprights[label] = mean
    return line_chart(series, title, "cosine similarity", "share of the pairs", text, uprights)
