"""What one GPU settles in a quarter of an hour: the tests that need it, a table of throughput, a pretraining.

    python -m studies.gpu --data imagenette --minutes 12 --out out/gpu
    python -m studies.gpu --data imagenette --minutes 3 --out out/gpu --small          # to try it on a CPU

Writes to --out: gpu.json (everything), table.md, and of the pretraining backbone0.pth (float16), log0.jsonl.
Steps: (a) pytest tests/test_cuda.py; (b) images/s of training steps, beside the share of the peak that a
plain bf16 matmul reaches in the same minute, memory, and what the loader gives with all cores; (c) with the
rest of the time, pretraining at 112 px on --data, with k-NN as it goes.  Each step has its share of the time,
and one that fails costs only itself."""
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import checkpoint
import pretrain
import run
import training
from data import ImageFolder, Views, init_worker
from report import markdown
from run import above, at_least
from studies.bench import Step, clock, matmul_peak

CROPS = {"2x224+10x96": "--local_crops_number 10", "2x224": "--local_crops_number 0"}
RECIPE = ("--arch vit_mini --patch_size 8 --global_crops_size 112 --local_crops_number 4 "
          "--local_crops_size 48 --blur .5 .1 .5 --blur_sigma .1 1.5 --head_hidden_dim 1024 "
          "--batch_size 128 --patch_negatives 49 --lr 2e-3 --warmup_epochs 4 --momentum_teacher 0.98 "
          "--drop_path 0.05")
SMALL = ("--arch vit_micro --patch_size 8 --global_crops_size 48 --local_crops_number 0 "
         "--head_hidden_dim 128 --batch_size 32 --lr 3e-3 --momentum_teacher 0.9 --warmup_epochs 1")


def run_tests(seconds: float) -> dict:
    """(a) The tests that need CUDA: pytest's closing line, and the names of those that failed."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "tests/test_cuda.py"]
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"result": f"stopped after {seconds:.0f} s"}
    lines = done.stdout.strip().splitlines()
    print(done.stdout[-3000:])
    failed = [line for line in lines if line.startswith("FAILED")]
    return {"result": lines[-1] if lines else done.stderr[-300:], "failed": failed}


def throughput(configurations: list[str], device: torch.device, until: float) -> list[dict]:
    """(b) A row for each configuration of pretrain.py's options, as long as there is time."""
    rows = []
    for options in configurations:
        if time.time() > until:
            rows.append({"options": options, "error": "no time left"})
            continue
        try:
            rows.append({"options": options, **measure(options.split(), device)})
        except Exception as e:                                         # out of memory, say: the next may fit
            rows.append({"options": options, "error": f"{type(e).__name__}: {str(e).splitlines()[0]}"})
        print(rows[-1], flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def measure(options: list[str], device: torch.device, rounds: int = 8) -> dict:
    """images/s, GFLOP and MiB an image of a step, its share of the peak, and what its parts take."""
    step = Step(options, device)
    began = time.time()
    step()
    step()
    clock(device)
    first = time.time() - began                                        # compiling, for the most part
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = clock(device)
    for _ in range(rounds):
        step()
    seconds = (clock(device) - start) / rounds
    B = step.args.batch_size
    found = {"images_per_s": round(B / seconds, 1), "first_two_steps_s": round(first, 1)}
    if device.type == "cuda":
        found["mib"] = round(torch.cuda.max_memory_allocated(device) / 2 ** 20)
    if "--compile" not in options:
        flop = step.flop()
        found["gflop"] = round(flop / B / 1e9, 1)
        found["share_of_peak"] = round(flop / seconds / matmul_peak(device, torch.bfloat16), 3)
        found["parts"] = step.shares()
    return found


def loader_speed(folder: str, local: int, workers: int, seconds: float) -> dict:
    """images/s that `workers` processes decode and crop to 2 x 224 + local x 96, from real files."""
    images = ImageFolder(folder)
    args = pretrain.get_args(["--data", folder, "--local_crops_number", str(local)])
    views = Views(images, pretrain.crops(args), 0)
    order = [(epoch, i) for epoch in range(1000) for i in range(len(images))]
    pin = torch.cuda.is_available()
    loader = iter(DataLoader(views, 48, sampler=order, num_workers=workers, pin_memory=pin,
                             worker_init_fn=init_worker, prefetch_factor=4))
    for _ in range(workers + 1):                                       # all of them at work
        next(loader)
    start = time.time()
    n = 0
    while time.time() - start < seconds:
        n += len(next(loader)["index"])
    return {"images_per_s": round(n / (time.time() - start), 1), "workers": workers, "files": images.about,
            "local": local}


def call_pretrain(options: list[str], folder: Path, epochs: int, seconds: float) -> tuple[int, list[dict]]:
    """Run pretrain.py in a process of its own, stopped after `seconds`.  Returns its exit code and log."""
    script = str(Path(__file__).parent.parent / "pretrain.py")
    command = [sys.executable, script, *options, "--epochs", str(epochs), "--output_dir", str(folder)]
    process = subprocess.Popen(command)
    try:
        code = process.wait(max(30, seconds))
    except subprocess.TimeoutExpired:
        process.terminate()                                            # it finishes its step and saves
        code = process.wait(60)
    return code, run.read_lines(folder / "log.jsonl")


def pretrain_until(options: list[str], folder: Path, until: float, every: int = 20) -> dict:
    """(c) As many epochs as the time allows, by the speed of a trial of two."""
    began = time.time()
    _, lines = call_pretrain([*options, "--knn_every", "0", "--warmup_epochs", "1"], folder / "trial", 2,
                             until - time.time())
    steps = [line for line in lines if "step" in line and "epoch" in line]
    half = steps[len(steps) // 2:]                                     # the first steps warm up
    per_step = (half[-1]["seconds"] - half[0]["seconds"]) / (half[-1]["step"] - half[0]["step"])
    per_epoch = per_step * half[-1]["step"] / 2
    around = time.time() - began - 2 * per_epoch                       # start, end, and two evaluations
    epochs = int((until - time.time() - 1.2 * around) / (per_epoch + around / 3 / every))
    epochs = max(2, epochs)
    print(f"an epoch takes {per_epoch:.2f} s, what is around it {around:.0f} s: {epochs} epochs", flush=True)
    code, lines = call_pretrain([*options, "--knn_every", str(every)], folder / "run", epochs,
                                until + 30 - time.time())
    evaluations = [line for line in lines if "step" not in line]
    return {"options": options, "epochs": epochs, "code": code, "seconds_per_epoch": round(per_epoch, 2),
            "evaluations": evaluations}


def pretrain_recipe(args, out: Path, until: float, workers: int) -> list[dict]:
    """(c) The recipe, and its weights in float16."""
    recipe = SMALL if args.small else args.recipe
    options = ["--data", args.data, "--num_workers", str(max(1, workers - 1)), *recipe.split()]
    found = pretrain_until(options, out / "recipe0", until)
    content = checkpoint.load(out / "recipe0/run/backbone.pth")
    content["backbone"] = {name: value.half() for name, value in content["backbone"].items()}
    checkpoint.save(out / "backbone0.pth", content)
    shutil.copyfile(out / "recipe0/run/log.jsonl", out / "log0.jsonl")
    return [found]


def table(found: dict) -> str:
    """Markdown."""
    tests = found.get("tests", {}).get("result", "not run")
    lines = [f"{found['device']}, torch {found['torch']}, bf16 matmul {found['peak'] / 1e12:.0f} TFLOP/s", "",
             f"tests: {tests}", "",
             "| step | images/s | GFLOP an image | share of the peak | MiB | first two steps, s |",
             "|---|---|---|---|---|---|"]
    for row in found.get("throughput", []):
        if "error" in row:
            lines.append(f"| `{row['options']}` | {row['error']} | | | | |")
            continue
        share = f"{100 * row['share_of_peak']:.0f} %" if "share_of_peak" in row else ""
        lines.append(f"| `{row['options']}` | {row['images_per_s']} | {row.get('gflop', '')} | {share} | "
                     f"{row.get('mib', '')} | {row['first_two_steps_s']} |")
    lines += ["", "| loader | workers | images/s |", "|---|---|---|"]
    for row in found.get("loader", []):
        crops = f"2 x 224 + {row['local']} x 96"
        lines.append(f"| {row['files']}, {crops} | {row['workers']} | {row['images_per_s']} |")
    return "\n".join(lines) + "\n"


def throughput_table(runs: list[dict]) -> str:
    """Markdown, shorter: for the page of results."""
    rows = []
    for one in runs:
        options = one["options"].replace(" --precision bf16", "").replace("--", "")
        share = f"{100 * one['share_of_peak']:.0f} %" if "share_of_peak" in one else ""
        rows.append([options, f"{one['images_per_s']:.0f}", f"{one['mib'] / 1024:.1f} GiB", share])
    return markdown(["options", "images/s", "memory", "of the peak of a matrix product"], rows)


def get_args(argv=None):
    p = run.Parser(description=__doc__)
    a = p.add_argument
    a("--data", required=True, metavar="DIR", help="folder with train/ and val/ to pretrain on")
    a("--photos", metavar="DIR", help="folder of larger photographs for the loader (default: --data)")
    a("--minutes", type=above(0.0), default=12.0, help="time for everything")
    a("--tests", type=at_least(0.0), default=1.5, help="minutes of it for the tests at most; 0 skips them")
    a("--table", type=at_least(0.0), default=4.0, help="minutes of it for the table at most; 0 skips it")
    a("--recipe", default=RECIPE, help="options of pretrain.py, one string; an empty one skips it")
    a("--small", action="store_true", help="small networks, to try this on a CPU")
    a("--out", required=True, metavar="DIR", help="folder to write to")
    run.add_shared(p, "device")
    return p.parse_args(argv)


def main(args) -> None:
    began = time.time()
    device = run.begin(args)
    end = began + 60 * args.minutes
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    found = {"eval": "gpu", "device": name, "torch": torch.__version__, "commit": run.commit(),
             "options": training.options_of(args), "peak": matmul_peak(device, torch.bfloat16)}
    workers = len(os.sched_getaffinity(0))

    def note(key: str, form) -> None:
        """Keep what a step found; what it failed of is kept, too."""
        start = time.time()
        try:
            found[key] = form()
        except Exception:
            found[f"{key}_error"] = traceback.format_exc()[-2000:]
            traceback.print_exc()
        found.setdefault("seconds", {})[key] = round(time.time() - start, 1)
        (out / "gpu.json").write_text(json.dumps(run.without_nan(found), indent=1) + "\n")
        (out / "table.md").write_text(table(found))

    if args.tests:
        note("tests", lambda: run_tests(60 * args.tests))
    if args.table:
        small = [f"{SMALL} --patch_tokens {tokens}" for tokens in ("all", "masked")]
        until = time.time() + 60 * args.table
        note("throughput", lambda: throughput(small if args.small else configurations(), device, until))
        photos = args.photos or str(Path(args.data) / "train")
        seconds = 2 if args.small else 6
        note("loader", lambda: [loader_speed(photos, local, workers, seconds) for local in (0, 10)])
    if args.recipe or args.small:
        note("pretraining", lambda: pretrain_recipe(args, out, end, workers))
    print((out / "table.md").read_text())


def configurations() -> list[str]:
    """Rows of the table, what matters most first; compiled ones last, as compiling takes a minute or more."""
    rows = []
    for crops in CROPS.values():
        for tokens in ("all", "masked"):
            for batch in (48, 128):
                rows.append(f"--arch vit_s {crops} --batch_size {batch} --patch_tokens {tokens}")
    for crops in CROPS.values():
        for batch in (48, 128):
            rows.append(f"--arch vit_b {crops} --batch_size {batch} --patch_tokens all")
    rows.append(f"--arch vit_s {CROPS['2x224+10x96']} --batch_size 128 --patch_tokens all --compile")
    return [row + " --precision bf16" for row in rows]


if __name__ == "__main__":
    run.script(main, get_args)
