"""Figures, drawn with Pillow only: heat maps, cut-out masks, clicked points, sheets of titled cells,
densities.

Arrays and tensors in, pictures out; nothing here knows about networks.  Shapes: H x W pixels of a cell."""
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

HEAT = np.array([(13, 8, 60), (84, 15, 109), (160, 45, 98), (220, 90, 60), (250, 165, 40), (252, 245, 165)])
# told apart by colour-blind readers, too
COLOURS = np.array([(86, 180, 233), (230, 159, 0), (0, 158, 115), (204, 121, 167), (240, 228, 66),
                    (0, 114, 178), (213, 94, 0), (150, 150, 150)])
CELL, GAP = 300, 8                                                     # width of a cell, space between two
SMOOTH = Image.Resampling.LANCZOS


def heat(values: Tensor, low: float, high: float) -> np.ndarray:
    """(H, W) -> (H, W, 3) uint8: dark violet at `low` or below, light yellow at `high` or above."""
    at = ((values - low) / max(high - low, 1e-6)).clamp(0, 1).numpy() * (len(HEAT) - 1)
    return np.stack([np.interp(at, range(len(HEAT)), c) for c in HEAT.T], -1).astype(np.uint8)


def cut_out(photo: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8, (H, W) bool -> the mask in colour with a white outline, all else grey and dark."""
    grey = (photo.mean(-1, keepdims=True) * 0.35 + 15).repeat(3, -1)
    out, m = np.where(mask[..., None], photo, grey).astype(np.uint8), torch.from_numpy(mask)[None].float()
    out[(F.max_pool2d(m, 5, 1, 2)[0] > m[0]).numpy()] = 255
    return out


def painted(photo: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8, (H, W) ints -> the photo in a colour for each number."""
    return (0.3 * photo.mean(-1, keepdims=True) + 0.7 * COLOURS[numbers % len(COLOURS)]).astype(np.uint8)


def marked(photo: np.ndarray, size: tuple[int, int], points: list, background: list) -> np.ndarray:
    """(H, W, 3) uint8 with a green dot at each point and a red one at each of the background.  Points are
    (x, y) pixels of the original, whose (height, width) was `size`."""
    picture, r, k = Image.fromarray(photo), max(photo.shape[:2]) / 70, 8
    side = 2 * int(r * 1.35 + 2)
    for found, colour in ((points, (60, 220, 90)), (background, (235, 50, 50))):
        dot = Image.new("RGBA", (side * k, side * k))                  # drawn k times larger: a smooth circle
        for radius, fill in ((r * 1.35 * k, "white"), (r * k, colour)):
            ImageDraw.Draw(dot).circle((side * k / 2, side * k / 2), radius, fill)
        dot = dot.resize((side, side), SMOOTH)
        for p in found:
            x, y = ((v + 0.5) * new / old for v, new, old in zip(p, picture.size, size[::-1], strict=True))
            picture.paste(dot, (round(x - side / 2), round(y - side / 2)), dot)
    return np.asarray(picture)


def sheet(rows: list[tuple[str, list[tuple[str, np.ndarray]]]]) -> Image.Image:
    """Rows of (name, cells), cells of (title, (H, W, 3) uint8), drawn equally wide."""
    big, small = ImageFont.load_default(17), ImageFont.load_default(13)
    heights = [max(round(CELL * c.shape[0] / c.shape[1]) for _, c in cells) for _, cells in rows]
    wide = max(len(cells) for _, cells in rows) * (CELL + GAP) + GAP
    out, y = Image.new("RGB", (wide, sum(heights) + 60 * len(rows)), "white"), 4
    draw = ImageDraw.Draw(out)
    for (name, cells), height in zip(rows, heights, strict=True):
        draw.text((GAP, y), name, fill="black", font=big)
        for i, (title, cell) in enumerate(cells):
            x = GAP + i * (CELL + GAP)
            draw.text((x, y + 25), title, fill=(90, 90, 90), font=small)
            size = CELL, round(CELL * cell.shape[0] / cell.shape[1])
            out.paste(Image.fromarray(cell).resize(size, SMOOTH), (x, y + 44))
        y += height + 60
    return out


def densities(p: np.ndarray, means: list[float], names: list[str], title: str, text: str) -> Image.Image:
    """Filled curves over [-1, 1], the rows of p (n, bins), each with its name and a line at its mean."""
    k, wide, high = 3, 420, 260                                        # drawn k times larger: smooth lines
    font, grey = ImageFont.load_default(12 * k), (60, 60, 60)
    out, peak = Image.new("RGB", (wide * k, high * k), "white"), max(np.nanmax(p, initial=0), 1e-9)
    left, right, top, bottom = 18 * k, (wide - 18) * k, 44 * k, (high - 34) * k

    def at(c):
        return left + (c + 1) / 2 * (right - left)
    for i, (curve, mean, name) in enumerate(zip(p, means, names, strict=True)):
        if np.isnan(curve).any():
            continue
        colour, centres = tuple(COLOURS[5 + i % 2].tolist()), (np.arange(len(curve)) * 2 + 1) / len(curve) - 1
        line = [(at(c), bottom - v / peak * (bottom - top)) for c, v in zip(centres, curve, strict=True)]
        layer = Image.new("RGBA", out.size)
        draw = ImageDraw.Draw(layer)
        draw.polygon([(left, bottom), *line, (right, bottom)], fill=(*colour, 90))
        draw.line(line, fill=(*colour, 255), width=2 * k, joint="curve")
        draw.line([(at(mean), top), (at(mean), bottom)], fill=(*colour, 160), width=k)
        draw.text((left, (62 + 16 * i) * k), f"{name}, mean {mean:.2f}", fill=(*colour, 255), font=font)
        out.paste(layer, mask=layer)
    draw = ImageDraw.Draw(out)
    draw.line([(left, bottom), (right, bottom)], fill=grey, width=k)
    for tick in (-1, -0.5, 0, 0.5, 1):
        draw.line([(at(tick), bottom), (at(tick), bottom + 5 * k)], fill=grey, width=k)
        draw.text((at(tick), bottom + 8 * k), f"{tick:g}", fill=grey, font=font, anchor="ma")
    draw.text((left, 4 * k), title, fill="black", font=ImageFont.load_default(15 * k))
    draw.text((left, 24 * k), text, fill=grey, font=font)
    return out.resize((wide, high), SMOOTH)


def beside(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one height in a row."""
    out = Image.new("RGB", (sum(p.width for p in pictures), pictures[0].height), "white")
    for i, p in enumerate(pictures):
        out.paste(p, (sum(q.width for q in pictures[:i]), 0))
    return out
