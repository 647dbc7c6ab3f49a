"""Fine-tune a pretrained ViT on labelled images, with layer decay (Table 7, Fig. 4, 7).

    torchrun --nproc_per_node=4 finetune.py --ckpt mmc.pth --data pets --download      # recipe: transfer
    torchrun --nproc_per_node=4 finetune.py --ckpt mmc.pth --data /imagenet --recipe in1k
    python finetune.py --ckpt mmc.pth --data /photos --linear                          # a linear probe
    python finetune.py --ckpt random:vit_s/16 --data /photos --fraction 0.1            # Fig. 7, from scratch
    python finetune.py --eval out/finetune/best.pth --data /photos --predictions guesses.csv

AdamW, lr 5e-4 * global batch / 256, weight decay 0.05, layer decay 0.65: layer 0 is patch, CLS and position
embedding, block i is i + 1, the final norm and the head are last, at rate 1; cosine after 5 epochs of
warm-up; mixup 0.8, cutmix 1.0, label smoothing 0.1, drop path 0.1.  in1k: 100 epochs, RandAugment; transfer:
200 epochs, ThreeAugment.  Head: one Linear on [CLS ; mean patch] (hybrid), CLS or PAT after the final norm.
Test: short side * 256/224, centre crop.

Writes to --output_dir: last.pth (the same command goes on from it), best.pth (best top-1, with classes),
log.jsonl, run.json.  Signals, NaN and unreadable images as in pretrain.py; exit codes in distributed.py.

Shapes: B images per rank, S pixels of a side, D width, C classes."""
import argparse
import csv
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoint
import distributed
import figure
from augment import AUGMENTS, mix, soft_targets
from checkpoint import load_backbone
from data import (
    BadImage,
    Part,
    Views,
    generator_of,
    init_worker,
    labelled,
    normalize,
    open_images,
    open_val,
    same_classes,
    seed_of,
    to_device,
    train_loader,
)
from distributed import say, unwrap
from features import CentreCrop, centre_crop, crop_size
from masking import random_resized_crop
from model import DropPath, ViT, cosine_schedule
from monitor import Guard

RECIPES = {"in1k": dict(epochs=100, augment="rand"), "transfer": dict(epochs=200, augment="three")}
PLAIN = dict(mixup=0.0, cutmix=0.0, smoothing=0.0, augment="none", drop_path=0.0)          # of --linear
HARMLESS = {"ckpt", "checkpoint_key", "output_dir", "num_workers", "log_every", "save_every", "max_bad",
            "device", "data_root", "download", "force", "json", "predictions", "picture", "eval_every"}


class Classifier(nn.Module):
    """A backbone and one Linear: (B, 3, S, S) normalised -> logits (B, C).  head: hybrid, cls or pat.
    frozen: no gradient into the backbone, which stays in eval mode."""

    def __init__(self, backbone: ViT, classes: int, head: str = "hybrid", frozen: bool = False):
        super().__init__()
        self.backbone, self.kind, self.frozen = backbone.requires_grad_(not frozen), head, frozen
        self.head = nn.Linear(backbone.embed_dim * (2 if head == "hybrid" else 1), classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.train(mode and not self.frozen)
        return self

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.backbone(x)                                                             # (B, T, D)
        cls, pat = tokens[:, 0], tokens[:, self.backbone.num_prefix_tokens:].mean(1)
        return self.head({"cls": cls, "pat": pat, "hybrid": torch.cat([cls, pat], 1)}[self.kind])


def layer_of(name: str, depth: int) -> int:
    """The layer of a Classifier's parameter: 0 embeddings, i + 1 block i, depth + 1 final norm and head."""
    parts = name.split(".")
    if parts[0] == "backbone" and parts[1] == "blocks":
        return int(parts[2]) + 1
    return depth + 1 if parts[0] == "head" or parts[1] == "norm" else 0


def param_groups(model: Classifier, weight_decay: float, layer_decay: float) -> list[dict]:
    """AdamW groups with "scale" = layer_decay ** (depth + 1 - layer); no decay of weights with one dimension,
    nor of cls_token, pos_embed and reg_token (BEiT, MAE)."""
    depth, groups = model.backbone.depth, {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            free = p.ndim <= 1 or name.split(".")[-1] in ("cls_token", "pos_embed", "reg_token")
            groups.setdefault((layer_of(name, depth), free), []).append(p)
    return [{"params": params, "weight_decay": 0.0 if free else weight_decay,
             "scale": layer_decay ** (depth + 1 - layer)} for (layer, free), params in sorted(groups.items())]


# ------------------------------------------------- data
class CropAndAugment:
    """A random crop, mirrored or not, then the recipe's augmentation.  A class, not a closure: where loader
    workers are spawned (macOS) it travels to them."""

    def __init__(self, size: int, augment: str):
        self.size, self.augment = size, augment

    def __call__(self, image: Tensor, g: torch.Generator) -> dict[str, Tensor]:
        crop = random_resized_crop(image, self.size, (0.08, 1.0), 0.5, g)
        return {"image": AUGMENTS[self.augment](crop, g)}


def chosen(images, fraction: float | None, shots: int | None, seed: int):
    """The same share, or number, of each class; at least one image of each.  Raises ValueError for a class
    with fewer images than `shots`."""
    if fraction is None and shots is None:
        return images
    labels, kept = torch.tensor(images.labels), []
    for c in labels.unique().tolist():
        of_class = (labels == c).nonzero()[:, 0]
        n = shots if shots is not None else max(1, round(fraction * len(of_class)))
        if n > len(of_class):
            raise ValueError(f"--shots {shots}: class {images.classes[c]} has only {len(of_class)} images")
        order = torch.randperm(len(of_class), generator=generator_of(seed, "chosen", c))
        kept += of_class[order[:n]].tolist()
    return Part(images, sorted(kept))


def open_split(args) -> tuple:
    """Labelled train and val images, without --fraction and --shots; of --eval, a folder without train/ and
    val/ is val.  Raises ValueError where they do not fit together."""
    train = labelled(open_images(args.data, "train", args.data_root, args.download), f"--data {args.data}")
    val = open_val(args)
    if val is None and args.val_split:
        held = set(chosen(train, args.val_split, None, 0).index)
        train, val = (Part(train, [i for i in range(len(train)) if (i in held) == k]) for k in (False, True))
        gone = sorted({train.classes[y] for y in set(val.labels) - set(train.labels)})
        if gone:
            raise ValueError(f"--val_split {args.val_split:g} leaves no image to train on of "
                             f"{', '.join(gone[:5])}")
        say(f"no val split: every class lends {args.val_split:g} of its images, {len(val)} in all, the same "
            "for every --seed")
    if val is None and (not args.eval or (Path(args.data) / "train").is_dir()):
        raise ValueError(f"--data {args.data}: no val split; give DIR/val/CLASS/*, --val_data, or "
                         "--val_split 0.2")
    val = train if val is None else labelled(val, f"val images of {args.val_data or args.data}")
    same_classes(train.classes, val.classes, "train and val")
    return train, val


# ------------------------------------------------- training and test
@torch.no_grad()
def predict(model: Classifier, val, size: int, device, batch_size: int,
            workers: int) -> tuple[Tensor, Tensor]:
    """Class (n,), -1 for an unreadable image, and its probability (n,), on every rank.  The ranks share the
    images out without padding, so that none counts twice."""
    mine = list(range(distributed.rank(), len(val), distributed.world_size()))
    loader = DataLoader(CentreCrop(Part(val, mine), size), batch_size, num_workers=workers,
                        worker_init_fn=init_worker)
    found, at = torch.zeros(len(val), 2, dtype=torch.float64), 0
    model.eval()
    for x, _, ok in loader:
        p = model(normalize(x.to(device))).float().softmax(1).cpu()
        best = torch.stack([p.argmax(1).double(), p.amax(1).double()], 1)
        best[~ok, 0] = -1
        found[mine[at:at + len(x)]] = best
        at += len(x)
    model.train()
    found = distributed.all_sum(found.float().to(device)).cpu()
    return found[:, 0].long(), found[:, 1]


def top1(guess: Tensor, labels: list[int]) -> float:
    """Percent; an unreadable image counts as wrong."""
    return 100 * (guess == torch.tensor(labels)).float().mean().item()


class Watch(Guard):
    def watch_collapse(self, values, step) -> None:
        """A classifier has no such floor."""


def train(model, optimizer, loader, val, args, device, state: dict,
          guard: Watch) -> tuple[Tensor, Tensor] | None:
    """The loop.  state: "step", "best", "top1", kept up to date.  Returns what `predict` said after the last
    step; None if there was no step left to do."""
    per_epoch, bare = loader.sampler.steps, unwrap(model)
    steps, step, stop = args.epochs * per_epoch, state["step"], distributed.StopSignal()
    lr = cosine_schedule(global_lr(args), args.min_lr, steps, args.warmup_epochs * per_epoch)
    labels, classes = torch.tensor(loader.dataset.images.labels), bare.head.out_features
    bar, found = tqdm(total=steps, initial=step, disable=not distributed.is_main(), unit="step",
                      mininterval=1), None
    while step < steps:
        loader.sampler.set_epoch(step // per_epoch, step % per_epoch)
        for batch in loader:
            torch.manual_seed(seed_of(args.seed, "drop_path", step, distributed.rank()))
            rng = np.random.default_rng(seed_of(args.seed, "mix", step, distributed.rank()))
            x = normalize(to_device(batch["image"], device))
            y = soft_targets(labels[batch["read"]].to(device), classes, args.smoothing)
            x, y = mix(x, y, rng, args.mixup, args.cutmix)

            optimizer.zero_grad(set_to_none=True)
            total = torch.zeros((), device=device)
            for part, target in zip(x.chunk(args.accum), y.chunk(args.accum), strict=True):
                with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16 and device.type == "cuda"):
                    logits = model(part)
                loss = F.cross_entropy(logits.float(), target) / args.accum
                loss.backward()
                total += loss.detach()
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            log = {"loss": total, "grad_norm": norm}
            guard.check(batch, log, lr[step], step, stop)
            for group in optimizer.param_groups:
                group["lr"] = lr[step] * group["scale"]
            optimizer.step()

            step += 1
            state["step"] = step
            guard.log(log, step, per_epoch, {"lr": lr[step - 1]}, bar)
            epoch, ended = step // per_epoch, step % per_epoch == 0
            saving = ended or guard.time_to_save(step) or guard.stopping
            if saving:
                guard.settle()                                         # nothing is saved unchecked
            if ended:
                guard.epoch_end(epoch)
            if ended and (epoch % args.eval_every == 0 or step == steps):
                began = time.time()
                found = predict(bare, val, args.size, device, args.batch_size, args.num_workers)
                state["top1"] = top1(found[0], val.labels)
                guard.write({"epoch": epoch, "top1": state["top1"]})
                say(f"\nepoch {epoch}: top-1 {state['top1']:.2f} %")
                if state["top1"] > state["best"]:
                    state["best"] = state["top1"]
                    checkpoint.save(Path(args.output_dir) / "best.pth",
                                    described(args, bare, val.classes, state))
                guard.evaluating += time.time() - began
            if saving:
                checkpoint.save(Path(args.output_dir) / "last.pth", {
                    **described(args, bare, val.classes, state), "optimizer": optimizer.state_dict(),
                    "options": vars(args) | {"world_size": distributed.world_size()}})
            if guard.stopping:
                bar.close()
                distributed.fail(f"stopped by a signal after step {step}, saved; start the same command "
                                 "again to go on", distributed.STOPPED, together=True)
    bar.close()
    stop.release()
    return found


def global_lr(args) -> float:
    return args.lr * args.batch_size * args.accum * distributed.world_size() / 256


def described(args, model: Classifier, classes: list[str], state: dict) -> dict:
    """The classifier with all that --eval and load_backbone need to build it."""
    return {**state, "arch": model.backbone.config, "head": model.kind, "classes": list(classes),
            "size": args.size, "model": model.state_dict()}


def load_best(path: str) -> tuple[Classifier, dict]:
    """What --eval reads: the classifier of a best.pth, and the file's other content.  Raises ValueError."""
    content = checkpoint.load(path)
    lacking = [k for k in ("arch", "head", "classes", "size", "model") if k not in content]
    if lacking:
        raise ValueError(f"--eval {path}: no {', '.join(lacking)} in it; expected a best.pth of finetune.py")
    model = Classifier(ViT(**content["arch"]), len(content["classes"]), content["head"])
    model.load_state_dict(content["model"])
    return model, content


def report(guess: Tensor, sure: Tensor, val, args, more: dict) -> None:
    """Top-1, the worst classes with what they are taken for; --predictions, --json."""
    labels, accuracy = torch.tensor(val.labels), top1(guess, val.labels)
    rows = []
    for c, name in enumerate(val.classes):
        of_class = guess[labels == c]
        wrong = of_class[(of_class != c) & (of_class >= 0)]
        if len(of_class):
            rows.append((100 * (of_class == c).float().mean().item(), name,
                         val.classes[wrong.mode()[0]] if len(wrong) else "nothing"))
    for share, name, other in sorted(rows)[:5]:
        say(f"  {name}: {share:.1f} %, most often taken for {other}")
    if (guess < 0).any():
        say(f"  {int((guess < 0).sum())} unreadable images count as wrong")
    say(f"top-1 {accuracy:.2f} % of {len(val)} images")
    if not distributed.is_main():
        return
    if args.predictions:
        with open(args.predictions, "w", newline="") as f:
            out = csv.writer(f)
            out.writerow(["image", "true", "predicted", "confidence"])
            out.writerows((val.name(i), val.classes[t], val.classes[p] if p >= 0 else "", f"{s:.4f}")
                          for i, (t, p, s) in enumerate(zip(val.labels, guess.tolist(), sure.tolist(),
                                                            strict=True)))
    distributed.append_json(args.json,
                            {"top1": round(accuracy, 3), "data": args.data, "n_val": len(val), **more})


def picture(train, args, n: int = 4, draws: int = 5) -> Image.Image:
    """Rows of training images: the test crop, then several draws of the training augmentation.  Raises
    ValueError where none of the n images can be read."""
    views, rows = Views(train, CropAndAugment(args.size, args.augment), args.seed), []

    def photo(x):
        return x.permute(1, 2, 0).numpy()
    for i in torch.linspace(0, len(train) - 1, n).long().tolist():
        try:
            test = centre_crop(train.read(i), args.size, round(args.size * 256 / 224))
        except BadImage:
            continue
        rows.append((f"{train.classes[train.labels[i]]}", [("test", photo(test))] + [
            (f"train, epoch {e}", photo(views[e, i]["image"])) for e in range(draws)]))
    if not rows:
        raise ValueError(f"--picture: none of the {n} images tried can be read, among them {train.name(0)}")
    return figure.sheet(rows)


def get_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error, a = distributed.fail, p.add_argument_group("weights and data").add_argument
    a("--ckpt", help="checkpoint of any method, or random:ARCH/PATCH for training from scratch")
    a("--checkpoint_key", help="weights other than the teacher's, by their name in the file")
    a("--eval", metavar="FILE",
      help="in place of --ckpt: test a best.pth or last.pth of this script, and end")
    a("--data", required=True, help="folder of class folders (train/ and val/), 'toy', or cifar10, cifar100, "
      "flowers102, pets, cars, aircraft")
    a("--val_data", help="folder of the test images, if it is not beside the train images")
    a("--val_split", type=float,
      help="share of each class to test on, where there is no val split; the same for every --seed")
    a("--data_root", default="data", help="where torchvision keeps its sets")
    a("--download", action="store_true", help="let torchvision download the named set")
    a("--fraction", type=float, help="train on this share of each class (Fig. 7: 0.1)")
    a("--shots", type=int, help="train on this many images of each class (which: by --seed)")
    a("--size", type=int, help="pixels of a side (paper 224, or the nearest multiple of the patch below)")
    a("--num_workers", type=int, default=8, help="loader processes per rank (8)")
    a("--max_bad", type=float, default=0.01, help="share of unreadable images above which the run fails")
    a = p.add_argument_group("recipe, Table 7").add_argument
    a("--recipe", default="transfer", choices=list(RECIPES),
      help="; ".join(f"{k}: {v['epochs']} epochs, {v['augment']}" for k, v in RECIPES.items()))
    a("--linear", action="store_true", help="train the head only: a linear probe, by default with no mixing, "
      "no smoothing, no augmentation but crops and flips")
    a("--head", default="hybrid", choices=["hybrid", "cls", "pat"],
      help="what the Linear reads (paper hybrid)")
    a("--epochs", type=int, help="passes over the data (in1k 100, transfer 200)")
    a("--warmup_epochs", type=int, default=5, help="linear warm-up (paper 5)")
    a("--batch_size", type=int, default=64, help="images per rank and forward (paper 64)")
    a("--accum", type=int, default=1, help="forwards per step; multiplies the batch")
    a("--lr", type=float, default=5e-4, help="learning rate per 256 images of global batch (paper 5e-4)")
    a("--min_lr", type=float, default=1e-6, help="learning rate at the last step (lineage 1e-6)")
    a("--layer_decay", type=float, default=0.65, help="factor of the rate from one layer to the one below")
    a("--weight_decay", type=float, default=0.05, help="AdamW's, of matrices only (paper 0.05)")
    a("--clip_grad", type=float, default=0.0, help="largest gradient norm, 0 for none (lineage none)")
    a("--drop_path", type=float, help="stochastic depth at the last block (lineage 0.1)")
    a("--mixup", type=float, help="Beta's parameter, 0 for none (paper 0.8)")
    a("--cutmix", type=float, help="Beta's parameter, 0 for none (paper 1.0)")
    a("--smoothing", type=float, help="of the labels (paper 0.1)")
    a("--augment", choices=list(AUGMENTS), help="rand: RandAugment m9 mstd0.5 inc1; three: ThreeAugment")
    a("--bf16", default=True, action=argparse.BooleanOptionalAction, help="bfloat16 in the network on CUDA")
    a("--seed", type=int, default=0, help="of the head, order, crops and mixing")
    a("--device", default="auto", help="auto, cuda, mps or cpu")
    a = p.add_argument_group("run").add_argument
    a("--output_dir", default="out/finetune", help="folder of this run; an interrupted run in it goes on")
    a("--force", action="store_true", help="go on although options differ from those of the stored run")
    a("--save_every", default="15m", help="besides each epoch: steps (500) or minutes (15m) between saves")
    a("--eval_every", type=int, default=1, help="epochs between tests; the last is always tested")
    a("--log_every", type=int, default=10, help="steps between lines of log.jsonl")
    a("--predictions", metavar="CSV", help="write image, true, predicted, confidence of the last test")
    a("--picture", metavar="PNG", help="write a sheet of the augmentations, and end")
    a("--json", help="append the result to this file, one JSON line")
    return p


def get_args(argv=None) -> argparse.Namespace:
    """Parse and complete the options.  Raises ValueError."""
    args = get_parser().parse_args(argv)
    if (args.ckpt is None) == (args.eval is None):
        raise ValueError("give --ckpt FILE (or random:ARCH/PATCH) to train, or --eval BEST to test")
    paper = RECIPES[args.recipe] | dict(mixup=0.8, cutmix=1.0, smoothing=0.1, drop_path=0.1)
    for k, v in (paper | PLAIN if args.linear else paper).items():
        if getattr(args, k) is None:
            setattr(args, k, v)
    if args.fraction is not None and not 0 < args.fraction <= 1:
        raise ValueError(f"--fraction {args.fraction:g}: expected a share above 0, at most 1")
    if min(args.epochs, args.batch_size, args.accum, 1 if args.shots is None else args.shots,
           args.eval_every, args.log_every) < 1:
        raise ValueError("--epochs, --batch_size, --accum, --shots, --eval_every, --log_every: expected 1 or "
                         "more")
    if args.fraction is not None and args.shots is not None:
        raise ValueError("--fraction and --shots: give one of them")
    if args.val_split is not None and not 0 < args.val_split < 1:
        raise ValueError(f"--val_split {args.val_split:g}: expected a share above 0, below 1")
    if not 0 <= args.smoothing < 1 or min(args.mixup, args.cutmix) < 0:
        raise ValueError("--smoothing, --mixup, --cutmix: expected 0 or more, and smoothing below 1")
    if (args.mixup or args.cutmix) and args.batch_size * args.accum < 2:
        raise ValueError("--batch_size 1: mixing needs two images; give more, or --mixup 0 --cutmix 0")
    distributed.check_outputs(args, "json", "predictions", "picture")
    return args


def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    train_images, val = open_split(args)
    if args.eval:
        model, content = load_best(args.eval)
        same_classes(content["classes"], val.classes, f"--eval {args.eval} and the data")
        size = crop_size(model.backbone, args.size) if args.size else content["size"]
        found = predict(model.to(device), val, size, device, args.batch_size, args.num_workers)
        return report(*found, val, args, {"eval": args.eval})
    torch.manual_seed(args.seed)
    backbone, said = load_backbone(args.ckpt, args.checkpoint_key)
    if str(args.ckpt).startswith("random:"):                           # from scratch: the run's own seed
        torch.manual_seed(args.seed)
        backbone.init_weights(fixed_pos=False)
        said = f"{args.ckpt}: RANDOM weights, seed {args.seed}"
    say(said)
    args.size = crop_size(backbone, args.size)
    if args.picture:
        if distributed.is_main():
            picture(train_images, args).save(args.picture)
        return say(f"look at {args.picture}")
    train_images = chosen(train_images, args.fraction, args.shots, args.seed)
    for i, block in enumerate(backbone.blocks):
        block.drop_path = DropPath(args.drop_path * i / max(backbone.depth - 1, 1))
    model = Classifier(backbone, len(val.classes), args.head, args.linear).to(device)
    groups = param_groups(model, args.weight_decay, 1.0 if args.linear else args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), fused=device.type != "mps")
    loader = train_loader(Views(train_images, CropAndAugment(args.size, args.augment), args.seed),
                          args.batch_size * args.accum, args.num_workers, device.type == "cuda")
    guard, state = Watch(args, train_images, device), {"step": 0, "best": -1.0, "top1": 0.0}
    args.weights = (args.ckpt if str(args.ckpt).startswith("random:") else       # CPUs draw differently
                    checkpoint.digest(backbone.state_dict()))          # another file of the same name
    last = checkpoint.open_run(args, HARMLESS)
    if last is not None:
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        state = {k: last[k] for k in state}
        say(f"going on from {args.output_dir}/last.pth, step {state['step']}")
    say(f"recipe {'linear probe' if args.linear else args.recipe}: {len(train_images)} train, {len(val)} val "
        f"images, {len(val.classes)} classes at {args.size} px; head {args.head}; {args.epochs} epochs of "
        f"{loader.sampler.steps} steps, warm-up {args.warmup_epochs}, batch {distributed.world_size()} x "
        f"{args.batch_size} x {args.accum}, so lr {global_lr(args):.2e}, layer decay {args.layer_decay:g}, "
        f"weight decay {args.weight_decay:g}, {args.augment} augment, mixup {args.mixup:g}, cutmix "
        f"{args.cutmix:g}, smoothing {args.smoothing:g}, drop path {args.drop_path:g}")
    model.train()
    if distributed.world_size() > 1:
        model = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    found = (train(model, optimizer, loader, val, args, device, state, guard) or
             predict(unwrap(model), val, args.size, device, args.batch_size, args.num_workers))
    report(*found, val, args, {
        "ckpt": args.ckpt, "best": round(state["best"], 3), "recipe": args.recipe, "linear": args.linear,
        "head": args.head, "epochs": args.epochs, "size": args.size, "fraction": args.fraction,
        "shots": args.shots, "seed": args.seed, "seconds": round(guard.elapsed(), 1)})


if __name__ == "__main__":
    distributed.run(lambda: main(get_args()))
