"""What each part costs, against its plain form, on this machine.

    python -m studies.bench                                                     # CPU: some minutes
    python -m studies.bench --only step --arch vit_s --local 8 --batch_size 8
    python -m studies.bench --only davis --threads 2 --json bench.jsonl

The machine's peak is measured first: a plain matrix product in float32 and in bf16.  Then, in turns:
step: images/s of a whole training step, the share of each part and of the peak.  infonce, davis, knn: our
form against the plain one, after their results were compared.  loader: a JPEG to crops in one process,
against torchvision's transforms.  forward: ViT-B at 480 px against timm, if it is installed.

Shapes: B images, N patches, D width, C width of the contrastive space."""
import ctypes
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

import pretrain
import run
import training
from data import generator_of
from images import IMAGENET_MEAN, IMAGENET_STD, read_image
from losses import patch_contrast
from model import ARCHS, ema_update, vit
from run import at_least


def clock(device: torch.device) -> float:
    """Seconds, once the device has done all that it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def interleaved(forms: dict, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each form in turns, after one call of each that does not count."""
    seconds = {name: [] for name in forms}
    for round_ in range(rounds + 1):
        for name, form in forms.items():
            start = clock(device)
            form()
            if round_:
                seconds[name].append(clock(device) - start)
    return seconds


def peak_mib(form, device: torch.device) -> float:
    """Memory in MiB that a call needs above what was there before it: torch's own count on CUDA, resident
    memory on Linux, NaN elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        form()
        return (torch.cuda.max_memory_allocated(device) - before) / 2 ** 20
    status = Path("/proc/self/status")
    reset = Path("/proc/self/clear_refs")
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


def compare(title: str, forms: dict, args, device: torch.device) -> dict:
    """Median, least and most ms of each form, how many times faster than the first, and peak memory."""
    memory = {name: peak_mib(form, device) for name, form in forms.items()}
    seconds = interleaved(forms, args.rounds, device)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(medians.values()))
    print(title)
    for name, values in seconds.items():
        low, high = 1e3 * min(values), 1e3 * max(values)
        times = f"{1e3 * medians[name]:9.1f} ms  ({low:.1f} to {high:.1f})  {first / medians[name]:5.2f}x"
        print(f"  {name:32} {times}  {memory[name]:7.0f} MiB", flush=True)
    return {name: {"ms": round(1e3 * medians[name], 2), "mib": round(memory[name], 1)} for name in forms}


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of an n x n product of random numbers, the best of 10."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / min(interleaved({"": lambda: a @ b}, 10, device)[""])


# ------------------------------------------------- a training step
class Step:
    """A training step of pretrain.py on one batch that stays in memory.

    options: those of pretrain.py, such as ["--arch", "vit_s"]."""

    def __init__(self, options: list[str], device: torch.device):
        self.device = device
        self.args = pretrain.get_args(["--data", "bench", "--epochs", "1", "--warmup_epochs", "0", *options])
        self.student, self.teacher = pretrain.networks(self.args, device)
        groups = pretrain.param_groups(self.student, self.args.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=device.type != "mps")
        image = torch.randint(0, 256, (3, 375, 500), dtype=torch.uint8)
        crops = pretrain.crops(self.args)
        self.batch = default_collate([crops(image, generator_of(i)) for i in range(self.args.batch_size)])
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, timed: bool = False) -> float:
        """Do it; the loss.  timed: note the seconds of each part, which makes the device wait after each."""
        def part(name: str, form):
            if not timed:
                return form()
            start = clock(self.device)
            result = form()
            self.seconds.setdefault(name, []).append(clock(self.device) - start)
            return result

        args, student, teacher = self.args, self.student, self.teacher
        inputs = part("augmentation", lambda: pretrain.prepare(self.batch, args, self.device))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            out = part("student forward", lambda: student(
                inputs.corrupted, inputs.local, inputs.rec_index, inputs.pat_index))
            with torch.no_grad():
                target = part("teacher forward", lambda: teacher(inputs.clean))
        losses = part("losses", lambda: pretrain.mmc_losses(out, target, inputs, args))
        loss = sum(losses.values())
        part("backward", loss.backward)
        part("clip, AdamW", self.update)
        part("EMA", lambda: ema_update(teacher, student, 0.996))
        return loss.detach()

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.student.parameters(), 3.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def flop(self) -> int:
        with FlopCounterMode(display=False) as counter:
            self()
        return counter.get_total_flops()

    def shares(self) -> dict[str, float]:
        """What part of the time each part takes."""
        for _ in range(3):
            self(timed=True)
        parts = {name: statistics.median(values) for name, values in self.seconds.items()}
        total = sum(parts.values())
        return {name: round(seconds / total, 3) for name, seconds in parts.items()}


def bench_step(args, device: torch.device, peaks: dict) -> dict:
    options = (f"--arch {args.arch} --local_crops_number {args.local} --batch_size {args.batch_size} "
               f"--precision {args.precision} --patch_tokens {args.patch_tokens}")
    step = Step(options.split(), device)
    B = args.batch_size
    seconds = statistics.median(interleaved({"": step}, args.rounds, device)[""])
    flop = step.flop()
    found = {
        "images_per_s": round(B / seconds, 3),
        "gflop": round(flop / B / 1e9, 1),
        "mib": round(peak_mib(step, device) / B, 1),
        "parts": step.shares(),
        "share_of_peak": round(flop / seconds / peaks[args.precision], 3),
    }
    print(f"training step, {options}\n  {found['images_per_s']:.2f} images/s, {found['gflop']:.0f} GFLOP an "
          f"image, {100 * found['share_of_peak']:.0f} % of the peak, {found['mib']:.0f} MiB an image")
    print("  " + "  ".join(f"{name} {100 * v:.0f} %" for name, v in found["parts"].items()), flush=True)
    return found


# ------------------------------------------------- parts against their plain forms
def bench_infonce(args, device: torch.device, _peaks) -> dict:
    from tests.plain_forms import plain_patch_contrast
    g = torch.Generator().manual_seed(0)
    B, N, C = 2 * args.batch_size, 196, 256
    q = torch.randn(B, N, C, generator=g).to(device)
    k = torch.randn(B, N, C, generator=g).to(device)

    def gradient_of(form) -> tuple[float, Tensor]:
        x = q.clone().requires_grad_()
        loss = form(x)
        loss.backward()
        return loss.item(), x.grad

    forms = {
        "plain": lambda: gradient_of(lambda x: plain_patch_contrast(x.flatten(0, 1), k, 0.2)),
        "ours": lambda: gradient_of(lambda x: patch_contrast(x.flatten(0, 1), k, 0.2)),
    }
    plain, plain_gradient = forms["plain"]()
    ours, gradient = forms["ours"]()
    assert abs(plain - ours) < 1e-4 and (plain_gradient - gradient).abs().max() < 1e-6
    return compare(f"patch InfoNCE, B {B}, N {N}, C {C}, forward and backward", forms, args, device)


def bench_davis(args, device: torch.device, _peaks) -> dict:
    import davis
    from tests.plain_forms import plain_propagation
    g = torch.Generator().manual_seed(0)
    query = F.normalize(torch.randn(52, 30, 384, generator=g), dim=-1).to(device)
    keys = F.normalize(torch.randn(8, 52, 30, 384, generator=g), dim=-1).to(device)
    labels = torch.rand(8, 52, 30, 3, generator=g).to(device)
    forms = {
        "plain": lambda: plain_propagation(query, keys, labels),
        "ours": lambda: davis.propagate(query, keys, labels),
    }
    assert (forms["plain"]() - forms["ours"]()).abs().max() < 1e-5
    return compare("DAVIS propagation of a 480p frame, 8 context frames, D 384", forms, args, device)


def bench_knn(args, device: torch.device, _peaks) -> dict:
    from knn import knn_predict
    from tests.plain_forms import plain_knn
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(1000, (50_000,), generator=g).to(device)
    train = F.normalize(torch.randn(50_000, 384, generator=g), dim=1).to(device)
    test = F.normalize(torch.randn(1_000, 384, generator=g), dim=1).to(device)
    forms = {
        "plain": lambda: plain_knn(train, labels, test, 20),
        "ours": lambda: knn_predict(train, labels, test, [20])[0],
    }
    assert torch.equal(forms["plain"](), forms["ours"]())
    return compare("k-NN, 50,000 train, 1,000 test, D 384, k 20", forms, args, device)


def torchvision_crop(size: int, scale: tuple[float, float]):
    """A crop of the recipe by torchvision's transforms (v2), on tensors."""
    from torchvision.transforms import v2
    bicubic = v2.InterpolationMode.BICUBIC
    crop = v2.RandomResizedCrop(size, scale, interpolation=bicubic, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])


def dino_crop(size: int, scale: tuple[float, float], blur: float, solarize: float):
    """A crop of DINO's recipe by torchvision's first transforms, on Pillow images, with colour."""
    from torchvision import transforms as T
    return T.Compose([
        T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC),
        T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4)], 0.8),
        T.RandomGrayscale(0.2),
        T.RandomApply([T.GaussianBlur(13, (0.1, 2.0))], blur),
        T.RandomSolarize(128, solarize),
        T.ToTensor(),
        T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ])


def bench_loader(args, device: torch.device, _peaks) -> dict:
    """What a worker does; where colour is the device's, its share on this one is the last line."""
    options = pretrain.get_args(["--data", "x", "--local_crops_number", "8"])
    crops = pretrain.crops(options)
    count = itertools.count()
    v2 = [torchvision_crop(224, (0.25, 1))] * 2 + [torchvision_crop(96, (0.05, 0.25))] * 8
    dino = [dino_crop(224, (0.25, 1), 1.0, 0.0), dino_crop(224, (0.25, 1), 0.1, 0.2)]
    dino += [dino_crop(96, (0.05, 0.25), 0.5, 0.0)] * 8
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jpg"
        Image.fromarray(noise).resize((500, 375)).save(path, quality=90)

        def ours() -> dict:
            return crops(read_image(path), generator_of(next(count)))

        def with_colour():
            return pretrain.prepare(default_collate([ours(), ours()]), options, device)

        def pillow():
            image = Image.open(path).convert("RGB")
            return [crop(image) for crop in dino]

        def torchvision_v2():
            image = read_image(path)
            return [crop(image) for crop in v2]

        forms = {
            "torchvision v2: crops": torchvision_v2,
            "ours: crops and masks": ours,
            "Pillow: crops and colour (DINO)": pillow,
            "ours: all, two images": with_colour,
        }
        args.rounds *= 5
        return compare("loader, a JPEG of 500 x 375 to 2 x 224 + 8 x 96", forms, args, device)


def bench_forward(args, device: torch.device, _peaks) -> dict:
    ours = vit("vit_b", 480, 16).eval().to(device)
    x = torch.randn(1, 3, 480, 480, device=device)

    def in_bf16():
        ours.bf16 = True
        ours(x)
        ours.bf16 = False

    forms = {"ours": lambda: ours(x), "ours, bf16": in_bf16}
    try:
        import timm
        theirs = timm.create_model("vit_base_patch16_224", img_size=480, num_classes=0).eval().to(device)
        forms = {"timm": lambda: theirs.forward_features(x)} | forms
    except ImportError:
        print("timm is not installed: ours alone")
    with torch.no_grad():
        return compare("ViT-B/16 forward, one image of 480 px", forms, args, device)


PARTS = {
    "step": bench_step,
    "infonce": bench_infonce,
    "davis": bench_davis,
    "knn": bench_knn,
    "loader": bench_loader,
    "forward": bench_forward,
}


def get_args(argv=None):
    p = run.Parser(description=__doc__)
    a = p.add_argument
    a("--only", nargs="+", choices=list(PARTS), help="these parts (default: all)")
    a("--arch", default="vit_s", help=f"{', '.join(ARCHS)} (default: %(default)s)")
    a("--patch_tokens", default="all", choices=["all", "masked"], help="anchors of Eq. (2)")
    a("--local", type=at_least(0), default=0, help="local crops of 96 pixels")
    a("--rounds", type=at_least(1), default=5, help="timed calls of each form")
    a("--threads", type=at_least(1), help="CPU threads (default: torch's own)")
    run.add_shared(p, "batch_size precision device json", batch_size=4)
    return p.parse_args(argv)


def main(args) -> None:
    run.check_outputs(args, "json")
    device = run.begin(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    peaks = {"fp32": matmul_peak(device, torch.float32), "bf16": matmul_peak(device, torch.bfloat16)}
    print(f"torch {torch.__version__}, {device.type}, {torch.get_num_threads()} threads; peak "
          + ", ".join(f"{name} {v / 1e9:.0f} GFLOP/s" for name, v in peaks.items()), flush=True)
    found = {name: PARTS[name](args, device, peaks) for name in args.only or PARTS}
    run.append_json(args.json, {
        "eval": "bench", "torch": torch.__version__, "device": device.type, "commit": run.commit(),
        "threads": torch.get_num_threads(), "peaks": peaks, "options": training.options_of(args), **found})


if __name__ == "__main__":
    run.script(main, get_args)
