"""One image: read any file, convert, resize, crop, normalise.

Images are tensors (3, H, W) of uint8, RGB, until `normalize` makes float32 of them for a network.  A file
that cannot be read is a BadImage."""
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

import distributed
from run import Mistake

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EXTENSIONS = set(".jpg .jpeg .jpe .jfif .png .bmp .gif .webp .avif .tif .tiff .ppm .pgm".split())
ROOM = 256 / 224                               # short side of an image before the crop, in sides of the crop
MAX_PIXELS = 178_956_970                       # Pillow's own limit for a decompression bomb
PngImagePlugin.MAX_TEXT_CHUNK = 1 << 26        # drawing programs write long texts into their files


class BadImage(Mistake):
    """A file that is not a readable image; the message names it."""


@dataclass
class Unreadable:
    """The one rule for images that an evaluation cannot read: they are counted, named and left out, and more
    than the share `max_bad` of `total` ends the script.  names: of each its name, or a message with it."""
    total: int
    max_bad: float
    names: list[str] = field(default_factory=list)

    def note(self, name: str | Path) -> None:
        """One more.  Raises Mistake when there are too many."""
        self.names.append(str(name))
        if len(self.names) > self.max_bad * self.total:
            raise Mistake(f"{len(self.names)} of {self.total} images cannot be read, more than --max_bad "
                          f"{self.max_bad:g}, such as {self.names[0]}")

    def say(self) -> None:
        if self.names:
            shown = ", ".join(self.names[:5]) + ", ..." * (len(self.names) > 5)
            distributed.say(f"left out: {len(self.names)} unreadable images: {shown}")

    def for_json(self) -> dict:
        return {"n_unreadable": len(self.names), "unreadable": self.names[:20]}


# ------------------------------------------------- tensors
def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on a device; on CUDA without waiting for the copy, which is not safe elsewhere (MPS)."""
    return x.to(device, non_blocking=device.type == "cuda")


@lru_cache
def constants(device: torch.device) -> Tensor:
    """ImageNet's mean and deviation, (2, 3, 1, 1); kept, as every copy to CUDA would be waited for."""
    return torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=device)[..., None, None]


def normalize(x: Tensor) -> Tensor:
    """uint8 0..255 or float 0..1 (..., 3, H, W) -> float32, normalised by ImageNet's mean and deviation."""
    mean, std = constants(x.device)
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    return (x - mean) / std


def denormalize(x: Tensor) -> Tensor:
    """The inverse of `normalize`, clipped, as uint8."""
    mean, std = constants(x.device)
    levels = 255 * (x.float() * std + mean)
    return levels.round().clamp(0, 255).byte()


def resize(image: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """(3, H, W) uint8 -> (3, *size) uint8, antialiased."""
    size = tuple(size)
    if image.shape[1:] == size:
        return image
    return F.interpolate(image[None], size, mode=mode, antialias=True)[0]


def resize_short(image: Tensor, short: int, mode: str = "bicubic") -> Tensor:
    """(3, H, W) uint8 with its short side made `short`, the aspect kept."""
    scale = short / min(image.shape[1:])
    size = [max(1, round(side * scale)) for side in image.shape[1:]]
    return resize(image, size, mode)


def centre_crop(image: Tensor, size: int, short: int | None = None) -> Tensor:
    """(3, H, W) uint8 -> (3, size, size): short side to `short`, then the centre.  The short side is
    256 pixels for a crop of 224, as evaluations see an image, and in this ratio for other sizes."""
    if short is None:
        short = round(size * ROOM)
    H, W = image.shape[1:]
    longest = 4 * min(H, W)                    # a strip is cut first, or millions of its pixels were resized
    top = max(0, H - longest) // 2
    left = max(0, W - longest) // 2
    image = resize_short(image[:, top:H - top, left:W - left], short)
    H, W = image.shape[1:]
    top = (H - size) // 2
    left = (W - size) // 2
    return image[:, top:top + size, left:left + size]


def crop_size(patch: int, size: int | None) -> int:
    """Pixels of a crop's side: `size`, or 224 floored to whole patches.  Raises Mistake."""
    whole = max(1, (size or 224) // patch) * patch
    if size and size != whole:
        raise Mistake(f"--size {size} is not a multiple of the patch size {patch} of the network: "
                      f"try {whole}")
    return whole


# ------------------------------------------------- one file
@contextmanager
def decoding(path: str | Path):
    """Around a decoder, which raises OSError, SyntaxError, RuntimeError, struct.error, ... for a bad file."""
    try:
        yield
    except Exception as e:
        why = str(e).splitlines()[0] if str(e) else ""
        raise BadImage(f"{path}: not a readable image ({type(e).__name__}: {why})") from e


def read_image(path: str | Path, upright: bool = True) -> Tensor:
    """Any image file -> (3, H, W) uint8 RGB; grey, palette, CMYK, alpha and deep images are converted.

    upright: turn a photo by its EXIF tag.  Masks describe the pixels as they are stored: where there are
    masks, read the photo with upright=False.  Raises BadImage."""
    with decoding(path):
        image = Image.open(path)               # raises above MAX_PIXELS
        if image.format == "JPEG" and image.mode in ("RGB", "L"):
            import torchvision  # its decoder is three times as fast as Pillow's
            if hasattr(torchvision.io, "decode_jpeg"):
                content = torch.from_numpy(np.fromfile(path, np.uint8))
                return torchvision.io.decode_jpeg(content, "RGB", apply_exif_orientation=upright)
        image.load()
    return pil_to_tensor(image, upright, str(path))


def pil_to_tensor(image: Image.Image, upright: bool = True, name: str = "image") -> Tensor:
    """Pillow image of any mode -> (3, H, W) uint8 RGB.

    Programs do not agree on the range of more than 8 bits (0 to 1, 12 bits, 16 bits): such an image is
    stretched from its least to its largest value.  NaN counts as the least.  Raises BadImage without any
    number."""
    if upright:
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:                      # broken metadata of a sound image: Pillow raises many kinds
            pass
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float64)
        numbers = values[np.isfinite(values)]
        if not numbers.size:
            raise BadImage(f"{name}: no pixel is a number")
        low = numbers.min()
        high = numbers.max()
        values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
        values = 255 * (values - low) / max(high - low, 1e-12)
        image = Image.fromarray(values.round().astype(np.uint8))
    if image.mode == "P":                      # a palette may carry transparency
        image = image.convert("RGBA")
    pixels = np.array(image.convert("RGB"))        # (H, W, 3), and so it stays in memory: crops are faster
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_numbers(path: str | Path) -> np.ndarray:
    """A palette, grey or 1-bit image of class or object numbers -> (H, W) integers.

    Grey that was saved as RGB, or with alpha, is accepted.  Raises BadImage for colours and fractions."""
    with decoding(path):
        numbers = np.array(Image.open(path))
    if numbers.ndim == 3:
        grey = numbers[..., :1]
        colours = numbers[..., :3]
        if numbers.shape[2] > 2 and (colours != grey).any():           # of two, the second is alpha
            raise BadImage(f"{path}: has colours; expected a palette or grey PNG of numbers")
        numbers = numbers[..., 0]
    if numbers.dtype.kind == "f":
        raise BadImage(f"{path}: holds fractions; expected whole numbers")
    return numbers.astype(np.uint8) if numbers.dtype == bool else numbers
