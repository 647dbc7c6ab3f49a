"""Write docs/RESULTS.md from the lines of results/: every number in it comes from there.

    python -m studies.results                  # writes docs/RESULTS.md
    python -m studies.results --check          # says which numbers in it are not those of results/

results/benchmark.jsonl has the lines of benchmark.py, and each study its folder.  A row of older code is
marked (age.py)."""
import argparse
import itertools
import json
import re
import statistics
from pathlib import Path

import run
from report import markdown, number_at, sections
from studies import ablation, gpu, rivals, tokens, weights
from studies.age import MARK, mark, marked_part

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
PAGE = ROOT / "docs/RESULTS.md"
KNN = ("knn_cls", "knn_pat")
CLICKS = ("coco", "coco_auto", "voc", "voc_auto")
NAMES = {
    "mmc.pth": "mmc.pth",
    "random:vit_mini/8": "random ViT-mini/8",
    "random:vit_s/16": "random ViT-S/16",
    "random:vit_b/16": "random ViT-B/16",
    "vits14_dinov2_saliency_fp16.pth": "DINOv2-S/14, saliency-tuned",
}


# ------------------------------------------------- what is there
def lines_of(name: str) -> list[dict]:
    return run.read_lines(RESULTS / name)


def find(lines: list[dict], eval: str, ckpt: str, data: str, size: int | None = None) -> dict:
    """The metrics of the last line of this kind; empty without one."""
    found = {}
    for line in lines:
        same = (line["eval"], line["ckpt"], line["data"]) == (eval, ckpt, data)
        if same and size in (None, line["protocol"].get("size")):
            found = line["metrics"]
    return found


def number(line: dict, key: str, digits: int = 1) -> str:
    """key: as in report.Column, such as 'cls 10'."""
    value = number_at(line, key)
    return "" if value is None else f"{value:.{digits}f}"


# ------------------------------------------------- the first screen
def cells_of(study: list[dict], variant: str, keys: tuple[str, ...] = KNN) -> str:
    """'k-NN CLS / PAT' of a variant, or its other measures, each with its deviation over several seeds."""
    rows = [row for row in study if row["variant"] == variant]
    return " / ".join(ablation.cell(rows, key) for key in keys)


def gap(study: list[dict], variant: str) -> str:
    """How much higher CLS is than PAT."""
    rows = [row for row in study if row["variant"] == variant]
    return f"{statistics.mean(row['knn_cls'] - row['knn_pat'] for row in rows):.1f}"


def untrained(study: list[dict]) -> str:
    seeds = list({row["seed"]: row for row in study}.values())
    return f"{ablation.cell(seeds, 'knn_cls_untrained')} / {ablation.cell(seeds, 'knn_pat_untrained')}"


def several(study: list[dict], *variants: str, keys: tuple[str, ...] = KNN) -> str:
    return "; ".join(f"{variant}: {cells_of(study, variant, keys)}" for variant in variants)


def claims() -> str:
    """The paper's claims, with the paper's numbers and ours."""
    toy = lines_of("toy/results.jsonl")
    longer = lines_of("imagenette_20/results.jsonl")
    paper = ablation.PAPER

    def theirs(*variants: str) -> str:
        return "; ".join(f"{variant}: {paper[variant].rsplit(' / ', 1)[0]}" for variant in variants)

    def gaps(study: list[dict]) -> str:
        return ", ".join(f"{variant} {gap(study, variant)}" for variant in ("010", "011", "110", "111"))

    clicks = several(longer, "111", "011", "010", keys=CLICKS)
    rows = [
        ["(a) all three losses together are best", theirs("111", "011"),
         several(longer, "111", "011", "010"), several(toy, "111", "011", "010"),
         "imagenette: yes, rec adds to PAT and to the click, not to CLS. COCO best t / auto / VOC best t / "
         f"auto: {clicks}. **Not** for PAT at epochs 5 and 10, and not on the toy world, "
         "where in each seed 010 has the higher CLS and 011 the higher PAT"],
        ["(b) without cls, CLS falls by tens of points", theirs("101", "001"),
         several(longer, "101", "001"), several(toy, "101", "001"),
         "toy: yes, to chance. imagenette: by eight points, **not** by tens"],
        ["(c) pat closes the gap from CLS to PAT", theirs("010", "011"),
         f"gap: {gaps(longer)}", f"gap: {gaps(toy)}",
         "imagenette: yes, with rec to nothing, without it by a third. toy: by ten points without rec, "
         "**not** with it"],
        ["(d) rec alone has poor k-NN", theirs("100"),
         f"{several(longer, '100')}; untrained: {untrained(longer)}",
         f"{several(toy, '100')}; untrained: {untrained(toy)}", "yes"],
    ]
    return markdown(["claim", "paper", "imagenette, 20 epochs", "toy world", "holds here?"], rows)


def headlines(lines: list[dict]) -> str:
    """One row per measure, one column per network."""
    sizes = {"mmc.pth": 240, "random:vit_mini/8": 240, "random:vit_s/16": 480,
             "vits14_dinov2_saliency_fp16.pth": 420}                   # 30 x 30 tokens
    measures = [
        ("one click on COCO, best t: mIoU", "38.4", "zeroshot", "COCO val2017", "best", 1),
        ("the same, automatic t", "", "zeroshot", "COCO val2017", "auto", 1),
        ("overlap O on COCO (lower is better)", ".55", "zeroshot", "COCO val2017", "overlap", 3),
        ("one click on VOC, best t: mIoU", "", "zeroshot", "VOC val", "best", 1),
        ("the same, automatic t", "", "zeroshot", "VOC val", "auto", 1),
        ("k-NN on imagenette, CLS", "77.5", "knn", "imagenette", "cls 10", 1),
        ("k-NN on imagenette, PAT", "77.0", "knn", "imagenette", "pat 10", 1),
        ("k-NN on imagewoof, CLS", "", "knn", "imagewoof", "cls 10", 1),
        ("5-way 1-shot, imagenette: accuracy", "", "fewshot", "imagenette", "accuracy", 1),
        ("DAVIS, three sequences: J&F", "60.3", "davis", "DAVIS", "J&F-Mean", 1),
        ("linear segmentation of COCO, a short form: mIoU", "46.4", "linseg", "coco", "miou", 1),
    ]
    rows = []
    for title, paper, eval, name, key, digits in measures:
        row = [title]
        for ckpt, size in sizes.items():
            dense = size if eval in ("zeroshot", "davis") else None
            row.append(number(find(lines, eval, ckpt, name, dense), key, digits))
        rows.append([*row, f"*{paper}*" if paper else ""])
    return markdown(["", *(NAMES[ckpt] for ckpt in sizes), "*paper's MMC*"], rows)


def three_clicks() -> str:
    """The mIoU of our network and of the untrained one, on each set of photographs."""
    asked = {"points": 3, "target": "class", "centre": False, "contiguous": False}
    lines = [line for line in lines_of("masks.jsonl") if asked.items() <= line["protocol"].items()]
    texts = []
    for name in ("COCO val2017", "VOC val"):
        ours = find(lines, "zeroshot", "mmc.pth", name, 240)
        untrained = find(lines, "zeroshot", "random:vit_mini/8", name, 240)
        texts.append(f"{name} {number(ours, 'auto')}, untrained {number(untrained, 'auto')}")
    return "; ".join(texts)


# ------------------------------------------------- the run on a GPU
def epochs_table(log: list[dict]) -> str:
    """k-NN and losses of the epochs that were evaluated, and of the last step."""
    steps = [line for line in log if "step" in line]
    rows = []
    for line in [line for line in log if "knn_cls" in line] + steps[-1:]:
        before = [step for step in steps if step["epoch"] <= line["epoch"] + 1e-6]
        losses = before[-1] if before else {}
        cells = [number(losses, name, 2) for name in ("loss", "rec", "pat", "cls")]
        knn = [number(line, "knn_cls"), number(line, "knn_pat")]
        rows.append([f"{line['epoch']:.0f}", *knn, *cells])
    return markdown(["epoch", "k-NN CLS", "k-NN PAT", "loss", "rec", "pat", "cls"], rows)


def gpu_part() -> str:
    about = json.loads((RESULTS / "gpu/gpu.json").read_text())
    training = about["pretraining"][0]
    runs = lines_of("weights/runs.jsonl")
    return f"""## The weights in the box, and speed on a GPU

mmc.pth is the first 4 blocks of a ViT of 6 (160 wide, patch 8), pretrained on the 9,469 train images of
imagenette by `python -m studies.weights`, one {about['device']}, torch {about['torch']}, code
{about['commit']}, in {about['seconds']['pretraining']:.0f} s. The run was planned for {training['epochs']}
epochs and ended with its time. k-NN of all 6 blocks on the 1,500 validation images, k = 10, in %; the losses
are means over the last steps before it:

{epochs_table(lines_of('gpu/log.jsonl'))}
The run and the blocks were chosen by the mIoU of one click on *train* images at 240 px: at the best t (which)
/ the automatic one. The runs of 36 and 37 epochs had those of imagewoof, VOC and COCO besides, 10,629 images;
`results/weights/runs.jsonl` has all options:

{weights.clicks_table(runs, lines_of('weights/clicks.jsonl'))}
The last blocks serve the losses more than the click: every run clicks as well or better some blocks before
its end. Trained on smaller crops, where a patch is a larger part of the object, it is better on VOC with the
automatic t, and its k-NN is lower.

Images per second of pretraining at 224 px, bf16, generated images, with `python -m studies.gpu` on the same
{about['device']}:

{gpu.throughput_table(about['throughput'])}"""


# ------------------------------------------------- studies of the losses and of decisions
def study(name: str) -> str:
    lines = lines_of(f"{name}/results.jsonl")
    return ablation.table(lines, lines[0]["study"])


def studies_part() -> str:
    imagenette = lines_of("imagenette_20/results.jsonl")
    options = imagenette[0]["options"]
    return f"""## Which loss does what, Table 4

Digits: rec, cls, pat, 1 = on. k-NN at k = 10 in %, chance is 10; "fine-tuned" is on imagewoof; mean and
standard deviation over the seeds. A standard deviation of two seeds says little.

**imagenette at 48 px, 20 epochs**, on an {imagenette[-1]['gpu']} that 14 runs shared, so each took 8 minutes;
evaluated on a CPU, COCO and VOC at 240 px. The second seeds of 100, 001 and 101 are not there:

```sh
SMALL=({" ".join(options[2:])})
python -m studies.ablation --seeds 0 1 --out results/imagenette_20 --coco coco --voc VOCdevkit \\
    --zeroshot_options "--size 240 --limit 80" --finetune imagewoof --finetune_options "--size 48 \\
    --epochs 10 --warmup_epochs 1 --lr 2e-3 --augment none --mixup 0 --cutmix 0" \\
    -- --data imagenette/train "${{SMALL[@]}}"
```

{study('imagenette_20')}
In both seeds rec on top of cls + pat adds 2 to 3 points of PAT, 2 to 5 of the click at the best of the ten t,
0 to 2 at the automatic one, 1 to 3 of fine-tuning, and nothing to CLS. So Eq. (1) helps what the paper is
about. For PAT it does so late: up to the tenth epoch that of 011 is the higher one. On top of cls alone it
takes 2 to 3 of PAT and adds 1 to 2 of the click on COCO. pat on top of rec + cls adds 3 points of CLS, 7 to 8
of PAT and 1 to 6 of the click at the best t; on top of cls alone 1 to 2 of CLS and 2 to 3 of PAT, and it
takes 2 of the click on VOC at the best t.

![k-NN over the epochs](../results/imagenette_20/curves.png)

**The toy world**, three seeds, each with a world and weights of its own: `python -m studies.ablation --out
results/toy --seeds 0 1 2`. The first row is `python pretrain.py --seed 0`, then 1 and 2:

{study('toy')}
![k-NN over the epochs](../results/toy/curves.png)

In each seed pat lifts the prompt IoU by 14 points or more, both of cls and of rec + cls. cls alone leaves it
below the untrained network's. pat without cls separates objects
best, and learns no class. In each seed, too, rec on top of cls + pat adds 1 to 3 points of CLS and takes 5 to
9 of PAT, and on top of cls alone it takes of both.

**Decisions that the paper leaves open**, one at a time: `python -m studies.ablation --study decisions --out
results/toy_decisions --seeds 0 1`, two or three runs at a time on two cores, one thread each:

{study('toy_decisions')}
The first row is 111 of the table above, the same two seeds, on one thread in place of two. So the order of
sums alone moves CLS by up to 0.9, PAT by up to 3.5 and the IoU by up to 0.6 points. In both seeds, beside
default:

- without BatchNorm in the heads the class is not learned;
- less of cls (`--w_cls 0.3`) or more of pat (`--w_pat 3`) adds 4 to 7 points of IoU, and takes 3 to 20 of CLS
  and 5 to 35 of PAT;
- 4 local crops add 8 and 14 of CLS, 22 and 7 of PAT, 2 and 5 of IoU; 10 of them, in this short run, do not;
- whole patches (`drop_align 8`) take 7 and 13 of the IoU; with masked anchors as well PAT gains 24 and 25,
  and the IoU loses as much as before or more;
- masked anchors alone take 9 and 33 of CLS; negatives at the same place only, and blocks that stay inside the
  image, take 2.5 to 5 of the IoU.

Two seeds of a toy do not overrule the paper's reading, which stays the default.
"""


def reconstruction_part() -> str:
    names = {"011": "w_rec 0", "111": "w_rec 1"}                       # rows of Table 4
    toy = [row for row in lines_of("toy/results.jsonl") if row["variant"] in names]
    rows = [row | {"variant": names[row["variant"]]} for row in toy]
    rows += lines_of("toy_reconstruction/results.jsonl")
    rows = [row for row in rows if row["seed"] in (0, 1)]              # those that all have
    return f"""## When does reconstruction help?

What the patch tokens of the networks of 20 epochs above have in common, in the last block, on 500 validation
images: `python -m studies.tokens --ckpt out/ablation/imagenette_20/*/backbone.pth --data imagenette/val
--size 48 --json results/tokens.jsonl`. The shares are of their mean squared length:

{tokens.table(lines_of("tokens.jsonl"))}
In the rows with cls or pat, what all tokens share has grown from next to nothing to 40 % of the squared
length and more. In each of the three pairs of these rows that differ in rec only, rec has less of it, and
more of what tells the patches of an image apart. So Eq. (1) works against the collapse of the last block.
This may be why it helps late: from the tenth epoch to the last, the PAT of 011 rises by 1.1 and 0.1 points in
the two seeds, that of 111 by 4.1 and 3.4. It is not all: rec does the same to the tokens of cls alone, and
takes of their PAT.

**The toy world**, where rec takes from PAT: `python -m studies.ablation --study reconstruction --out
results/toy_reconstruction --seeds 0 1`, one thread each. w_rec 0 and 1 are 011 and 111 of the toy table,
the same seeds:

{ablation.table(rows, "reconstruction")}
**imagenette, 5 epochs**, where rec does not help yet; `--out results/reconstruction --seeds 0 1 --coco coco
--voc VOCdevkit --zeroshot_options "--size 240 --limit 80" -- --data imagenette/train "${{SMALL[@]}}" --epochs
5`:

{study('reconstruction')}
What two seeds show, each beside the same seed of w_rec 1:

- **How much is corrupted** matters most. With half of it (`--drop_perc 0.25 0.375 --drop_replace 0.15`), CLS
  on the toy rises by 13 points and PAT by 21 and 28, and the click falls by 8 and 13. There, too, rec takes
  from PAT, 10 and 3 points, and adds 6 and 1 to the click.
- **Pixels normalised per patch**, as MAE's, add 1 to 5 points of CLS on the toy, in a third seed, too, and on
  imagenette 1 to 2 of CLS and of PAT. They take up to 1.4 of the click on the toy, and 0.9 on COCO. On the
  toy their PAT is 21 points higher in one seed and 1 lower in the other.
- **The weight of rec**, 0.3 or 3, and **its block** change PAT by 2 to 14 points, up in one seed and down in
  the other: two seeds cannot tell.

So on the toy rec costs PAT at either share of corruption, and gives a little of the click.
"""


# ------------------------------------------------- other methods
def rivals_part() -> str:
    finals = lines_of("rivals/final.jsonl")
    seconds = max(row.get("asked_seconds", 0) for row in finals)
    return f"""## MMC beside other methods, at equal time

The paper's Tables 1, 2, 5 and 11 in small. One network of 0.8 million parameters, the same images (train of
imagenette, 48 px) and augmentation, and about {seconds:.0f} seconds of a CPU thread for each, two seeds.
Epochs are whole, and their number follows from the fastest of four timings; the runs themselves shared the
machine and took longer. *Contrast of CLS* is Eq. (3) alone, *MAE's task* Eq. (1) alone with three quarters of
the patches grey. *DINO* and *iBOT* are their losses in our code, with BatchNorm in the heads and prototypes
that stand still. Each has the best of [four settings](#how-the-settings-of-the-methods-were-chosen), which
for MMC is `--w_rec .3` and batches of 64. The best of ours is bold. *Paper*: ViT-B on ImageNet-1K for COCO,
ViT-S on ImageNet-100 for DAVIS and k-NN; for O it names no architecture.

{rivals.final_table(finals)}
*The better mask* is `--centre --contiguous`. In both seeds **MMC is ahead** on the click, with each of the
three masks on both sets, on DAVIS, in O on VOC and in PAT on imagewoof. **It loses** to the contrast of CLS,
which sees nearly twice the images in this time: k-NN CLS on imagenette by 2 and 4 points in the two seeds, on
imagewoof by less than one, fine-tuning by 2.0 and 0.4. PAT on imagenette is level, and on O of COCO the seeds
disagree. DINO, iBOT and MAE's task are behind on the mean of every measure. iBOT and MAE's task have hardly
begun to learn; DINO's k-NN has risen by 5 to 8 points. At the best t all three click worse than the untrained
network. So this says what eleven minutes of a CPU give, not which method is best in the end. O does not
follow mIoU: on VOC, MAE's task has a lower, that is better, O than the untrained network, and a worse mIoU.
"""


def tries_part() -> str:
    tries = lines_of("rivals/tries.jsonl")
    untrained = tries[0]["before_and_after"]
    seconds = max(row.get("asked_seconds", 0) for row in lines_of("rivals/final.jsonl"))
    return f"""## How the settings of the methods were chosen

Four tries for each method in {tries[0]['asked_seconds']:.0f} s of a CPU thread, in whole epochs, on the same
1,500 train images. They are judged on 1,000 other train images and on VOC's train images, by the mean of k-NN
CLS, k-NN PAT and the click's mIoU at the best t. The losses of DINO and iBOT are those of [exercise
5](exercises/README.md). The best of each method is bold:

{rivals.tries_table(tries)}
`python -m studies.rivals --data imagenette/train --voc VOCdevkit --out results/rivals --seconds 300
--device cpu`. Untrained k-NN is {untrained['knn_cls_untrained']:.1f} / {untrained['knn_pat_untrained']:.1f}.
The contrast of CLS, which sees nearly twice the images in the time, is level with MMC. DINO rises clearly
above the untrained k-NN in one setting only, with standing prototypes, lr 1e-3 and momentum .96. iBOT and
MAE's task do not in this time. Then `python -m studies.rivals --data imagenette/train --voc VOCdevkit --out
results/rivals --device cpu --final --seconds {seconds:.0f} --seeds 0 1 --coco coco --davis DAVIS --knn
imagenette imagewoof --finetune imagewoof`.
"""


# ------------------------------------------------- the page
def page() -> str:
    lines = lines_of("benchmark.jsonl")
    devices = ", ".join(sorted({f"{line['device']}, torch {line['torch']}" for line in lines}))
    parts = [f"""# Results

Generated by `python -m studies.results` from the lines of `results/`; do not edit it by hand. Nothing
here is at the paper's scale: the paper's numbers are of ViT-S or ViT-B on ImageNet, ours of small
networks and of parts of public sets. The numbers say whether code and method behave, not which method is
best.

## Do the paper's claims hold at this scale?

k-NN CLS / PAT in %, k = 10, chance is 10. Paper: Table 4, ViT-S, ImageNet-100, 200 epochs. Ours: a ViT of
0.8 million parameters; imagenette at 48 px for 20 epochs, two seeds, of 100, 001 and 101 one; the toy world,
three seeds. Digits: rec, cls, pat, 1 = on.

{claims()}
{rivals_part()}
## What the weights in the box do

mmc.pth: 4 blocks, 1.3 million parameters, 66 epochs on imagenette without labels. All networks at 30 x 30
tokens where patches are compared, at 112 px elsewhere. random ViT-mini/8 has all 6 blocks. *Paper*, on whole
sets: ViT-B for mIoU on COCO, ViT-S for k-NN and DAVIS; for O it names no architecture.

{headlines(lines)}""", f"""mIoU of mmc.pth with three random clicks on the object and the automatic t:
{three_clicks()}. Better masks from the same clicks, with 1, 3 and 5 of them: [MASKS.md](MASKS.md).
There, interpolating the similarity to pixels is what sharpens edges; half a patch as stride gains at most
0.6 points of IoU and 4.9 of boundary F on top of that, for four times the tokens, so no further step was
built.

## Every table

```sh
python benchmark.py --ckpt mmc.pth random:vit_mini/8 random:vit_s/16 vits14_dinov2_saliency_fp16.pth \\
    --grid 30 --crop_size 112 --coco coco --voc VOCdevkit --davis DAVIS --imagenette imagenette imagewoof \\
    --also variance "--limit 10" --also linseg "--crop 168 --iters 150 --lr 3e-3 --batch_size 8"
```

Besides, with `--skip linseg`: random:vit_b/16 on COCO and VOC, and mmc.pth there with `--size 480`. Linear
segmentation is a short form of 150 iterations on the 80 train images of each set, so its numbers only
rank the networks. Not measured: what is empty, and the sets that are not named here. Data: imagenette (10
ImageNet classes, 9,469 train and 1,500 validation images of 112 px), imagewoof (1,000 and 500), 80 images
of COCO val2017 and of VOC2012 val, three sequences of DAVIS-2017; `results/subsets.json` names the files.
*DINOv2-S/14, saliency-tuned* was tuned by a third party and is not the published DINOv2. Lines:
`results/benchmark.jsonl` ({devices}). The best of ours is bold.
"""]
    for title, table in sections(lines, NAMES, mark):
        parts.append(f"### {title}\n\n{table}")
    notes = marked_part(lines)
    if notes:
        parts.append(f"Rows with{MARK} are by code older than the last change of these files, which need not "
                     f"have changed the numbers:\n\n{notes}")
    parts += [gpu_part(), studies_part(), reconstruction_part(), tries_part()]
    return "\n".join(parts)


def unmarked(text: str) -> list[str]:
    """The lines of the page without what git says about their age."""
    kept = [line for line in text.splitlines() if not line.startswith(("- †", "Rows with †"))]
    return [line.replace(MARK, "") for line in kept]


def differences(stored: str, made: str) -> list[str]:
    """What differs between two pages, line by line: the numbers, or else the lines."""
    found = []
    before = unmarked(stored)
    now = unmarked(made)
    for i, (there, here) in enumerate(itertools.zip_longest(before, now, fillvalue=""), 1):
        if there == here:
            continue
        pattern = r"\d*\.?\d+"
        pairs = list(zip(re.findall(pattern, there), re.findall(pattern, here), strict=False))
        other = [f"{a} is {b}" for a, b in pairs if a != b]
        same_words = re.sub(pattern, "", there) == re.sub(pattern, "", here)
        row = here.split("|")[1].strip() if here.startswith("|") else here[:60]
        what = ", ".join(other) if other and same_words else f"{there[:80]!r} is {here[:80]!r}"
        found.append(f"line {i}, {row}: {what} in results/")
    return found


def main(args: argparse.Namespace) -> None:
    made = page()
    if args.check:
        found = differences(PAGE.read_text(), made)
        if found:
            raise run.Mistake(f"{PAGE.relative_to(ROOT)} is not what results/ say: " + "; ".join(found[:10]))
        print("the same")
        return
    PAGE.write_text(made)
    print(f"wrote {PAGE.relative_to(ROOT)}")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = run.Parser(description=__doc__)
    p.add_argument("--check", action="store_true", help="write nothing, and say which numbers differ")
    return p.parse_args(argv)


if __name__ == "__main__":
    run.script(main, get_args)
