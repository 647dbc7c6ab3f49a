"""What is done to an image before the student sees it: crops, colours, and GMML corruption.

Workers of the loader crop, resize and flip (`MultiCrop`, on uint8) and decide which pixels to corrupt.  The
training device then colours and corrupts a whole batch at once (`colour`, `gmml`).  `MultiCrop` draws all
random numbers, from the generator of the image, so a batch is the same for any worker, device or number of
ranks.  Only the pixels of N(0, 1) noise are drawn on the device, from a seed that the image brings.

Two words: the *lineage* is the earlier code of the paper's authors and what it follows (SiT, GMML, MC-SSL,
DINO), where constants come from that the paper does not name.  *Alien* pixels are those of another image of
the batch.  Masks are True where a pixel or a patch is corrupted.

Departs from the lineage: blocks may start outside the image and are clipped, so that they cover it evenly.
The lineage's blocks only grow down and right, so that the first row is masked 3 % of the time and the last
66 %; `GMML(even=False)` brings that back.

Shapes: B images, V = 2 global views, n local crops, S pixels of a side, P patch size, N patches."""
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from images import normalize, resize, to_device
from model import patchify

BLOCKS_DRAWN = 256             # per view; 75 % of the area takes about 82 blocks of up to 0.3 of the side
MOST_BLOCKS_DRAWN = 16384      # at a time, for tiny blocks; more are drawn until the area is reached
GREY = (0.2989, 0.587, 0.114)  # weights of red, green, blue: Rec. 601 luma, as torchvision rounds it
Range = tuple[float, float]    # lowest and highest value


@dataclass
class Augmentation:
    """Constants of the multi-crop augmentation, valued as in the paper or its lineage.

    blur, solarize: probabilities for global view 1, global view 2, local crops.  jitter: strength of
    brightness, contrast, saturation, hue; a factor is drawn from 1 +- strength, the hue shift, in turns, from
    +- strength.  blur_sigma: in pixels."""

    global_size: int = 224
    global_scale: Range = (0.25, 1.0)
    local_number: int = 10
    local_size: int = 96
    local_scale: Range = (0.05, 0.25)
    flip: float = 0.5
    jitter: tuple = (0.4, 0.4, 0.4, 0.0)
    jitter_p: float = 0.8
    grey: float = 0.2
    blur: tuple = (1.0, 0.1, 0.5)
    blur_sigma: Range = (0.1, 2.0)
    solarize: tuple = (0.0, 0.2, 0.0)


@dataclass
class GMML:
    """Constants of group-masked corruption; all shares are between 0 and 1.

    noise_p: how often a view is corrupted by noise; otherwise by alien pixels.
    drop_perc: share of the area that noise overwrites, uniform in this range.
    drop_replace: share of the area that alien pixels overwrite.
    block: largest side of a block as a share of the image's side.
    align: blocks begin and end on multiples of this many pixels.
    even: blocks cover the image evenly, see the head of this file."""

    noise_p: float = 0.5
    drop_perc: Range = (0.5, 0.75)
    drop_replace: float = 0.30
    block: float = 0.3
    align: int = 1
    even: bool = True


class Colours(NamedTuple):
    """What `colour` does to each of the 2 + n crops of an image, n of them local."""

    factors: Tensor   # (2 + n, 4) of brightness, contrast, saturation, and the shift of hue
    order: Tensor     # (2 + n, 4) in which of these four are applied
    grey: Tensor      # (2 + n,) bool
    sigma: Tensor     # (2 + n,) of the blur, 0 for none
    solarize: Tensor  # (2 + n,) bool


class Corruption(NamedTuple):
    """What `gmml` does to the two global views of an image."""

    mask: Tensor        # (2, S, S) bool, True = to corrupt
    alien: Tensor       # (2,) float64, which other image lends pixels, as a place in 0 ... 1; -1 = noise
    noise_seed: Tensor  # (2,) int64


# ---- crops and random numbers, in the workers of the loader ----
def crop_box(H: int, W: int, scale: Range, g: Generator) -> tuple:
    """(top, left, height, width) with the distribution of torchvision's RandomResizedCrop: area uniform in
    `scale`, log of the aspect ratio uniform in log 3/4 ... log 4/3, ten tries, then the centre."""
    low, high = scale
    for r_area, r_ratio, r_top, r_left in torch.rand(10, 4, generator=g).tolist():
        area = H * W * (low + r_area * (high - low))
        ratio = math.exp((2 * r_ratio - 1) * math.log(4 / 3))
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= W and 0 < h <= H:
            top = int(r_top * (H - h + 1))
            left = int(r_left * (W - w + 1))
            return top, left, h, w
    h = min(H, round(W * 4 / 3))
    w = min(W, round(H * 4 / 3))
    return (H - h) // 2, (W - w) // 2, h, w


def random_resized_crop(
    image: Tensor, size: int,
    scale: Range, flip: float, g: Generator,
) -> Tensor:
    """(3, H, W) uint8 -> (3, size, size) uint8: a random box, resized by antialiased bicubic interpolation,
    mirrored with probability `flip`."""
    top, left, h, w = crop_box(*image.shape[1:], scale, g)
    crop = image[:, top:top + h, left:left + w]
    crop = resize(crop, (size, size))
    if torch.rand((), generator=g) < flip:
        crop = crop.flip(-1)
    return crop


class MultiCrop:
    """2 global views and n local crops of an image, with the random numbers that `colour` and `gmml` need.

    Call it with an image (3, H, W) uint8 and a generator.  Returns a dict, without the batch dimension:
      views (2, 3, S, S) uint8, and local (n, 3, s, s) uint8 if n > 0;
      colours: `Colours` of the 2 + n crops, views first;  corruption: `Corruption` of the views;
      with a patch_size: corrupted_patches (2, N) bool, True where any pixel of the patch is corrupted, and
      masked_patches (2, N) bool, True where at least half of them are.
    largest_block: the largest side, in pixels, that a block really gets: whole cells of `align`."""

    def __init__(
        self, augmentation: Augmentation,
        corruption: GMML, patch_size: int | None = None,
    ):
        size = augmentation.global_size
        c = corruption
        if size % c.align:
            raise ValueError(f"align {c.align} does not divide the {size} pixels of a view")
        if c.block <= 0 or max(*c.drop_perc, c.drop_replace) > 1:
            raise ValueError(f"{c}: expected a block above 0, and shares of the area up to 1")
        self.augmentation = augmentation
        self.corruption = c
        self.patch_size = patch_size
        self.cells = size // c.align                                   # of a side, where blocks can begin
        self.largest = max(1, int(c.block * self.cells))               # side of a block in cells
        self.largest_block = self.largest * c.align                    # and in pixels

    def __call__(self, image: Tensor, g: Generator) -> dict:
        a = self.augmentation
        views = []
        for _ in range(2):
            view = random_resized_crop(image, a.global_size, a.global_scale, a.flip, g)
            views.append(view)
        out = {"views": torch.stack(views)}
        local = []
        for _ in range(a.local_number):
            crop = random_resized_crop(image, a.local_size, a.local_scale, a.flip, g)
            local.append(crop)
        if local:
            out["local"] = torch.stack(local)
        out["colours"] = self.draw_colours(g)
        out["corruption"] = self.draw_corruption(g)
        if self.patch_size:
            share = corrupted_share(out["corruption"].mask, self.patch_size)
            out["corrupted_patches"] = share > 0
            out["masked_patches"] = share >= 0.5
        return out

    def draw_colours(self, g: Generator) -> Colours:
        """Draw what `colour` does to the 2 + n crops."""
        a = self.augmentation
        crops = 2 + a.local_number
        kind = torch.arange(crops).clamp(max=2)                        # view 1, view 2, local
        r = torch.rand(crops, 12, generator=g)
        r_factor, r_four, r_order = r.split(4, dim=1)                  # (2 + n, 4) each
        r_jitter, r_sigma, r_blur, r_solarize = r_four.unbind(1)       # (2 + n,) each
        r_grey = torch.rand(crops, generator=g)

        factors = 1 + (2 * r_factor - 1) * torch.tensor(a.jitter)
        factors[:, 3] -= 1                                             # hue is a shift, not a gain
        factors[r_jitter >= a.jitter_p] = torch.tensor(NEUTRAL)
        low, high = a.blur_sigma
        sigma = low + r_sigma * (high - low)
        sigma[r_blur >= torch.tensor(a.blur)[kind]] = 0.0
        return Colours(
            factors=factors,
            order=r_order.argsort(1),
            grey=r_grey < a.grey,
            sigma=sigma,
            solarize=r_solarize < torch.tensor(a.solarize)[kind],
        )

    def draw_corruption(self, g: Generator) -> Corruption:
        """Draw what `gmml` does to the 2 global views."""
        c = self.corruption
        size = self.augmentation.global_size
        blocks = self.draw_blocks(2, g)
        r = torch.rand(2, 3, generator=g, dtype=torch.float64)
        r_noise, r_area, alien = r.unbind(1)
        noise_seed = torch.randint(2 ** 52, (2,), generator=g)

        noise = r_noise < c.noise_p
        low, high = c.drop_perc
        area = low + r_area * (high - low)
        area[~noise] = c.drop_replace
        masks = np.zeros((2, size, size), bool)
        for mask, of_view, share in zip(masks, blocks, area.tolist(), strict=True):
            while not add_blocks(mask, of_view, share):
                of_view = self.draw_blocks(1, g)[0]
        alien[noise] = -1.0
        return Corruption(torch.from_numpy(masks), alien, noise_seed)

    def draw_blocks(self, views: int, g: Generator) -> Tensor:
        """Draw blocks for each view, (views, K, 4): top, left, bottom, right in pixels.  The smaller the
        blocks, the more are drawn, in inverse proportion to their area."""
        c = self.corruption
        share = max(c.block, 1 / self.cells)           # of a side; no block is below a cell
        K = math.ceil(BLOCKS_DRAWN * (0.3 / share) ** 2)
        K = min(max(K, BLOCKS_DRAWN), MOST_BLOCKS_DRAWN)
        r_size = torch.rand(views, K, 2, generator=g)
        r_start = torch.rand(views, K, 2, generator=g)

        size = (r_size * self.largest).long()
        size = 1 + size.clamp(max=self.largest - 1)                    # (views, K, 2) in cells
        first = 1 - size if c.even else 0                              # where a block may start
        start = first + (r_start * (self.cells - first)).long()
        return torch.cat([start, start + size], dim=-1) * c.align


def corruption_of_views(settings: GMML, size: int, generators: list[Generator]) -> Corruption:
    """One view's corruption from each of R generators: mask (R, S, S), alien (R,), noise_seed (R,)."""
    crops = MultiCrop(Augmentation(size), settings)
    drawn = [crops.draw_corruption(g) for g in generators]             # each of two views
    fields = [torch.stack(field)[:, 0] for field in zip(*drawn, strict=True)]
    return Corruption(*fields)


def add_blocks(mask: np.ndarray, blocks: Tensor, area: float) -> bool:
    """Corrupt one block after another, until a share `area` of the mask is corrupted.

    mask: (S, S) bool, changed in place.  blocks: (K, 4) top, left, bottom, right in pixels; they may overlap
    and reach outside.  Returns whether the area is reached; the last block may overshoot it."""
    missing = area * mask.size - np.count_nonzero(mask)
    for top, left, bottom, right in blocks.clamp(min=0).tolist():
        if missing <= 0:
            break
        box = mask[top:bottom, left:right]
        missing -= box.size - np.count_nonzero(box)
        box[:] = True
    return missing <= 0


def corrupted_share(mask: Tensor, p: int) -> Tensor:
    """(B, S, S) bool -> (B, N): the share of a patch's pixels that is corrupted."""
    return patchify(mask[:, None].float(), p).mean(-1)


# ---- colour, on the device ----
# Each op is that of torchvision.transforms.functional with the same name, with a factor (B,) for each image.
def each(factor: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return factor.view(-1, 1, 1, 1)


def luma(x: Tensor) -> Tensor:
    """(B, 3, H, W) in 0 ... 1 -> (B, 1, H, W), the grey that has the same brightness."""
    red, green, blue = x.unbind(1)
    y = red * GREY[0]
    y.add_(green, alpha=GREY[1])
    y.add_(blue, alpha=GREY[2])
    return y[:, None]


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * each(factor)).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = luma(x).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, x, each(factor)).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(luma(x), x, each(factor)).clamp_(0, 1)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of HSV by `shift` turns (-0.5 ... 0.5); value and saturation stay."""
    red, green, blue = x.unbind(1)                                     # (B, H, W)
    value = x.amax(1)
    chroma = value - x.amin(1)
    divisor = chroma.clamp(min=1e-12)

    hue = 4 + (red - green) / divisor                                  # in sixths of a turn
    hue = torch.where(value == green, 2 + (blue - red) / divisor, hue)
    hue = torch.where(value == red, (green - blue) / divisor, hue)
    hue = torch.where(chroma > 0, hue, 0.0)                            # grey has none
    hue = hue[:, None] + 6 * each(shift)                               # (B, 1, H, W)

    offset = torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1)
    sextant = hue + to_device(offset, x.device)                        # (B, 3, H, W)
    sextant = sextant % 6
    weight = torch.minimum(sextant, 4 - sextant).clamp(0, 1)
    return value[:, None] - chroma[:, None] * weight


def solarize(x: Tensor) -> Tensor:
    """Invert what is above the middle."""
    return torch.where(x >= 0.5, 1 - x, x)


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each image with its own sigma (pixels), reflected at the borders.

    Rows and columns are blurred by a product with a banded matrix, which is faster than a convolution with a
    different kernel for each image.  radius: of the largest sigma, from `blur_radius`."""
    H, W = x.shape[2:]
    rows = blur_matrix(sigma, H, radius)                               # (B, H, H)
    columns = blur_matrix(sigma, W, radius)                            # (B, W, W)
    x = x.flatten(1, 2) @ columns.transpose(1, 2)                      # (B, 3*H, W)
    x = x.unflatten(1, (3, H))
    return rows[:, None] @ x


def blur_radius(sigma: Tensor) -> Tensor:
    """How many pixels a kernel reaches to each side: 3 sigma, and at least 6."""
    return (3 * sigma).ceil().clamp(min=6)


def blur_matrix(sigma: Tensor, n: int, radius: int) -> Tensor:
    """(B,) -> (B, n, n): row i holds the weights of the pixels that make the blurred pixel i.

    Each image has the reach of its own sigma, whatever the others need.  On tiny images it is shorter."""
    radius = min(radius, n - 1)
    offset = torch.arange(-radius, radius + 1, device=sigma.device)
    logits = -0.5 * (offset / sigma[:, None]) ** 2
    beyond = offset.abs() > blur_radius(sigma)[:, None]
    logits = logits.masked_fill(beyond, -math.inf)
    weights = logits.softmax(1)                                        # (B, 2*radius+1)

    row = torch.arange(n, device=sigma.device)
    source = (row[:, None] + offset).abs()                             # (n, 2*radius+1)
    source = n - 1 - (n - 1 - source).abs()                            # reflected at both ends
    source = source.expand(len(sigma), -1, -1)
    weights = weights[:, None].expand_as(source)
    matrix = sigma.new_zeros(len(sigma), n, n)
    return matrix.scatter_add_(2, source, weights)


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
NEUTRAL = (1.0, 1.0, 1.0, 0.0)                                         # factors that change nothing


def apply_to(x: Tensor, chosen: Tensor, op: Callable, *values: Tensor) -> None:
    """Apply an op, in place, to the chosen images (B,) bool.  These are known on the CPU, so that the device
    need not be waited for.  values: (B,) arguments of the op, on the device."""
    index = chosen.nonzero().flatten()
    if len(index):
        index = to_device(index, x.device)
        values = [v[index] for v in values]
        x[index] = op(x[index], *values)


@torch.no_grad()
def colour(x: Tensor, colours: Colours) -> Tensor:
    """(B, 3, S, S) uint8 -> float32, coloured as drawn and normalised.

    colours: fields of (B, ...), which stay on the CPU."""
    x = x.float() / 255
    factors = to_device(colours.factors, x.device)
    sigma = to_device(colours.sigma, x.device)
    for place in range(4):
        for i, adjust in enumerate(ADJUSTMENTS):
            changes = colours.factors[:, i] != NEUTRAL[i]
            its_turn = colours.order[:, place] == i
            apply_to(x, changes & its_turn, adjust, factors[:, i])
    apply_to(x, colours.grey, luma)
    radius = int(blur_radius(colours.sigma).max())
    blur = partial(gaussian_blur, radius=radius)
    apply_to(x, colours.sigma > 0, blur, sigma)
    apply_to(x, colours.solarize, solarize)
    return normalize(x)


# ---- GMML corruption, on the device ----
@torch.no_grad()
def gmml(x: Tensor, mask: Tensor, alien: Tensor, noise_seed: Tensor) -> Tensor:
    """Overwrite the masked pixels of one view of a batch, as in the lineage.

    x: (B, 3, S, S) normalised.  mask: (B, S, S) bool, on the device of x.  alien, noise_seed: (B,), as in
    `Corruption`, which stay on the CPU.  Raises ValueError for a batch of one, which has no other image."""
    B = len(x)
    if B < 2:
        raise ValueError("GMML needs another image to take pixels from: a batch of 2 or more per rank")
    place = alien.clamp(min=0) * (B - 1)
    step = 1 + place.long()                                            # 1 ... B-1 images further
    lender = (torch.arange(B) + step) % B
    fill = x[to_device(lender, x.device)]
    g = Generator(x.device)
    for i in (alien < 0).nonzero().flatten().tolist():
        g.manual_seed(noise_seed[i].item())
        fill[i].normal_(generator=g)
    return torch.where(mask[:, None], fill, x)
