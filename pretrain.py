"""Pretrain a ViT with MMC: masked reconstruction + patch distillation + global contrast (METHOD section 1).

    python pretrain.py                                              # generated toy world, on a laptop's CPU
    python pretrain.py --data /photos --arch vit_s                  # any folder of images, one GPU
    torchrun --nproc_per_node=4 pretrain.py --arch vit_b --data /imagenet/train --output_dir out/vit_b

Writes to --output_dir: last.pth (everything, to go on from), backbone.pth (the teacher's ViT alone, for the evaluations),
log.jsonl (one line per --log_every steps), results.json and result.png at the end.

Shapes: B images per rank, V = 2 global views, L local crops, N patches, P patch size, S pixels of a side, C head width."""
import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import distributed
import probes
import zeroshot
from data import Views, denormalize, normalize, open_images, seed_of, train_loader
from distributed import say
from losses import global_contrast, mean_cosines, patch_contrast, reconstruction
from masking import GMML, Augmentation, MultiCrop, colour, gmml, mask_to_patches
from model import ALIASES, ARCHS, MMC, ema_update, momentum_teacher, patchify, unpatchify, vit

PAPER_EPOCHS = {"vit_b": 400}                  # ViT-B on ImageNet-1K; ViT-S on ImageNet-100: 500
TOY = dict(data="toy", arch="vit_micro", patch_size=8, global_crops_size=48, local_crops_number=0, batch_size=64,
           epochs=10, warmup_epochs=1, lr=4e-3, drop_path=0.0, head_hidden_dim=256, head_out_dim=128,
           global_crops_scale=(0.3, 1.0), jitter=(0.4, 0.4, 0.4, 0.5), num_workers=0, knn_every=0, momentum_teacher=0.99)


def cosine_schedule(base: float, final: float, steps: int, warmup: int = 0) -> list[float]:
    """Value per step: linear from base/warmup to base in `warmup` steps, then half a cosine to final at the last step.
    The first value is never 0; a warm-up as long as the run is only the ramp."""
    ramp = [base * (i + 1) / warmup for i in range(min(warmup, steps))]
    n = steps - len(ramp)
    return ramp + [final + (base - final) * (1 + math.cos(math.pi * i / max(n - 1, 1))) / 2 for i in range(n)]


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay for matrices, none for biases and norms (everything with one dimension)."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0}]


def corrupt(clean: torch.Tensor, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """GMML on each view by itself, so that an alien never is the same image: (V*B, 3, S, S) and mask (V*B, S, S)."""
    views = [gmml(x, batch["blocks"][:, v], batch["kind"][:, v]) for v, x in enumerate(clean.chunk(2))]
    return torch.cat([x for x, _ in views]), torch.cat([m for _, m in views])


def view_by_view(crops: torch.Tensor) -> torch.Tensor:
    """(B, V, ...) -> (V*B, ...)."""
    return crops.transpose(0, 1).flatten(0, 1)


def train_step(student, teacher, batch, args, device) -> tuple[torch.Tensor, dict]:
    """The paper's algorithm up to the loss: Eq. (4), and what is worth logging, as tensors."""
    colours, P, B = batch["colour"], args.patch_size, len(batch["index"])
    clean = colour(view_by_view(batch["global"].to(device, non_blocking=True)), view_by_view(colours[:, :2]))
    corrupted, mask = corrupt(clean, batch)                            # (V*B, 3, S, S), (V*B, S, S)
    local = None
    if args.local_crops_number and args.w_cls:
        local = colour(view_by_view(batch["local"].to(device, non_blocking=True)), view_by_view(colours[:, 2:]))

    rec_tokens = mask_to_patches(mask, P, 0).flatten().nonzero()[:, 0]                        # any corrupted pixel
    anchors = [None, None]
    if args.patch_tokens == "masked":
        anchors = [m.flatten().nonzero()[:, 0] for m in mask_to_patches(mask, P).chunk(2)]
    N = (args.global_crops_size // P) ** 2
    pat_tokens = None if anchors[0] is None else torch.cat([anchors[0], B * N + anchors[1]])

    with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16 and device.type == "cuda"):
        out = student(corrupted, local, rec_tokens, pat_tokens)
        with torch.no_grad():
            target = teacher(clean) if args.w_pat or args.w_cls else {}

    loss, log = torch.zeros((), device=device), {}
    if args.w_rec:
        pixels, hidden = patchify(clean, P)[...], patchify(mask[:, None], P)                  # (V*B, N, 3PP), (V*B, N, PP)
        log["rec"] = reconstruction(out["rec"].unflatten(1, (3, P * P)), pixels.flatten(0, 1)[rec_tokens].unflatten(1, (3, P * P)),
                                    hidden.flatten(0, 1)[rec_tokens][:, None])                # Eq. (1)
        loss = loss + args.w_rec * log["rec"]
    if args.w_pat:
        q, k = out["pat"].split([B * N if a is None else len(a) for a in anchors]), target["pat"].view(2, B, N, -1)
        log["pat"] = sum(patch_contrast(q[v], k[v], args.temp, anchors[v], args.patch_negatives) for v in range(2)) / 2     # Eq. (2)
        loss = loss + args.w_pat * log["pat"]
        log["pat_pos"], log["pat_neg"] = mean_cosines(q[0], k[0], anchors[0])
    if args.w_cls:
        u, w = out["cls"].view(-1, B, args.head_out_dim), target["cls"].view(2, B, -1)
        log["cls"] = global_contrast(u, w, args.temp)                                         # Eq. (3)
        loss = loss + args.w_cls * log["cls"]
        log["cls_pos"], log["cls_neg"] = mean_cosines(u[0], w[1][:, None])
        log["feature_std"] = F.normalize(w[0].float(), dim=-1).std(0).mean() * w.shape[-1] ** 0.5
    return loss, {"loss": loss.detach()} | {k: v.detach() for k, v in log.items()}


def train(student, teacher, optimizer, loader, args, device, evaluate) -> None:
    """The loop.  Steps count from 0 over the whole run; each draws its random numbers from seeds of its own."""
    per_epoch, bare, seen, start = loader.sampler.steps, unwrap(student), 0, time.time()
    steps = args.epochs * per_epoch
    lr = cosine_schedule(args.lr * args.batch_size * distributed.world_size() / 256, args.min_lr, steps, args.warmup_epochs * per_epoch)
    momentum = cosine_schedule(args.momentum_teacher, 1.0, steps)
    bar = tqdm(total=steps, disable=not distributed.is_main(), unit="step", dynamic_ncols=True, mininterval=1)
    step = 0
    for epoch in range(args.epochs):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            torch.manual_seed(seed_of(args.seed, "drop_path", step, distributed.rank()))
            for group in optimizer.param_groups:
                group["lr"] = lr[step]

            loss, log = train_step(student, teacher, batch, args, device)

            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(student.parameters(), args.clip_grad or math.inf)
            optimizer.step()
            ema_update(teacher, bare, momentum[step])

            step, seen = step + 1, seen + args.batch_size * distributed.world_size()
            if step % args.log_every == 0 or step == steps:
                values = {k: round(v, 5) for k, v in zip([*log, "grad_norm"], torch.stack([*log.values(), norm]).tolist(), strict=True)}
                speed = seen / (time.time() - start)
                write_log(args, {"step": step, "epoch": round(step / per_epoch, 3), **values, "lr": lr[step - 1],
                                 "momentum": momentum[step - 1], "images_per_s": round(speed, 1)})
                bar.set_postfix_str(" ".join(f"{k} {values[k]:.3f}" for k in ("rec", "pat", "cls") if k in values) + f" {speed:.0f} images/s")
            bar.update()
        if args.knn_every and (epoch + 1) % args.knn_every == 0 and epoch + 1 < args.epochs:
            evaluate(epoch + 1)
        save(args, bare, teacher, optimizer, step)
    bar.close()


def unwrap(model: nn.Module) -> MMC:
    return model.module if isinstance(model, DistributedDataParallel) else model


def write_log(args, line: dict) -> None:
    if distributed.is_main():
        with open(Path(args.output_dir) / "log.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")


def save(args, student: MMC, teacher: MMC, optimizer, step: int) -> None:
    """last.pth: all that a run needs to go on.  backbone.pth: the teacher's ViT with its architecture."""
    out, arch = Path(args.output_dir), teacher.backbone.config
    checkpoint.save(out / "last.pth", {"arch": arch, "step": step, "args": vars(args), "student": student.state_dict(),
                                       "teacher": teacher.state_dict(), "optimizer": optimizer.state_dict()})
    checkpoint.save(out / "backbone.pth", {"arch": arch, "step": step, "backbone": teacher.backbone.state_dict()})


class Evaluator:
    """k-NN of the teacher (CLS and PAT, k = 10) on val images and, where there are masks, prompt IoU at its best threshold."""

    def __init__(self, args, train_images, val_images, device):
        self.args, self.train, self.val, self.device = args, train_images, val_images, device
        self.masks = hasattr(val_images, "scene")

    def scenes(self, n=200):
        """(uint8 image (3, S, S), masks of the scene's objects of its class together and of every other) of val scenes."""
        for i in range(min(n, len(self.val))):
            s = self.val.scene(i)
            ids, cats = torch.from_numpy(s.instances), torch.tensor(s.categories)
            kinds = torch.where(ids > 0, cats[(ids.long() - 1).clamp(min=0)], -1)
            masks = torch.stack([kinds == c for c in cats.unique()])
            S = self.args.global_crops_size
            image = F.interpolate(self.val.read(i)[None], size=(S, S), mode="bicubic", antialias=True)[0]
            yield image, masks

    def __call__(self, backbone) -> dict[str, float]:
        mode, args = backbone.training, self.args
        backbone.eval()
        out = {}
        if self.val is not None and self.train.labels is not None and self.val.labels is not None:
            knn = probes.knn_of(backbone, self.train, self.val, args.global_crops_size, self.device, [10])
            out |= {"knn_cls": knn["cls"][10], "knn_pat": knn["pat"][10]}
        if self.masks:
            g = args.global_crops_size // args.patch_size
            def tokens(image):
                return zeroshot.patch_features(backbone, normalize(image[None].to(self.device)))[0]
            def colours(image):
                return F.normalize(patchify(normalize(image[None]), args.patch_size)[0].unflatten(1, (3, -1)).mean(-1), dim=-1)
            iou = zeroshot.prompt_iou(tokens, self.scenes(), (g, g))
            raw = zeroshot.prompt_iou(colours, self.scenes(), (g, g))
            out |= {"prompt_iou": 100 * iou.max().item(), "prompt_iou_colours": 100 * raw.max().item()}
        backbone.train(mode)
        return out


def get_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = p.add_argument
    a("--data"); a("--data_root", default="data"); a("--download", action="store_true")
    a("--output_dir", default="out")
    a("--arch", default="vit_s"); a("--patch_size", type=int, default=16); a("--drop_path", type=float, default=0.1)
    a("--head_hidden_dim", type=int, default=4096); a("--head_out_dim", type=int, default=256)
    a("--head_norm", default="bn", choices=["bn", "none"])
    a("--w_rec", type=float, default=1.0); a("--w_cls", type=float, default=1.0); a("--w_pat", type=float, default=1.0)
    a("--temp", type=float, default=0.2)
    a("--patch_tokens", default="all"); a("--patch_negatives", default="others")
    a("--momentum_teacher", type=float, default=0.996)
    a("--drop_perc", type=float, nargs=2, default=(0.5, 0.75)); a("--drop_replace", type=float, default=0.3)
    a("--noise_p", type=float, default=0.5); a("--drop_align", type=int, default=1)
    a("--global_crops_size", type=int, default=224); a("--global_crops_scale", type=float, nargs=2, default=None)
    a("--local_crops_number", type=int, default=10); a("--local_crops_size", type=int, default=96)
    a("--local_crops_scale", type=float, nargs=2, default=(0.05, 0.25))
    a("--jitter", type=float, nargs=4, default=(0.4, 0.4, 0.4, 0.0)); a("--grey", type=float, default=0.2)
    a("--blur", type=float, nargs=3, default=(1.0, 0.1, 0.5)); a("--blur_sigma", type=float, nargs=2, default=(0.1, 2.0))
    a("--solarize", type=float, nargs=3, default=(0, 0.2, 0))
    a("--batch_size", type=int, default=48); a("--epochs", type=int); a("--warmup_epochs", type=int, default=10)
    a("--lr", type=float, default=5e-4); a("--min_lr", type=float, default=1e-6); a("--weight_decay", type=float, default=0.04)
    a("--clip_grad", type=float, default=3.0); a("--seed", type=int, default=0); a("--bf16", default=True, action=argparse.BooleanOptionalAction)
    a("--device", default="auto"); a("--num_workers", type=int, default=4); a("--log_every", type=int, default=10)
    a("--knn_every", type=int, default=10)
    a("--toy_n", type=int, default=4000); a("--threads", type=int, default=0)
    return p


def main() -> None:
    p = get_parser()
    if p.parse_known_args()[0].data in (None, "toy"):
        p.set_defaults(**TOY)
    args = p.parse_args()
    if args.threads: torch.set_num_threads(args.threads)
    args.arch = ALIASES.get(args.arch, args.arch)
    args.epochs = args.epochs or PAPER_EPOCHS.get(args.arch, 500)
    args.global_crops_scale = args.global_crops_scale or ((0.25, 1.0) if args.local_crops_number else (0.2, 1.0))
    device = distributed.init(args.device)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    say(vars(args))
    images = open_images(args.data, "train", args.data_root, args.download, toy_size=64, toy_n=args.toy_n, seed=args.seed)
    val = open_images(args.data, "val", args.data_root, args.download, toy_size=64, toy_n=500, seed=args.seed)
    augmentation = Augmentation(args.global_crops_size, args.global_crops_scale, args.local_crops_number, args.local_crops_size,
                                args.local_crops_scale, 0.5, args.jitter, 0.8, args.grey, args.blur, args.blur_sigma, args.solarize)
    corruption = GMML(args.noise_p, args.drop_perc, args.drop_replace, 0.3, args.drop_align)
    loader = train_loader(Views(images, MultiCrop(augmentation, corruption), args.seed), args.batch_size, args.num_workers, device.type == "cuda")
    torch.manual_seed(args.seed)
    student = MMC(vit(args.arch, args.global_crops_size, args.patch_size, drop_path=args.drop_path), args.w_rec > 0, args.w_pat > 0,
                  args.w_cls > 0, args.head_hidden_dim, args.head_out_dim, args.head_norm == "bn").to(device)
    teacher = momentum_teacher(student)
    if distributed.world_size() > 1:
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student) if device.type == "cuda" else student
        student = DistributedDataParallel(student, [device] if device.type == "cuda" else None)
    optimizer = torch.optim.AdamW(param_groups(student, args.weight_decay), lr=args.lr, betas=(0.9, 0.999), fused=True)
    ev = Evaluator(args, images, val, device)
    def evaluate(epoch):
        r = ev(teacher.backbone)
        say(f"epoch {epoch}: " + " ".join(f"{k} {v:.1f}" for k, v in r.items()))
        write_log(args, {"epoch": epoch, **r})
        return r
    t = time.time()
    evaluate(0)
    say("eval", time.time() - t); t = time.time()
    train(student, teacher, optimizer, loader, args, device, evaluate)
    say("train seconds", time.time() - t)
    evaluate(args.epochs)


if __name__ == "__main__":
    main()
