"""Which part of the method does what?  Pretrains variants of MMC, evaluates each, draws a table and curves.

    python -m studies.ablation --out results/toy --seeds 0 1 2                # Table 4 on the toy world
    python -m studies.ablation --study decisions --out results/toy_decisions --seeds 0 1
    python -m studies.ablation --out out/imagenette --coco COCO --voc VOC --finetune imagewoof -- \\
        --data imagenette/train --arch vit_t --patch_size 8 --global_crops_size 96 --epochs 100

The studies are table4, which losses are on; decisions, which the paper leaves open; and reconstruction, which
asks when Eq. (1) helps.  A variant of table4 has the paper's name, three digits for rec, cls, pat in this
order: 110 is rec + cls, 101 is rec + pat.  Some variants of reconstruction train in a copy of the code that a
patch of this folder has changed.

What follows `--` goes to pretrain.py, the same for all variants.  Each finished run is a line of
OUT/results.jsonl; the same command leaves out what is there, and goes on with a run that was cut off.  The
weights are kept in --work.  OUT/table.md and OUT/curves.png are drawn anew after each run.  One on the toy
world takes about 5 minutes on two CPU cores; results/toy/table.md shows what to expect."""
import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

import distributed
import figure
import finetune
import pretrain
import run
import zeroshot
from report import markdown, spread

ROOT = Path(__file__).parent.parent
FINETUNE = "--epochs 10 --warmup_epochs 1 --lr 2e-3 --augment none --mixup 0 --cutmix 0"

STUDIES = {  # study: {variant: options of pretrain.py}
    "table4": {
        "111": "",
        "010": "--w_rec 0 --w_pat 0",
        "100": "--w_cls 0 --w_pat 0",
        "001": "--w_rec 0 --w_cls 0",
        "011": "--w_rec 0",
        "101": "--w_cls 0",
        "110": "--w_pat 0",
    },
    "decisions": {
        "default": "",
        "anchors masked": "--patch_tokens masked",
        "drop_align 8": "--drop_align 8",
        "anchors masked, drop_align 8": "--patch_tokens masked --drop_align 8",
        "negatives at the position": "--patch_negatives position",
        "negatives at 6 places": "--patch_negatives 6",
        "head norm none": "--head_norm none",
        "4 local crops": "--local_crops_number 4 --local_crops_size 24",
        "10 local crops": "--local_crops_number 10 --local_crops_size 24",
        "blocks inside the image": "--no-even_blocks",
        "factor 2 tau": "--w_pat 0.4 --w_cls 0.4",
        "w_cls 0.3": "--w_cls 0.3",
        "w_pat 3": "--w_pat 3",
    },
    "reconstruction": {
        "w_rec 0": "--w_rec 0",
        "w_rec 0.3": "--w_rec 0.3",
        "w_rec 1": "",
        "w_rec 3": "--w_rec 3",
        "half as much corrupted": "--drop_perc 0.25 0.375 --drop_replace 0.15",
        "half as much corrupted, w_rec 0": "--drop_perc 0.25 0.375 --drop_replace 0.15 --w_rec 0",
        "from the middle block": "",
        "pixels normalised per patch": "",
    },
}
PATCHES = {  # variant: the patch that makes it
    "from the middle block": "rec_block",
    "pixels normalised per patch": "rec_pixels",
}
PAPER = {  # Table 4: k-NN CLS / k-NN PAT / fine-tuned (ViT-S, ImageNet-100, 200 epochs)
    "100": "17.2 / 14.7 / 89.9", "010": "75.0 / 63.9 / 90.6", "001": "39.9 / 40.8 / 87.8",
    "011": "75.6 / 75.5 / 89.7", "101": "33.5 / 33.7 / 89.4", "110": "72.5 / 53.7 / 88.2",
    "111": "77.5 / 77.0 / 91.0",
}
COLUMNS = {  # key in results.jsonl: head of its column
    "knn_cls": "k-NN CLS", "knn_pat": "k-NN PAT", "prompt_iou": "toy prompt IoU",
    "coco": "COCO, best t", "coco_auto": "auto", "coco_overlap": "O",
    "voc": "VOC, best t", "voc_auto": "auto", "voc_overlap": "O",
    "finetune": "fine-tuned", "seconds": "seconds",
}


# ------------------------------------------------- runs
def call(script, *options) -> None:
    """Run one of our scripts in this process.  What ends it, such as a signal, ends us with its exit code."""
    script.main(script.get_args([str(option) for option in options]))
    torch.compiler.reset()                     # the next networks are others, if --compile is given


def copy_of_code(folder: Path, *patches: str) -> Path:
    """Make the folder a copy of the code with these patches, of docs/exercises or of studies, applied in this
    order.  Raises Mistake for one that does not fit the code."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent.resolve())}  # whatever git is above
    for name in patches:
        patch = ROOT / "docs/exercises" / f"{name}.patch"
        if not patch.exists():
            patch = ROOT / "studies" / f"{name}.patch"
        done = subprocess.run(["git", "apply", patch], cwd=folder, env=alone, capture_output=True, text=True)
        if done.returncode:
            raise run.Mistake(f"{patch} no longer applies to this code; `patch -p1 --fuzz=3` may still do, "
                              f"and `git diff -U1` makes it anew: {done.stderr.strip()}")
    return folder


def pretrain_with(patch: str, folder: Path, *options) -> None:
    """Run pretrain.py of a copy of the code in a process of its own, whose exit code ends us, too."""
    code = copy_of_code(folder, patch)
    done = subprocess.run([sys.executable, code / "pretrain.py", *map(str, options)])
    if done.returncode:
        sys.exit(done.returncode)


def settings_of(name: str, args: argparse.Namespace) -> dict:
    """The options of a variant's pretraining, and those of the evaluations that are asked for."""
    evaluation = {
        "coco": args.coco,
        "voc": args.voc,
        "zeroshot": args.zeroshot_options if args.coco or args.voc else None,
        "finetune": [args.finetune, args.finetune_options] if args.finetune else None,
    }
    return {"options": args.pretrain + STUDIES[args.study][name].split(), "evaluation": evaluation}


def run_variant(name: str, seed: int, args: argparse.Namespace) -> dict:
    """Pretrain and evaluate one variant; returns its line of results.jsonl, with shares in percent."""
    settings = settings_of(name, args)
    work = Path(args.work) / f"{name.replace(' ', '_')}_{seed}"
    options = ["--output_dir", work, "--seed", seed, *settings["options"]]
    if name in PATCHES:
        pretrain_with(PATCHES[name], work.with_name(f"{work.name}_code"), *options)
    else:
        call(pretrain, *options)
    about = json.loads((work / "run.json").read_text())
    device = distributed.pick_device(about["options"]["device"])

    row = {"study": args.study, "variant": name, "seed": seed, **settings}
    row |= json.loads((work / "results.json").read_text())
    row |= {"curve": curve_of(work), **evaluate(work, seed, args)}
    return row | {"patch": PATCHES.get(name), "command": args.command, "device": device.type,
                  "torch": about["torch"], "commit": about["commit"] or run.commit(),  # a copy has none
                  "date": date.today().isoformat()}


def curve_of(work: Path) -> list[list[float]]:
    """[epoch, k-NN CLS, k-NN PAT] of each evaluation; an epoch that ran twice counts once."""
    points = {}
    for line in run.read_lines(work / "log.jsonl"):
        if "knn_cls" in line:
            points[line["epoch"]] = [line["epoch"], line["knn_cls"], line["knn_pat"]]
    return [points[epoch] for epoch in sorted(points)]


def measure(script, work: Path, *options) -> dict:
    """What an evaluation finds for the backbone in a run's folder: the metrics of its --json."""
    file = work / "evaluation.jsonl"
    file.unlink(missing_ok=True)
    call(script, *options, "--ckpt", work / "backbone.pth", "--json", file)
    return run.read_lines(file)[-1]["metrics"]


def evaluate(work: Path, seed: int, args: argparse.Namespace) -> dict:
    """What zeroshot.py and finetune.py find for the pretrained weights."""
    row = {}
    for name, folder in (("coco", args.coco), ("voc", args.voc)):
        if folder:
            metrics = measure(zeroshot, work, f"--{name}", folder, *args.zeroshot_options.split())
            row[name] = metrics["best"]
            row[f"{name}_auto"] = metrics["auto"]
            row[f"{name}_overlap"] = metrics["overlap"]
    if args.finetune:
        metrics = measure(finetune, work, "--data", args.finetune, "--output_dir", work / "finetune",
                          "--seed", seed, *args.finetune_options.split())
        row["finetune"] = metrics["top1"]
    return row


# ------------------------------------------------- table and curves
def by_variant(rows: list[dict], study: str) -> dict[str, list[dict]]:
    """The lines of each variant that has any, in the order of the study; variants that it had before last."""
    groups = {name: [] for name in STUDIES[study]}
    for row in rows:
        groups.setdefault(row["variant"], []).append(row)
    return {name: mine for name, mine in groups.items() if mine}


def cell(rows: list[dict], key: str) -> str:
    """'mean +- standard deviation' over the lines, the value alone if one has it, and nothing if none has."""
    values = [row[key] for row in rows if row.get(key) is not None]
    mean = statistics.mean(values) if values else 0
    return spread(values, 3 if mean < 1.5 else 1 if mean < 1000 else 0)              # O is a share of 1


def table(rows: list[dict], study: str) -> str:
    """Markdown: the networks before training, one per seed, then a line per variant, with mean and standard
    deviation over the seeds, beside the paper's figures.  Only columns that some line has."""
    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    heads = ["rec cls pat" if study == "table4" else "variant", "seeds", *[COLUMNS[key] for key in keys]]
    seeds = {row["seed"]: row for row in rows}                         # all variants begin with the same ViT
    before = [cell(list(seeds.values()), f"{key}_untrained") for key in keys]
    lines = [["untrained", str(len(seeds)), *before]]
    for name, mine in by_variant(rows, study).items():
        lines.append([name, str(len(mine)), *[cell(mine, key) for key in keys]])
    if study == "table4":
        heads.append("*paper: CLS / PAT / fine-tuned*")
        for line in lines:
            line.append(f"*{PAPER[line[0]]}*" if line[0] in PAPER else "")
    return markdown(heads, lines)


def mean_curve(rows: list[dict], column: int) -> list[tuple[float, float]]:
    """(epoch, mean over the lines) at the epochs that all lines have.  column: 1 for CLS, 2 for PAT."""
    curves = [{point[0]: point[column] for point in row["curve"]} for row in rows]
    shared = set(curves[0]).intersection(*curves)
    return [(epoch, statistics.mean(curve[epoch] for curve in curves)) for epoch in sorted(shared)]


def curves(rows: list[dict], study: str) -> figure.Picture:
    """k-NN over the epochs, CLS on the left, PAT on the right; a line per variant."""
    note = "mean of the seeds" + "; digits: rec, cls, pat" * (study == "table4")
    charts = []
    for column, name in ((1, "CLS"), (2, "PAT")):
        series = {variant: mean_curve(mine, column) for variant, mine in by_variant(rows, study).items()}
        charts.append(figure.line_chart(series, f"k-NN {name}", "epoch", "%", note))
    return figure.beside(charts)


def draw(out: Path, study: str) -> str:
    """Write table.md and curves.png from results.jsonl; returns the table."""
    rows = run.read_lines(out / "results.jsonl")
    text = table(rows, study)
    with run.writing(out, "--out "):
        (out / "table.md").write_text(text)
        curves(rows, study).save(out / "curves.png")
    return text


def is_done(file: Path, name: str, seed: int, args: argparse.Namespace) -> bool:
    """Whether results.jsonl has this run.  Raises Mistake if it was run with other options."""
    for row in run.read_lines(file):
        if (row["variant"], row["seed"]) == (name, seed):
            for key, now in settings_of(name, args).items():
                if row.get(key) != now:
                    raise run.Mistake(f"{file}: {name}, seed {seed}, was run with other options, "
                                      f"{row.get(key)}, not {now}: give another --out")
            return True
    return False


def main(args: argparse.Namespace) -> None:
    out = Path(args.out)
    with run.writing(out, "--out "):
        out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in STUDIES[args.study]:
            if name in args.variants and not is_done(out / "results.jsonl", name, seed, args):
                print(f"{args.study} {name}, seed {seed}", flush=True)
                run.append_json(out / "results.jsonl", run_variant(name, seed, args))
                draw(out, args.study)
    print(draw(out, args.study))


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    p = run.Parser(description=__doc__)
    a = p.add_argument
    a("--study", default="table4", choices=STUDIES, help="which variants (default: %(default)s)")
    a("--variants", nargs="+", metavar="NAME", help="only these of the study, such as 111 010")
    a("--seeds", type=int, nargs="+", default=[0], help="seeds of pretraining and fine-tuning (default: 0)")
    a("--out", required=True, metavar="DIR", help="folder of results.jsonl, table.md and curves.png")
    a("--work", metavar="DIR", help="folder of the runs and weights (default: out/ablation/NAME of --out)")
    a("--coco", metavar="DIR", help="prompt segmentation and overlap on COCO val2017")
    a("--voc", metavar="DIR", help="the same on PASCAL VOC")
    a("--zeroshot_options", default="--limit 80", help="one string of options of zeroshot.py (default: "
      "%(default)s; '--size 240 --limit 80' gives patches of 8 pixels the paper's 30 x 30 tokens)")
    a("--finetune", metavar="DIR", help="fine-tune each on this labelled folder")
    a("--finetune_options", default=FINETUNE, help="those of finetune.py, one string (default: %(default)s)")
    args = p.parse_args(argv[:cut])
    args.pretrain = argv[cut + 1:]
    args.command = shlex.join(["python", "-m", "studies.ablation", *argv])
    args.work = args.work or Path("out/ablation") / Path(args.out).name
    known = list(STUDIES[args.study])
    args.variants = args.variants or known
    unknown = sorted(set(args.variants) - set(known))
    if unknown:
        raise run.Mistake(f"--variants {', '.join(unknown)}: {args.study} has {', '.join(known)}")
    return args


if __name__ == "__main__":
    run.script(main, get_args)
