"""Linear segmentation on frozen features: BatchNorm, 1x1 convolution (Table 3; column "Lin." of Table 1).

    python probes.py linseg --ckpt out/backbone.pth --data /data/ADEChallengeData2016
    torchrun --nproc_per_node=4 probes.py linseg --ckpt mmc.pth --data /data/VOCdevkit --layout voc_aug
    python probes.py linseg --ckpt mmc.pth dino.pth --data /data/coco                      # Table 1, "Lin."
    python probes.py linseg --ckpt random:vit_s --data /data/VOCdevkit --crop 256 --iters 200 --lr 3e-3  # CPU

The outputs of blocks 6, 8, 10 and 12 (of another depth: the same shares of it), side by side; cross-entropy
at the crop's pixels; AdamW, 1,500 iterations of linear warm-up, linear decay to 0 at 40,000; 16 images per
step over all ranks; their crops are those of labelmaps.py.  Test: short side = crop, windows of crop x crop
every two thirds, their logits averaged, bilinear to the size of the label.  Paper: ADE20K 37.0, Cityscapes
62.6, VOC aug 77.7; COCO 46.4, whose classes are the background and the 80 categories [D].

Neither interruptions nor the number of workers change a run; nor does the number of ranks on CUDA, where
BatchNorm is synchronised.

Shapes: B images, H x W pixels, h x w tokens, D width of all blocks together, C classes, W ranks."""
import argparse
import copy
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoint
import data
import distributed
import figure
import run
import training
from data import evenly, init_worker, next_batch
from distributed import say
from images import BadImage, Unreadable, normalize, resize_short, to_device
from labelmaps import IGNORE, LAYOUTS, Pairs, Samples
from model import ViT
from run import Mistake, at_least, count, number

MAY_CHANGE = {"ckpt", "checkpoint_key", "json"}
PROTOCOL = "layout blocks crop iters warmup_iters batch_size lr weight_decay seed precision".split()


# ------------------------------------------------- the probe
class Probe(nn.Module):
    """Frozen backbone and linear head: (B, 3, H, W) normalised -> logits (B, C, H, W)."""

    def __init__(self, vit: ViT, blocks: list[int], classes: int):
        super().__init__()
        self.vit = vit.requires_grad_(False)
        self.blocks = blocks
        dim = len(blocks) * vit.embed_dim
        bn = nn.BatchNorm2d(dim)
        conv = nn.Conv2d(dim, classes, 1)
        nn.init.normal_(conv.weight, std=0.01)
        nn.init.zeros_(conv.bias)
        self.head = nn.Sequential(OrderedDict(bn=bn, conv=conv))

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, D, h, w) float32: raw outputs of the blocks, side by side."""
        grid = self.vit.patch_embed.grid(*x.shape[2:])
        maps = []
        for tokens in self.vit.intermediate(x, self.blocks):
            patches = tokens[:, self.vit.num_prefix_tokens:].float()
            maps.append(patches.mT.unflatten(2, grid))
        return torch.cat(maps, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.features(x))                           # (B, C, h, w)
        return F.interpolate(logits, size=x.shape[2:], mode="bilinear")


def default_blocks(depth: int) -> list[int]:
    """6, 8, 10, 12 of 12 blocks, and the same shares of another depth."""
    shares = (1 / 2, 2 / 3, 5 / 6, 1)
    return sorted({max(1, round(depth * share)) for share in shares})


def learning_rate(step: int, args) -> float:
    """Linear warm-up, then linear to 0."""
    warmup = min(args.warmup_iters, args.iters // 4)
    up = (step + 1) / max(warmup, 1)
    down = (args.iters - step) / (args.iters - warmup)
    return args.lr * min(up, down)


# ------------------------------------------------- training
def batches_of(
    train: Pairs,
    args,
    first: int,
    pin: bool,
) -> Iterator[tuple[int, dict]]:
    """(step, this rank's batch) from iteration `first` on: each of W ranks takes every W-th sample."""
    W = distributed.world_size()
    start = first * args.batch_size + distributed.rank()
    end = args.iters * args.batch_size
    loader = DataLoader(
        Samples(train, args.crop, args.seed),
        args.batch_size // W,
        sampler=range(start, end, W),
        num_workers=args.num_workers,
        pin_memory=pin,
        worker_init_fn=init_worker,
    )
    batches = iter(loader)
    for step in range(first, args.iters):
        yield step, next_batch(batches)


def loss_of(model: nn.Module, batch: dict, device) -> Tensor:
    """Cross-entropy, a mean over the scored pixels of all ranks; 0 where there are none."""
    image = to_device(batch["image"], device)                          # (B, 3, crop, crop)
    label = to_device(batch["label"], device)                          # (B, crop, crop)
    logits = model(normalize(image))                                   # (B, C, crop, crop)
    loss = F.cross_entropy(logits, label.long(), ignore_index=IGNORE, reduction="sum")
    scored = distributed.all_sum((label != IGNORE).sum())
    W = distributed.world_size()         # by which DDP divides
    return loss * W / scored.clamp(min=1)


def fit(probe: Probe, optimizer, train: Pairs, args, device, first: int) -> None:
    """Train the head from iteration `first` to the end."""
    def save(step: int) -> None:
        checkpoint.save(f"{args.output_dir}/last.pth", {
            "step": step,
            "options": training.options_of(args),
            "head": probe.head.state_dict(),
            "optimizer": optimizer.state_dict(),
        })

    per_pass = math.ceil(len(train) / args.batch_size)                 # an epoch of the log
    guard = training.Guard(args, train, device, per_pass, save)
    model = training.on_all_ranks(probe, device)
    batches = batches_of(train, args, first, pin=device.type == "cuda")
    told = {""}
    for step, batch in guard.steps(batches, first, args.iters):
        for fault in set(batch["fault"]) - told:
            say(f"gave way to another: {fault}")
            told.add(fault)

        loss = loss_of(model, batch, device)
        optimizer.zero_grad()
        loss.backward()
        lr = learning_rate(step, args)
        gradients = [p.grad for p in probe.head.parameters()]
        values = {"loss": loss.detach(), "grad_norm": nn.utils.get_total_norm(gradients)}
        guard.check(step, values, {"lr": lr}, [batch])                 # ends all ranks on NaN

        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        guard.after_step(step + 1)
    guard.finish()


# ------------------------------------------------- test
def test_stride(crop: int) -> int:
    return round(crop * 2 / 3)


def windows(n: int, crop: int, stride: int) -> list[int]:
    """Where windows of `crop` begin on n >= crop pixels: every `stride`, the last one flush with the end."""
    last = n - crop
    return [*range(0, last, stride), last]


@torch.no_grad()
def sliding_logits(predict: Callable, image: Tensor, crop: int, stride: int) -> Tensor:
    """Logits of an image of any size: windows of crop x crop, averaged where they overlap.

    predict: (1, 3, crop, crop) normalised -> (1, C, crop, crop).  image: (3, H, W) uint8, padded by black
    where it is smaller than a window.  Returns (C, H, W)."""
    H, W = image.shape[1:]
    image = F.pad(image, [0, max(0, crop - W), 0, max(0, crop - H)])
    height, width = image.shape[1:]
    total = None
    count = torch.zeros(height, width, device=image.device)
    for top in windows(height, crop, stride):
        for left in windows(width, crop, stride):
            rows = slice(top, top + crop)
            columns = slice(left, left + crop)
            window = normalize(image[None, :, rows, columns])
            logits = predict(window)[0]                                # (C, crop, crop)
            if total is None:
                total = logits.new_zeros(len(logits), height, width)
            total[:, rows, columns] += logits
            count[rows, columns] += 1
    mean = total / count
    return mean[:, :H, :W]


def likeliest(logits: Tensor, size: torch.Size, together: int = 16) -> Tensor:
    """(C, h, w) -> the class with the largest logit at each pixel, (*size): bilinear, and a few classes at a
    time, as all of them may not fit into memory."""
    best = logits.new_full(size, -torch.inf)
    number = torch.zeros(size, dtype=torch.long, device=logits.device)
    for first in range(0, len(logits), together):
        part = logits[None, first:first + together]
        part = F.interpolate(part, size=size, mode="bilinear")[0]
        value, place = part.max(0)       # on a CPU faster than argmax(0)
        better = value > best
        best = torch.where(better, value, best)
        number = torch.where(better, first + place, number)
    return number


def segment(probe: Probe, image: Tensor, size: torch.Size, crop: int, device) -> Tensor:
    """(3, H, W) uint8 -> class numbers, (*size)."""
    image = resize_short(image, crop, "bilinear")
    image = to_device(image, device)
    logits = sliding_logits(probe, image, crop, test_stride(crop))
    return likeliest(logits, size).cpu()


def confusion(prediction: Tensor, truth: Tensor, classes: int) -> Tensor:
    """(...) ints -> (C, C) counts, rows truth, columns prediction; truth of 255 is left out."""
    kept = truth != IGNORE
    row = truth[kept].long()
    column = prediction[kept].long()
    counts = torch.bincount(row * classes + column, minlength=classes ** 2)
    return counts.view(classes, classes)


def scores(counts: Tensor) -> tuple[float, float, Tensor]:
    """mIoU and pixel accuracy in percent, and IoU per class (C,), nan for a class that is absent from truth
    and prediction and that mIoU leaves out."""
    counts = counts.double()
    hit = counts.diag()
    union = counts.sum(0) + counts.sum(1) - hit
    iou = 100 * hit / union              # 0 / 0 is nan
    accuracy = 100 * hit.sum() / counts.sum()
    return iou.nanmean().item(), accuracy.item(), iou


@torch.no_grad()
def evaluate(probe: Probe, val: Pairs, args, device) -> tuple[Tensor, Unreadable]:
    """Confusion matrix (C, C) over all ranks, and the pairs that could not be read."""
    probe.head.eval()
    C = len(val.classes)
    counts = torch.zeros(C, C, dtype=torch.int64)
    bad = []
    numbers = range(distributed.rank(), len(val), distributed.world_size())
    for i in tqdm(numbers, "test", disable=not distributed.is_main(), mininterval=1):
        try:
            image, label = val.read(i)
        except BadImage as e:
            bad.append(str(e))
            continue
        guess = segment(probe, image, label.shape, args.crop, device)
        counts += confusion(guess, label, C)

    unreadable = Unreadable(len(val), args.max_bad)
    for name in chain(*distributed.everywhere(bad)):
        unreadable.note(name)
    return distributed.all_sum(counts.to(device)).cpu(), unreadable


# ------------------------------------------------- results
def report(counts: Tensor, classes: list[str]) -> dict:
    """Print the scores; returns them for JSON."""
    miou, accuracy, iou = scores(counts)
    by_class = {}
    for name, value in zip(classes, iou.tolist(), strict=True):
        if not math.isnan(value):
            by_class[name] = round(value, 2)
    say("  ".join(f"{name} {value:.1f}" for name, value in by_class.items()))
    say(f"mIoU {miou:.2f} % over {len(by_class)} classes that occur, pixel accuracy {accuracy:.2f} %")
    return {"miou": round(miou, 3), "accuracy": round(accuracy, 3), "iou": by_class}


def save_picture(probe: Probe, val: Pairs, args, device) -> None:
    """predictions.png: image, prediction and truth of 6 test images, evenly spaced."""
    rows = []
    for i in evenly(6, len(val)):
        try:
            image, label = val.read(i)
        except BadImage:                 # `evaluate` has named it
            continue
        photo = image.permute(1, 2, 0).numpy()
        guess = segment(probe, image, label.shape, args.crop, device)
        truth = figure.painted(photo, label.numpy())
        truth[label == IGNORE] = figure.WHITE
        there = [val.classes[k] for k in label.unique() if k != IGNORE]
        panels = [
            ("image", photo),
            ("prediction", figure.painted(photo, guess.numpy())),
            ("truth (white: not scored)", truth),
        ]
        rows.append((f"{Path(val.name(i)).stem}: {', '.join(there)}", panels))
    path = f"{args.output_dir}/predictions.png"
    if rows:
        with run.writing(path):
            figure.sheet(rows).save(path)
        say(f"look at {path}")


# ------------------------------------------------- one run per checkpoint
def own_args(args, ckpt: str, vit: ViT, train: Pairs) -> argparse.Namespace:
    """The options of the run of one checkpoint.  Raises Mistake for what its network cannot do."""
    own = copy.copy(args)
    own.ckpt = ckpt
    own.layout = train.layout
    own.blocks = args.blocks or default_blocks(vit.depth)
    own.crop = args.crop // vit.patch_size * vit.patch_size
    if own.crop == 0 or max(own.blocks) > vit.depth:
        raise Mistake(f"--blocks {own.blocks}, --crop {args.crop}: {ckpt} has blocks 1 ... {vit.depth} and "
                      f"patches of {vit.patch_size} pixels")
    name = ckpt.replace(":", "_").replace("/", "_").removesuffix(".pth")
    if args.output_dir is None:
        own.output_dir = f"out/linseg/{name}-{train.layout}"
    elif len(args.ckpt) > 1:
        own.output_dir = f"{args.output_dir}/{name}"
    own.images = training.fingerprint(train)
    own.weights = checkpoint.digest(vit)
    return own


def run_one(args, vit: ViT, train: Pairs, val: Pairs, device) -> None:
    """Train and test the head of one checkpoint, and report."""
    started = time.time()
    torch.manual_seed(args.seed)
    probe = Probe(vit, args.blocks, len(train.classes))
    if device.type == "cuda":
        probe = nn.SyncBatchNorm.convert_sync_batchnorm(probe)
    probe = probe.to(device)
    optimizer = torch.optim.AdamW(probe.head.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    first = training.resume(args, MAY_CHANGE, {"head": probe.head}, optimizer)
    protocol = {name: getattr(args, name) for name in PROTOCOL}
    say(", ".join(f"{name} {value}" for name, value in protocol.items()))
    say(f"test windows of {args.crop} every {test_stride(args.crop)}; writes {args.output_dir}")
    fit(probe, optimizer, train, args, device, first)

    counts, unreadable = evaluate(probe, val, args, device)
    unreadable.say()
    if not counts.any():
        raise Mistake(f"{args.data}: no labelled pixel in {len(val)} test images")
    if not distributed.is_main():
        return
    metrics = report(counts, val.classes) | unreadable.for_json()
    metrics["n_unreadable_train"] = len(training.bad_names(args.output_dir))
    run.record(
        args.json,
        eval="linseg",
        ckpt=args.ckpt,
        weights=args.weights,
        data=args.data,
        data_digest=f"{data.digest(train)}-{data.digest(val)}",
        protocol=protocol,
        metrics=metrics,
        seconds=time.time() - started,
        device=device,
    )
    save_picture(probe, val, args, device)


def main(args) -> None:
    device = run.begin(args)
    run.check_outputs(args, "json")
    W = distributed.world_size()
    if args.batch_size % W:
        raise Mistake(f"--batch_size {args.batch_size} is not a multiple of the {W} ranks")
    train = Pairs(args.data, "train", args.layout, args.num_classes)
    val = Pairs(args.data, "val", args.layout, args.num_classes)
    if args.num_classes and train.layout != "pairs":
        raise Mistake(f"--num_classes: {train.layout} has its own {len(train.classes)} classes")
    if not train.classes:
        raise Mistake("--num_classes: how many classes do the labels of this folder have?")
    left = data.counted(train.left_out + val.left_out)
    left = f", left out: {left}" if left else ""
    say(f"linseg, {train.layout}: {len(train)} train, {len(val)} test images, {len(train.classes)} "
        f"classes{left}")

    jobs = []
    weights = {}                         # in each folder
    for ckpt in args.ckpt:
        vit = checkpoint.open_backbone(args, ckpt, device)
        own = own_args(args, ckpt, vit, train)
        if weights.setdefault(own.output_dir, own.weights) != own.weights:
            raise Mistake(f"--ckpt {ckpt}: another one has the folder {own.output_dir}: run it by itself, "
                          "with its own --output_dir")
        jobs.append((own, vit))
    for own, vit in jobs:
        run_one(own, vit, train, val, device)


def add_options(p: argparse.ArgumentParser) -> None:
    a = p.add_argument
    run.add_shared(p, "ckpt checkpoint_key num_heads")
    a("--data", required=True, help="folder of the set, in its published layout, or of pairs")
    a("--layout", default="auto", choices=["auto", *LAYOUTS],
      help="; ".join(f"{layout}: {text}" for layout, text in LAYOUTS.items()))
    a("--num_classes", type=count, help="classes of a folder of pairs; the named sets know theirs")
    a("--blocks", type=count, nargs="+", help="blocks whose outputs are read, from 1 (paper: 6 8 10 12)")
    a("--crop", type=count, default=512,
      help="pixels of a crop's and a window's side (paper 512), floored to whole patches")
    a("--iters", type=count, default=40_000, help="iterations (paper 40000)")
    a("--warmup_iters", type=at_least(0), default=1500,
      help="linear warm-up (1500), at most a quarter of --iters")
    a("--batch_size", type=count, default=16, help="crops per iteration over all ranks (paper 16)")
    a("--lr", type=number, default=1e-4,
      help="learning rate (paper 1e-4); short runs need more, such as 3e-3")
    a("--weight_decay", type=number, default=0.05, help="AdamW's weight decay (paper 0.05)")
    run.add_shared(p, "seed num_workers max_bad device precision json force save_every log_every tensorboard")
    run.add_shared(p, "stop_at")
    a("--output_dir", help="folder of this run, an interrupted run in it goes on (default: "
      "out/linseg/CKPT-LAYOUT; with several checkpoints: a folder in it for each)")
    p.set_defaults(main=main)
