"""Augmentation of labelled images, for finetune.py: RandAugment, ThreeAugment, mixup and cutmix.

Everything random is drawn from the generator that is handed in, so that neither workers nor ranks change a
run.  RandAugment and ThreeAugment take one uint8 image at a time, in the workers of the loader; mixup and
cutmix take the batch, on the device.

Sources: RandAugment (arXiv 1909.13719) in the form rand-m9-mstd0.5-inc1: two operations, each applied with
probability 1/2, of magnitude N(9, 0.5) within 0 ... 10, where 10 is the strongest for every operation.
ThreeAugment (DeiT III, arXiv 2204.07118): one of grey, solarise, blur, then a colour jitter of 0.3.  Mixup
(arXiv 1710.09412), cutmix (arXiv 1905.04899).

Departs from timm: always bilinear, where timm picks bilinear or bicubic at random, and on tensors, whose
rounding differs by a grey level here and there.  torchvision is imported where it is used, because it is slow
to load.

Shapes: B images, S pixels of a side, C classes."""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

MEAN_COLOUR = [124, 116, 104]                  # ImageNet's, where an image was moved away

RAND_OPS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing",
    "SolarizeAdd", "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing",
    "SharpnessIncreasing", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)


def rand_op(name: str, image: Tensor, m: float, sign: int) -> Tensor:
    """One operation of RandAugment, (3, S, S) uint8 -> the same.

    name: one of RAND_OPS, as timm calls them.  m: magnitude / 10, so 0 ... 1.  sign: direction, 1 or -1."""
    from torchvision.transforms.v2 import functional as tvf

    gain = max(0.1, 1 + sign * 0.9 * m)
    shear = sign * math.degrees(math.atan(0.3 * m))
    shift = sign * 0.45 * m
    match name:
        case "AutoContrast":
            return tvf.autocontrast(image)
        case "Equalize":
            return tvf.equalize(image)
        case "Invert":
            return tvf.invert(image)
        case "Rotate":
            return moved(image, angle=sign * 30 * m)
        case "PosterizeIncreasing":
            bits_kept = max(1, 4 - int(4 * m))
            return tvf.posterize(image, bits_kept)
        case "SolarizeIncreasing":
            return solarize(image, 256 - min(256, int(256 * m)))
        case "SolarizeAdd":
            return solarize_add(image, min(128, int(110 * m)))
        case "ColorIncreasing":
            return tvf.adjust_saturation(image, gain)
        case "ContrastIncreasing":
            return tvf.adjust_contrast(image, gain)
        case "BrightnessIncreasing":
            return tvf.adjust_brightness(image, gain)
        case "SharpnessIncreasing":
            return tvf.adjust_sharpness(image, gain)
        case "ShearX":
            return moved(image, shear=(shear, 0.0))
        case "ShearY":
            return moved(image, shear=(0.0, shear))
        case "TranslateXRel":
            return moved(image, x=shift)
        case "TranslateYRel":
            return moved(image, y=shift)
    raise ValueError(f"operation '{name}' is not known: choose from {', '.join(RAND_OPS)}")


def moved(image: Tensor, angle=0.0, x=0.0, y=0.0, shear=(0.0, 0.0)) -> Tensor:
    """Rotation and shear in degrees, translation in shares of the side."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as tvf

    H, W = image.shape[1:]
    shift = [round(x * W), round(y * H)]
    bilinear = InterpolationMode.BILINEAR
    return tvf.affine(image, angle, shift, 1.0, list(shear), bilinear, fill=MEAN_COLOUR)


def solarize(image: Tensor, threshold: int) -> Tensor:
    """Invert what is at or above the threshold, 0 ... 256."""
    return torch.where(image.int() >= threshold, 255 - image, image)


def solarize_add(image: Tensor, amount: int) -> Tensor:
    """Add `amount` to what is below 128."""
    brighter = (image.int() + amount).clamp(max=255).byte()
    return torch.where(image < 128, brighter, image)


def rand_augment(image: Tensor, g: Generator) -> Tensor:
    """(3, S, S) uint8 -> the same: two operations drawn with replacement, each applied half of the time."""
    for _ in range(2):
        r_apply, r_name, r_sign = torch.rand(3, generator=g).tolist()
        noise = torch.randn((), generator=g).item()
        if r_apply < 0.5:
            name = RAND_OPS[int(r_name * len(RAND_OPS))]
            magnitude = np.clip(9 + 0.5 * noise, 0, 10)
            sign = 1 if r_sign < 0.5 else -1
            image = rand_op(name, image, magnitude / 10, sign)
    return image


def three_augment(image: Tensor, g: Generator) -> Tensor:
    """(3, S, S) uint8 -> the same: grey, solarised at 128 or blurred (sigma 0.1 to 2), then brightness,
    contrast and saturation by factors of 0.7 to 1.3."""
    from torchvision.transforms.v2 import functional as tvf

    r_which, r_sigma, *r_jitter = torch.rand(5, generator=g).tolist()
    if r_which < 1 / 3:
        image = tvf.rgb_to_grayscale(image, num_output_channels=3)
    elif r_which < 2 / 3:
        image = solarize(image, 128)
    else:
        sigma = 0.1 + 1.9 * r_sigma
        taps = 2 * math.ceil(2 * sigma) + 1
        image = tvf.gaussian_blur(image, [taps, taps], [sigma, sigma])

    brightness, contrast, saturation = [1 + 0.3 * (2 * r - 1) for r in r_jitter]
    image = tvf.adjust_brightness(image, brightness)
    image = tvf.adjust_contrast(image, contrast)
    return tvf.adjust_saturation(image, saturation)


AUGMENTS = {"rand": rand_augment, "three": three_augment, "none": lambda image, g: image}


def soft_targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """(B,) -> (B, C): 1 - smoothing on the label, and smoothing spread evenly over all classes."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix(
    x: Tensor,
    y: Tensor,
    rng,
    mixup: float,
    cutmix: float,
) -> tuple[Tensor, Tensor]:
    """Mix each image of a batch with its counterpart at the other end, by mixup or, half of the time, cutmix.

        mixup   x = lam x_i + (1 - lam) x_j                       lam ~ Beta(mixup, mixup)
        cutmix  a box of share 1 - lam of x_i is that of x_j      lam ~ Beta(cutmix, cutmix), then as clipped
        y = lam y_i + (1 - lam) y_j

    x: (B, 3, S, S) normalised.  y: (B, C) soft targets.  rng: NumPy's.  mixup, cutmix: 0 switches one off."""
    if not mixup and not cutmix:
        return x, y
    other = x.flip(0)
    if cutmix and (not mixup or rng.random() < 0.5):
        lam = rng.beta(cutmix, cutmix)
        x, lam = paste_box(x, other, lam, rng)
    else:
        lam = rng.beta(mixup, mixup)
        x = lam * x + (1 - lam) * other
    return x, lam * y + (1 - lam) * y.flip(0)


def paste_box(x: Tensor, other: Tensor, lam: float, rng) -> tuple[Tensor, float]:
    """x with a box of `other` at a random place, of share 1 - lam before it is clipped at the borders, and
    the share of x that is left after that."""
    S = x.shape[-1]
    half = S * math.sqrt(1 - lam) / 2
    y_centre, x_centre = rng.integers(0, S, 2)
    top = max(round(y_centre - half), 0)
    bottom = min(round(y_centre + half), S)
    left = max(round(x_centre - half), 0)
    right = min(round(x_centre + half), S)
    x = x.clone()
    x[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    return x, 1 - (bottom - top) * (right - left) / S ** 2
