"""Pretrain a ViT with MMC: masked reconstruction, patch distillation, global contrast (arXiv 2308.11448).

    python pretrain.py                                              # generated toy world, CPU, a few minutes
    python pretrain.py --data /photos --arch vit_s                  # any folder of images, one GPU
    torchrun --nproc_per_node=4 pretrain.py --arch vit_b --data /imagenet/train --output_dir out/vit_b

Writes to --output_dir: last.pth (everything; the same command goes on from it), backbone.pth (the
teacher's ViT alone, for the evaluations), log.jsonl (losses and more), run.json (options), results.json and
result.png at the end.  Stopped by SIGTERM, SIGINT or SIGUSR1 it finishes the step, saves and exits with
code 75: start the same command again.  Where the paper is silent or contradicts itself the choice is an
option, marked [D] in its help.

Shapes: B images per rank, V = 2 global views, L local crops, N patches, P patch size, S pixels of a side,
C width of the contrastive space."""
import argparse
import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import distributed
from data import Views, open_images, open_val, seed_of, to_device, train_loader
from distributed import say, unwrap
from losses import global_contrast, mean_cosines, patch_contrast, reconstruction
from masking import GMML, Augmentation, MultiCrop, colour, gmml, mask_to_patches
from model import ALIASES, MMC, cosine_schedule, ema_update, momentum_teacher, patchify, vit
from monitor import Monitor

PAPER_EPOCHS = {"vit_b": 400}                  # ViT-B on ImageNet-1K; ViT-S on ImageNet-100: 500
TOY = dict(data="toy", arch="vit_micro", patch_size=8, global_crops_size=48, global_crops_scale=[0.3, 1.0],
           local_crops_number=0, jitter=[0.0, 0.0, 0.0, 0.0], grey=0.6, blur=[0.5, 0.1, 0.5],
           blur_sigma=[0.1, 0.5], solarize=[0.0, 0.0, 0.0], drop_align=1, head_hidden_dim=256,
           head_out_dim=128, drop_path=0.0, batch_size=64, epochs=6, warmup_epochs=1, lr=4e-3,
           momentum_teacher=0.8, w_cls=0.3, num_workers=0)
HARMLESS = {"output_dir", "epochs", "num_workers", "log_every", "knn_every", "save_every", "keep", "max_bad",
            "device", "data_root", "download", "val_data", "compile", "checkpointing", "force"}


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay for matrices, none for biases and norms (whatever has one dimension)."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0}]


def view_by_view(crops: Tensor) -> Tensor:
    """(B, V, ...) -> (V*B, ...)."""
    return crops.transpose(0, 1).flatten(0, 1)


def corrupted_views(batch: dict, args, device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Colour and corrupt a batch: clean and corrupted views (V*B, 3, S, S), mask (V*B, S, S), local crops or
    None.  Each view is corrupted by itself, so that alien pixels never come from the same image."""
    draw = batch["colour"]
    clean = colour(view_by_view(to_device(batch["global"], device)), view_by_view(draw[:, :2]))
    mask = to_device(batch["mask"], device)
    views = [gmml(x, mask[:, v], batch["kind"][:, v]) for v, x in enumerate(clean.chunk(2))]
    local = None
    if args.local_crops_number and args.w_cls:
        local = colour(view_by_view(to_device(batch["local"], device)), view_by_view(draw[:, 2:]))
    return clean, torch.cat(views), view_by_view(mask), local


def tokens_to_read(mask: Tensor, args, device) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
    """Which of the V*B*N patches the heads run on: those with a corrupted pixel for Eq. (1); the anchors of
    Eq. (2) per view, numbered within the view, and joined (None: all patches).  mask: (V*B, S, S) on the
    CPU, or the device would have to wait for the numbers."""
    def indices(chosen: Tensor) -> Tensor:
        return to_device(chosen.flatten().nonzero()[:, 0], device)
    rec = indices(mask_to_patches(mask, args.patch_size, 0))
    if args.patch_tokens == "all":
        return rec, [None, None], None
    masked = mask_to_patches(mask, args.patch_size)                                           # (V*B, N)
    anchors = [indices(m) for m in masked.chunk(2)]
    return rec, anchors, torch.cat([anchors[0], masked.numel() // 2 + anchors[1]])


def mmc_losses(out: dict, target: dict, clean: Tensor, mask: Tensor, rec: Tensor, anchors: list,
               args) -> tuple[Tensor, dict]:
    """Eq. (4) from the student's outputs and the teacher's; also what is worth logging, as tensors.
    Change a line here to change the method."""
    loss, log, P, B = 0.0, {}, args.patch_size, len(clean) // 2
    if args.w_rec:
        pixels = patchify(clean, P).flatten(0, 1)[rec].unflatten(1, (3, -1))              # (M, 3, PP)
        hidden = patchify(mask[:, None], P).flatten(0, 1)[rec][:, None]                   # (M, 1, PP)
        log["rec"] = reconstruction(out["rec"].unflatten(1, (3, -1)), pixels, hidden)
        loss = loss + args.w_rec * log["rec"]                                             # Eq. (1)
    if args.w_pat:
        k = target["pat"].unflatten(0, (2, B, -1))                                        # (V, B, N, C)
        q = out["pat"].split([k[0, :, :, 0].numel() if a is None else len(a) for a in anchors])
        log["pat"] = sum(patch_contrast(q[v], k[v], args.temp, anchors[v], args.patch_negatives)
                         for v in (0, 1)) / 2
        loss = loss + args.w_pat * log["pat"]                                             # Eq. (2)
        log["pat_pos"], log["pat_neg"] = mean_cosines(q[0], k[0], anchors[0])
    if args.w_cls:
        u = out["cls"].unflatten(0, (-1, B))                                              # (V+L, B, C)
        w = target["cls"].unflatten(0, (2, B))                                            # (V, B, C)
        log["cls"] = global_contrast(u, w, args.temp)
        loss = loss + args.w_cls * log["cls"]                                             # Eq. (3)
        log["cls_pos"], log["cls_neg"] = mean_cosines(u[0], w[1][:, None])
    for name, keys in target.items():                             # 1: spread over the sphere, 0: collapsed
        log[f"{name}_std"] = F.normalize(keys.float(), dim=-1).std(0).mean() * keys.shape[-1] ** 0.5
    return loss, {"loss": loss.detach()} | {k: v.detach() for k, v in log.items()}


def train(student, teacher, optimizer, loader, args, device, step, monitor) -> None:
    """The loop.  `step` counts over the whole run, and everything random is seeded by it or by the image."""
    per_epoch, bare = loader.sampler.steps, unwrap(student)
    steps, stop = args.epochs * per_epoch, distributed.StopSignal()
    lr = cosine_schedule(global_lr(args), args.min_lr, steps, args.warmup_epochs * per_epoch)
    momentum = cosine_schedule(args.momentum_teacher, 1.0, steps)
    bar = tqdm(total=steps, initial=step, disable=not distributed.is_main(), unit="step", mininterval=1,
               dynamic_ncols=True)
    while step < steps:
        epoch = step // per_epoch
        loader.sampler.set_epoch(epoch, step % per_epoch)
        for batch in loader:
            torch.manual_seed(seed_of(args.seed, "drop_path", step, distributed.rank()))
            optimizer.zero_grad(set_to_none=True)
            log = {}
            for i in range(0, len(batch["index"]), args.batch_size):   # --accum batches, each as if alone
                part = {k: v[i:i + args.batch_size] for k, v in batch.items()}
                clean, corrupted, mask, local = corrupted_views(part, args, device)
                rec, anchors, pat = tokens_to_read(view_by_view(part["mask"]), args, device)

                with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16 and device.type == "cuda"):
                    out = student(corrupted, local, rec, pat)
                    with torch.no_grad():
                        target = teacher(clean) if args.w_pat or args.w_cls else {}
                loss, parts = mmc_losses(out, target, clean, mask, rec, anchors, args)
                (loss / args.accum).backward()
                log = {k: log.get(k, 0) + v / args.accum for k, v in parts.items()}
            log["grad_norm"] = nn.utils.clip_grad_norm_(student.parameters(), args.clip_grad or math.inf)
            monitor.check(batch, log, lr[step], step, stop)            # ends all ranks on NaN

            for group in optimizer.param_groups:
                group["lr"] = lr[step]
            optimizer.step()
            ema_update(teacher, bare, momentum[step])

            step += 1
            rates = {"lr": lr[step - 1], "momentum": momentum[step - 1]}
            monitor.log(log, step, per_epoch, rates, bar)
            if monitor.time_to_save(step) or monitor.stopping or step % per_epoch == 0:
                monitor.settle()                                       # nothing is saved unchecked
                save(args, bare, teacher, optimizer, step, per_epoch)
            if monitor.stopping:
                bar.close()
                distributed.fail(f"stopped by a signal after step {step}, saved; start the same command "
                                 "again to go on", distributed.STOPPED, together=True)
        monitor.epoch_end(epoch + 1, teacher.backbone)
    bar.close()
    stop.release()


def global_lr(args) -> float:
    return args.lr * args.batch_size * args.accum * distributed.world_size() / 256


def save(args, student: MMC, teacher: MMC, optimizer, step: int, per_epoch: int) -> None:
    """last.pth: all that a run needs to go on.  backbone.pth: the teacher's ViT with its architecture."""
    if not distributed.is_main():
        return
    out, arch = Path(args.output_dir), teacher.backbone.config
    options = vars(args) | {"world_size": distributed.world_size()}
    checkpoint.save(out / "last.pth", {
        "arch": arch, "step": step, "options": options, "student": student.state_dict(),
        "teacher": teacher.state_dict(), "optimizer": optimizer.state_dict()})
    checkpoint.save(out / "backbone.pth", {
        "arch": arch, "step": step, "backbone": teacher.backbone.state_dict()})
    if args.keep and step % (args.keep * per_epoch) == 0:
        shutil.copyfile(out / "backbone.pth", out / f"backbone_{step // per_epoch:04d}.pth")


def negatives(text: str) -> str | int:
    """Of --patch_negatives."""
    if text in ("others", "position"):
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected others, position, or a number of 1 or more")
    return int(text)


def get_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = distributed.fail

    a = p.add_argument_group("data").add_argument
    a("--data",
      help="folder of images (flat, nested or class folders; DIR/train and DIR/val if there), 'toy', or "
           "cifar10, cifar100, stl10, flowers102, pets, cars, aircraft. Default: the toy world, with small "
           "settings of its own. Paper: ImageNet-100 or -1K, train split")
    a("--val_data",
      help="labelled folder for the k-NN monitor. Default: DIR/val, or the sibling val/ of a folder named "
           "train")
    a("--data_root", default="data", help="where torchvision keeps the named sets (default: data)")
    a("--download", action="store_true", help="let torchvision download the named set")
    a("--num_workers", type=int, default=8,
      help="loader processes per rank (default 8; toy 0). Does not change the run")
    a("--max_bad", type=float, default=0.01,
      help="share of unreadable images above which the run fails (default 0.01); below, each is replaced by "
           "its neighbour and named in bad_images.txt")

    a = p.add_argument_group("network").add_argument
    a("--arch", default="vit_s",
      help="vit_micro, vit_t, vit_s, vit_b (or vit_tiny ...). Paper: vit_s, vit_b (default vit_s; toy "
           "vit_micro)")
    a("--patch_size", type=int, default=16, help="pixels of a patch's side (paper 16; toy 8)")
    a("--drop_path", type=float, default=0.1,
      help="stochastic depth of the student at the last block (lineage 0.1; toy 0)")
    a("--head_hidden_dim", type=int, default=4096, help="width of the three heads (paper 4096; toy 256)")
    a("--head_out_dim", type=int, default=256, help="width of the contrastive space (lineage 256; toy 128)")
    a("--head_norm", default="bn", choices=["bn", "none"],
      help="[D] norm in the contrastive heads; bn is synchronised across ranks on CUDA only")

    a = p.add_argument_group("losses, Eq. (4); a weight of 0 skips that head's work").add_argument
    a("--w_rec", type=float, default=1.0, help="weight of the reconstruction, Eq. (1) (paper 1)")
    a("--w_pat", type=float, default=1.0, help="weight of the patch distillation, Eq. (2) (paper 1)")
    a("--w_cls", type=float, default=1.0,
      help="weight of the global contrast, Eq. (3) (paper 1; MoCo's 2*tau factor is --w_cls 0.4; toy 0.3)")
    a("--temp", type=float, default=0.2, help="temperature of both contrasts (paper 0.2)")
    a("--patch_tokens", default="all", choices=["all", "masked"],
      help="[D] anchors of Eq. (2): all patches (paper), or those at least half corrupted, which is cheaper")
    a("--patch_negatives", type=negatives, default="others", metavar="WHICH",
      help="[D] negatives of Eq. (2): others = all patches of the other images of this rank (paper); "
           "position = those at the same place only; a number = those at so many random places, anew in "
           "each step")
    a("--momentum_teacher", type=float, default=0.996,
      help="EMA at the first step, cosine to 1 at the last (lineage 0.996; toy 0.8: a short run needs a "
           "teacher that moves)")

    a = p.add_argument_group("corruption (GMML), per global view").add_argument
    a("--noise_p", type=float, default=0.5,
      help="probability of noise; else pixels of another image (lineage 0.5)")
    a("--drop_perc", type=float, nargs=2, default=[0.5, 0.75], metavar=("LOW", "HIGH"),
      help="share of the area overwritten by noise (paper: up to 0.75)")
    a("--drop_replace", type=float, default=0.3,
      help="share of the area overwritten by another image (paper 0.30)")
    a("--drop_block", type=float, default=0.3,
      help="largest side of a block, as a share of the image's (lineage 0.3)")
    a("--drop_align", type=int,
      help="[D] pixels to which blocks are aligned (default: the patch size, that is whole patches, which "
           "learned more in the same time on real images, see README; lineage 1; toy 1)")
    a("--even_blocks", default=True, action=argparse.BooleanOptionalAction,
      help="[D] blocks may start outside the image and are clipped, so that they cover it evenly; "
           "--no-even_blocks is the lineage")

    a = p.add_argument_group("augmentation; three numbers: view 1, view 2, local crops").add_argument
    a("--global_crops_size", type=int, default=224, help="pixels of a global view's side (paper 224; toy 48)")
    a("--global_crops_scale", type=float, nargs=2, metavar=("LOW", "HIGH"),
      help="area of a global crop (lineage 0.25 1 with local crops, 0.2 1 without)")
    a("--local_crops_number", type=int, default=10,
      help="local crops per image; 0 switches them off (paper 10; toy 0)")
    a("--local_crops_size", type=int, default=96, help="pixels of a local crop's side (paper 96)")
    a("--local_crops_scale", type=float, nargs=2, default=[0.05, 0.25], metavar=("LOW", "HIGH"),
      help="area of a local crop (lineage 0.05 0.25)")
    a("--flip", type=float, default=0.5, help="probability of a mirrored crop (lineage 0.5)")
    a("--jitter", type=float, nargs=4, default=[0.4, 0.4, 0.4, 0.0], metavar=("B", "C", "S", "H"),
      help="strength of brightness, contrast, saturation, hue (paper 0.4 0.4, lineage 0.4 0; toy 0), "
           "applied with probability 0.8")
    a("--grey", type=float, default=0.2, help="probability of a grey crop (lineage 0.2; toy 0.6)")
    a("--blur", type=float, nargs=3, default=[1.0, 0.1, 0.5], metavar="P",
      help="probability of blur (paper 1, lineage 0.1 0.5)")
    a("--blur_sigma", type=float, nargs=2, default=[0.1, 2.0], metavar=("LOW", "HIGH"),
      help="its sigma in pixels (lineage 0.1 2; toy 0.1 0.5)")
    a("--solarize", type=float, nargs=3, default=[0.0, 0.2, 0.0], metavar="P",
      help="probability of solarisation (paper: view 2 0.2; toy 0)")

    a = p.add_argument_group("optimisation").add_argument
    a("--batch_size", type=int, default=48,
      help="images per rank (paper 48; toy 64); more are more negatives, fewer than 2 are none")
    a("--epochs", type=int,
      help="passes over the data (paper: vit_s 500 on ImageNet-100, vit_b 400 on ImageNet-1K; toy 6)")
    a("--warmup_epochs", type=int, default=10, help="linear warm-up (lineage 10; toy 1)")
    a("--lr", type=float, default=0.0005,
      help="learning rate per 256 images of global batch (lineage 5e-4; toy 4e-3)")
    a("--min_lr", type=float, default=1e-06, help="learning rate at the last step (lineage 1e-6)")
    a("--weight_decay", type=float, default=0.04,
      help="AdamW's decay of matrices, not of biases and norms (paper 0.04)")
    a("--accum", type=int, default=1,
      help="batches per step, one after another: multiplies the global batch and the learning rate, not the "
           "negatives, which are those of one batch, as are the statistics of BatchNorm")
    a("--clip_grad", type=float, default=3.0, help="largest gradient norm, 0 for none (lineage 3.0)")
    a("--bf16", default=True, action=argparse.BooleanOptionalAction,
      help="bfloat16 in the networks on CUDA; losses and parameters stay float32")
    a("--compile", action="store_true",
      help="torch.compile the ViTs: for CUDA; on CPU it does not pay")
    a("--checkpointing", action="store_true",
      help="compute the activations of a block again in backward: less memory, more time, same result")
    a("--seed", type=int, default=0, help="of weights, order, crops and masks")
    a("--device", default="auto", help="auto, cuda, mps or cpu")

    a = p.add_argument_group("run").add_argument
    a("--output_dir", default="out",
      help="folder of this run; an interrupted run in it goes on (default: out)")
    a("--force", action="store_true",
      help="go on although options differ from those that the run was started with")
    a("--save_every", default="15m",
      help="besides each epoch: steps (500) or minutes (15m) between saves of last.pth")
    a("--keep", type=int, default=0,
      help="epochs between backbones that are kept, as backbone_EPOCH.pth; 0 keeps none")
    a("--log_every", type=int, default=10, help="steps between lines of log.jsonl")
    a("--knn_every", type=int,
      help="epochs between k-NN evaluations of the teacher, 0: only before and after (default: 10; toy 2)")
    return p


def get_args(argv=None) -> argparse.Namespace:
    """Parse and complete the options.  Raises ValueError for combinations that cannot train."""
    p = get_parser()
    if p.parse_args(argv).data in (None, "toy"):
        p.set_defaults(**TOY, knn_every=2)
    args = p.parse_args(argv)
    args.arch = ALIASES.get(args.arch, args.arch)
    if args.patch_size < 1:
        raise ValueError(f"--patch_size {args.patch_size}: expected 1 or more")
    args.epochs = PAPER_EPOCHS.get(args.arch, 500) if args.epochs is None else args.epochs
    args.knn_every = 10 if args.knn_every is None else args.knn_every
    args.drop_align = args.patch_size if args.drop_align is None else args.drop_align
    if args.global_crops_scale is None:
        args.global_crops_scale = [0.25, 1.0] if args.local_crops_number else [0.2, 1.0]
    for name in ("global", "local")[:1 + (args.local_crops_number > 0)]:
        size = getattr(args, f"{name}_crops_size")
        if size % args.patch_size:
            near = size // args.patch_size * args.patch_size or args.patch_size
            raise ValueError(f"--{name}_crops_size {size} is not a multiple of --patch_size "
                             f"{args.patch_size}: try {near}")
    if args.batch_size < 2:
        raise ValueError(f"--batch_size {args.batch_size}: the contrasts need negatives, so at least 2 "
                         "images per rank")
    if args.drop_align < 1 or args.global_crops_size % args.drop_align:
        raise ValueError(f"--drop_align {args.drop_align} does not divide --global_crops_size "
                         f"{args.global_crops_size}")
    if not 0 < args.drop_block <= 1:
        raise ValueError(f"--drop_block {args.drop_block}: expected a share of the side above 0, at most 1")
    if not (args.w_rec or args.w_pat or args.w_cls) or min(args.w_rec, args.w_pat, args.w_cls) < 0:
        raise ValueError("--w_rec, --w_pat, --w_cls: expected no negative weight and at least one above 0")
    if min(args.epochs, args.accum, args.log_every) < 1:
        raise ValueError(f"--epochs {args.epochs}, --accum {args.accum}, --log_every {args.log_every}: "
                         "expected 1 or more")
    return args


def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    if args.data is None or args.data == "toy":
        say("toy run: the generated world with its own small settings; --data DIR trains on your images with "
            "the paper's")
    images = open_images(args.data, "train", args.data_root, args.download, seed=args.seed)
    val = open_val(args, seed=args.seed)
    augmentation = Augmentation(
        args.global_crops_size, args.global_crops_scale, args.local_crops_number, args.local_crops_size,
        args.local_crops_scale, args.flip, args.jitter, 0.8, args.grey, args.blur, args.blur_sigma,
        args.solarize)
    corruption = GMML(args.noise_p, args.drop_perc, args.drop_replace, args.drop_block, args.drop_align,
                      args.even_blocks)
    loader = train_loader(Views(images, MultiCrop(augmentation, corruption), args.seed),
                          args.batch_size * args.accum, args.num_workers, device.type == "cuda")
    torch.manual_seed(args.seed)
    backbone = vit(args.arch, args.global_crops_size, args.patch_size, drop_path=args.drop_path)
    student = MMC(backbone, args.w_rec > 0, args.w_pat > 0, args.w_cls > 0, args.head_hidden_dim,
                  args.head_out_dim, args.head_norm == "bn")
    if device.type == "cuda":
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    student = student.to(device)
    teacher = momentum_teacher(student)
    student.backbone.checkpointing = args.checkpointing
    if args.compile:
        student.backbone.compile()
        teacher.backbone.compile()
    optimizer = torch.optim.AdamW(param_groups(student, args.weight_decay), lr=args.lr, betas=(0.9, 0.999),
                                  fused=device.type != "mps")

    monitor = Monitor(args, images, val, device)
    last = checkpoint.open_run(args, HARMLESS)
    if last is not None:
        student.load_state_dict(last["student"])
        teacher.load_state_dict(last["teacher"])
        optimizer.load_state_dict(last["optimizer"])
        say(f"going on from {args.output_dir}/last.pth, step {last['step']}")
    else:
        monitor.untrained(teacher.backbone)
    accum = f" x {args.accum}" if args.accum > 1 else ""
    say(f"{len(images)} images, {args.arch}/{args.patch_size} at {args.global_crops_size} px, {args.epochs} "
        f"epochs of {loader.sampler.steps} steps; {distributed.world_size()} x {args.batch_size}{accum} "
        f"images on {device.type}, so lr {global_lr(args):.2e}; [D] anchors {args.patch_tokens}, negatives "
        f"{args.patch_negatives} on this rank, head norm {args.head_norm}, drop_align {args.drop_align}")
    if distributed.world_size() > 1:
        student = DistributedDataParallel(student, [device] if device.type == "cuda" else None)
    train(student, teacher, optimizer, loader, args, device, last["step"] if last else 0, monitor)
    monitor.finish(unwrap(student), teacher)


if __name__ == "__main__":
    distributed.run(lambda: main(get_args()))
