"""How fast is this machine, and what does each part cost?  All sides interleaved in one run, medians.

    python bench.py                                                    # CPU: a few minutes
    python bench.py --arch vit_s --crops 224 --local 8 --batch_size 8 --only step
    python bench.py --only davis --threads 2 --json bench.jsonl

step: images/s of a whole training step, the share of each part, and of the measured matmul peak.  infonce,
davis, knn: our form against the plain one, results compared first.  loader: a JPEG to crops in one
process.  forward: 480 px against timm, if it is installed.

Shapes: B images, N patches, D width, C width of the contrastive space."""
import argparse
import ctypes
import itertools
import random
import statistics
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms as T

import davis
import distributed
import probes
from data import IMAGENET_MEAN, IMAGENET_STD, generator_of, read_image
from losses import patch_contrast
from masking import GMML, Augmentation, MultiCrop, colour
from model import MMC, ema_update, momentum_teacher, vit
from pretrain import corrupted_views, mmc_losses, param_groups, tokens_to_read, view_by_view


def interleaved(forms: dict, rounds: int, device=None) -> dict[str, list[float]]:
    """Seconds of each form in turns, after one call of each that does not count."""
    seconds = {name: [] for name in forms}
    for r in range(rounds + 1):
        for name, form in forms.items():
            start = davis.clock(device or torch.device("cpu"))
            form()
            if r:
                seconds[name].append(davis.clock(device or torch.device("cpu")) - start)
    return seconds


def peak_mib(form, device: torch.device) -> float:
    """Memory in MiB that a call needs above what was there before it: torch's own count on CUDA, resident
    memory on Linux, NaN elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        form()
        return (torch.cuda.max_memory_allocated(device) - before) / 2 ** 20
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return float("nan")

    def kib(field: str) -> int:
        return int(status.read_text().split(field)[1].split()[0])
    if hasattr(ctypes.CDLL(None), "malloc_trim"):                      # freed pages would be used unseen
        ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")                                              # the high-water mark starts anew
    before = kib("VmRSS:")
    form()
    return (kib("VmHWM:") - before) / 2 ** 10


def compare(title: str, forms: dict, rounds: int, device: torch.device) -> dict[str, float]:
    """Median, least and most ms of each form, how many times faster than the first, and peak memory."""
    memory = {k: peak_mib(form, device) for k, form in forms.items()}
    seconds = interleaved(forms, rounds, device)
    medians = {k: statistics.median(v) for k, v in seconds.items()}
    first = next(iter(medians.values()))
    print(title)
    for k, v in seconds.items():
        print(f"  {k:32} {1e3 * medians[k]:9.1f} ms  ({1e3 * min(v):.1f} to {1e3 * max(v):.1f})  "
              f"{first / medians[k]:5.2f}x  {memory[k]:7.0f} MiB")
    return {k: {"ms": round(1e3 * m, 2), "mib": round(memory[k], 1)} for k, m in medians.items()}


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a 2048 x 2048 product, the best of 10."""
    a, b = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in range(2))
    return 2 * 2048 ** 3 / min(interleaved({"": lambda: a @ b}, 10, device)[""])


# ------------------------------------------------- plain forms
def plain_infonce(q: Tensor, k: Tensor, tau: float) -> Tensor:
    """Eq. (2) with its whole (B*N) x (B*N) matrix.  q, k: (B, N, C)."""
    B, N, C = q.shape
    q, k = F.normalize(q.reshape(B * N, C), dim=-1), F.normalize(k.reshape(B * N, C), dim=-1)
    logits, image = q @ k.T / tau, torch.arange(B * N) // N
    own = (image[:, None] == image) & ~torch.eye(B * N, dtype=torch.bool)
    return F.cross_entropy(logits.masked_fill(own, -torch.inf), torch.arange(B * N))


def plain_davis(query: Tensor, keys: Tensor, labels: Tensor, radius: int = 12, topk: int = 5) -> Tensor:
    """Propagation with one dense affinity, (sources, targets) as the equation reads."""
    (n, h, w, D), place = keys.shape, torch.stack(torch.meshgrid(
        torch.arange(keys.shape[1]), torch.arange(keys.shape[2]), indexing="ij"), -1).view(-1, 2)
    near = ((place[:, None] - place).abs() <= radius).all(-1).repeat(n, 1)
    a = (keys.view(-1, D) @ query.view(-1, D).T / 0.1).exp() * near
    a[a < a.topk(topk, dim=0)[0][-1]] = 0
    return ((a / a.sum(0)).T @ labels.flatten(0, 2)).view(h, w, -1)


def plain_knn(train: Tensor, labels: Tensor, test: Tensor, k: int = 20) -> Tensor:
    """All similarities of a chunk, top-k, one-hot votes: a hundred chunks for 10,000 images."""
    out = []
    for q in test.split(100):
        s, i = (q @ train.T).topk(k, 1)
        out.append((F.one_hot(labels[i], 1000) * (s / 0.07).exp()[..., None]).sum(1).argmax(1))
    return torch.cat(out)


# ------------------------------------------------- what is timed
def bench_infonce(args, device) -> dict:
    g, (B, N, C) = torch.Generator().manual_seed(0), (args.batch_size * 2, 196, 256)
    q, k = (torch.randn(B, N, C, generator=g) for _ in range(2))

    def run(form):
        x = q.clone().requires_grad_()
        loss = form(x)
        loss.backward()
        return loss.item(), x.grad
    forms = {"plain": lambda: run(lambda x: plain_infonce(x, k, 0.2)),
             "ours": lambda: run(lambda x: patch_contrast(x.flatten(0, 1), k, 0.2, None, "others"))}
    (a, ga), (b, gb) = (f() for f in forms.values())
    assert abs(a - b) < 1e-4 and (ga - gb).abs().max() < 1e-6
    return compare(f"patch InfoNCE, B {B}, N {N}, C {C}, forward and backward", forms, args.rounds, device)


def bench_davis(args, device) -> dict:
    g = torch.Generator().manual_seed(0)
    query, keys = (F.normalize(torch.randn(*n, 52, 30, 384, generator=g), dim=-1) for n in ((), (8,)))
    labels = torch.rand(8, 52, 30, 3, generator=g)
    forms = {"plain": lambda: plain_davis(query, keys, labels),
             "ours": lambda: davis.propagate(query, keys, labels)}
    a, b = (f() for f in forms.values())
    assert (a - b).abs().max() < 1e-6 and torch.equal(a.argmax(-1), b.argmax(-1))
    return compare("DAVIS propagation of a 480p frame, 8 context frames, D 384", forms, args.rounds, device)


def bench_knn(args, device) -> dict:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(1000, (50_000,), generator=g)
    train, test = (F.normalize(torch.randn(n, 384, generator=g), dim=1) for n in (50_000, 1_000))
    forms = {"plain": lambda: plain_knn(train, labels, test),
             "ours": lambda: probes.knn_predict(train, labels, test, [20])[0]}
    a, b = (f() for f in forms.values())
    assert torch.equal(a, b)
    return compare("k-NN, 50,000 train, 1,000 test, D 384, k 20", forms, args.rounds, device)


def pil_chain(size: int, scale: tuple[float, float], blur: float, solarize: float) -> T.Compose:
    """One crop of the recipe by torchvision's first transforms, on Pillow images."""
    def smooth(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
    return T.Compose([
        T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC), T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4)], 0.8), T.RandomGrayscale(0.2),
        T.RandomApply([smooth], blur), T.RandomSolarize(128, solarize), T.ToTensor(),
        T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def bench_loader(args, device) -> dict:
    """What a worker does; where colour is the device's, its share on this one is the last line."""
    crops, count = MultiCrop(Augmentation(224, local_number=8), GMML()), itertools.count()
    chain = ([pil_chain(224, (0.25, 1), 1.0, 0.0), pil_chain(224, (0.25, 1), 0.1, 0.2)]
             + 8 * [pil_chain(96, (0.05, 0.25), 0.5, 0.0)])
    plain = [T.Compose(c.transforms[:2]) for c in chain]
    with tempfile.TemporaryDirectory() as d:
        path = Path(args.image or Path(d) / "a.jpg")
        if not args.image:
            noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((500, 375)).save(path, quality=90)

        def pillow(transforms):
            image = Image.open(path).convert("RGB")
            return [t(image) for t in transforms]

        def ours():
            return crops(read_image(path), generator_of(next(count)))

        def whole():
            x = ours()
            return [colour(x["global"].to(device), x["colour"][:2]),
                    colour(x["local"].to(device), x["colour"][2:])]
        forms = {"Pillow, crops and colour": lambda: pillow(chain), "Pillow, crops": lambda: pillow(plain),
                 "ours: crops and masks": ours, "ours, and colour": whole}
        return compare(f"loader, {path.name} to 2 x 224 + 8 x 96", forms, 5 * args.rounds, device)


def bench_forward(args, device) -> dict:
    ours, x = vit("vit_b", 480, 16).eval().to(device), torch.randn(1, 3, 480, 480, device=device)
    forms = {}
    try:
        import timm
        theirs = timm.create_model("vit_base_patch16_224", img_size=480, num_classes=0).eval().to(device)
        forms["timm"] = lambda: theirs.forward_features(x)
    except ImportError:
        print("timm is not installed: ours alone")
    forms["ours"] = lambda: ours(x)
    with torch.no_grad():
        return compare("ViT-B/16 forward, one image of 480 px", forms, args.rounds, device)


def bench_step(args, device) -> dict:
    """A whole step, and its parts one by one."""
    a = SimpleNamespace(patch_size=16, patch_tokens=args.patch_tokens, patch_negatives="others", temp=0.2,
                        w_rec=1.0, w_pat=1.0, w_cls=1.0, local_crops_number=args.local)
    crop = MultiCrop(Augmentation(args.crops, local_number=args.local), GMML(align=args.drop_align))
    image = torch.randint(0, 256, (3, 375, 500), dtype=torch.uint8)
    items = [crop(image, generator_of(i)) for i in range(args.batch_size)]
    batch = {k: torch.stack([x[k] for x in items]) for k in items[0]}
    student = MMC(vit(args.arch, args.crops, 16, drop_path=0.1)).to(device)
    teacher, bf16 = momentum_teacher(student), device.type == "cuda"
    optimizer = torch.optim.AdamW(param_groups(student, 0.04), lr=1e-4, fused=device.type != "mps")
    spent: dict[str, list[float]] = {}

    def part(name, form):
        start = davis.clock(device)
        out = form()
        spent.setdefault(name, []).append(davis.clock(device) - start)
        return out

    def step():
        clean, corrupted, mask, local = part("augmentation", lambda: corrupted_views(batch, a, device))
        rec, anchors, pat = tokens_to_read(view_by_view(batch["mask"]), a, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            out = part("student forward", lambda: student(corrupted, local, rec, pat))
            with torch.no_grad():
                target = part("teacher forward", lambda: teacher(clean))
        loss, _ = part("losses", lambda: mmc_losses(out, target, clean, mask, rec, anchors, a))
        part("backward", loss.backward)
        part("clip, AdamW", lambda: (torch.nn.utils.clip_grad_norm_(student.parameters(), 3.0),
                                     optimizer.step(), optimizer.zero_grad(set_to_none=True)))
        part("EMA", lambda: ema_update(teacher, student, 0.996))
    seconds = interleaved({"step": step}, args.rounds, device)["step"]
    memory = peak_mib(step, device)
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as flops:
        step()
    median, peak = statistics.median(seconds), matmul_peak(device, torch.bfloat16 if bf16 else torch.float32)
    share = flops.get_total_flops() / median / peak
    print(f"training step, {args.arch}/16, batch {args.batch_size}, 2 x {args.crops} + {args.local} x 96, "
          f"anchors {args.patch_tokens}\n  {args.batch_size / median:.2f} images/s ({min(seconds):.2f} to "
          f"{max(seconds):.2f} s a step), {flops.get_total_flops() / args.batch_size / 1e9:.0f} GFLOP per "
          f"image, {100 * share:.0f} % of the measured {peak / 1e9:.0f} GFLOP/s, {memory:.0f} MiB above "
          "weights and AdamW's state")
    parts = {k: statistics.median(v[1:-2]) / median for k, v in spent.items()}
    print("  " + "  ".join(f"{k} {100 * v:.0f} %" for k, v in parts.items()))
    return {"images_per_s": round(args.batch_size / median, 3), "share_of_peak": round(share, 3),
            "mib": round(memory, 1),
            "parts": {k: round(v, 3) for k, v in parts.items()}}


PARTS = {"step": bench_step, "infonce": bench_infonce, "davis": bench_davis, "knn": bench_knn,
         "loader": bench_loader, "forward": bench_forward}


def main(args) -> None:
    distributed.check_outputs(args, "json")
    device = distributed.init(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {device.type}, {torch.get_num_threads()} threads; {args.rounds} calls")
    result = {name: PARTS[name](args, device) for name in args.only or PARTS}
    distributed.append_json(args.json, {"torch": torch.__version__, "device": device.type, **result})


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = distributed.fail
    p.add_argument("--only", nargs="+", choices=list(PARTS), help="these parts (default: all)")
    p.add_argument("--arch", default="vit_s", help="vit_micro, vit_t, vit_s, vit_b")
    p.add_argument("--crops", type=int, default=224, help="pixels of a global crop")
    p.add_argument("--local", type=int, default=0, help="local crops of 96 pixels")
    p.add_argument("--batch_size", type=int, default=4, help="images of a step; twice that for InfoNCE")
    p.add_argument("--patch_tokens", default="all", choices=["all", "masked"], help="anchors of Eq. (2)")
    p.add_argument("--drop_align", type=int, default=16, help="pixels to which corrupted blocks are aligned")
    p.add_argument("--image", help="a JPEG for the loader (default: a generated one of 500 x 375)")
    p.add_argument("--rounds", type=int, default=5, help="timed calls of each form")
    p.add_argument("--threads", type=int, help="CPU threads (default: torch's own)")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--json", help="append the medians to this file, one JSON line")
    distributed.run(lambda: main(p.parse_args()))
