"""What is done to an image before the student sees it: crops, colours, and GMML corruption.

Geometry runs in the loader's workers (`MultiCrop`: crop, resize, flip, on uint8, and which pixels to
corrupt), colour and corruption on the training device in one batch (`colour`, `gmml`).  All random numbers
are drawn by `MultiCrop` from the generator of the image, so a batch is the same whatever the worker, the
device or the number of ranks; only the pixels of N(0,1) noise are drawn on the device, from a seed that the
image brings.  Everywhere: mask True = corrupted.

Departs from the lineage: GMML blocks may start outside the image and are clipped, so that they cover it
evenly (theirs grow down and right only, and the first row is masked 3 % of the time, the last 66 %);
`even=False` brings that back.

Shapes: B images, V global views, L local crops, S pixels of a side, P patch size, N patches."""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import normalize, to_device
from model import patchify

MAX_BLOCKS = 256                             # 75 % of the area takes about 82 blocks of up to 0.3 of the side
                                               # (smaller blocks: more of them, in proportion to their area)
GREY = (0.2989, 0.587, 0.114)                  # Rec. 601 luma, as torchvision rounds it


@dataclass
class Augmentation:
    """Constants of the multi-crop augmentation; fields named and valued as in the paper or its lineage
    (SiT, MC-SSL, DINO). blur, solarize: probability for global view 1, global view 2, local crops.  jitter:
    strength of brightness, contrast, saturation, hue; a factor is drawn from 1 +- strength, the hue shift,
    in turns, from +- strength."""
    global_size: int = 224
    global_scale: tuple[float, float] = (0.25, 1.0)
    local_number: int = 10
    local_size: int = 96
    local_scale: tuple[float, float] = (0.05, 0.25)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.0)
    jitter_p: float = 0.8
    grey: float = 0.2
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: tuple[float, float, float] = (0.0, 0.2, 0.0)


@dataclass
class GMML:
    """Constants of group-masked corruption.  noise_p: how often noise, else alien pixels.  drop_perc: area
    overwritten by noise, uniform in this range; drop_replace: area overwritten by another image.  block:
    largest side of a block as a share of the image's.  align: blocks begin and end on multiples of this many
    pixels.  even: see the file's head."""
    noise_p: float = 0.5
    drop_perc: tuple[float, float] = (0.5, 0.75)
    drop_replace: float = 0.30
    block: float = 0.3
    align: int = 1
    even: bool = True


def crop_box(H: int, W: int, scale: tuple[float, float], g: torch.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) with torchvision's RandomResizedCrop distribution: area share uniform in
    `scale`, log aspect uniform in log 3/4 ... log 4/3, ten tries, then the centre."""
    for area, ratio, y, x in torch.rand(10, 4, generator=g).tolist():
        area = H * W * (scale[0] + area * (scale[1] - scale[0]))
        ratio = math.exp((2 * ratio - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= W and 0 < h <= H:
            return int(y * (H - h + 1)), int(x * (W - w + 1)), h, w
    h, w = min(H, round(W * 4 / 3)), min(W, round(H * 4 / 3))
    return (H - h) // 2, (W - w) // 2, h, w


def random_resized_crop(image: Tensor, size: int, scale: tuple[float, float], flip: float,
                        g: torch.Generator) -> Tensor:
    """(3, H, W) uint8 -> (3, size, size) uint8: a random box, resized by antialiased bicubic, mirrored
    with probability `flip`."""
    top, left, h, w = crop_box(*image.shape[1:], scale, g)
    crop = image[None, :, top:top + h, left:left + w]
    crop = F.interpolate(crop, size=(size, size), mode="bicubic", antialias=True)[0]
    return crop.flip(-1) if torch.rand((), generator=g) < flip else crop


class MultiCrop:
    """2 global views and n local crops of an image, with the random numbers that `colour` and `gmml` need.

    Call: (image (3, H, W) uint8, generator) -> dict of tensors without the batch dimension:
      global (2, 3, S, S), local (n, 3, s, s) if n > 0, both uint8;
      colour (2+n, 11), mask (2, S, S) bool, True = to corrupt, kind (2, 2)."""

    def __init__(self, augmentation: Augmentation, corruption: GMML):
        self.a, self.c = augmentation, corruption
        self.blocks = max(MAX_BLOCKS, math.ceil(MAX_BLOCKS * (0.3 / corruption.block) ** 2))

    def __call__(self, image: Tensor, g: torch.Generator) -> dict[str, Tensor]:
        a, n = self.a, self.a.local_number
        views = [random_resized_crop(image, a.global_size, a.global_scale, a.flip, g) for _ in range(2)]
        local = [random_resized_crop(image, a.local_size, a.local_scale, a.flip, g) for _ in range(n)]
        out = {"global": torch.stack(views), "colour": self.draw_colour(g)} | self.draw_masks(g)
        return out | ({"local": torch.stack(local)} if n else {})

    def draw_colour(self, g: torch.Generator) -> Tensor:
        """(2+n, 11): what `colour` does to each crop:
        [4 factors, 4 = order of the ops, grey, sigma or 0, solarize]."""
        a, n = self.a, self.a.local_number
        kinds = torch.tensor([0, 1] + [2] * n)
        r = torch.rand(2 + n, 12, generator=g)
        strength = torch.tensor(a.jitter)
        factors = 1 + (2 * r[:, :4] - 1) * strength
        factors[:, 3] -= 1                                             # hue is a shift, not a gain
        neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
        factors = torch.where(r[:, 4:5] < a.jitter_p, factors, neutral)
        sigma = a.blur_sigma[0] + r[:, 5] * (a.blur_sigma[1] - a.blur_sigma[0])
        sigma = torch.where(r[:, 6] < torch.tensor(a.blur)[kinds], sigma, 0.0)
        solarize = r[:, 7] < torch.tensor(a.solarize)[kinds]
        return torch.cat([factors, r[:, 8:].argsort(1), (torch.rand(2 + n, 1, generator=g) < a.grey),
                          sigma[:, None], solarize[:, None]], dim=1)

    def draw_masks(self, g: torch.Generator) -> dict[str, Tensor]:
        """mask (2, S, S) bool: pixels to corrupt in each view.
        kind (2, 2) float64: where to look for the alien (0 ... 1, or -1 for noise), the seed of the noise."""
        a, c, cells = self.a, self.c, self.a.global_size // self.c.align
        largest = max(1, int(c.block * cells))
        size = 1 + (torch.rand(2, self.blocks, 2, generator=g) * largest).long().clamp(max=largest - 1)
        low = 1 - size if c.even else torch.zeros_like(size)
        start = low + (torch.rand(2, self.blocks, 2, generator=g) * (cells - low)).long()
        r = torch.rand(2, 3, generator=g, dtype=torch.float64)
        noise = r[:, 0] < c.noise_p
        area = torch.where(noise, c.drop_perc[0] + r[:, 1] * (c.drop_perc[1] - c.drop_perc[0]),
                           c.drop_replace)
        seeds = torch.randint(2 ** 52, (2,), generator=g).double()
        blocks = torch.cat([start, start + size], -1) * c.align
        masks = [block_mask(blocks[v], area[v].item(), a.global_size) for v in (0, 1)]
        return {"mask": torch.stack(masks),
                "kind": torch.stack([torch.where(noise, -1.0, r[:, 2]), seeds], dim=1)}


def block_mask(blocks: Tensor, area: float, size: int) -> Tensor:
    """Union of rectangles, added in order until the area is reached; overlaps and overshoot allowed.

    blocks: (K, 4) top, left, bottom, right in pixels, may reach outside.  area: share of the image, 0 ... 1.
    Returns (S, S) bool."""
    mask, missing = np.zeros((size, size), bool), area * size ** 2
    for top, left, bottom, right in blocks.clamp(min=0).tolist():
        if missing <= 0:
            break
        box = mask[top:bottom, left:right]
        missing -= box.size - np.count_nonzero(box)
        box[:] = True
    return torch.from_numpy(mask)


# ---- colour, on the device ----
# Each op is torchvision.transforms.functional's of the same name, with a factor per image.

def per_image(f: Tensor) -> Tensor:
    return f.view(-1, 1, 1, 1)


def grayscale(x: Tensor) -> Tensor:
    """(B, 3, H, W) in 0..1 -> (B, 1, H, W) luma."""
    r, g, b = x.unbind(1)
    return (r * GREY[0]).add_(g, alpha=GREY[1]).add_(b, alpha=GREY[2])[:, None]


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * per_image(factor)).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = grayscale(x).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean.expand_as(x), x, per_image(factor)).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(grayscale(x).expand_as(x), x, per_image(factor)).clamp_(0, 1)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of HSV by `shift` turns (-0.5 ... 0.5), value and saturation kept."""
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    r, g, b = x.unbind(1)
    c = chroma.clamp(min=1e-12)
    # sextants
    h = torch.where(value == r, (g - b) / c, torch.where(value == g, 2 + (b - r) / c, 4 + (r - g) / c))
    h = torch.where(chroma > 0, h, 0.0) + 6 * shift.view(-1, 1, 1)
    sextant = (h[:, None] + torch.tensor([5.0, 3.0, 1.0], device=x.device).view(3, 1, 1)) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(sextant, 4 - sextant).clamp(0, 1)


def solarize(x: Tensor) -> Tensor:
    """Invert what is above the middle."""
    return torch.where(x >= 0.5, 1 - x, x)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image with its own sigma (pixels), reflected at the borders.  Rows and columns are blurred by
    a product with a banded matrix, which is faster than a convolution with a different kernel per image. The
    kernel reaches 3 sigma of the largest sigma in the recipe, 13 taps at sigma 2, less on tiny images."""
    rows, columns = blur_matrix(sigma, x.shape[2]), blur_matrix(sigma, x.shape[3])
    return rows[:, None] @ (x.flatten(1, 2) @ columns.transpose(1, 2)).view_as(x)


def blur_matrix(sigma: Tensor, n: int, radius: int = 6) -> Tensor:
    """(B,) -> (B, n, n): row i holds the weights of the pixels that make the blurred pixel i."""
    radius = min(radius, n - 1)
    d = torch.arange(-radius, radius + 1, device=sigma.device)
    taps = torch.softmax(-0.5 * (d / sigma[:, None]) ** 2, dim=1)                             # (B, 2R+1)
    source = (torch.arange(n, device=sigma.device)[:, None] + d).abs()
    source = torch.where(source >= n, 2 * (n - 1) - source, source)                           # reflect
    out = taps.new_zeros(len(sigma), n, n)
    return out.scatter_add_(2, source.expand(len(sigma), -1, -1), taps[:, None].expand(-1, n, -1))


@torch.no_grad()
def colour(x: Tensor, draw: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 -> float32 normalised, coloured by the rows of `draw` (B, 11), which stays on the
    CPU: the images that an op touches are chosen there, so the device never waits."""
    def chosen(mask):
        return to_device(mask.nonzero().flatten(), x.device)
    values = to_device(draw, x.device)
    x = x.float() / 255
    ops = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
    for slot in range(4):
        for op in range(4):
            i = chosen((draw[:, 4 + slot] == op) & (draw[:, op] != neutral[op]))
            if len(i):
                x[i] = ops[op](x[i], values[i, op])
    for column, fn in ((8, lambda x, _: grayscale(x).expand_as(x)), (9, gaussian_blur),
                       (10, lambda x, _: solarize(x))):
        i = chosen(draw[:, column] > 0)
        if len(i):
            x[i] = fn(x[i], values[i, column])
    return normalize(x)


# ---- GMML corruption, on the device ----
@torch.no_grad()
def gmml(x: Tensor, mask: Tensor, kind: Tensor) -> Tensor:
    """Overwrite the masked pixels of one view of a batch (GMML, as in the authors' SiT and MC-SSL).

    x: (B, 3, S, S) normalised.  mask (B, S, S), on x's device, kind (B, 2), which stays on the CPU: of
    `MultiCrop.draw_masks`.  Raises ValueError for a batch of one: no alien exists."""
    B = len(x)
    if B < 2:
        raise ValueError("GMML needs another image to take pixels from: a batch of 2 or more per rank")
    where, seeds = kind.unbind(1)
    step = 1 + (where.clamp(min=0) * (B - 1)).long()                                          # 1 ... B-1
    fill = x[((torch.arange(B) + step) % B).to(x.device)]
    g = torch.Generator(x.device)
    for i in (where < 0).nonzero().flatten().tolist():
        fill[i].normal_(generator=g.manual_seed(int(seeds[i])))
    return torch.where(mask[:, None], fill, x)


def mask_to_patches(mask: Tensor, p: int, share: float = 0.5) -> Tensor:
    """(B, S, S) bool -> (B, N) bool: True where at least `share` of a patch's pixels are corrupted
    (0: any pixel)."""
    covered = patchify(mask[:, None].float(), p).mean(-1)
    return covered >= share if share > 0 else covered > 0
