"""What is in the features: frozen-feature probes (METHOD 2.3).

    # any checkpoint that load_backbone reads
    python probes.py knn --ckpt out/backbone.pth --data /imagenette

knn: resize, centre crop, L2-normalise, cosine, top-k votes weighted by exp(sim / 0.07); heads CLS, PAT (mean
of the patch tokens) and hybrid (both, concatenated); k = 10 is the paper's choice.

Shapes: n train, m test images, D width, k neighbours, C classes."""
import argparse
import json
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import distributed
from checkpoint import load_backbone
from data import BadImage, init_worker, normalize, open_images
from model import ViT

KS = (10, 20, 50, 100)


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


@torch.no_grad()
def extract_features(vit: ViT, images, size: int, device: torch.device, batch_size: int = 128,
                     workers: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """L2-normalised float32 features of all readable images, on the CPU:
    {"cls": (n, D), "pat": (n, D)}, labels (n,)."""
    loader = DataLoader(CentreCrop(images, size), batch_size, num_workers=workers, worker_init_fn=init_worker)
    cls, pat, labels = [], [], []
    for x, y, ok in loader:
        tokens = vit(normalize(x[ok].to(device))).float()                                     # (B, T, D)
        cls.append(F.normalize(tokens[:, 0], dim=-1).cpu())
        pat.append(F.normalize(tokens[:, vit.num_prefix_tokens:].mean(1), dim=-1).cpu())
        labels.append(y[ok])
    return {"cls": torch.cat(cls), "pat": torch.cat(pat)}, torch.cat(labels)


def hybrid(features: dict[str, Tensor]) -> Tensor:
    """CLS and PAT side by side, (n, 2D), normalised again."""
    return F.normalize(torch.cat([features["cls"], features["pat"]], dim=1), dim=-1)


@torch.no_grad()
def knn_predict(train: Tensor, labels: Tensor, test: Tensor, ks: Sequence[int] = KS, temp: float = 0.07,
                chunk: int = 256) -> Tensor:
    """Weighted k-NN (Wu et al. 2018): each of the k nearest train images votes exp(cos / temp) for its class.

    train (n, D), test (m, D): L2-normalised.  labels: (n,) ints from 0.  A k above n uses all n.
    Returns predictions (len(ks), m).  Memory: chunk * n similarities at a time."""
    classes, out = int(labels.max()) + 1, []
    for q in test.split(chunk):
        sims, index = (q @ train.T).topk(min(max(ks), len(train)), dim=1)                 # (b, k), best first
        votes = torch.zeros(len(ks), len(q), classes, device=q.device)
        for v, k in zip(votes, ks, strict=True):
            v.scatter_add_(1, labels[index[:, :k]], (sims[:, :k] / temp).exp())
        out.append(votes.argmax(-1))
    return torch.cat(out, dim=1)


def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor,
                 ks: Sequence[int] = KS, temp: float = 0.07) -> dict[int, float]:
    """{k: accuracy in percent}."""
    hits = knn_predict(train, train_labels, test, ks, temp) == test_labels
    return {k: 100 * h.float().mean().item() for k, h in zip(ks, hits, strict=True)}


def knn_of(vit: ViT, train, val, size: int, device: torch.device, ks: Sequence[int] = KS,
           **kwargs) -> dict[str, dict[int, float]]:
    """k-NN of a backbone from labelled image sources: {"cls" | "pat" | "hybrid": {k: percent}}."""
    (a, ya), (b, yb) = (extract_features(vit, images, size, device, **kwargs) for images in (train, val))
    a, b = a | {"hybrid": hybrid(a)}, b | {"hybrid": hybrid(b)}
    return {head: knn_accuracy(a[head], ya, b[head], yb, ks) for head in a}


def knn_main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    vit, report = load_backbone(args.ckpt, args.checkpoint_key)
    print(report)
    train = open_images(args.data, "train", args.data_root, args.download)
    val = open_val(args)
    if val is None or train.labels is None or val.labels is None:
        raise ValueError(f"--data {args.data}: k-NN needs class folders and a val split: "
                         "DIR/train/CLASS/*, DIR/val/CLASS/*, or give --val_data")
    if list(train.classes) != list(val.classes):
        raise ValueError(f"train has {len(train.classes)} classes, val {len(val.classes)}, "
                         "and their names differ")
    size = args.size or (224 // vit.patch_size) * vit.patch_size
    print(f"k-NN: short side {round(size * 256 / 224)}, centre {size}, cosine, weights exp(sim/{args.temp}), "
          f"{len(train)} train, {len(val)} test images, {len(train.classes)} classes")
    result = knn_of(vit.to(device), train, val, size, device, args.nb_knn,
                    batch_size=args.batch_size, workers=args.num_workers)
    for head, accuracy in result.items():
        print(f"{head.upper():>6}  " + "  ".join(f"k={k} {a:.1f}" for k, a in accuracy.items()))
    if args.json:
        with open(args.json, "a") as f:
            f.write(json.dumps({"probe": "knn", "ckpt": args.ckpt, "data": args.data, "size": size,
                                **result}) + "\n")


def open_val(args):
    return (open_images(args.val_data, "train") if args.val_data
            else open_images(args.data, "val", args.data_root, args.download))


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    sub = parser.add_subparsers(dest="probe", required=True)
    p = sub.add_parser("knn", help="weighted k-nearest-neighbour accuracy",
                       formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--ckpt", required=True,
                   help="checkpoint of any method, or random:ARCH/PATCH for the untrained row")
    p.add_argument("--checkpoint_key", help="weights other than the teacher's, by their name in the file")
    p.add_argument("--data", required=True,
                   help="folder with train/ and val/ of class folders, 'toy', or a torchvision set")
    p.add_argument("--val_data", help="folder of the test images, if it is not beside the train images")
    p.add_argument("--data_root", default="data", help="where torchvision keeps its sets")
    p.add_argument("--download", action="store_true", help="let torchvision download the named set")
    p.add_argument("--size", type=int,
                   help="pixels of the centre crop; 224 (paper) or the nearest multiple of the patch below")
    p.add_argument("--nb_knn", type=int, nargs="+", default=list(KS),
                   help="numbers of neighbours; the paper reports 10")
    p.add_argument("--temp", type=float, default=0.07, help="temperature of the votes")
    p.add_argument("--batch_size", type=int, default=128, help="images per forward")
    p.add_argument("--num_workers", type=int, default=2, help="loader processes")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--json", help="append the result to this file, one JSON line")
    p.set_defaults(main=knn_main)
    return parser


if __name__ == "__main__":
    arguments = get_parser().parse_args()
    try:
        arguments.main(arguments)
    except ValueError as e:
        distributed.fail(str(e))
