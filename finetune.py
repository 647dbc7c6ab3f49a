"""Fine-tune a pretrained ViT on labelled images, with layer decay (Table 7, Fig. 4, 7).

    torchrun --nproc_per_node=4 finetune.py --ckpt mmc.pth --data pets --download      # recipe: transfer
    torchrun --nproc_per_node=4 finetune.py --ckpt mmc.pth --data /imagenet --recipe in1k
    python finetune.py --ckpt mmc.pth dino.pth --data /photos --linear                 # two linear probes
    python finetune.py --ckpt random:vit_s/16 --data /photos --fraction 0.1            # Fig. 7, from scratch
    python finetune.py --eval out/finetune/best.pth --data /photos --predictions guesses.csv

AdamW, lr 5e-4 * global batch / 256, cosine after 5 epochs of warm-up, weight decay 0.05, layer decay 0.65;
mixup 0.8, cutmix 1.0, label smoothing 0.1, drop path 0.1.  in1k: 100 epochs, RandAugment; transfer: 200
epochs, ThreeAugment.  The head is one Linear on [CLS ; mean patch], CLS or PAT.  classifier.py tests it.

The paper's ViT-S reaches 91.0 % (Table 4).  A small ViT on a tenth of imagenette, at 48 px for 10 epochs: one
minute on one core, 46 %, from scratch 30 %.

Writes to --output_dir: last.pth (the same command goes on from it), best.pth (the best test, for --eval),
log.jsonl, run.json.  Several checkpoints train one after another, each in a folder of its name in there.
Signals, NaN and unreadable images as in pretrain.py; exit codes in run.py.

Shapes: B images of a step per rank, S pixels of a side, C classes."""
import argparse
import copy
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import checkpoint
import classifier
import figure
import run
import training
from augment import AUGMENTS, mix, soft_targets
from classifier import HEADS, Classifier, of_each_class, open_pair, predict, report
from data import Batches, Views, evenly, seed_of
from distributed import fast_precision, is_main, rank, say, world_size
from images import centre_crop, crop_size, normalize, to_device
from masking import random_resized_crop
from model import ViT, cosine_schedule
from run import Mistake, above, between, count, number, option
from training import Guard, global_lr

RECIPES = {
    "in1k": dict(epochs=100, augment="rand"),
    "transfer": dict(epochs=200, augment="three"),
}
REGULARISED = dict(mixup=0.8, cutmix=1.0, smoothing=0.1, drop_path=0.1, layer_decay=0.65)
LINEAR = dict(mixup=0.0, cutmix=0.0, smoothing=0.0, drop_path=0.0, layer_decay=1.0, augment="none")
PROTOCOL = """recipe linear head epochs warmup_epochs size classes fraction shots val_split batch_size accum
    lr min_lr layer_decay weight_decay clip_grad drop_path mixup cutmix smoothing augment precision
    seed""".split()
MAY_CHANGE = set("""ckpt checkpoint_key num_heads val_data data_root download eval_every json
    predictions""".split())
OF_EVAL = set("""eval data val_data val_split classes data_root download size batch_size num_workers max_bad
    device json predictions""".split())


# ------------------------------------------------- the network
def build(args, ckpt: str, classes: int) -> tuple[argparse.Namespace, Classifier]:
    """The options of one checkpoint's run, and the network that it begins with.  Raises Mistake."""
    vit, about = checkpoint.load_backbone(ckpt, args.checkpoint_key, args.num_heads)
    own = copy.copy(args)
    own.ckpt = ckpt
    own.weights = checkpoint.digest(vit)
    own.size = crop_size(vit.patch_size, args.size)
    if len(args.ckpt) > 1:
        own.output_dir = str(folder_of(args, ckpt))

    torch.manual_seed(args.seed)
    backbone = ViT(**vit.config, drop_path=args.drop_path)
    if ckpt.startswith("random:"):                     # from scratch: drawn by the run's own seed
        torch.manual_seed(args.seed)
        backbone.init_weights()
        own.weights = ckpt                             # another machine may draw others
        about = f"{ckpt}: RANDOM weights, seed {args.seed}"
    else:
        backbone.load_state_dict(vit.state_dict())
    say(about)
    backbone.requires_grad_(not args.linear)
    return own, Classifier(backbone, classes, args.head)


def folder_of(args, ckpt: str) -> Path:
    """Where one of several checkpoints trains."""
    return Path(args.output_dir) / re.sub(r"[/\\:]", "_", checkpoint.short_name(ckpt))


def layer_of(name: str, depth: int) -> int:
    """The layer of a Classifier's parameter: 0 embeddings, i + 1 block i, depth + 1 final norm and head."""
    if name.startswith(("head.", "backbone.norm.")):
        return depth + 1
    block = re.match(r"backbone\.blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else 0


def param_groups(model: Classifier, weight_decay: float, layer_decay: float) -> list[dict]:
    """Groups for AdamW; the rate of each is multiplied by its "scale" = layer_decay ** (depth + 1 - layer).

    No decay of what has one dimension, nor of cls_token, pos_embed and reg_token (as in BEiT and MAE)."""
    depth = model.backbone.depth
    members = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            layer = layer_of(name, depth)
            free = p.ndim <= 1 or name.endswith(("cls_token", "pos_embed", "reg_token"))
            members.setdefault((layer, free), []).append(p)
    groups = []
    for layer, free in sorted(members):
        groups.append({
            "params": members[layer, free],
            "weight_decay": 0.0 if free else weight_decay,
            "scale": layer_decay ** (depth + 1 - layer),
        })
    return groups


# ------------------------------------------------- images
def crop_and_augment(
    image: Tensor,
    g: torch.Generator,
    size: int,
    augment: str,
) -> dict[str, Tensor]:
    """A training image: a random crop, mirrored or not, then the recipe's augmentation."""
    crop = random_resized_crop(image, size, (0.08, 1.0), 0.5, g)
    return {"image": AUGMENTS[augment](crop, g)}


def views_of(images, args) -> Views:
    return Views(images, partial(crop_and_augment, size=args.size, augment=args.augment), args.seed)


def picture(images, args, n=4, draws=5) -> Image.Image:
    """Rows of training images: the test crop, then several draws of the augmentation."""
    views = views_of(images, args)
    rows = []
    for i in evenly(n, len(images)):
        read = views[0, i]["read"]                     # image i, or the next that is readable
        crops = {"test": centre_crop(images.read(read), args.size)}
        for epoch in range(draws):
            crops[f"train, epoch {epoch}"] = views[epoch, i]["image"]
        panels = [(title, crop.permute(1, 2, 0).numpy()) for title, crop in crops.items()]
        name = images.classes[images.labels[read]]
        rows.append((name, panels))
    return figure.sheet(rows)


# ------------------------------------------------- training
class Tester(Guard):
    """The guard of a fine-tuning run, which also tests, and keeps the best network in best.pth."""

    def begin(self, step: int, model: Classifier, val) -> None:
        """Find the best test of a run that goes on from `step`; test what a kill may have left untested."""
        self.model = model
        self.val = val
        self.best = -1.0
        path = self.folder / "best.pth"
        if step == 0:
            if is_main():
                path.unlink(missing_ok=True)           # of another run that began here
            return
        if path.exists():
            self.best = checkpoint.load(path)["top1"]
        epoch, rest = divmod(step, self.steps_per_epoch)
        if rest == 0 or epoch >= self.args.epochs:
            self.end_epoch(epoch)

    def due(self, epoch: int) -> bool:
        return epoch % self.args.eval_every == 0 or epoch >= self.args.epochs

    def evaluate(self, epoch: int) -> None:
        self.answers = predict(self.model, self.val, self.args, self.device)
        top1 = self.answers.top1
        say(f"epoch {epoch}: top-1 {top1:.2f} %")
        if top1 > self.best:
            self.best = top1
            about = {"step": epoch * self.steps_per_epoch, "top1": top1}
            checkpoint.save(self.folder / "best.pth", self.content() | about)
        self.write({"epoch": epoch, "top1": top1})

    def content(self) -> dict:
        return classifier.content_of(self.model, self.val.classes, self.args.size)


def prepare(
    parts: list,
    labels: Tensor,
    classes: int,
    step: int,
    args,
    device,
) -> tuple[Tensor, Tensor]:
    """The images of one step, normalised and mixed, (B, 3, S, S), and their soft targets, (B, C)."""
    images = torch.cat([to_device(part["image"], device) for part in parts])
    read = torch.cat([part["read"] for part in parts])
    targets = soft_targets(to_device(labels[read], device), classes, args.smoothing)
    rng = np.random.default_rng(seed_of(args.seed, "mix", step, rank()))
    return mix(normalize(images), targets, rng, args.mixup, args.cutmix)


def train(
    model: nn.Module,
    optimizer,
    batches: Batches,
    guard: Tester,
    args,
    device,
    first: int,
) -> None:
    """The loop.  `step` counts over the whole run; everything random is seeded by it, or by the image."""
    last = args.epochs * batches.per_epoch
    warmup = round(args.warmup_epochs * batches.per_epoch)
    lr = cosine_schedule(global_lr(args), args.min_lr, last, warmup)
    labels = torch.tensor(guard.images.labels)
    classes = len(guard.val.classes)

    for step, parts in guard.steps(batches.steps(first, last), first, last):
        torch.manual_seed(seed_of(args.seed, "drop_path", step, rank()))
        x, y = prepare(parts, labels, classes, step, args, device)     # (B, 3, S, S), (B, C)

        optimizer.zero_grad()
        loss = torch.zeros((), device=device)
        parts_of_step = zip(x.chunk(args.accum), y.chunk(args.accum), strict=True)
        for images, targets in parts_of_step:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                logits = model(images)
            part_loss = F.cross_entropy(logits.float(), targets) / args.accum
            part_loss.backward()
            loss += part_loss.detach()

        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
        values = {"loss": loss, "grad_norm": grad_norm}
        guard.check(step, values, {"lr": lr[step]}, parts)             # ends all ranks on NaN

        for group in optimizer.param_groups:
            group["lr"] = lr[step] * group["scale"]
        optimizer.step()

        guard.after_step(step + 1)


# ------------------------------------------------- options
def add_recipe(p) -> None:
    g = p.add_argument_group("recipe, Table 7")
    a = partial(option, g)
    recipes = [f"{name}: {r['epochs']} epochs, {r['augment']}" for name, r in RECIPES.items()]
    a("--recipe", str, "transfer", "; ".join(recipes), choices=list(RECIPES))
    g.add_argument(
        "--linear", action="store_true", help="train the head only: a linear probe, by default with no "
        "mixing, no smoothing, no augmentation but crops and flips")
    a("--head", str, "hybrid", "what the Linear reads (paper hybrid)", choices=HEADS)
    a("--epochs", count, None, "passes over the data (in1k 100, transfer 200)")
    a("--warmup_epochs", number, 5, "linear warm-up (paper 5)")
    a("--batch_size", count, 64, "images per rank and forward (paper 64)")
    a("--accum", count, 1, "forwards per step; multiplies the batch")
    a("--lr", number, 5e-4, "learning rate per 256 images of a step (paper 5e-4)")
    a("--min_lr", number, 1e-6, "learning rate at the last step (lineage 1e-6)")
    a("--layer_decay", above(0.0), None, "factor of the rate from one layer to the one below (0.65)")
    a("--weight_decay", number, 0.05, "AdamW's, of matrices only (paper 0.05)")
    a("--clip_grad", number, 0.0, "largest gradient norm, 0 for none (lineage none)")
    a("--drop_path", between(0.0, 0.99), None, "stochastic depth at the last block (lineage 0.1)")
    a("--mixup", number, None, "Beta's parameter, 0 for none (paper 0.8)")
    a("--cutmix", number, None, "Beta's parameter, 0 for none (paper 1.0)")
    a("--smoothing", between(0.0, 0.99), None, "of the labels (paper 0.1)")
    a("--augment", str, None, "rand: RandAugment m9 mstd0.5 inc1; three: ThreeAugment",
      choices=list(AUGMENTS))


def get_parser() -> run.Parser:
    p = run.Parser(description=__doc__)
    a = partial(option, p)
    part = run.ranged(float, lambda v: 0 < v <= 1, "above 0, at most 1")
    a("--ckpt", str, None,
      "checkpoints of any method, or random:ARCH/PATCH for training from scratch", nargs="+")
    a("--eval", str, None,
      "in place of --ckpt: test a best.pth or last.pth of this script", metavar="FILE")
    run.add_shared(p, "checkpoint_key num_heads data val_data classes data_root download size")
    a("--val_split", part, None,
      "share of each class to test on, where there is no val split; the same for every --seed")
    a("--fraction", part, None, "train on this share of each class (Fig. 7: 0.1)")
    a("--shots", count, None, "train on this many images of each class (which: by --seed)")
    run.add_shared(p, "num_workers max_bad seed device precision output_dir force save_every stop_at",
                   num_workers=8, precision="auto", output_dir="out/finetune")
    run.add_shared(p, "log_every tensorboard json")
    a("--eval_every", count, 1, "epochs between tests; the last is always tested")
    a("--predictions", str, None, "write image, true, predicted, confidence of the last test", metavar="CSV")
    a("--picture", str, None, "write a sheet of the augmentations, and end", metavar="PNG")
    add_recipe(p)
    return p


def get_args(argv=None) -> argparse.Namespace:
    """Parse and complete the options.  Raises Mistake for combinations that cannot work."""
    args = get_parser().parse_args(argv)
    check(args)
    recipe = RECIPES[args.recipe] | REGULARISED
    if args.linear:
        recipe |= LINEAR
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if (args.mixup or args.cutmix) and args.batch_size * args.accum < 2:
        raise Mistake("--batch_size 1: mixing needs two images; give more, or --mixup 0 --cutmix 0")
    run.check_outputs(args, "json", "predictions", "picture")
    return args


def check(args):
    """Raises Mistake for options that do not go together."""
    if (args.ckpt is None) == (args.eval is None):
        raise Mistake("give --ckpt FILE (or random:ARCH/PATCH) to train, or --eval BEST to test")
    given = set(run.changed(args, args.defaults))
    idle = {
        "eval": given - OF_EVAL,
        "linear": given & {"layer_decay", "drop_path"},
        "picture": given & {"json", "predictions"},
    }
    for mode, names in idle.items():
        if getattr(args, mode) and names:
            raise Mistake(f"--{', --'.join(sorted(names))}: no effect with --{mode}")
    if args.fraction and args.shots:
        raise Mistake("--fraction and --shots: give one of them")
    if args.ckpt and len(args.ckpt) > 1:
        if args.predictions or args.picture:
            raise Mistake("--predictions and --picture are of one run: give one --ckpt")
        if len({folder_of(args, ckpt) for ckpt in args.ckpt}) < len(args.ckpt):
            raise Mistake("--ckpt: two of these files have the same name, and would train in the same folder")


# ------------------------------------------------- the script
def fine_tune(args, model: Classifier, images, val, device: torch.device) -> None:
    """One run, from its beginning or from its last.pth, to its report."""
    views = views_of(images, args)
    on_cuda = device.type == "cuda"
    batches = Batches(views, args.batch_size, args.accum, args.num_workers, pin=on_cuda)
    protocol = {"n_train": len(images), "n_val": len(val)}
    protocol |= {name: getattr(args, name) for name in PROTOCOL}
    chosen = [f"{name} {value}" for name, value in protocol.items() if value is not None]
    say(", ".join(chosen))
    say(f"{batches.per_epoch} steps an epoch, global batch {args.batch_size * args.accum * world_size()}, lr "
        f"{global_lr(args):.2e}")

    model = model.to(device)
    groups = param_groups(model, args.weight_decay, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, args.lr, fused=device.type != "mps")
    first = training.resume(args, MAY_CHANGE, {"model": model}, optimizer)

    def save(step):
        checkpoint.save(Path(args.output_dir) / "last.pth", guard.content() | {
            "step": step,
            "options": training.options_of(args),
            "optimizer": optimizer.state_dict(),
        })

    guard = Tester(args, images, device, batches.per_epoch, save)
    guard.begin(first, model.train(), val)
    network = training.on_all_ranks(model, device)
    train(network, optimizer, batches, guard, args, device, first)
    guard.finish()
    more = {
        "best": round(guard.best, 3),
        "n_unreadable_train": len(training.bad_names(args.output_dir)),
    }
    report(args, guard.answers, val, more, ckpt=args.ckpt, weights=args.weights,
           protocol=protocol, seconds=guard.seconds(), device=device)


def main(args: argparse.Namespace) -> None:
    precision = args.precision
    device = run.begin(args)
    if args.eval:
        return classifier.test(args, device)
    images, val = open_pair(args)
    runs = [build(args, ckpt, len(val.classes)) for ckpt in args.ckpt]               # all, before any work
    if args.picture:
        if is_main():
            picture(images, runs[0][0]).save(args.picture)
        return say(f"look at {args.picture}")
    images = of_each_class(images, args.fraction, args.shots, args.seed)
    for own, model in runs:
        if precision == "auto":                        # what is faster depends on the network's width
            own.precision = fast_precision(device, model.backbone.embed_dim)
        own.images = training.fingerprint(images)
        own.test_images = training.fingerprint(val)
        fine_tune(own, model, images, val, device)


if __name__ == "__main__":
    run.script(main, get_args)
