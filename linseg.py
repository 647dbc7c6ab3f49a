"""Linear segmentation on frozen features (Table 3): one BatchNorm and one 1x1 convolution.

    python probes.py linseg --ckpt out/backbone.pth --data /data/ADEChallengeData2016
    torchrun --nproc_per_node=4 probes.py linseg --ckpt mmc.pth --data /data/VOCdevkit --layout voc_aug
    python probes.py linseg --ckpt random:vit_s --data /data/VOCdevkit --crop 256 --iters 200 --lr 3e-3  # CPU

The outputs of blocks 6, 8, 10 and 12 (of another depth: the same shares of it), side by side; cross-entropy
at the crop's pixels; AdamW, 1,500 iterations of linear warm-up, linear decay to 0 at 40,000; 16 images per
step over all ranks.  Training: short side crop * uniform(0.5, 2), a random crop, mirrored or not, photometric
distortion.  Test: short side = crop, windows of crop x crop every two thirds, their logits averaged, bilinear
to the size of the label.  Paper: ADE20K 37.0, Cityscapes 62.6, VOC aug 77.7.

Sample n of the run is drawn from (seed, n) alone, so workers and interruptions do not change a run; nor do
ranks on CUDA, where BatchNorm is synchronised.  A pair that cannot be read gives way to the next.  Layouts:
the published ones, found by their folders (LAYOUTS), or any pair images/{train,val}, labels/{train,val} of
pictures and index PNGs of the same names; 255 is never scored.

Shapes: B images, H x W pixels, h x w tokens, D width of all blocks together, C classes."""
import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as tvf
from tqdm import tqdm

import checkpoint
import distributed
import figure
from checkpoint import load_backbone
from data import EXTENSIONS, BadImage, generator_of, init_worker, normalize, read_image
from distributed import say
from model import ViT

IGNORE = 255
# Cityscapes: the 19 classes that count, by their number in *_labelIds.png
CITY_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITY_NAMES = ("road sidewalk building wall fence pole traffic_light traffic_sign vegetation terrain sky "
              "person rider car truck bus train motorcycle bicycle").split()
VOC_NAMES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
             "motorbike person pottedplant sheep sofa train tvmonitor").split()
LAYOUTS = {
    "ade20k": "images/{training,validation}/*.jpg, annotations/{training,validation}/*.png, 0 = not scored",
    "cityscapes": "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png, "
                  "gtFine/{train,val}/CITY/*_gtFine_label{TrainIds,Ids}.png",
    "voc": "VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation/{train,val}.txt}",
    "voc_aug": "as voc, with SegmentationClassAug/ and ImageSets/Segmentation/trainaug.txt",
    "pairs": "images/{train,val}/NAME.jpg, labels/{train,val}/NAME.png",
}
HARMLESS = {"ckpt", "checkpoint_key", "output_dir", "num_workers", "save_every", "max_bad", "device", "force",
            "json"}


# ------------------------------------------------- images and their labels
class Pairs:
    """One split of a segmentation set.  files: (image, label) paths.  names: of the C classes; num_classes:
    C, where there are no names.

    Labels come out as 0 ... C-1 and 255, by way of a table of 256 numbers."""

    def __init__(self, root: str | Path, split: str = "train", layout: str = "auto",
                 num_classes: int | None = None):
        root = Path(root)
        if not root.is_dir():
            raise ValueError(f"--data {root}: no such folder")
        voc = next((p for p in (root, root / "VOC2012", root / "VOCdevkit/VOC2012")
                    if (p / "SegmentationClass").is_dir()), root)
        found = ("voc" if voc != root or (root / "SegmentationClass").is_dir() else
                 "cityscapes" if (root / "leftImg8bit").is_dir() else
                 "ade20k" if (root / "annotations/training").is_dir() else
                 "pairs" if (root / "labels").is_dir() else None)
        self.layout = found if layout == "auto" else layout
        if self.layout is None:
            raise ValueError(f"--data {root}: none of the layouts is there; " +
                             "; ".join(f"{k}: {v}" for k, v in LAYOUTS.items()))
        self.root, self.split, self.table = root, split, np.arange(256, dtype=np.uint8)
        if self.layout == "ade20k":
            part = {"train": "training", "val": "validation"}[split]
            self.files = self.match(root / "images" / part, root / "annotations" / part)
            self.table, self.names = self.table - 1, [str(i + 1) for i in range(150)]      # 0 becomes 255
            self.table[151:] = IGNORE
        elif self.layout == "cityscapes":
            self.files, self.names = self.cityscapes(root, split), CITY_NAMES
        elif self.layout in ("voc", "voc_aug"):
            aug = self.layout == "voc_aug"
            labels = voc / ("SegmentationClassAug" if aug else "SegmentationClass")
            listed = "trainaug" if aug and split == "train" else split
            listed = voc / "ImageSets/Segmentation" / f"{listed}.txt"
            if not listed.is_file():
                raise ValueError(f"{listed}: no such list; expected {LAYOUTS[self.layout]}")
            self.files = [(voc / "JPEGImages" / f"{n}.jpg", labels / f"{n}.png")
                          for n in listed.read_text().split()]
            self.names = VOC_NAMES
        else:
            self.files, self.names = self.match(root / "images" / split, root / "labels" / split), None
        self.classes = len(self.names) if self.names else num_classes
        lost = [str(f) for pair in self.files for f in pair if not f.is_file()]
        if lost or not self.files:
            raise ValueError(f"{root}, {split}: " + (f"{len(lost)} files are missing, the first {lost[0]}"
                                                     if lost else "no images") +
                             f"; expected {LAYOUTS[self.layout]}")

    @staticmethod
    def match(images: Path, labels: Path) -> list[tuple[Path, Path]]:
        pictures = sorted(p for p in images.rglob("*") if p.suffix.lower() in EXTENSIONS)
        return [(p, (labels / p.relative_to(images)).with_suffix(".png")) for p in pictures]

    def cityscapes(self, root: Path, split: str) -> list[tuple[Path, Path]]:
        out = []
        for p in sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png")):
            name = p.name.replace("_leftImg8bit.png", "_gtFine_label")
            ready, ids = (root / "gtFine" / split / p.parent.name / f"{name}{k}.png"
                          for k in ("TrainIds", "Ids"))
            out.append((p, ready if ready.is_file() else ids))
        if out and out[0][1].name.endswith("labelIds.png"):
            self.table[:] = IGNORE
            self.table[list(CITY_IDS)] = np.arange(len(CITY_IDS))
        return out

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        return self.files[i][0].stem

    def read(self, i: int) -> tuple[Tensor, Tensor]:
        """(3, H, W) uint8, (H, W) uint8.  Raises BadImage, also where image and label differ in size."""
        image, path = read_image(self.files[i][0]), self.files[i][1]
        try:
            with Image.open(path) as picture:
                label = np.array(picture)
        except Exception as e:
            raise BadImage(f"{path}: not a readable label ({type(e).__name__})") from e
        if label.ndim != 2 or label.shape != tuple(image.shape[1:]):
            raise BadImage(f"{path}: shape {label.shape}, expected one number for each pixel, "
                           f"{tuple(image.shape[1:])}")
        wide = label.max() > 255                                       # 16 bits
        label = label if wide else self.table[label.astype(np.uint8)]
        if wide or self.classes and (label[label != IGNORE] >= self.classes).any():
            raise BadImage(f"{path}: holds class {label[label != IGNORE].max()}, "
                           f"expected 0 ... {(self.classes or 255) - 1} or {IGNORE}")
        return image, torch.from_numpy(label)


def resize_short(image: Tensor, short: int) -> Tensor:
    """(3, H, W) uint8 with its short side made `short`."""
    H, W = image.shape[1:]
    size = max(1, round(H * short / min(H, W))), max(1, round(W * short / min(H, W)))
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]


def augment(image: Tensor, label: Tensor, crop: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """A training sample: (3, crop, crop) uint8 and (crop, crop) uint8, padded with 0 and 255 where the image
    is smaller.  The same resize, crop and mirror for both; photometric distortion for the image."""
    r = torch.rand(14, generator=g).tolist()
    image = resize_short(image, round(crop * (0.5 + 1.5 * r[0])))
    label = F.interpolate(label[None, None], size=image.shape[1:], mode="nearest-exact")[0, 0]
    pad = [0, max(0, crop - image.shape[2]), 0, max(0, crop - image.shape[1])]
    image, label = F.pad(image, pad), F.pad(label, pad, value=IGNORE)
    top, left = (int(v * (n - crop + 1)) for v, n in zip(r[1:3], image.shape[1:], strict=True))
    image, label = (x[..., top:top + crop, left:left + crop] for x in (image, label))
    if r[3] < 0.5:
        image, label = image.flip(-1), label.flip(-1)
    return distort(image, r[4:]), label.contiguous()


def distort(image: Tensor, r: list[float]) -> Tensor:
    """SSD's photometric distortion, each with probability 1/2: brightness +-32 of 255, contrast 0.5 to 1.5
    before or after saturation 0.5 to 1.5 and hue +-0.05 turns.  image: uint8; r: ten numbers in [0, 1)."""
    x = image.float() / 255
    if r[0] < 0.5:
        x = x + (2 * r[1] - 1) * 32 / 255
    contrast = (0.5 + r[2]) if r[3] < 0.5 else 1.0
    if r[4] < 0.5:
        x = x * contrast
    x = x.clamp(0, 1)
    if r[5] < 0.5:
        x = tvf.adjust_saturation(x, 0.5 + r[6])
    if r[7] < 0.5:
        x = tvf.adjust_hue(x, 0.1 * r[8] - 0.05)
    if r[4] >= 0.5:
        x = x * contrast
    return (x.clamp(0, 1) * 255).round().byte()


class Samples(Dataset):
    """Sample n of an endless stream of augmented training crops: image, label, and what is wrong with a pair
    that gave way to the next, or nothing."""

    def __init__(self, pairs: Pairs, crop: int, seed: int):
        self.pairs, self.crop, self.seed = pairs, crop, seed

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor, str]:
        epoch, at = divmod(n, len(self.pairs))
        order = torch.randperm(len(self.pairs), generator=generator_of(self.seed, "order", epoch))
        error = ""
        for step in range(min(100, len(self.pairs))):
            try:
                image, label = self.pairs.read(int(order[(at + step) % len(order)]))
                image, label = augment(image, label, self.crop, generator_of(self.seed, "crop", n))
                return image, label, error
            except BadImage as e:
                error = error or str(e)
        raise BadImage(f"{step + 1} pairs in a row cannot be read, the first: {error}")


# ------------------------------------------------- the probe
class LinearHead(nn.Module):
    """(B, D, h, w) -> logits (B, C, h, w): BatchNorm, then a 1x1 convolution."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(dim), nn.Conv2d(dim, classes, 1)
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bn(x))


def default_blocks(depth: int) -> list[int]:
    """6, 8, 10, 12 of 12 blocks, and the same shares of another depth."""
    return sorted({max(1, round(depth * share)) for share in (1 / 2, 2 / 3, 5 / 6, 1)})


@torch.no_grad()
def dense_features(vit: ViT, x: Tensor, blocks: list[int]) -> Tensor:
    """(B, 3, H, W) normalised -> (B, D, h, w) float32: raw outputs of the blocks, side by side."""
    h, w = x.shape[2] // vit.patch_size, x.shape[3] // vit.patch_size
    tokens = [t[:, vit.num_prefix_tokens:].float() for t in vit.intermediate(x, blocks)]
    return torch.cat(tokens, -1).transpose(1, 2).unflatten(2, (h, w))


def windows(n: int, crop: int, stride: int) -> list[int]:
    """Where windows of `crop` begin on n >= crop pixels: every `stride`, the last one flush with the end."""
    return [min(i * stride, n - crop) for i in range(math.ceil((n - crop) / stride) + 1)]


@torch.no_grad()
def sliding_logits(predict, image: Tensor, crop: int, stride: int) -> Tensor:
    """Logits of an image of any size: windows of crop x crop, averaged where they overlap.

    predict: (n, 3, crop, crop) normalised -> (n, C, crop, crop).  image: (3, H, W) uint8, padded by black
    where it is smaller than a window.  Returns (C, H, W)."""
    H, W = image.shape[1:]
    x = F.pad(image, [0, max(0, crop - W), 0, max(0, crop - H)])
    places = [(y, z) for y in windows(x.shape[1], crop, stride) for z in windows(x.shape[2], crop, stride)]
    total = count = 0
    for y, z in places:
        logits = predict(normalize(x[None, :, y:y + crop, z:z + crop]))[0]
        if isinstance(total, int):
            total, count = logits.new_zeros(len(logits), *x.shape[1:]), logits.new_zeros(x.shape[1:])
        total[:, y:y + crop, z:z + crop] += logits
        count[y:y + crop, z:z + crop] += 1
    return (total / count)[:, :H, :W]


def confusion(prediction: Tensor, truth: Tensor, classes: int) -> Tensor:
    """(...) ints -> (C, C) counts, rows truth, columns prediction; truth of 255 is left out."""
    kept = truth != IGNORE
    index = truth[kept].long() * classes + prediction[kept].long()
    return torch.bincount(index, minlength=classes ** 2).view(classes, classes)


def scores(counts: Tensor) -> tuple[float, float, Tensor]:
    """mIoU and pixel accuracy in percent, and IoU per class (C,), nan for a class that is absent from truth
    and prediction and that mIoU leaves out."""
    counts = counts.double()
    hit, union = counts.diag(), counts.sum(0) + counts.sum(1) - counts.diag()
    iou = 100 * torch.where(union > 0, hit / union.clamp(min=1), torch.nan)
    return iou.nanmean().item(), (100 * hit.sum() / counts.sum().clamp(min=1)).item(), iou


def learning_rate(step: int, args) -> float:
    """Linear warm-up, then linear to 0."""
    warm = min(args.warmup_iters, args.iters // 4)
    return args.lr * min((step + 1) / max(warm, 1), (args.iters - step) / max(args.iters - warm, 1))


@torch.no_grad()
def evaluate(vit: ViT, head: nn.Module, val: Pairs, args, device) -> tuple[Tensor, list[str]]:
    """Confusion matrix (C, C) over the ranks, and what is wrong with the pairs that could not be read."""
    head.eval()
    C = head.conv.out_channels
    counts, bad = torch.zeros(C, C, dtype=torch.int64), []
    mine = range(distributed.rank(), len(val), distributed.world_size())
    for i in tqdm(mine, "test", disable=not distributed.is_main(), mininterval=1):
        try:
            image, label = val.read(i)
        except BadImage as e:
            bad.append(str(e))
            continue
        counts += confusion(predict_one(vit, head, image, label.shape, args, device), label, C)
    head.train()
    return distributed.all_sum(counts.to(device)).cpu(), sum(distributed.everywhere(bad), [])


def predict_one(vit: ViT, head: nn.Module, image: Tensor, size, args, device) -> Tensor:
    """(3, H, W) uint8 -> (H, W) class numbers."""
    def predict(x):
        return F.interpolate(head(dense_features(vit, x, args.blocks)), size=x.shape[2:], mode="bilinear")
    x = resize_short(image, args.crop).to(device)
    logits = sliding_logits(predict, x, args.crop, round(args.crop * 2 / 3))
    return F.interpolate(logits[None], size=tuple(size), mode="bilinear")[0].argmax(0).cpu()


def train(vit: ViT, head: nn.Module, optimizer, data: Pairs, args, device, step: int) -> None:
    """From iteration `step` to args.iters; saves and ends with code 75 when a signal asks for it."""
    W, stop = distributed.world_size(), distributed.StopSignal()
    if args.batch_size % W:
        raise ValueError(f"--batch_size {args.batch_size} is not a multiple of the {W} ranks")
    order = range(step * args.batch_size + distributed.rank(), args.iters * args.batch_size, W)
    loader = DataLoader(Samples(data, args.crop, args.seed), args.batch_size // W, sampler=order,
                        num_workers=args.num_workers, worker_init_fn=init_worker)
    bare = head
    if W > 1:
        head = DistributedDataParallel(head, [device] if device.type == "cuda" else None)
    bar = tqdm(total=args.iters, initial=step, disable=not distributed.is_main(), unit="it", mininterval=1)
    bad: set[str] = set()                                              # what is wrong with this rank's pairs
    for x, y, wrong in loader:
        bad |= {w for w in wrong if w}
        logits = head(dense_features(vit, normalize(x.to(device)), args.blocks))
        logits = F.interpolate(logits, size=y.shape[1:], mode="bilinear")
        loss = F.cross_entropy(logits, y.long().to(device), ignore_index=IGNORE, reduction="sum")
        scored = distributed.all_sum((y != IGNORE).sum().to(device))   # DDP averages over the ranks
        loss = loss * W / scored.clamp(min=1)                          # 0, not nan, if all is void

        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        asked, broken, lost = distributed.all_sum(torch.tensor(
            [float(stop.asked), float(not loss.isfinite()), float(len(bad))], device=device)).tolist()
        if broken:
            distributed.fail(f"not finite at iteration {step}: loss {loss.item():.4g}; {args.output_dir} is "
                             "as it was; lower --lr", distributed.FAILED, together=True)
        if lost > args.max_bad * len(data):
            every = set().union(*distributed.everywhere(bad))          # ranks may have met the same one
            if len(every) > args.max_bad * len(data):
                distributed.fail(f"{len(every)} of {len(data)} training pairs cannot be read, more than "
                                 f"--max_bad {args.max_bad:g}: {min(every)}", together=True)
        optimizer.step()
        step += 1
        bar.update()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
        if asked or step % args.save_every == 0 or step == args.iters:
            checkpoint.save(Path(args.output_dir) / "last.pth", {
                "step": step, "options": vars_of(args), "head": bare.state_dict(),
                "optimizer": optimizer.state_dict()})
        if asked:
            bar.close()
            distributed.fail(f"stopped by a signal after iteration {step}, saved; start the same command "
                             "again to go on", distributed.STOPPED, together=True)
    bar.close()
    stop.release()
    lost = set().union(*distributed.everywhere(bad))
    if lost:
        say(f"{len(lost)} training pairs could not be read and gave way to others, such as {min(lost)}")


def vars_of(args) -> dict:
    """The options that belong into a file."""
    return {k: v for k, v in vars(args).items() if k != "main"} | {"world_size": distributed.world_size()}


def picture(vit: ViT, head: nn.Module, val: Pairs, args, device, n: int = 6) -> Image.Image | None:
    """Image, prediction and truth of n test images, evenly spaced; None if none of them can be read."""
    rows, head = [], head.eval()
    for i in torch.linspace(0, len(val) - 1, min(n, len(val))).long().tolist():
        try:
            image, label = val.read(i)
        except BadImage:                                               # named by `evaluate` already
            continue
        photo = image.permute(1, 2, 0).numpy()
        guess = predict_one(vit, head, image, label.shape, args, device)
        void, kinds = (label == IGNORE).numpy(), [int(k) for k in label.unique() if k != IGNORE]
        truth = np.where(void[..., None], 255, figure.painted(photo, label.numpy()))
        names = ", ".join(val.names[k] if val.names else str(k) for k in kinds)
        rows.append((f"{val.name(i)}: {names}", [("image", photo), ("prediction", figure.painted(
            photo, guess.numpy())), ("truth (white: not scored)", truth.astype(np.uint8))]))
    return figure.sheet(rows) if rows else None


def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    vit, report = load_backbone(args.ckpt, args.checkpoint_key)
    say(report)
    args.blocks = args.blocks or default_blocks(vit.depth)
    args.crop = args.crop // vit.patch_size * vit.patch_size
    if args.crop <= 0 or not all(1 <= b <= vit.depth for b in args.blocks):
        raise ValueError(f"--blocks {args.blocks}, --crop {args.crop}: this network has blocks 1 ... "
                         f"{vit.depth} and patches of {vit.patch_size} pixels")
    if min(args.iters, args.batch_size, args.save_every, args.num_classes or 1) < 1:
        raise ValueError("--iters, --batch_size, --save_every, --num_classes: expected 1 or more")
    distributed.check_outputs(args, "json")
    data, val = (Pairs(args.data, split, args.layout, args.num_classes) for split in ("train", "val"))
    classes = data.classes
    if classes is None:
        raise ValueError("--num_classes: how many classes do the labels of this folder have?")
    torch.manual_seed(args.seed)
    vit, head = vit.to(device), LinearHead(vit.embed_dim * len(args.blocks), classes)
    if device.type == "cuda":
        head = nn.SyncBatchNorm.convert_sync_batchnorm(head)
    head = head.to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    name = args.ckpt.replace(":", "_").replace("/", "_").removesuffix(".pth")
    args.output_dir = args.output_dir or f"out/linseg/{name}-{data.layout}"
    args.weights = checkpoint.digest(vit.state_dict())                 # another file of the same name
    last = checkpoint.open_run(argparse.Namespace(**vars_of(args)), HARMLESS)
    if last is not None:
        head.load_state_dict(last["head"])
        optimizer.load_state_dict(last["optimizer"])
    say(f"linseg, {data.layout}: {len(data)} train, {len(val)} test images, {classes} classes; blocks "
        f"{args.blocks}, BN + 1x1; {args.iters} iterations of {args.batch_size} crops of {args.crop} px, "
        f"AdamW lr {args.lr:g} wd {args.weight_decay:g}; test windows of {args.crop} every "
        f"{round(args.crop * 2 / 3)}; {'going on from iteration %d in' % last['step'] if last else 'writes'} "
        f"{args.output_dir}")
    train(vit, head, optimizer, data, args, device, last["step"] if last else 0)

    counts, bad = evaluate(vit, head, val, args, device)
    if not counts.sum():
        raise ValueError(f"{args.data}: no labelled pixel in {len(val)} test images; " + "; ".join(bad[:1]))
    miou, accuracy, iou = scores(counts)
    if not distributed.is_main():
        return
    for line in bad:
        print(f"left out: {line}")
    names = val.names or [str(i) for i in range(classes)]
    by_class = {n: round(v, 2) for n, v in zip(names, iou.tolist(), strict=True) if not math.isnan(v)}
    print("  ".join(f"{n} {v:.1f}" for n, v in by_class.items()))
    print(f"mIoU {miou:.2f} % over {len(by_class)} classes that occur, pixel accuracy {accuracy:.2f} %")
    distributed.append_json(args.json, {
        "probe": "linseg", "ckpt": args.ckpt, "data": args.data, "layout": data.layout, "iters": args.iters,
        "crop": args.crop, "blocks": args.blocks, "miou": round(miou, 3), "accuracy": round(accuracy, 3),
        "iou": by_class, "left_out": len(bad)})
    out = Path(args.output_dir)
    if (drawn := picture(vit, head, val, args, device)) is not None:
        drawn.save(out / "predictions.png")
        print(f"look at {out / 'predictions.png'}")


def add_options(p: argparse.ArgumentParser) -> None:
    a = p.add_argument
    a("--data", required=True, help="folder of the set, in its published layout, or of pairs")
    a("--layout", default="auto", choices=["auto", *LAYOUTS],
      help="; ".join(f"{k}: {v}" for k, v in LAYOUTS.items()))
    a("--num_classes", type=int, help="classes of a folder of pairs; the named sets know theirs")
    a("--blocks", type=int, nargs="+", help="blocks whose outputs are read, from 1 (paper: 6 8 10 12)")
    a("--crop", type=int, default=512, help="pixels of a crop's and window's side (paper 512), floored to "
      "whole patches")
    a("--iters", type=int, default=40_000, help="iterations (paper 40000)")
    a("--warmup_iters", type=int, default=1500, help="linear warm-up (1500), at most a quarter of --iters")
    a("--batch_size", type=int, default=16, help="crops per iteration over all ranks (paper 16)")
    a("--lr", type=float, default=1e-4, help="learning rate (paper 1e-4); short runs need more, such as 3e-3")
    a("--weight_decay", type=float, default=0.05, help="AdamW's weight decay (paper 0.05)")
    a("--seed", type=int, default=0, help="of the head, the order and the crops")
    a("--max_bad", type=float, default=0.01, help="share of unreadable training pairs above which it fails")
    a("--save_every", type=int, default=1000, help="iterations between saves; a run that stopped goes on")
    a("--output_dir", help="folder of this run (default: out/linseg/CKPT-LAYOUT)")
    a("--force", action="store_true", help="go on although options differ from those of the stored run")
    p.set_defaults(main=main)
