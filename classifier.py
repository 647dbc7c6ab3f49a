"""A classifier on a backbone: the network, its file, its test on labelled images, and what is said of it.

finetune.py trains it.  A test takes the short side to size * 256/224 and the centre crop, in float32; the
ranks share the images out, and none counts twice.  Top-1 is over the images that can be read, and the others
are named.

Shapes: B images of a batch, S pixels of a side, T tokens, D width, C classes, n test images."""
import csv
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import checkpoint
import data
import run
from data import CentreCrop, Subset, labelled, with_classes_of
from distributed import all_sum, is_main, rank, say, world_size
from images import Unreadable, crop_size, normalize, to_device
from model import ViT
from run import Mistake

HEADS = ("hybrid", "cls", "pat")


class Classifier(nn.Module):
    """A backbone and one Linear: (B, 3, S, S) normalised -> logits (B, C).

    head: what the Linear reads, after the final norm: CLS, PAT (the mean of the patches), or hybrid, both."""

    def __init__(self, backbone: ViT, classes: int, head: str = "hybrid"):
        super().__init__()
        self.backbone = backbone
        self.reads = head
        parts = 2 if head == "hybrid" else 1
        self.head = nn.Linear(parts * backbone.embed_dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.backbone(x)                                      # (B, T, D)
        cls = tokens[:, 0]
        pat = tokens[:, self.backbone.num_prefix_tokens:].mean(1)      # (B, D)
        inputs = {"cls": cls, "pat": pat, "hybrid": torch.cat([cls, pat], dim=1)}
        return self.head(inputs[self.reads])


# ------------------------------------------------- files
def content_of(model: Classifier, classes: list[str], size: int) -> dict:
    """What `load` and checkpoint.load_backbone need to build the network again."""
    return {
        "arch": model.backbone.config,
        "head": model.reads,
        "classes": list(classes),
        "size": size,
        "model": model.state_dict(),
    }


def load(path: str) -> tuple[Classifier, dict]:
    """The classifier in a best.pth or last.pth of finetune.py, and the file's content.  Raises Mistake."""
    content = checkpoint.load(path)
    lacking = {"arch", "head", "classes", "size", "model"} - content.keys()
    if lacking:
        raise Mistake(f"{path}: holds no classifier (no {', '.join(sorted(lacking))}); expected a best.pth "
                      "of finetune.py")
    backbone, report = checkpoint.read_backbone(path, content, None, None)
    model = Classifier(backbone, len(content["classes"]), content["head"])
    checkpoint.restore(path, [(model, content["model"])])
    say(report)
    return model, content


# ------------------------------------------------- images
def of_each_class(images, fraction: float | None, shots: int | None, seed: int):
    """The same share, or number, of images of each class, one at least.  Raises Mistake for a class that has
    fewer than `shots`."""
    if fraction is None and shots is None:
        return images
    labels = torch.tensor(images.labels)
    kept = []
    for c in labels.unique().tolist():
        members = (labels == c).nonzero()[:, 0]
        there = len(members)
        n = shots or max(1, round(fraction * there))
        if n > there:
            raise Mistake(f"--shots {shots}: class {images.classes[c]} has only {there} images")
        order = torch.randperm(there, generator=data.generator_of(seed, "chosen", c))
        kept += members[order[:n]].tolist()
    return Subset(images, sorted(kept))


def hold_out(images, share: float) -> tuple:
    """(train, val): every class lends a share of its images to val, the same ones for every --seed.  Raises
    Mistake where none are left."""
    val = of_each_class(images, share, None, seed=0)
    rest = set(range(len(images))) - set(val.index)
    train = Subset(images, sorted(rest))
    gone = sorted(images.classes[c] for c in set(val.labels) - set(train.labels))
    if gone:
        raise Mistake(f"--val_split {share:g} leaves no image to train on of {', '.join(gone[:5])}")
    say(f"no val split: every class lends {share:g} of its images, {len(val)} in all")
    return train, val


def open_pair(args) -> tuple:
    """Labelled images to train and to test on, with the same class numbers.  --eval tests on all images of a
    folder that has no splits.  Raises Mistake."""
    train = data.open_images(args)
    val = data.open_val(args)
    say(f"train: {train.about}")
    train = labelled(train, f"--data {args.data}")
    if val is None:
        if args.val_split:
            return hold_out(train, args.val_split)
        if not args.eval or data.has_splits(Path(args.data)):
            raise Mistake(f"--data {args.data}: no val split; give DIR/val/CLASS/*, --val_data, or "
                          "--val_split 0.2")
        return train, train
    if args.val_split:
        raise Mistake("--val_split: no effect, because there is a val split")
    say(f"val: {val.about}")
    val = labelled(val, f"val images of {args.val_data or args.data}")
    return train, with_classes_of(train, val, "train and val")


# ------------------------------------------------- test
class Answers(NamedTuple):
    """What a network says of n images.

    guess: (n,) classes, -1 for an image that cannot be read.  confidence: (n,) their probabilities.  top1:
    percent of the images that can be read."""
    guess: Tensor
    confidence: Tensor
    unreadable: Unreadable
    top1: float


@torch.no_grad()
def predict(model: Classifier, images, args, device: torch.device) -> Answers:
    """The answers for all images, on every rank.  Raises Mistake where too many cannot be read.

    args: size, batch_size, num_workers, max_bad."""
    n = len(images)
    mine = torch.arange(rank(), n, world_size())
    crops = CentreCrop(Subset(images, mine.tolist()), args.size)
    loader = DataLoader(crops, args.batch_size, num_workers=args.num_workers, worker_init_fn=data.init_worker)
    batches = iter(loader)
    guess = torch.zeros(n, dtype=torch.long)
    confidence = torch.zeros(n)

    model.eval()
    for _ in range(len(loader)):
        x, _, index, readable = data.next_batch(batches)
        logits = model(normalize(to_device(x, device)))                # (B, C)
        largest, number = logits.softmax(1).cpu().max(1)
        guess[mine[index]] = number.where(readable, -1)
        confidence[mine[index]] = largest
    model.train()

    guess = all_sum(guess.to(device)).cpu()
    confidence = all_sum(confidence.to(device)).cpu()
    unreadable = Unreadable(n, args.max_bad)
    for i in (guess < 0).nonzero()[:, 0].tolist():
        unreadable.note(images.name(i))
    if len(unreadable.names) == n:
        raise Mistake(f"none of the {n} test images can be read, such as {images.name(0)}")
    right = guess == torch.tensor(images.labels)
    top1 = 100 * right[guess >= 0].float().mean().item()
    return Answers(guess, confidence, unreadable, top1)


def worst_classes(answers: Answers, images) -> list[tuple[float, str, str]]:
    """(percent right, class, the class that it is most often taken for) of the five classes that do worst."""
    labels = torch.tensor(images.labels)
    rows = []
    for c, name in enumerate(images.classes):
        guess = answers.guess[(labels == c) & (answers.guess >= 0)]
        if len(guess) == 0:
            continue
        wrong = guess[guess != c]
        taken_for = images.classes[wrong.mode()[0]] if len(wrong) else "nothing"
        rows.append((100 - 100 * len(wrong) / len(guess), name, taken_for))
    return sorted(rows)[:5]


def write_predictions(path: str, answers: Answers, images) -> None:
    """A CSV of image, true, predicted, confidence; the last two are empty for an unreadable image."""
    with (
        run.writing(path, "--predictions "),
        open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as f,
    ):
        table = csv.writer(f)
        table.writerow(["image", "true", "predicted", "confidence"])
        classes = images.classes
        for i, label in enumerate(images.labels):
            guess = answers.guess[i]
            answer = ["", ""]
            if guess >= 0:
                answer = [classes[guess], f"{answers.confidence[i]:.4f}"]
            table.writerow([images.name(i), classes[label], *answer])


def report(args, answers: Answers, images, metrics: dict, **about) -> None:
    """The line of --json, --predictions, and only then the worst classes and top-1 in words.

    metrics: more of them.  about: what else run.record wants to know."""
    unreadable = answers.unreadable
    metrics = {"top1": round(answers.top1, 3)} | metrics | unreadable.for_json()
    run.record(
        args.json, eval="finetune", data=args.data,
        data_digest=data.digest(images), metrics=metrics, **about,
    )
    if args.predictions and is_main():
        write_predictions(args.predictions, answers, images)

    for percent, name, taken_for in worst_classes(answers, images):
        say(f"  {name}: {percent:.1f} %, most often taken for {taken_for}")
    unreadable.say()
    say(f"top-1 {answers.top1:.2f} % of {len(images) - len(unreadable.names)} images")


def test(args, device: torch.device) -> None:
    """--eval: test what a best.pth holds."""
    began = time.time()
    model, content = load(args.eval)
    _, val = open_pair(args)
    known = SimpleNamespace(classes=content["classes"])
    val = with_classes_of(known, val, f"--eval {args.eval} and --data")
    args.size = crop_size(model.backbone.patch_size, args.size or content["size"])
    answers = predict(model.to(device), val, args, device)
    protocol = {"size": args.size, "head": model.reads, "n_val": len(val)}
    report(
        args, answers, val, {}, ckpt=args.eval, weights=checkpoint.digest(model),
        protocol=protocol, seconds=time.time() - began, device=device,
    )
