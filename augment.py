"""Augmentation of labelled images, for finetune.py: RandAugment, ThreeAugment, mixup and cutmix.

Everything random is drawn from the generator that is handed in, so that neither workers nor ranks change a
run.  One image at a time, uint8, in the loader's workers; mixup and cutmix on the batch, on the device.

Sources: RandAugment (arXiv 1909.13719) in the form rand-m9-mstd0.5-inc1: two operations, each applied with
probability 1/2, magnitude N(9, 0.5) within 0 ... 10, and "increasing" severities: 10 is always the strongest.
ThreeAugment (DeiT III, arXiv 2204.07118): one of grey, solarise, blur, then a colour jitter of 0.3.  Mixup
(arXiv 1710.09412), cutmix (arXiv 1905.04899).

Departs from timm's: always bilinear (theirs picks bilinear or bicubic at random), on tensors, whose rounding
differs by a grey level here and there.

Shapes: B images, S pixels of a side, C classes."""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

MEAN_COLOUR = [124, 116, 104]                  # ImageNet's, where an image was moved away
BILINEAR = InterpolationMode.BILINEAR


def moved(image: Tensor, angle: float = 0.0, x: float = 0.0, y: float = 0.0,
          shear: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """Rotation and shear in degrees, translation in shares of the side."""
    H, W = image.shape[1:]
    return tvf.affine(image, angle, [round(x * W), round(y * H)], 1.0, list(shear), BILINEAR,
                      fill=MEAN_COLOUR)


def solarize(image: Tensor, threshold: int) -> Tensor:
    """Inverts what is at or above the threshold, 0 ... 256."""
    return torch.where(image.int() >= threshold, 255 - image, image)


def solarize_add(image: Tensor, amount: int) -> Tensor:
    """Adds `amount` to what is below 128."""
    return torch.where(image < 128, (image.int() + amount).clamp(max=255).byte(), image)


# name: (image, m in 0 ... 1, s = -1 or 1) -> image.  m = magnitude / 10
RAND_OPS = {
    "AutoContrast": lambda x, m, s: tvf.autocontrast(x),
    "Equalize": lambda x, m, s: tvf.equalize(x),
    "Invert": lambda x, m, s: tvf.invert(x),
    "Rotate": lambda x, m, s: moved(x, angle=s * 30 * m),
    "PosterizeIncreasing": lambda x, m, s: tvf.posterize(x, max(1, 4 - int(4 * m))),       # bits that stay
    "SolarizeIncreasing": lambda x, m, s: solarize(x, 256 - min(256, int(256 * m))),
    "SolarizeAdd": lambda x, m, s: solarize_add(x, min(128, int(110 * m))),
    "ColorIncreasing": lambda x, m, s: tvf.adjust_saturation(x, max(0.1, 1 + s * 0.9 * m)),
    "ContrastIncreasing": lambda x, m, s: tvf.adjust_contrast(x, max(0.1, 1 + s * 0.9 * m)),
    "BrightnessIncreasing": lambda x, m, s: tvf.adjust_brightness(x, max(0.1, 1 + s * 0.9 * m)),
    "SharpnessIncreasing": lambda x, m, s: tvf.adjust_sharpness(x, max(0.1, 1 + s * 0.9 * m)),
    "ShearX": lambda x, m, s: moved(x, shear=(s * math.degrees(math.atan(0.3 * m)), 0.0)),
    "ShearY": lambda x, m, s: moved(x, shear=(0.0, s * math.degrees(math.atan(0.3 * m)))),
    "TranslateXRel": lambda x, m, s: moved(x, x=s * 0.45 * m),
    "TranslateYRel": lambda x, m, s: moved(x, y=s * 0.45 * m),
}


def rand_augment(image: Tensor, g: torch.Generator, n: int = 2, magnitude: float = 9.0, std: float = 0.5,
                 p: float = 0.5) -> Tensor:
    """(3, S, S) uint8 -> the same: n operations drawn with replacement, each applied with probability p."""
    names = list(RAND_OPS)
    for _ in range(n):
        r, noise = torch.rand(3, generator=g).tolist(), torch.randn((), generator=g).item()
        if r[0] < p:
            m = min(max(magnitude + std * noise, 0.0), 10.0) / 10
            image = RAND_OPS[names[int(r[1] * len(names))]](image, m, 1 if r[2] < 0.5 else -1)
    return image


def three_augment(image: Tensor, g: torch.Generator, jitter: float = 0.3) -> Tensor:
    """(3, S, S) uint8 -> the same: grey, solarised at 128 or blurred (sigma 0.1 to 2), then brightness,
    contrast and saturation by factors within 1 +- jitter."""
    r = torch.rand(5, generator=g).tolist()
    if r[0] < 1 / 3:
        image = tvf.rgb_to_grayscale(image, num_output_channels=3)
    elif r[0] < 2 / 3:
        image = solarize(image, 128)
    else:
        sigma = 0.1 + 1.9 * r[1]
        image = tvf.gaussian_blur(image, [2 * math.ceil(2 * sigma) + 1] * 2, [sigma] * 2)
    for adjust, v in zip((tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation), r[2:],
                         strict=True):
        image = adjust(image, 1 + jitter * (2 * v - 1))
    return image


AUGMENTS = {"rand": rand_augment, "three": three_augment, "none": lambda image, g: image}


def soft_targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """(B,) -> (B, C): 1 - smoothing on the label, and smoothing spread evenly over all classes."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix(x: Tensor, y: Tensor, rng: np.random.Generator, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Each image of a batch with its counterpart at the other end, by mixup or, half of the time, cutmix.

        mixup   x = lam x_i + (1 - lam) x_j                       lam ~ Beta(mixup, mixup)
        cutmix  a box of share 1 - lam of x_i is that of x_j      lam ~ Beta(cutmix, cutmix), then as clipped
        y = lam y_i + (1 - lam) y_j

    x: (B, 3, S, S) normalised.  y: (B, C) soft targets.  mixup, cutmix: 0 switches one off."""
    if not mixup and not cutmix:
        return x, y
    cut = bool(cutmix) and (not mixup or rng.random() < 0.5)
    lam, other = rng.beta(*[cutmix if cut else mixup] * 2), x.flip(0)
    if cut:
        S, (cy, cx) = x.shape[-1], rng.integers(0, x.shape[-1], 2)
        half = S * math.sqrt(1 - lam) / 2
        top, bottom, left, right = (min(max(round(v), 0), S)
                                    for v in (cy - half, cy + half, cx - half, cx + half))
        x = x.clone()
        x[..., top:bottom, left:right] = other[..., top:bottom, left:right]
        lam = 1 - (bottom - top) * (right - left) / S ** 2
    else:
        x = lam * x + (1 - lam) * other
    return x, lam * y + (1 - lam) * y.flip(0)
