"""From clicks on an image to a mask: features, similarity, threshold, the part that was clicked (Fig. 1).

    tokens = picture_tokens(vit, image, device, size=480)              # the network runs here, once
    similarity, t, mask = select(tokens, on=[(120, 88)], off=[])       # (N,), a number, (H, W) bool

The paper's mask is every token whose cosine to the clicked one is at least t, wherever it lies.  Beyond it:
tokens may be `centred` first, and the mask `connected` with its clicks.  Nothing is trained here.

Shapes: N = h*w tokens, D width, Q prompts of n clicks each, H x W pixels, P patch size, S stride."""
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from images import normalize, resize
from model import ViT
from run import Mistake

MAX_TOKENS = 20_000                            # of a picture: attention is quadratic


# ------------------------------------------------- tokens
def patch_features(vit: ViT, x: Tensor, block: int = -1) -> Tensor:
    """(B, 3, H, W) normalised pixels -> (B, N, D) float32 L2-normalised patch tokens of a block, by default
    of the last, after the final norm."""
    return block_features(vit, x, [block])[0]


@torch.no_grad()
def block_features(vit: ViT, x: Tensor, blocks: list[int]) -> list[Tensor]:
    """The same of several blocks, in one pass."""
    outputs = vit.intermediate(x, blocks, norm=True)
    patches = [tokens[:, vit.num_prefix_tokens:].float() for tokens in outputs]
    return [F.normalize(z, dim=-1) for z in patches]


def centred(z: Tensor) -> Tensor:
    """Tokens (N, D) minus their mean, normalised again.  What all tokens of an image share does not tell its
    objects apart."""
    return F.normalize(z - z.mean(0), dim=-1)


# ------------------------------------------------- similarity and threshold
def similarity_map(z: Tensor, points: Tensor, combine: str = "max") -> Tensor:
    """Cosine of every token to the clicked ones; several clicks are joined by their max or mean.

    z: (N, D) normalised.  points: (Q, n) token numbers.  Returns (Q, N)."""
    cosines = z[points] @ z.T                                          # (Q, n, N)
    if combine == "mean":
        return cosines.mean(1)
    return cosines.amax(1)


def take_away(maps: Tensor, z: Tensor, background: Tensor) -> Tensor:
    """What is more like one of the background clicks than like the prompt gets -1: no threshold takes it.

    maps: (Q, N).  z: (N, D).  background: (Q, m) token numbers, -1 = none."""
    cosines = z[background] @ z.T                                      # (Q, m, N)
    none = (background < 0)[..., None]
    rival = cosines.masked_fill(none, -1.0).amax(1)
    return maps.masked_fill(rival > maps, -1.0)


def agreement(z: Tensor, points: Tensor, combine: str = "max") -> Tensor:
    """How similar the clicks of a prompt are: of each its cosine to the most similar other one, or with
    "mean" its mean cosine to the others, averaged over the clicks.

    z: (N, D) normalised.  points: (Q, n).  Returns (Q, 1), 1 where all clicks are on the same token."""
    clicked = z[points]
    cosines = clicked @ clicked.mT                                     # (Q, n, n)
    same = points[:, :, None] == points[:, None]
    if combine == "mean":
        levels = cosines.masked_fill(same, torch.nan).nanmean(-1)
    else:
        levels = cosines.masked_fill(same, -torch.inf).amax(-1)
    levels = levels.masked_fill(same.all(-1), 1.0)
    return levels.mean(-1, keepdim=True)


def auto_threshold(
    maps: Tensor,
    clicks: int = 1,
    level: Tensor | None = None,
    centre: bool = False,
) -> Tensor:
    """A threshold for each map, between its mean, the level of what is not meant, and its maximum, the
    clicked token; nearer to the maximum the more clicks share the work.

        top = (1 - c / sqrt(clicks)) (max - mean),   c = 0.5, or 0.35 for centred tokens
        t   = mean + top                             for one click
        t   = mean + (top + (level - mean)) / 2      for several, level - mean within 0 and top

    Clicks that differ from each other lower t, so that the mask grows to what lies between them; none raise
    it above mean + top.  c is a compromise, chosen on 160 train images of COCO and VOC with one strong ViT-S;
    with weak features the IoU can be far below that of the best single threshold (docs/MASKS.md).
    maps: (..., N), before `take_away`.  level: (..., 1), see `agreement`.  Returns (..., 1)."""
    low = maps.mean(-1, keepdim=True)
    high = maps.amax(-1, keepdim=True)
    c = 0.35 if centre else 0.5
    top = (1 - c / clicks**0.5) * (high - low)
    if level is None:
        return low + top
    own = torch.minimum((level - low).clamp(min=0), top)
    return low + (top + own) / 2


def prompt_maps(
    z: Tensor,
    points: Tensor,
    background: Tensor | None = None,
    combine: str = "max",
    centre: bool = False,
) -> tuple[Tensor, Tensor]:
    """The similarity maps (Q, N) of prompts, and their automatic thresholds (Q, 1).

    z: (N, D).  points: (Q, n), background: (Q, m) token numbers."""
    if centre:
        z = centred(z)
    maps = similarity_map(z, points, combine)
    level = agreement(z, points, combine)
    auto = auto_threshold(maps, points.shape[1], level, centre)
    if background is not None:
        maps = take_away(maps, z, background)
    return maps, auto


# ------------------------------------------------- mask
def segment(maps: Tensor, threshold: float | str = "auto") -> Tensor:
    """(..., N) similarities -> bool masks.  'auto': the threshold of each map for one click and tokens that
    are not centred; `select` has those for others."""
    if threshold == "auto":
        threshold = auto_threshold(maps)
    return maps >= threshold


def connected(masks: Tensor, points: Tensor, grid: tuple[int, int]) -> Tensor:
    """The parts of each mask that hold one of its clicks, as the magic wand of a paint program selects;
    diagonal neighbours are connected.  masks: (Q, h*w) bool.  points: (Q, n) places in them."""
    from scipy.ndimage import label
    neighbours = np.zeros((3, 3, 3))
    neighbours[1] = 1                                                  # none in the mask before or after
    numbers, _ = label(masks.view(-1, *grid), neighbours)              # 0 = outside; none is in two masks
    numbers = torch.from_numpy(numbers).flatten(1)                     # (Q, h*w)
    clicked = numbers.gather(1, points)
    clicked = clicked[clicked > 0]
    return torch.isin(numbers, clicked)


def to_pixels(
    maps: Tensor,
    grid: tuple[int, int],
    patch: int,
    stride: int,
    smooth: bool,
) -> Tensor:
    """Maps of tokens (Q, h*w) -> (Q, H, W) pixels: the token of the nearest centre, or linear in between."""
    axes = []
    for n in grid:
        pixel = torch.arange((n - 1) * stride + patch, device=maps.device)
        token = (pixel + 0.5 - patch / 2) / stride
        axes.append(2 * token / max(n - 1, 1) - 1)                     # -1 and 1 are the outer centres
    y, x = torch.meshgrid(*axes, indexing="ij")
    places = torch.stack([x, y], -1).to(maps.dtype)                    # (H, W, 2)
    mode = "bilinear" if smooth else "nearest"
    maps = maps.view(1, -1, *grid)                                     # (1, Q, h, w)
    return F.grid_sample(maps, places[None], mode, "border", align_corners=True)[0]


def middle_pixels(tokens: Tensor, columns: int, patch: int, stride: int) -> Tensor:
    """Numbers of tokens -> numbers of the pixels in the middle of them, in the maps of `to_pixels`."""
    y = tokens // columns * stride + patch // 2
    x = tokens % columns * stride + patch // 2
    width = (columns - 1) * stride + patch
    return y * width + x


# ------------------------------------------------- one picture
def working_size(size: float, patch: int) -> int:
    """The multiple of the patch that is nearest to `size` pixels."""
    return max(1, round(size / patch)) * patch


def fitted(image: Tensor, size: int, patch: int) -> list[int]:
    """Height and width of an image (3, H, W) with its short side made `size`, the aspect kept but for
    rounding to multiples of the patch."""
    sides = image.shape[1:]
    scale = size / min(sides)
    return [working_size(side * scale, patch) for side in sides]


def token_at(
    point: tuple[float, float],
    old: tuple[int, int],
    new: tuple[int, int],
    P: int,
    S: int,
) -> int:
    """The token nearest to a pixel (x, y) of an image that was resized from (height, width) old to new."""
    places = []
    for pixel, before, after in zip(point[::-1], old, new, strict=True):
        last = (after - P) // S
        place = round(((pixel + 0.5) * after / before - P / 2) / S)
        places.append(min(max(place, 0), last))
    row, column = places
    columns = (new[1] - P) // S + 1
    return row * columns + column


class Tokens(NamedTuple):
    """A picture as a network sees it.  given: (height, width) before it was resized."""
    image: Tensor                                                      # (3, H, W) uint8
    z: Tensor                                                          # (N, D), on the CPU
    grid: tuple[int, int]
    P: int
    S: int
    given: tuple[int, int]

    def at(self, points: list[tuple[float, float]]) -> Tensor:
        """Pixels of the picture as given -> (1, n) numbers of tokens; a double click is one prompt."""
        size = self.image.shape[1:]
        found = [token_at(point, self.given, size, self.P, self.S) for point in points]
        return torch.tensor([list(dict.fromkeys(found))])

    def pixels(self, values: Tensor, smooth: bool = True) -> Tensor:
        """(N,) -> (H, W)."""
        maps = values[None].float()
        return to_pixels(maps, self.grid, self.P, self.S, smooth)[0]


def picture_tokens(
    vit: ViT,
    image: Tensor,
    device: torch.device,
    size: int,
    stride: int | None = None,
    block: int = -1,
) -> Tokens:
    """(3, H, W) uint8 -> the tokens of the image, its short side made `size`.

    Sets the network's stride (None: the patch size).  Raises Mistake above MAX_TOKENS."""
    P = vit.patch_size
    S = stride or P
    vit.patch_embed.stride = S
    sides = fitted(image, size, P)
    grid = vit.patch_embed.grid(*sides)
    N = math.prod(grid)
    if N > MAX_TOKENS:
        raise Mistake(f"{N} tokens, more than {MAX_TOKENS}: lower --size or raise --stride")
    x = resize(image, sides)
    z = patch_features(vit, normalize(x[None].to(device)), block)
    return Tokens(x, z[0].cpu(), grid, P, S, image.shape[1:])


def select(
    tokens: Tokens,
    on: list,
    off: list,
    threshold: float | str = "auto",
    combine: str = "max",
    centre: bool = False,
    smooth: bool = True,
    contiguous: bool = False,
) -> tuple[Tensor, float, Tensor]:
    """Clicks (x, y) on an object and beside it, in pixels of the picture as given -> the similarity (N,), the
    threshold for it, and the mask (H, W) bool.  contiguous: only the parts that were clicked."""
    points = tokens.at(on)
    background = tokens.at(off) if off else None
    maps, auto = prompt_maps(tokens.z, points, background, combine, centre)
    similarity = maps[0]
    t = auto.item() if threshold == "auto" else threshold
    mask = tokens.pixels(similarity, smooth) >= t
    if contiguous:
        places = middle_pixels(points, tokens.grid[1], tokens.P, tokens.S)
        mask = connected(mask.view(1, -1), places, mask.shape).view(mask.shape)
    return similarity, t, mask
