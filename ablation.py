"""Which part of the method does what?  Pretrains variants of MMC, evaluates each, draws table and curves.

    python ablation.py --out results/toy --seeds 0 1 2                       # Table 4 on the toy world
    python ablation.py --study decisions --out results/toy_decisions --seeds 0 1
    python ablation.py --out results/imagenette --coco COCO --voc VOC --finetune imagewoof -- \\
        --data imagenette/train --arch vit_t --patch_size 8 --global_crops_size 96 --epochs 100

What follows `--` goes to pretrain.py, the same for all variants.  Each finished run is a line of
OUT/results.jsonl; the same command leaves out what is there and goes on with a run that was cut off.  The
weights are kept in --work.  OUT/table.md and OUT/curves.png are drawn anew after each run."""
import argparse
import json
import signal
import statistics
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import distributed
from figure import COLOURS, SMOOTH
from monitor import read_lines

OFF = [["--w_rec", "0"], ["--w_cls", "0"], ["--w_pat", "0"]]
STUDIES = {  # study: {variant: options of pretrain.py}
    "table4": {"".join(map(str, on)): [x for o, off in zip(on, OFF, strict=True) if not o for x in off]
               for on in ((1, 1, 1), (0, 1, 0), (1, 0, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0))},
    "decisions": {
        "default": [], "anchors masked": ["--patch_tokens", "masked"], "drop_align 8": ["--drop_align", "8"],
        "anchors masked, drop_align 8": ["--patch_tokens", "masked", "--drop_align", "8"],
        "negatives at the position": ["--patch_negatives", "position"],
        "negatives at 6 places": ["--patch_negatives", "6"],
        "head norm none": ["--head_norm", "none"],
        "4 local crops": ["--local_crops_number", "4", "--local_crops_size", "24"],
        "10 local crops": ["--local_crops_number", "10", "--local_crops_size", "24"],
        "factor 2 tau": ["--w_pat", "0.4", "--w_cls", "0.12"],         # of the toy's 1 and 0.3
        "w_cls 1": ["--w_cls", "1"], "w_pat 3": ["--w_pat", "3"]},
}
# the paper's Table 4, order rec, cls, pat: k-NN CLS, k-NN PAT, fine-tuned (ViT-S, ImageNet-100, 200 epochs)
PAPER = {"100": (17.2, 14.7, 89.9), "010": (75.0, 63.9, 90.6), "001": (39.9, 40.8, 87.8),
         "011": (75.6, 75.5, 89.7), "101": (33.5, 33.7, 89.4), "110": (72.5, 53.7, 88.2),
         "111": (77.5, 77.0, 91.0)}
COLUMNS = {"knn_cls": "k-NN CLS", "knn_pat": "k-NN PAT", "prompt_iou": "toy prompt IoU", "coco": "COCO mIoU",
           "coco_overlap": "COCO O", "voc": "VOC mIoU", "voc_overlap": "VOC O", "finetune": "fine-tuned",
           "seconds": "seconds"}


def call(script: str, *options: str) -> None:
    """Run one of our scripts; ends with its exit code if it does not end well."""
    command = [sys.executable, str(Path(__file__).parent / script), *map(str, options)]
    process = subprocess.Popen(command)
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        code = process.wait()
    except KeyboardInterrupt:                                          # the script was told, too, and saves
        code = process.wait()
    signal.signal(signal.SIGTERM, before)
    if code:
        distributed.fail(f"{' '.join(command[1:])} ended with code {code}; start the same command to go on",
                         code if code in (distributed.STOPPED, distributed.FAILED) else distributed.MISUSED)


def how(options: list[str], args: argparse.Namespace) -> dict:
    """What rows of one table share: the options of pretraining and those of the evaluations."""
    zeroshot, finetune = args.coco or args.voc, args.finetune
    return {"options": args.pretrain + options,
            "evaluation": {"coco": args.coco, "voc": args.voc, "zeroshot": zeroshot and args.zeroshot_options,
                           "finetune": finetune and [finetune, args.finetune_options]}}


def run_variant(name: str, options: list[str], seed: int, args: argparse.Namespace) -> dict:
    """Pretrain and evaluate one variant; returns its line of results.jsonl, figures in percent."""
    work = Path(args.work or Path("out/ablation") / Path(args.out).name) / f"{name.replace(' ', '_')}_{seed}"
    call("pretrain.py", "--output_dir", work, "--seed", seed, *args.pretrain, *options)
    row = {"study": args.study, "variant": name, "seed": seed, **how(options, args),
           **json.loads((work / "results.json").read_text())}
    found = {x["epoch"]: [x["epoch"], x["knn_cls"], x["knn_pat"]] for x in read_lines(work / "log.jsonl")
             if "knn_cls" in x}                                        # an epoch that ran twice counts once
    row["curve"] = [found[epoch] for epoch in sorted(found)]

    def measured(script, *more) -> dict:
        found = work / "evaluation.jsonl"
        found.unlink(missing_ok=True)
        call(script, "--ckpt", work / "backbone.pth", *more, "--json", found)
        return read_lines(found)[-1]
    for data in ("coco", "voc"):
        if getattr(args, data):
            r = measured("zeroshot.py", f"--{data}", getattr(args, data), *args.zeroshot_options.split())
            row |= {data: r["best"], f"{data}_auto": r["auto"], f"{data}_overlap": r["overlap"]}
    if args.finetune:
        more = args.finetune_options.split()
        row["finetune"] = measured("finetune.py", "--data", args.finetune, "--output_dir", work / "finetune",
                                   "--seed", seed, *more)["top1"]
    return row


def spread(values: list[float]) -> str:
    """'mean +- standard deviation', or the value alone."""
    mean = statistics.mean(values)
    digits = 3 if mean < 1.5 else 1 if mean < 1000 else 0
    more = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{more}"


def table(rows: list[dict], study: str) -> str:
    """Markdown: a line per variant, mean and standard deviation over the seeds, the paper's beside it; first
    the networks before training, one per seed."""
    columns = {k: v for k, v in COLUMNS.items() if any(k in r for r in rows)}
    names = list(dict.fromkeys(r["variant"] for r in rows))
    paper = [" *paper: CLS / PAT / fine-tuned* |"] if study == "table4" else []
    head = ["rec cls pat" if paper else "variant", "seeds", *columns.values()]
    head = "| " + " | ".join(head) + " |" + "".join(paper)
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    before = {r["seed"]: {k: r.get(f"{k}_untrained") for k in columns} for r in rows}
    groups = {"untrained": list(before.values())}
    groups |= {n: [r for r in rows if r["variant"] == n] for n in STUDIES[study] if n in names}
    for name, mine in groups.items():
        values = [[r[k] for r in mine if r.get(k) is not None] for k in columns]
        cells = [spread(v) if v else "" for v in values]
        theirs = f" *{' / '.join(map(str, PAPER[name]))}*" if name in PAPER else ""
        lines.append(f"| {name} | {len(mine)} | " + " | ".join(cells) + " |" + f"{theirs} |" * bool(paper))
    return "\n".join(lines) + "\n"


def curves(rows: list[dict], study: str) -> Image.Image:
    """k-NN over the epochs, CLS on the left and PAT on the right, a line per variant (mean of the seeds)."""
    k, wide, high = 2, 460, 320                                        # drawn k times larger: smooth lines
    out = Image.new("RGB", (2 * wide * k, high * k), "white")
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(12 * k)
    last = max((p[0] for r in rows for p in r["curve"]), default=1)
    most = max((max(p[1:]) for r in rows for p in r["curve"]), default=100)
    top, bottom = 40 * k, (high - 30) * k
    for panel, head in enumerate(("CLS", "PAT")):
        left, right = (panel * wide + 36) * k, ((panel + 1) * wide - (130 if panel else 20)) * k

        def at(epoch, value, left=left, right=right):
            return left + epoch / last * (right - left), bottom - value / most * (bottom - top)
        draw.text((left, 10 * k), f"k-NN {head}, %, by epoch", fill="black", font=font)
        for value in range(0, int(most) + 1, 20):
            draw.line([at(0, value), at(last, value)], fill=(225, 225, 225), width=k)
            draw.text((left - 4 * k, at(0, value)[1]), str(value), fill=(90, 90, 90), font=font, anchor="rm")
        for epoch in (0, last):
            draw.text((at(epoch, 0)[0], bottom + 5 * k), str(epoch), fill="black", font=font, anchor="ma")
        for i, name in enumerate(n for n in STUDIES[study] if any(r["variant"] == n for r in rows)):
            mine = [{p[0]: p[1 + panel] for p in r["curve"]} for r in rows if r["variant"] == name]
            shared = sorted(set.intersection(*map(set, mine)))                              # epochs
            line = [at(epoch, statistics.mean(m[epoch] for m in mine)) for epoch in shared]
            colour = tuple((0.75 * COLOURS[i % len(COLOURS)]).astype(int).tolist())         # for white paper
            draw.line(line, fill=colour, width=2 * k, joint="curve")
            if panel:
                draw.text((right + 10 * k, (50 + 18 * i) * k), name, fill=colour, font=font)
    return out.resize((2 * wide, high), SMOOTH)


def draw(out: Path, study: str) -> str:
    """Write table.md, which is returned, and curves.png from results.jsonl."""
    rows = read_lines(out / "results.jsonl")
    text = table(rows, study)
    (out / "table.md").write_text(text)
    curves(rows, study).save(out / "curves.png")
    return text


def main(args: argparse.Namespace) -> None:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.jsonl"
    chosen = {k: v for k, v in STUDIES[args.study].items() if k in (args.variants or STUDIES[args.study])}
    for seed in args.seeds:
        for name, options in chosen.items():
            done = [r for r in read_lines(file) if (r["variant"], r["seed"]) == (name, seed)]
            for key, now in how(options, args).items():
                if done and done[0].get(key) != now:
                    raise ValueError(f"{file}: {name}, seed {seed}, was run with other options, "
                                     f"{done[0].get(key)}, not {now}: give another --out")
            if done:
                continue
            print(f"{args.study} {name}, seed {seed}", flush=True)
            distributed.append_json(file, run_variant(name, options, seed, args))
            draw(out, args.study)
    print(draw(out, args.study))


def get_args(argv=None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error, a = distributed.fail, p.add_argument
    a("--study", default="table4", choices=list(STUDIES),
      help="which variants (default table4: which losses are on)")
    a("--variants", nargs="+", metavar="NAME", help="only these of the study, such as 111 010")
    a("--seeds", type=int, nargs="+", default=[0], help="seeds of pretraining and fine-tuning (default 0)")
    a("--out", required=True, metavar="DIR", help="folder of results.jsonl, table.md, curves.png")
    a("--work", metavar="DIR", help="folder of the runs and weights (default out/ablation/NAME of --out)")
    a("--coco", metavar="DIR", help="prompt segmentation and overlap on COCO val2017")
    a("--voc", metavar="DIR", help="the same on PASCAL VOC")
    a("--zeroshot_options", default="--limit 80",
      help="one string of options of zeroshot.py (default: --limit 80; '--size 240 --limit 80' gives patches "
           "of 8 pixels the paper's 30 x 30 tokens)")
    a("--finetune", metavar="DIR", help="fine-tune each on this labelled folder")
    a("--finetune_options",
      default="--epochs 10 --warmup_epochs 1 --lr 2e-3 --augment none --mixup 0 --cutmix 0",
      help="one string of options of finetune.py (default: a short schedule)")
    args = p.parse_args(argv[:cut])
    args.pretrain = argv[cut + 1:]
    wrong = set(args.variants or []) - set(STUDIES[args.study])
    if wrong:
        raise ValueError(f"--variants {', '.join(sorted(wrong))}: {args.study} has "
                         f"{', '.join(STUDIES[args.study])}")
    return args


if __name__ == "__main__":
    distributed.run(lambda: main(get_args()))
