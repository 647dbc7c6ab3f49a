"""One command for the paper's tables: every evaluation whose data is given, for every checkpoint.

    python benchmark.py --ckpt mmc.pth dino.pth random:vit_s/16 --coco COCO --voc VOCdevkit --davis DAVIS \\
        --imagenette imagenette --out out/benchmark                    # --quick: minutes, on small subsets
    torchrun --nproc_per_node=8 benchmark.py ...                       # the ranks share out the measurements

The evaluations are those of the scripts, with their protocols; Tables 4 and 7 (studies.ablation, finetune.py)
and Fig. 9 (probes.py layers) are not among them.  Written to OUT: results.jsonl, the lines that the scripts'
--json has; report.md; report.html, one file with all pictures.
The same command goes on after an interruption: what results.jsonl has, with the same weights, images and
protocol, is not done again.  A measurement that a checkpoint is not fit for is left out, and the report says
why.  The ranks of torchrun do not wait for each other; the last to end has written the whole report.

Networks of other patch sizes: --grid 30 compares all at 30x30 tokens, --size 480 at 480 pixels (the paper).
--also changes the options of one script: --also linseg "--iters 300 --lr 3e-3".
Cost: that of the networks, said before the work begins; --quick is made for 10 minutes on two CPU cores."""
import argparse
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import checkpoint
import data
import davis
import linseg
import probes
import retrieval
import run
import videos
import zeroshot
from distributed import say
from images import crop_size
from labelmaps import Pairs
from model import ViT
from report import TABLES, write_report
from run import Mistake

QUICK = {                                      # options of a script with --quick
    "zeroshot": "--limit 20",
    "variance": "--limit 8 --views 16",
    "linseg": "--crop 224 --iters 40 --batch_size 4 --lr 3e-3",
    "retrieval": "--imsize 64",
}
CLASSES = 20                                   # with --quick at most, and images of each of them:
TRAIN = 50
TEST = 20
NEEDS = {                                      # what is not measured without this option
    "coco": "Tables 1 and 5 on COCO",
    "voc": "prompts and linear segmentation on VOC",
    "ade20k": "Table 3 on ADE20K",
    "cityscapes": "Table 3 on Cityscapes",
    "davis": "Table 2 on DAVIS",
    "imagenette": "Tables 4, 6, 8, 10, 11 on folders of classes",
    "retrieval": "Table 9 on Oxford and Paris",
}
SEEDED = "zeroshot fewshot variance linseg".split()      # what --seeds changes
PHOTOS = {"cat": "225,150", "coffee": "300,200"}         # in docs/, and where they are clicked
ELSEWHERE = [
    "Table 4, which loss does what: python -m studies.ablation trains and measures it",
    "Table 7, Fig. 4 and 7, fine-tuning: finetune.py",
]


# ------------------------------------------------- what there is to do
class Network(NamedTuple):
    """A checkpoint, loaded.  fault: why it cannot be measured."""
    ckpt: str
    name: str
    vit: ViT | None
    weights: str
    fault: str


class Job(NamedTuple):
    """An evaluation on a set of images, for any network.

    options: (network, seed) -> the options of its script.  work: (options, network), appends a line to the
    options' json.  cost: options -> how many images go through the network, and their side in pixels."""
    eval: str
    data: str
    digest: str
    options: Callable
    work: Callable
    cost: Callable


def parse(args, eval: str, words: list, ckpt: str = "-", seed: int = 0) -> argparse.Namespace:
    """The options of a script: `words`, what all scripts share, then --quick, then --also."""
    words = [*words, "--ckpt", ckpt, "--device", args.device, "--precision", args.precision]
    words += ["--json", f"{args.out}/results.jsonl"]
    if args.quick:
        words += QUICK.get(eval, "").split()
    for which, text in args.also:
        if which == eval:
            words += shlex.split(text)
    script = {"zeroshot": zeroshot, "davis": davis}.get(eval, probes)
    if script is probes:
        words.insert(0, eval)
    own = script.get_args([str(word) for word in words])
    own.seed = seed
    own.num_workers = args.num_workers
    return own


def dense_size(args, vit: ViT) -> int:
    """Pixels of the side of an image whose patches are compared."""
    if args.grid:
        return args.grid * vit.patch_size
    return zeroshot.working_size(args.size, vit.patch_size)


def prompt_job(args, option: str, device) -> Job:
    """Tables 1 and 5, Fig. 5.  option: coco or voc."""
    words = [f"--{option}", getattr(args, option)]
    scenes = zeroshot.open_scenes(parse(args, "zeroshot", words))

    def options(network: Network, seed: int):
        size = dense_size(args, network.vit)
        picture = f"{args.out}/pictures/similarity_{option}_{network.weights}_{size}.png"
        more = ["--size", size, "--similarity", picture]
        return parse(args, "zeroshot", words + more, network.ckpt, seed)

    def work(own, network: Network):
        zeroshot.table_main(own, [network.vit], device)

    def cost(own):
        return len(scenes), own.size

    return Job("zeroshot", scenes.title, data.digest(scenes), options, work, cost)


def probe_job(args, probe: str, folder: str, device) -> Job:
    """k-NN, few-shot or variance on a folder of classes."""
    val = Path(folder) / "val"
    if probe == "variance" and val.is_dir():
        folder = str(val)
    words = ["--data", folder]
    sources = probes.open_sources(parse(args, probe, words))
    if args.quick and probe != "variance":
        numbers = [TRAIN, TEST][-len(sources):]
        sources = [few_of_each(images, n) for images, n in zip(sources, numbers, strict=True)]

    def options(network: Network, seed: int):
        size = args.crop_size or crop_size(network.vit.patch_size, None)
        return parse(args, probe, [*words, "--size", size], network.ckpt, seed)

    def work(own, network: Network):
        probes.run_one(own, network.ckpt, network.vit, sources, device)

    def cost(own):
        images = 2 * own.limit * own.views if probe == "variance" else sum(map(len, sources))
        return images, own.size

    digest = "-".join(map(data.digest, sources))
    return Job(probe, folder, digest, options, work, cost)


def few_of_each(images, n: int) -> data.Subset:
    """The first n images of each of the first CLASSES classes."""
    taken = Counter()
    index = []
    for i, label in enumerate(images.labels):
        if label < CLASSES and taken[label] < n:
            taken[label] += 1
            index.append(i)
    return data.Subset(images, index)


def davis_job(args, folder: str, device) -> Job:
    """Table 2."""
    words = ["--davis", folder, "--overlay"]
    clips = videos.find_clips(parse(args, "davis", words), Counter())
    if args.quick:
        clips = clips[:1]
        words += ["--sequences", clips[0].name]
    frames = sum(len(clip.frames) for clip in clips)

    def options(network: Network, seed: int):
        size = args.grid * network.vit.patch_size if args.grid else args.size
        folder = f"{args.out}/davis/{network.weights}_{size}"
        more = ["--size", size, "--size_multiple", max(1, 64 * size // 480), "--output_dir", folder]
        return parse(args, "davis", words + more, network.ckpt, seed)

    def work(own, network: Network):
        entry = davis.entry_of(own, network.ckpt, network.vit, Path(own.output_dir))
        davis.run_one(own, clips, entry, device)

    def cost(own):
        return 2 * frames, own.size                                    # wide frames, and the propagation

    first_masks = {clip.name: torch.from_numpy(clip.first) for clip in clips}
    return Job("davis", folder, checkpoint.digest(first_masks), options, work, cost)


def linseg_job(args, folder: str, device) -> Job:
    """Table 3, and the last column of Table 1."""
    words = ["--data", folder]
    layout = parse(args, "linseg", words).layout
    train = Pairs(folder, "train", layout)
    val = Pairs(folder, "val", layout)
    if args.quick:
        val.pairs = val.pairs[:TEST]

    def options(network: Network, seed: int):
        own = parse(args, "linseg", words, network.ckpt, seed)
        own = linseg.own_args(own, network.ckpt, network.vit, train)
        chosen = [getattr(own, name) for name in linseg.PROTOCOL]
        own.output_dir = f"{args.out}/linseg/{network.weights}_{data.seed_of(chosen):x}"
        return own

    def work(own, network: Network):
        linseg.run_one(own, network.vit, train, val, device)

    def cost(own):
        return own.iters * own.batch_size + 4 * len(val), own.crop

    digest = f"{data.digest(train)}-{data.digest(val)}"
    return Job("linseg", folder, digest, options, work, cost)


def retrieval_job(args, folder: str, device) -> Job:
    """Table 9."""
    images = retrieval.Revisited(folder)

    def options(network: Network, seed: int):
        return parse(args, "retrieval", ["--data", folder], network.ckpt, seed)

    def work(own, network: Network):
        retrieval.run_one(own, network.ckpt, network.vit, images, device)

    def cost(own):
        return len(images) * len(own.scales), own.imsize

    return Job("retrieval", folder, data.digest(images), options, work, cost)


def open_jobs(args, device) -> tuple[list[Job], list[str]]:
    """The evaluations whose data is given, and what is not measured and why.  Raises Mistake for data that is
    not there or is no such set."""
    missing = [f"{what}: needs --{option}" for option, what in NEEDS.items() if not getattr(args, option)]
    jobs = [prompt_job(args, option, device) for option in ("voc", "coco") if getattr(args, option)]
    jobs += [probe_job(args, "knn", folder, device) for folder in args.imagenette]
    for probe in ("fewshot", "variance"):
        jobs += [probe_job(args, probe, folder, device) for folder in args.imagenette[:1]]
    if args.davis:
        jobs.append(davis_job(args, args.davis, device))
    for option in "voc coco ade20k cityscapes".split():
        folder = getattr(args, option)
        try:
            jobs += [linseg_job(args, folder, device)] if folder else []
        except Mistake as e:                                           # there are no images to train with
            missing.append(f"linear segmentation on {folder}: {e}")
    jobs += [retrieval_job(args, folder, device) for folder in args.retrieval]
    missing += [f"{eval}: --skip" for eval in args.skip]
    return [job for job in jobs if job.eval not in args.skip], missing + ELSEWHERE


# ------------------------------------------------- doing it
@torch.no_grad()
def open_network(args, ckpt: str, device) -> Network:
    """Raises Mistake for a file that is not there; one without a network, or a broken one, has a fault."""
    name = checkpoint.short_name(ckpt)
    try:
        vit = checkpoint.open_backbone(args, ckpt, device)
    except Mistake as e:
        if not Path(ckpt).is_file():
            raise
        return Network(ckpt, name, None, "", str(e))
    side = 4 * vit.patch_size
    tokens = vit(torch.ones(1, 3, side, side, device=device))
    fault = "" if tokens.isfinite().all() else "its features are not finite"
    return Network(ckpt, name, vit, checkpoint.digest(vit), fault)


def is_there(job: Job, network: Network, own: argparse.Namespace) -> bool:
    """Whether a line has this measurement: each choice in its protocol is that of the option of its name."""
    for line in run.read_lines(Path(own.json)):
        if (line["eval"], line["weights"], line["data_digest"]) != (job.eval, network.weights, job.digest):
            continue
        protocol = line["protocol"]
        protocol.pop("sequences", None)
        if all(getattr(own, name, None) in (None, value) for name, value in protocol.items()):
            return True
    return False


def planned(args, job: Job, network: Network, seed: int) -> argparse.Namespace | None:
    """The options of a measurement that is still to be made; None for one that is there, or cannot be made,
    which is noted."""
    try:
        if network.fault:
            raise Mistake(network.fault)
        own = job.options(network, seed)
    except Mistake as e:
        note_failure(args, job, network, str(e))
        return None
    drawn = Path(getattr(own, "similarity", own.json)).exists()        # a picture is written after its line
    return None if drawn and is_there(job, network, own) else own


@cache
def seconds_of(network: Network, side: int, device) -> float:
    """About how long an image of this size takes; timed once for all jobs."""
    side = zeroshot.working_size(side, network.vit.patch_size)
    x = torch.zeros(1, 3, side, side, device=device)
    for _ in range(2):                                                 # the first one warms up
        start = time.perf_counter()
        network.vit(x).sum().item()
        seconds = time.perf_counter() - start
    return seconds


def measure(args, job: Job, network: Network, own: argparse.Namespace) -> None:
    """One measurement.  One that fails is noted, and the others go on."""
    try:
        job.work(own, network)
    except Mistake as e:
        note_failure(args, job, network, str(e))
    except SystemExit as e:                                            # of a training, which has said why
        if e.code == run.STOPPED:
            raise
        note_failure(args, job, network, f"its training ended with code {e.code}")


def note_failure(args, job: Job, network: Network, why: str) -> None:
    say(f"{network.name}, {job.eval} on {job.data}, left out: {why}")
    line = {"name": network.name, "eval": job.eval, "data": job.data, "why": why}
    run.append_json(f"{args.out}/failed.jsonl", line)


def draw(args, network: Network, photo: str, device) -> None:
    """Fig. 1 and 6 of one photo."""
    size = dense_size(args, network.vit)
    image = Path(__file__).parent / f"docs/{photo}.jpg"
    out = f"{args.out}/pictures/prompt_{photo}_{network.weights}_{size}.png"
    words = ["--ckpt", network.ckpt, "--image", str(image), "--point", PHOTOS[photo]]
    own = zeroshot.get_args([*words, "--size", str(size), "--out", out])
    zeroshot.picture_main(own, [network.vit], device)


def main(args) -> None:
    rank = int(os.environ.pop("RANK", 0))
    ranks = int(os.environ.pop("WORLD_SIZE", 1))                       # each works as if it were alone
    device = run.begin(args)
    out = Path(args.out)
    lines = out / "results.jsonl"
    with run.writing(out, "--out "):
        (out / "pictures").mkdir(parents=True, exist_ok=True)
        lines.touch()
    if rank == 0:
        run.lock(out)
        (out / "failed.jsonl").unlink(missing_ok=True)

    networks = [open_network(args, ckpt, device) for ckpt in args.ckpt]
    jobs, missing = open_jobs(args, device)
    for network in networks[rank::ranks]:
        for photo in PHOTOS if not network.fault else ():
            draw(args, network, photo, device)
    cells = []
    for job in jobs:
        seeds = args.seeds if job.eval in SEEDED else [0]
        cells += product([job], networks, seeds)
    todo = []
    total = 0
    for job, network, seed in cells[rank::ranks]:
        own = planned(args, job, network, seed)
        if own:
            images, side = job.cost(own)
            seconds = images * seconds_of(network, side, device)
            todo.append((job, network, own, seconds))
            total += seconds
    say(f"{len(todo)} measurements to make, of {len(cells)}: about {total / 60:.0f} minutes")

    bar = tqdm(total=round(total), unit="s", disable=None)
    for job, network, own, seconds in todo:
        bar.set_description(f"{job.eval}, {network.name}")
        measure(args, job, network, own)
        bar.update(round(seconds))
        write_report(out, networks, missing)
    write_report(out, networks, missing)
    say(f"look at {out / 'report.html'}")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = run.Parser(description=__doc__)
    a = p.add_argument
    run.add_shared(p, "ckpt checkpoint_key num_heads")
    a("--out", default="out/benchmark", help="folder of results and report (default: %(default)s)")
    a("--quick", action="store_true", help="small subsets and short trainings: to see that all works")
    a("--size", type=run.count, default=480, help="pixels of a side where patches are compared, to the "
      "nearest multiple of the patch (paper 480)")
    a("--grid", type=run.count, metavar="N", help="in its place N x N tokens for every network")
    a("--crop_size", type=run.count, help="pixels for k-NN, few-shot, variance (224, to whole patches)")
    a("--seeds", type=int, nargs="+", default=[0], help="the report has their mean and spread (default: 0)")
    a("--also", nargs=2, action="append", default=[], metavar=("EVAL", "OPTIONS"),
      help=f"more options for the script of EVAL: {', '.join(TABLES)}")
    a("--skip", nargs="+", default=[], choices=list(TABLES), help="leave these out")

    a = p.add_argument_group("data").add_argument
    for option in "coco voc ade20k cityscapes davis".split():
        a(f"--{option}", metavar="DIR", help=NEEDS[option])
    a("--imagenette", nargs="+", default=[], metavar="DIR", help="folders with train/ and val/ of classes: "
      "imagenette, ImageNet or others; few-shot and variance take the first")
    a("--retrieval", nargs="+", default=[], metavar="DIR", help=NEEDS["retrieval"])
    run.add_shared(p, "num_workers device precision")
    args = p.parse_args(argv)

    unknown = sorted({eval for eval, _ in args.also} - set(TABLES))
    if unknown:
        raise Mistake(f"--also {unknown[0]}: expected one of {', '.join(TABLES)}")
    return args


if __name__ == "__main__":
    run.script(main, get_args)
