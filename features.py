"""Frozen features of many images: what the evaluations start from.

    found, labels = extract_features(vit, open_images("/imagenette", "val"), 224, device)

Shapes: n images, H x W pixels, T tokens, D width."""
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import checkpoint
from data import BadImage, init_worker, normalize
from model import ViT


class CentreCrop(Dataset):
    """Images for evaluation: short side to size * 256/224, centre crop of `size`.

    Items: uint8 (3, size, size), label, ok.  An unreadable image comes with ok = False."""

    def __init__(self, images, size: int):
        self.images, self.size, self.short = images, size, round(size * 256 / 224)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int, bool]:
        label = self.images.labels[i] if self.images.labels is not None else -1
        try:
            return centre_crop(self.images.read(i), self.size, self.short), label, True
        except BadImage:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), label, False


def centre_crop(image: Tensor, size: int, short: int) -> Tensor:
    """(3, H, W) uint8 -> (3, size, size): short side to `short` (antialiased bicubic), then the centre."""
    H, W = image.shape[-2:]
    h, w = max(short, round(H * short / min(H, W))), max(short, round(W * short / min(H, W)))
    image = (F.interpolate(image[None], size=(h, w), mode="bicubic", antialias=True)[0]
             if (h, w) != (H, W) else image)
    top, left = (h - size) // 2, (w - size) // 2
    return image[:, top:top + size, left:left + size]


def crop_size(vit: ViT, size: int | None) -> int:
    """Pixels of the crop's side: `size`, or 224 floored to whole patches.  Raises ValueError."""
    P = vit.patch_size
    size = 224 // P * P if size is None else size
    if size % P or size < P:
        raise ValueError(f"--size {size} is not a multiple of the patch size {P} of the network: try "
                         f"{max(1, size // P) * P}")
    return size


@torch.no_grad()
def extract_features(vit: ViT, images, size: int, device: torch.device, batch_size: int = 128,
                     workers: int = 0, blocks: Sequence[int] = (-1,), cache: str | None = None):
    """L2-normalised float32 features of all readable images after the final norm, on the CPU:
    {"cls": (n, D), "pat": (n, D)}, labels (n,); of several blocks a list of such dicts, labels.

    cache: a folder that keeps them, under a hash of weights, files and sizes."""
    file = Path(cache) / f"{feature_key(vit, images, size, blocks)}.pth" if cache else None
    if file is not None and file.is_file():
        kept = checkpoint.load(file)
        found, labels = kept["features"], kept["labels"]
    else:
        loader = DataLoader(CentreCrop(images, size), batch_size, num_workers=workers,
                            worker_init_fn=init_worker)
        found, labels = [{"cls": [], "pat": []} for _ in blocks], []
        for x, y, ok in loader:
            if not ok.any():
                continue
            for kept, tokens in zip(found, vit.intermediate(normalize(x[ok].to(device)), blocks, norm=True),
                                    strict=True):                                             # (B, T, D)
                kept["cls"].append(F.normalize(tokens[:, 0].float(), dim=-1).cpu())
                pat = tokens[:, vit.num_prefix_tokens:].float().mean(1)
                kept["pat"].append(F.normalize(pat, dim=-1).cpu())
            labels.append(y[ok])
        if not labels:
            raise ValueError(f"none of the {len(images)} images can be read")
        found, labels = [{k: torch.cat(v) for k, v in kept.items()} for kept in found], torch.cat(labels)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save(file, {"features": found, "labels": labels})
    return (found[0] if len(blocks) == 1 else found), labels


def feature_key(vit: ViT, images, size: int, blocks: Sequence[int]) -> str:
    """Names the features of a network and a source: changes with any weight, image name, size or date."""
    h = hashlib.blake2b(repr((size, list(blocks), vit.config, len(images))).encode(), digest_size=12)
    h.update(checkpoint.digest(vit.state_dict()).encode())
    for i in range(len(images)):
        path = Path(images.name(i))
        stat = path.stat() if path.is_file() else None
        h.update(repr((images.name(i), stat and (stat.st_size, stat.st_mtime_ns))).encode())
    return h.hexdigest()
