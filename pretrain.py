"""Pretrain a ViT with MMC: masked reconstruction, patch distillation, global contrast (arXiv 2308.11448).

    python pretrain.py                                              # generated toy world, CPU, a few minutes
    python pretrain.py --data /photos --arch vit_s                  # any folder of images, one GPU
    torchrun --nproc_per_node=4 pretrain.py --arch vit_b --data /imagenet/train --output_dir out/vit_b

Writes to --output_dir: last.pth (everything; the same command goes on from it), backbone.pth (the teacher's
ViT alone, for the evaluations), log.jsonl, run.json (options), at each evaluation curves.png and result.png,
at the end results.json.  A run stopped by a signal finishes its step, saves and exits with code 75.  Where
the paper is silent or contradicts itself the choice is an option: docs/FAITHFULNESS.md has all, and [D] in
the help marks our own decisions on losses, heads and blocks.

Shapes: B images per rank, V = 2 global views, L local crops, N patches, P patch size, S pixels of a side,
C width of the contrastive space, M patches with corrupted pixels, A anchors."""
import argparse
import copy
import math
import shutil
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import checkpoint
import run
import training
from data import Batches, Views, open_images, seed_of
from distributed import is_main, rank, say, unwrap, world_size
from images import to_device
from losses import global_contrast, patch_contrast, reconstruction
from masking import GMML, Augmentation, Colours, MultiCrop, colour, gmml
from model import ALIASES, ARCHS, MMC, cosine_schedule, ema_update, momentum_teacher, patchify, vit
from monitor import Monitor, similarities, test_images
from run import Mistake, above, at_least, between, count, number, option, plural, share
from training import global_lr, warmup_epochs

TOY = dict(data="toy", arch="vit_micro", patch_size=8, global_crops_size=48, global_crops_scale=[0.3, 1.0],
           local_crops_number=0, jitter=[0.0, 0.0, 0.0, 0.0], grey=0.6, blur=[0.5, 0.1, 0.5],
           blur_sigma=[0.1, 0.5], solarize=[0.0, 0.0, 0.0], drop_align=1, head_hidden_dim=256,
           head_out_dim=128, drop_path=0.0, batch_size=32, epochs=5, warmup_epochs=1, lr=8e-3,
           momentum_teacher=0.8, num_workers=0, knn_every=2)
PAIR = dict(nargs=2, metavar=("LOW", "HIGH"))
TRIPLE = dict(nargs=3, metavar="P")
IDLE = {"w_pat": ("patch_tokens", "patch_negatives"),         # options without effect where the first is 0
        "local_crops_number": ("local_crops_size", "local_crops_scale")}
MAY_CHANGE = {"epochs", "knn_every", "keep", "data_root", "download", "val_data", "compile", "checkpointing"}


# ------------------------------------------------- from a batch to the networks' inputs
class Inputs(NamedTuple):
    """What one batch gives to the networks and the losses; views stand one after another.

    rec_index: (M,) the patches with a corrupted pixel, numbered among all V*B*N.
    anchors: for each view (A,) the anchors of Eq. (2), numbered among its B*N patches.
    pat_index: the anchors of both views, numbered among all V*B*N; None for all patches."""
    clean: Tensor              # (V*B, 3, S, S)
    corrupted: Tensor          # (V*B, 3, S, S)
    local: Tensor | None       # (L*B, 3, s, s)
    mask: Tensor               # (V*B, S, S) bool, True = corrupted
    rec_index: Tensor
    anchors: list[Tensor]
    pat_index: Tensor | None


def view_by_view(x: Tensor) -> Tensor:
    """(B, V, ...) -> (V*B, ...)."""
    return x.transpose(0, 1).flatten(0, 1)


def prepare(batch: dict, args, device: torch.device) -> Inputs:
    """Colour and corrupt the crops of a batch on the device.  Each view is corrupted by itself, so that alien
    pixels never come from the same image."""
    def coloured(name, crops):
        fields = [view_by_view(field[:, crops]) for field in batch["colours"]]
        pixels = view_by_view(to_device(batch[name], device))
        return colour(pixels, Colours(*fields))                        # which stay on the CPU

    clean = coloured("views", slice(0, 2))                             # colours: views first, then local
    local = coloured("local", slice(2, None)) if "local" in batch else None

    draws = batch["corruption"]
    mask = to_device(draws.mask, device)                               # (B, V, S, S)
    corrupted = []
    for v, view in enumerate(clean.chunk(2)):
        corrupted.append(gmml(view, mask[:, v], draws.alien[:, v], draws.noise_seed[:, v]))

    def where(chosen):                                                 # on the CPU, or the device would wait
        return to_device(chosen.flatten().nonzero()[:, 0], device)

    rec_index = where(view_by_view(batch["corrupted_patches"]))
    chosen = batch["masked_patches"]                                   # (B, V, N)
    pat_index = where(view_by_view(chosen))
    if args.patch_tokens == "all":
        chosen = torch.ones_like(chosen)
        pat_index = None
    anchors = [where(chosen[:, v]) for v in (0, 1)]
    corrupted = torch.cat(corrupted)
    return Inputs(clean, corrupted, local, view_by_view(mask), rec_index, anchors, pat_index)


# ------------------------------------------------- the method
def mmc_losses(out: dict, target: dict, inputs: Inputs, args) -> dict[str, Tensor]:
    """Eq. (1), (2), (3) by name, from the student's outputs and the teacher's.

    Change the method here: whatever stands in the dict under NAME is logged and weighted by --w_NAME."""
    losses = {}
    if args.w_rec:
        P = args.patch_size
        pixels = patchify(inputs.clean, P).flatten(0, 1)[inputs.rec_index]                    # (M, 3*P*P)
        mask = inputs.mask[:, None].expand_as(inputs.clean)
        mask = patchify(mask, P).flatten(0, 1)[inputs.rec_index]                              # (M, 3*P*P)
        losses["rec"] = reconstruction(out["rec"], pixels, mask)                              # Eq. (1)
    if args.w_pat:
        B = len(inputs.clean) // 2
        k = target["pat"].unflatten(0, (2, B, -1))                                            # (V, B, N, C)
        q = out["pat"].split([len(anchors) for anchors in inputs.anchors])                    # (A, C) of each
        per_view = []
        for v, anchors in enumerate(inputs.anchors):
            per_view.append(patch_contrast(q[v], k[v], args.temp, anchors, args.patch_negatives))
        losses["pat"] = sum(per_view) / 2                                                     # Eq. (2)
    if args.w_cls:
        B = len(inputs.clean) // 2
        q = out["cls"].unflatten(0, (-1, B))                                                  # (V+L, B, C)
        k = target["cls"].unflatten(0, (2, B))                                                # (V, B, C)
        losses["cls"] = global_contrast(q, k, args.temp)                                      # Eq. (3)
    return losses


def train(student, teacher, optimizer, batches: Batches, monitor: Monitor, args, device, first: int) -> None:
    """The loop.  `step` counts over the whole run; everything random is seeded by it, or by the image."""
    last = args.epochs * batches.per_epoch
    warmup = round(warmup_epochs(args) * batches.per_epoch)
    lr = cosine_schedule(global_lr(args), args.min_lr, last, warmup)
    momentum = cosine_schedule(args.momentum_teacher, 1.0, last)

    for step, of_step in monitor.steps(batches.steps(first, last), first, last):
        torch.manual_seed(seed_of(args.seed, "drop_path", step, rank()))
        optimizer.zero_grad()
        values = {}
        for batch in of_step:                                          # --accum of them, each as if alone
            student.require_backward_grad_sync = batch is of_step[-1]  # of DDP: join gradients once a step
            inputs = prepare(batch, args, device)

            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                out = student(inputs.corrupted, inputs.local, inputs.rec_index, inputs.pat_index)
                with torch.no_grad():
                    target = teacher(inputs.clean) if args.w_pat or args.w_cls else {}

            losses = mmc_losses(out, target, inputs, args)
            loss = sum(getattr(args, f"w_{name}") * value for name, value in losses.items())  # Eq. (4)
            (loss / args.accum).backward()

            seen = {"loss": loss.detach()} | losses | similarities(out, target, inputs)
            for name, value in seen.items():
                values[name] = values.get(name, 0) + value.detach() / args.accum

        values["grad_norm"] = nn.utils.clip_grad_norm_(student.parameters(), args.clip_grad or math.inf)
        rates = {"lr": lr[step], "momentum": momentum[step]}
        monitor.check(step, values, rates, of_step)                    # NaN, bad images, a signal

        for group in optimizer.param_groups:
            group["lr"] = lr[step]
        optimizer.step()
        ema_update(teacher, unwrap(student), momentum[step])

        monitor.after_step(step + 1)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay for matrices, none for biases and norms (whatever has one dimension)."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def save_run(args, student: MMC, teacher: MMC, optimizer, per_epoch: int, step: int) -> None:
    """last.pth: all that a run needs to go on.  backbone.pth: the teacher's ViT with its architecture."""
    last = Path(args.output_dir) / "last.pth"
    backbone = last.with_name("backbone.pth")
    about = {"arch": teacher.backbone.config, "step": step}
    checkpoint.save(last, about | {
        "options": training.options_of(args),
        "student": student.state_dict(),
        "teacher": teacher.state_dict(),
        "optimizer": optimizer.state_dict(),
    })
    checkpoint.save(backbone, about | {"backbone": teacher.backbone.state_dict()})
    epoch, rest = divmod(step, per_epoch)
    if is_main() and args.keep and rest == 0 and epoch % args.keep == 0:
        shutil.copyfile(backbone, last.with_name(f"backbone_{epoch:04d}.pth"))


# ------------------------------------------------- options
def add_network(p) -> None:
    a = partial(option, p.add_argument_group("network"))
    a("--arch", str, "vit_s", f"{', '.join(ARCHS)} (default vit_s; toy vit_micro; paper vit_s, vit_b)",
      choices=[*ARCHS, *ALIASES], metavar="NAME")
    a("--patch_size", count, 16, "pixels of a patch's side (paper 16; toy 8)")
    a("--drop_path", between(0.0, 0.99), 0.1,
      "stochastic depth of the student at the last block (lineage 0.1; toy 0)")
    a("--head_hidden_dim", count, 4096, "width of the three heads (paper 4096; toy 256)")
    a("--head_out_dim", count, 256, "width of the contrastive space (lineage 256; toy 128)")
    a("--head_norm", str, "bn",
      "[D] norm in the contrastive heads; bn is synchronised across ranks on CUDA only",
      choices=["bn", "none"])


def add_method(p) -> None:
    g = p.add_argument_group("losses, Eq. (4); a weight of 0 skips that head's work")
    a = partial(option, g)
    a("--w_rec", number, 1.0, "weight of the reconstruction, Eq. (1) (paper 1)")
    a("--w_pat", number, 1.0, "weight of the patch distillation, Eq. (2) (paper 1)")
    a("--w_cls", number, 1.0,
      "weight of the global contrast, Eq. (3) (paper 1; MoCo's factor of 2*tau is --w_cls 0.4)")
    a("--temp", above(0.0), 0.2, "temperature of both contrasts (paper 0.2)")
    a("--patch_tokens", str, "all",
      "[D] anchors of Eq. (2): all patches (paper), or those at least half corrupted, which is cheaper",
      choices=["all", "masked"])
    a("--patch_negatives", negatives, "others",
      "[D] negatives of Eq. (2): others = all patches of the other images of this rank (paper); "
      "position = those at the same place only; a number = those at so many random places, anew in each "
      "step", metavar="WHICH")
    a("--momentum_teacher", share, 0.996,
      "EMA at the first step, cosine to 1 at the last (lineage 0.996; toy 0.8: a short run needs a "
      "teacher that moves)")

    g = p.add_argument_group("corruption (GMML), of each global view")
    a = partial(option, g)
    a("--noise_p", share, 0.5, "probability of noise; else pixels of another image (lineage 0.5)")
    a("--drop_perc", share, [0.5, 0.75], "share of the area overwritten by noise (paper: up to 0.75)", **PAIR)
    a("--drop_replace", share, 0.3, "share of the area overwritten by another image (paper 0.30)")
    a("--drop_block", between(0.001, 1.0), 0.3,
      "largest side of a block, as a share of the image's, floored to whole --drop_align (lineage 0.3)")
    a("--drop_align", count, None,
      "[D] pixels to which blocks are aligned (default: the patch size, whole patches, which learned "
      "more in the same time on real images; lineage 1; toy 1)")
    g.add_argument(
        "--even_blocks", default=True, action=argparse.BooleanOptionalAction,
        help="[D] blocks may start outside the image and are clipped, so that they cover it evenly; "
             "--no-even_blocks is the lineage")


def add_augmentation(p) -> None:
    a = partial(option, p.add_argument_group("augmentation; three numbers: view 1, view 2, local crops"))
    a("--global_crops_size", count, 224, "pixels of a global view's side (paper 224; toy 48)")
    a("--global_crops_scale", share, None,
      "area of a global crop (lineage 0.25 1 with local crops, 0.2 1 without)", **PAIR)
    a("--local_crops_number", at_least(0), 10,
      "local crops per image; 0 switches them off (paper 10; toy 0)")
    a("--local_crops_size", count, 96, "pixels of a local crop's side (paper 96)")
    a("--local_crops_scale", share, [0.05, 0.25], "area of a local crop (lineage 0.05 0.25)", **PAIR)
    a("--flip", share, 0.5, "probability of a mirrored crop (lineage 0.5)")
    a("--jitter", number, [0.4, 0.4, 0.4, 0.0],
      "strength of brightness, contrast, saturation, hue, applied with probability 0.8 (paper 0.4 0.4, "
      "lineage 0.4 0; toy 0)", nargs=4, metavar=("B", "C", "S", "H"))
    a("--grey", share, 0.2, "probability of a grey crop (lineage 0.2; toy 0.6)")
    a("--blur", share, [1.0, 0.1, 0.5], "probability of blur (paper 1, lineage 0.1 0.5)", **TRIPLE)
    a("--blur_sigma", above(0.0), [0.1, 2.0], "its sigma in pixels (lineage 0.1 2; toy 0.1 0.5)", **PAIR)
    a("--solarize", share, [0.0, 0.2, 0.0],
      "probability of solarisation (paper: view 2 0.2; toy 0)", **TRIPLE)


def add_training(p) -> None:
    g = p.add_argument_group("optimisation")
    a = partial(option, g)
    a("--batch_size", at_least(2), 48,
      "images per rank (paper 48; toy 32); more are more negatives, so at least 2")
    a("--accum", count, 1,
      "batches per step, one after another: multiplies the global batch and the learning rate, not the "
      "negatives, which are those of one batch, as are the statistics of BatchNorm")
    a("--epochs", count, None,
      "passes over the data (paper: vit_s 500 on ImageNet-100, vit_b 400 on ImageNet-1K; toy 5); raised "
      "on a resume, it stretches the schedules")
    a("--warmup_epochs", number, 10, "linear warm-up (lineage 10; toy 1)")
    a("--lr", number, 5e-4, "learning rate per 256 images of global batch (lineage 5e-4; toy 8e-3)")
    a("--min_lr", number, 1e-6, "learning rate at the last step (lineage 1e-6)")
    a("--weight_decay", number, 0.04, "AdamW's decay of matrices, not of biases and norms (paper 0.04)")
    a("--clip_grad", number, 3.0, "largest gradient norm, 0 for none (lineage 3.0)")
    g.add_argument("--compile", action="store_true",
                   help="torch.compile the ViTs: for CUDA; on CPU it does not pay")
    g.add_argument("--checkpointing", action="store_true", help="compute the activations of a block again "
                   "in backward: less memory, more time, same result")
    run.add_shared(g, "precision seed device", precision="auto")

    g = p.add_argument_group("run")
    run.add_shared(g, "output_dir force save_every log_every tensorboard stop_at")
    option(g, "--keep", at_least(0), 0,
           "epochs between backbones that are kept, as backbone_EPOCH.pth; 0 keeps none")
    option(g, "--knn_every", at_least(0), 10,
           "epochs between evaluations of the teacher; 0: only before and after (10; toy 2)")


def negatives(text: str) -> str | int:
    """Type of --patch_negatives."""
    if text in ("others", "position"):
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected others, position, or a number of 1 or more")
    return int(text)


def get_parser() -> run.Parser:
    p = run.Parser(description=__doc__)
    g = p.add_argument_group("data")
    g.add_argument("--data", help="folder of images (flat, nested or class folders; DIR/train and DIR/val if "
                   "there), 'toy', or cifar10, cifar100, stl10, flowers102, pets, cars, aircraft. Default: "
                   "the toy world, with small settings of its own. Paper: ImageNet-100 or -1K, train split")
    run.add_shared(g, "val_data classes data_root download num_workers max_bad", num_workers=8)
    add_network(p)
    add_method(p)
    add_augmentation(p)
    add_training(p)
    return p


def get_args(argv=None) -> argparse.Namespace:
    """Parse and complete the options.  Raises Mistake for combinations that cannot train."""
    p = get_parser()
    if p.parse_args(argv).data in (None, "toy"):
        p.set_defaults(**TOY)
    args = p.parse_args(argv)
    args.arch = ALIASES.get(args.arch, args.arch)
    if args.epochs is None:
        args.epochs = 400 if args.arch == "vit_b" else 500             # the paper's
    if args.drop_align is None:
        args.drop_align = args.patch_size
    if args.global_crops_scale is None:
        args.global_crops_scale = [0.25, 1.0] if args.local_crops_number else [0.2, 1.0]
    P = args.patch_size
    sizes = {"global": args.global_crops_size}
    if args.local_crops_number:
        sizes["local"] = args.local_crops_size
    for name, size in sizes.items():
        if size % P:
            near = max(size // P, 1) * P
            raise Mistake(f"--{name}_crops_size {size} is not a multiple of --patch_size {P}: try {near}")
    if args.global_crops_size % args.drop_align:
        raise Mistake(f"--drop_align {args.drop_align} does not divide --global_crops_size "
                      f"{args.global_crops_size}")
    if not (args.w_rec or args.w_pat or args.w_cls):
        raise Mistake("--w_rec, --w_pat, --w_cls: expected at least one above 0")
    for name, idle in IDLE.items():
        if getattr(args, name) == 0:
            run.refuse_idle(args, idle, f"--{name} 0")
    return args


# ------------------------------------------------- the script
def networks(args, device: torch.device) -> tuple[MMC, MMC]:
    """Student and teacher as they begin."""
    torch.manual_seed(args.seed)
    backbone = vit(args.arch, args.global_crops_size, args.patch_size, drop_path=args.drop_path)
    student = MMC(
        backbone, rec=args.w_rec > 0, pat=args.w_pat > 0, cls=args.w_cls > 0,
        hidden=args.head_hidden_dim, out=args.head_out_dim, head_norm=args.head_norm == "bn",
    )
    if device.type == "cuda":
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    student = student.to(device)
    teacher = momentum_teacher(student)
    student.backbone.checkpointing = args.checkpointing
    if args.compile:
        student.backbone.compile(dynamic=False)
        teacher.backbone.compile(dynamic=False)
    return student, teacher


def crops(args) -> MultiCrop:
    """What the loader's workers do to an image: crops, and the random numbers of colours and corruption."""
    local = args.local_crops_number if args.w_cls else 0               # only Eq. (3) reads them
    augmentation = Augmentation(
        global_size=args.global_crops_size, global_scale=args.global_crops_scale,
        local_number=local, local_size=args.local_crops_size, local_scale=args.local_crops_scale,
        flip=args.flip, jitter=args.jitter, grey=args.grey,
        blur=args.blur, blur_sigma=args.blur_sigma, solarize=args.solarize,
    )
    corruption = GMML(
        noise_p=args.noise_p, drop_perc=args.drop_perc, drop_replace=args.drop_replace,
        block=args.drop_block, align=args.drop_align, even=args.even_blocks,
    )
    return MultiCrop(augmentation, corruption, args.patch_size)


def describe(args, batches: Batches, transform: MultiCrop) -> str:
    """The launch line."""
    local = transform.augmentation.local_number
    accum = f" x {args.accum}" if args.accum > 1 else ""
    ranks = f"{world_size()} ranks x " if world_size() > 1 else ""
    return (f"{args.arch}/{args.patch_size} at {args.global_crops_size} px, {local} local "
            f"crops; {plural(args.epochs, 'epoch')} of {plural(batches.per_epoch, 'step')} of "
            f"{ranks}{args.batch_size}{accum} images in {args.precision}, lr {global_lr(args):.2e}\n"
            f"[D] anchors {args.patch_tokens}, negatives {args.patch_negatives} of this rank, head norm "
            f"{args.head_norm}, blocks of up to {transform.largest_block} px aligned to {args.drop_align}")


def main(args: argparse.Namespace) -> None:
    device = run.begin(args, width=ARCHS[args.arch][0])
    began = time.time()
    images = open_images(args, toy_seed=args.seed)
    val = test_images(args)
    seconds = time.time() - began
    listed = f"; listed in {seconds:.0f} s" if seconds > 1 else ""
    say(f"{args.data}: {images.about}{listed}")
    if val is not None:
        say(f"val: {val.about}")
    args.images = training.fingerprint(images)                         # an option: a resume compares it
    transform = crops(args)
    views = Views(images, transform, args.seed)
    on_cuda = device.type == "cuda"
    batches = Batches(views, args.batch_size, args.accum, args.num_workers, pin=on_cuda)
    say(describe(args, batches, transform))
    if args.warmup_epochs > args.epochs:
        say(f"--warmup_epochs {args.warmup_epochs:g} is longer than the run of {args.epochs} epochs: a tenth "
            "of it is warm-up")

    student, teacher = networks(args, device)
    untrained = copy.deepcopy(teacher.backbone)
    groups = param_groups(student, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, args.lr, fused=device.type != "mps")
    by_name = {"student": student, "teacher": teacher}
    first = training.resume(args, MAY_CHANGE, by_name, optimizer)

    save = partial(save_run, args, student, teacher, optimizer, batches.per_epoch)
    monitor = Monitor(args, images, val, device, batches.per_epoch, save, student, teacher, untrained)
    monitor.begin(first)
    network = training.on_all_ranks(student, device)
    train(network, teacher, optimizer, batches, monitor, args, device, first)
    monitor.finish()


if __name__ == "__main__":
    run.script(main, get_args)
