"""MMC beside DINO, iBOT, MAE's task and plain contrast: one network, the same data and augmentation, equal
time, and as many tries for each.

    python -m studies.rivals --data imagenette/train --voc VOC --out results/rivals
    python -m studies.rivals --data imagenette/train --voc VOC --out results/rivals --final --seconds 1200 \\
        --seeds 0 1 --coco COCO --davis DAVIS --knn imagenette imagewoof --finetune imagewoof

First the tries: each method trains for --seconds with each of its settings, on --per_class images of every
class of --data.  They are judged on 100 others of every class and on VOC's train images, by the mean of k-NN
CLS, k-NN PAT and the prompt mIoU at the best t.  With --final, each method trains on all of --data with the
setting that won, and everything is evaluated.

DINO, iBOT and MAE's masks are the solutions of docs/exercises, in a copy of the code.  A second patch,
studies/prototypes.patch, gives DINO and iBOT BatchNorm in the heads and prototypes that do not move, and the
best try of both has it.  Before all else a few steps of each setting are timed, on a CPU with one thread
(OUT/speeds.jsonl), and from that follows the number of its epochs, a whole one.

Each run is a line of OUT/tries.jsonl or OUT/final.jsonl; what is there is left out."""
import argparse
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

import checkpoint
import davis
import distributed
import finetune
import probes
import run
import zeroshot
from data import evenly
from model import vit
from report import Column, column_of, markdown
from studies.ablation import FINETUNE, copy_of_code, measure

NETWORK = ("--arch vit_micro --patch_size 8 --global_crops_size 48 --local_crops_number 0 --blur .5 .1 .5 "
           "--blur_sigma .1 1 --head_hidden_dim 512 --head_out_dim 128 --drop_path 0 --warmup_epochs 1 "
           "--knn_every 0")
CPU = "--device cpu --num_workers 0 --precision fp32"
CUDA = "--device cuda --num_workers 8 --precision bf16"
LARGE = "--batch_size 128 --lr 3e-3 --momentum_teacher .9"
SMALL = "--batch_size 64 --lr 5e-3 --momentum_teacher .9"
CLEAN = "--noise_p 0 --drop_replace 0"      # the student sees nothing corrupted
SLOW = "--batch_size 128 --lr 1e-3 --momentum_teacher .96"
MAE = "--w_pat 0 --w_cls 0 --noise_p 1 --drop_perc .75 .75 --drop_align 8 --drop_block .001"
DINO = f"--w_rec 0 --w_pat 0 --temp .1 {CLEAN}"
IBOT = "--w_rec 0 --temp .1 --patch_tokens masked --noise_p 1"
CONTRAST = "--w_rec 0 --w_pat 0"
HEADS = ["dino_ibot", "prototypes"]
ROUNDS = 4                                     # of timing
HELD_OUT = 100                                 # images of a class, to judge the tries
SAME_COST = re.compile(                        # options that hardly change the time of an image
    r"--(lr|temp|momentum_teacher|batch_size) \S+|--w_\w+ (?!0( |$))\S+")
UNTRAINED = "untrained"                        # a row of the finals: the network before any training

METHODS = {  # method: its tries, each the patches and the options
    "MMC": [
        ([], LARGE),
        ([], SMALL),
        ([], f"{SMALL} --w_rec .3"),
        ([], f"{SMALL} --patch_tokens masked"),
    ],
    "contrast of CLS": [
        ([], f"{CONTRAST} {LARGE}"),
        ([], f"{CONTRAST} {SMALL}"),
        ([], f"{CONTRAST} {SMALL} {CLEAN}"),
        ([], f"{CONTRAST} {SMALL} {CLEAN} --temp .1"),
    ],
    "MAE's task": [
        (["mae"], f"{MAE} {LARGE}"),
        (["mae"], f"{MAE} {SMALL}"),
        (["mae"], f"{MAE} --batch_size 64 --lr 1.5e-2"),
        ([], f"{MAE} {SMALL}"),                # noise instead of grey
    ],
    "DINO": [
        (["dino_ibot"], f"{DINO} {LARGE}"),
        (HEADS, f"{DINO} {SLOW}"),
        (HEADS, f"{DINO} {LARGE}"),
        (HEADS, f"{DINO} {SMALL}"),
    ],
    "iBOT": [
        (["dino_ibot"], f"{IBOT} {LARGE}"),
        (HEADS, f"{IBOT} {SLOW} --drop_perc .1 .5"),
        (HEADS, f"{IBOT} {LARGE} --drop_perc .1 .5"),
        (HEADS, f"{IBOT} {SMALL} --drop_perc .1 .5"),
    ],
}
MEASURES = [  # of the finals, by their key in final.jsonl, and {method: the paper's number}
    (Column("seconds, by the timing", "train_seconds", None, 0), {}),
    (Column("images seen", "images", None, 0), {}),
    (Column("Table 11: k-NN PAT, imagenette", "knn_pat_imagenette"), {"MMC": "77.0"}),
    (Column("k-NN CLS, imagenette", "knn_cls_imagenette"), {"MMC": "77.5"}),
    (Column("k-NN PAT, imagewoof", "knn_pat_imagewoof"), {}),
    (Column("k-NN CLS, imagewoof", "knn_cls_imagewoof"), {}),
    (Column("Table 1: click on COCO, best t", "coco"),
     {"MMC": "38.4", "MAE's task": "30.1", "DINO": "35.1", "iBOT": "36.2"}),
    (Column("the same, automatic t", "coco_auto"), {}),
    (Column("the same, the better mask", "coco_better"), {}),
    (Column("Table 5: overlap O on COCO", "coco_overlap", min, 3),
     {"MMC": ".55", "MAE's task": ".76", "DINO": ".66", "iBOT": ".56"}),
    (Column("click on VOC, best t", "voc"), {}),
    (Column("the same, automatic t", "voc_auto"), {}),
    (Column("the same, the better mask", "voc_better"), {}),
    (Column("overlap O on VOC", "voc_overlap", min, 3), {}),
    (Column("Table 2: DAVIS, J&F", "davis"), {"MMC": "60.3", "DINO": "57.7", "iBOT": "59.7"}),
    (Column("fine-tuned on imagewoof", "finetune"), {}),
]


# ------------------------------------------------- data and code of a run
def part_of(data: Path, work: Path, per_class: int) -> Path:
    """A folder with train/ and val/ of links: per_class and HELD_OUT images of each class, apart."""
    part = work / f"part_{per_class}"
    shutil.rmtree(part, ignore_errors=True)            # it may be of other data, or half made
    for folder in sorted(path for path in data.iterdir() if path.is_dir()):
        files = sorted(folder.iterdir())
        held_out = set(evenly(HELD_OUT, len(files)))
        rest = [i for i in range(len(files)) if i not in held_out]
        chosen = {rest[i] for i in evenly(per_class, len(rest))}
        for split, indices in (("train", chosen), ("val", held_out)):
            target = part / split / folder.name
            target.mkdir(parents=True)
            for i in sorted(indices):
                (target / files[i].name).symlink_to(files[i].resolve())
    return part


def pretrain(code: Path, options: list, device: torch.device) -> float:
    """Run pretrain.py of a copy; its seconds, on a CPU those of one thread.  Raises CalledProcessError if it
    fails; that it stopped at --stop_at is no failure."""
    before = clock(device)
    command = [sys.executable, "pretrain.py", *map(str, options)]
    done = subprocess.run(command, cwd=code, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode not in (0, run.STOPPED):
        raise subprocess.CalledProcessError(done.returncode, command)
    return clock(device) - before


def clock(device: torch.device) -> float:
    """CPU seconds of the processes that ended, or seconds of the wall where a GPU works."""
    if device.type != "cpu":
        return time.monotonic()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds_per_image(code: Path, data: Path, work: Path, options: list[str], device: torch.device) -> float:
    """Seconds of a training image, from the difference between two runs of a few steps."""
    few, many = (3, 13) if device.type == "cpu" else (20, 120)
    seconds = {}
    for step in (few, many):
        pilot = work / f"pilot_{step}"
        shutil.rmtree(pilot, ignore_errors=True)
        short = ["--data", data, "--output_dir", pilot, "--epochs", 100, "--stop_at", step]
        seconds[step] = pretrain(code, short + options, device)
    batch = int(options[options.index("--batch_size") + 1])
    return (seconds[many] - seconds[few]) / ((many - few) * batch)


def cost_of(patches: list[str], options: str) -> str:
    """What a step costs: settings that differ in nothing else share a measurement."""
    costly = SAME_COST.sub("", " ".join([*patches, options]))
    return " ".join(costly.split()) or "the defaults"


def code_with(patches: list[str], args) -> Path:
    return copy_of_code(Path(args.work).resolve() / "_".join(["code", *patches]), *patches)


def measure_speeds(args) -> None:
    """Add what is missing to OUT/speeds.jsonl, the seconds of a training image by `cost_of`: the fastest of
    some rounds through all settings, so that what else the machine does slows no method more than another."""
    device = distributed.pick_device(args.device)
    settings = {cost_of(*setting): setting for tries in METHODS.values() for setting in tries}
    for cost in speeds(args, device):
        settings.pop(cost, None)
    if not settings:
        return
    work = Path(args.work).resolve()
    images = part_of(Path(args.data), work / "timing", args.per_class) / "train"
    shutil.rmtree(images.with_name("val"))     # or k-NN on them would take most of the time
    fastest = {}
    for _ in range(ROUNDS):
        for cost, (patches, options) in settings.items():
            words = words_of(options, device)
            seconds = seconds_per_image(code_with(patches, args), images, work, words, device)
            print(f"{1 / seconds:.1f} images/s: {cost}", flush=True)
            fastest[cost] = min(seconds, fastest.get(cost, seconds))
    for cost, seconds in fastest.items():
        row = {"cost": cost, "seconds_per_image": seconds, "device": device.type}
        run.append_json(Path(args.out) / "speeds.jsonl", row)


def speeds(args, device: torch.device) -> dict[str, float]:
    """{cost: seconds of an image} on this kind of device, as far as it was measured."""
    rows = run.read_lines(Path(args.out) / "speeds.jsonl")
    return {row["cost"]: row["seconds_per_image"] for row in rows if row["device"] == device.type}


def words_of(options: str, device: torch.device) -> list[str]:
    """All options of a run that the methods and their tries share, and its own."""
    return [*NETWORK.split(), *(CPU if device.type == "cpu" else CUDA).split(), *options.split()]


def train(patches: list[str], options: str, data: Path, folder: Path, seed: int, args) -> dict:
    """Pretrain for --seconds; the first half of a line of results, with shares in percent."""
    device = distributed.pick_device(args.device)
    code = code_with(patches, args)
    words = [*words_of(options, device), "--seed", str(seed)]
    images = data / "train" if (data / "train").is_dir() else data
    n_images = sum(1 for _ in images.glob("*/*"))
    of_image = speeds(args, device)[cost_of(patches, options)]
    epochs = max(round(args.seconds / of_image / n_images), 2)
    shutil.rmtree(folder, ignore_errors=True)
    began = clock(device)
    pretrain(code, ["--data", data, "--output_dir", folder, "--epochs", epochs, *words], device)
    return {
        "seed": seed, "patches": patches, "options": words, "epochs": epochs, "images": epochs * n_images,
        "asked_seconds": args.seconds, "seconds_with_evaluation": round(clock(device) - began),
        "images_per_s": round(1 / of_image, 1), "train_seconds": round(epochs * n_images * of_image),
        "device": device.type,
        "before_and_after": json.loads((folder / "results.json").read_text()),
    }


# ------------------------------------------------- tries and finals
def one_try(name: str, number: int, args) -> dict:
    """Pretrain on a part of the data and judge; a line of tries.jsonl."""
    patches, options = METHODS[name][number]
    work = Path(args.work).resolve()
    part = part_of(Path(args.data), work, args.per_class)
    folder = work / f"{name.replace(' ', '_')}_try_{number}"
    row = {"method": name, "try": number, **train(patches, options, part, folder, 0, args)}
    held_out = row["before_and_after"]
    voc = measure(zeroshot, folder, "--voc", args.voc, "--split", "train", "--size", 240)
    judged = [held_out["knn_cls"], held_out["knn_pat"], voc["best"]]
    row |= {"voc_train": voc["best"], "voc_train_overlap": voc["overlap"]}
    return row | {"score": round(sum(judged) / 3, 2)}


def best_try(name: str, args) -> dict:
    """The line of the try that won.  Raises Mistake if a try is missing."""
    file = Path(args.out) / "tries.jsonl"
    rows = [row for row in run.read_lines(file) if row["method"] == name]
    if len(rows) < len(METHODS[name]):
        raise run.Mistake(f"{file}: {name} has {len(rows)} of {len(METHODS[name])} tries: run the same "
                          "command without --final first")
    return max(rows, key=lambda row: row["score"])


def final(name: str, seed: int, args) -> dict:
    """Pretrain on all images with the setting that won, and evaluate; a line of final.jsonl."""
    folder = Path(args.work).resolve() / f"{name.replace(' ', '_')}_final_{seed}"
    row = {"method": name, "seed": seed}
    if name == UNTRAINED:
        save_untrained(folder, seed)
    else:
        won = best_try(name, args)["try"]
        patches, options = METHODS[name][won]
        row |= {"try": won, **train(patches, options, Path(args.data).resolve(), folder, seed, args)}
    return row | evaluate(folder, seed, args)


def save_untrained(folder: Path, seed: int) -> None:
    """Write backbone.pth of the network before any training."""
    torch.manual_seed(seed)
    backbone = vit("vit_micro", img_size=48, patch_size=8)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"arch": backbone.config, "step": 0, "backbone": backbone.state_dict()}
    checkpoint.save(folder / "backbone.pth", content)


def evaluate(folder: Path, seed: int, args) -> dict:
    """All that is asked for of the backbone in a folder, by its key in MEASURES; shares in percent."""
    row = {}
    for where in ("voc", "coco"):
        if getattr(args, where):
            options = [f"--{where}", getattr(args, where), "--size", 240, "--limit", 80]
            found = measure(zeroshot, folder, *options)
            better = measure(zeroshot, folder, *options, "--centre", "--contiguous")
            row[where] = found["best"]
            row[f"{where}_auto"] = found["auto"]
            row[f"{where}_overlap"] = found["overlap"]
            row[f"{where}_better"] = better["best"]
    for data in args.knn:
        found = measure(probes, folder, "knn", "--data", data, "--size", 48, "--nb_knn", 10)
        row[f"knn_cls_{Path(data).name}"] = found["cls"]["10"]
        row[f"knn_pat_{Path(data).name}"] = found["pat"]["10"]
    if args.davis:
        options = ["--davis", args.davis, "--output_dir", folder / "davis", "--size", 240]
        row["davis"] = measure(davis, folder, *options)["J&F-Mean"]
    if args.finetune:
        options = ["--data", args.finetune, "--output_dir", folder / "finetune", "--size", 48, "--seed", seed]
        row["finetune"] = measure(finetune, folder, *options, *FINETUNE.split())["top1"]
    return row


# ------------------------------------------------- tables
def tries_table(rows: list[dict]) -> str:
    """Markdown: every try, in percent, the one that won in bold."""
    heads = ["method", "settings", "images/s", "epochs", "k-NN CLS", "k-NN PAT", "VOC train", "O", "mean"]
    lines = []
    for name in METHODS:
        mine = sorted((row for row in rows if row["method"] == name), key=lambda row: row["try"])
        best = max((row["score"] for row in mine), default=None)
        for row in mine:
            patches, options = METHODS[name][row["try"]]
            settings = " ".join([*(f"{patch}.patch" for patch in patches), options])
            score = f"{row['score']:.1f}"
            lines.append([
                name, f"`{settings}`", f"{row['images_per_s']:.0f}", str(row["epochs"]),
                *(f"{row['before_and_after'][key]:.1f}" for key in ("knn_cls", "knn_pat")),
                f"{row['voc_train']:.1f}", f"{row['voc_train_overlap']:.3f}",
                f"**{score}**" if row["score"] == best else score,
            ])
    return markdown(heads, lines)


def final_table(rows: list[dict]) -> str:
    """Markdown: a line for each measure, the best of ours in bold, the paper's numbers below in italics."""
    groups = {}
    for name in [UNTRAINED, *METHODS]:
        mine = [{"metrics": row} for row in rows if row["method"] == name]
        if mine:
            groups[name] = mine
    lines = []
    for column, paper in MEASURES:
        texts = column_of(column, list(groups.values()))
        texts = [text.removesuffix(" +- 0") for text in texts]         # equal for all seeds
        if any(texts):
            lines.append([column.head, *texts])
            if paper:
                lines.append(["*paper*", *(f"*{paper[name]}*" if name in paper else "" for name in groups)])
    return markdown(["", *groups], lines)


def check_data(data: Path, held_out: int = HELD_OUT) -> None:
    """Raises Mistake for a folder without classes, or with one that the held-out images would leave empty."""
    sizes = {path.name: sum(1 for _ in path.iterdir()) for path in data.glob("*/") if path.is_dir()}
    for name, size in sizes.items():
        if size <= held_out:
            raise run.Mistake(f"--data {data}: {name} has {size} files, and {held_out} of a class are held "
                              "out to judge: expected class folders of more, such as imagenette/train")
    if not sizes:
        raise run.Mistake(f"--data {data}: expected class folders of train images, found none")


def main(args: argparse.Namespace) -> None:
    check_data(Path(args.data))
    out = Path(args.out)
    with run.writing(out, "--out "):
        out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    file = out / ("final.jsonl" if args.final else "tries.jsonl")
    key = "seed" if args.final else "try"
    done = set()
    for row in run.read_lines(file):
        done.add((row["method"], row[key]))
        if row.get("asked_seconds", args.seconds) != args.seconds:
            raise run.Mistake(f"{file} has runs of {row['asked_seconds']:g} s, and --seconds is "
                              f"{args.seconds:g}: give another --out")
    names = [name for name in args.methods if args.final or name != UNTRAINED]
    if args.final:
        for name in names:
            if name != UNTRAINED:
                best_try(name, args)           # raises now if one is missing, not after hours
    measure_speeds(args)
    tries = max(len(METHODS[name]) for name in METHODS)
    for i in args.seeds if args.final else range(tries):
        for name in names:
            if (name, i) in done or (not args.final and i >= len(METHODS[name])):
                continue
            print(f"{name}, {key} {i}", flush=True)
            row = final(name, i, args) if args.final else one_try(name, i, args)
            row |= {"command": args.command, "commit": run.commit(), "torch": torch.__version__,
                    "date": date.today().isoformat()}
            run.append_json(file, row)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    p = run.Parser(description=__doc__)
    a = p.add_argument
    a("--data", required=True, metavar="DIR", help="class folders of train images; the labels only judge")
    a("--out", required=True, metavar="DIR", help="folder of tries.jsonl and final.jsonl")
    a("--work", default="out/rivals", metavar="DIR", help="folder of the runs (default: %(default)s)")
    names = [*METHODS, UNTRAINED]
    a("--methods", nargs="+", default=names, choices=names, help="only these")
    a("--seconds", type=run.above(0.0), default=150.0, help="of training (default: %(default)s)")
    a("--per_class", type=run.count, default=150, help="images of a class in a try (default: %(default)s)")
    a("--final", action="store_true", help="train with what won among the tries, and evaluate all")
    a("--seeds", type=int, nargs="+", default=[0, 1], help="of the final runs (default: 0 1)")
    run.add_shared(p, "device")
    a("--voc", required=True, metavar="DIR", help="PASCAL VOC; the tries are judged on its train images")
    a("--coco", metavar="DIR", help="COCO, for the final runs, as all that follow")
    a("--davis", metavar="DIR", help="DAVIS-2017")
    a("--knn", nargs="*", default=[], metavar="DIR", help="labelled folders with train/ and val/")
    a("--finetune", metavar="DIR", help="fine-tune on this labelled folder")
    args = p.parse_args(argv)
    args.command = shlex.join(["python", "-m", "studies.rivals", *argv])
    return args


if __name__ == "__main__":
    run.script(main, get_args)
