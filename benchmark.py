"""One command for the paper's tables: every evaluation whose data is given, for every checkpoint.

    python benchmark.py --ckpt mmc.pth dino.pth random:vit_s/16 --coco COCO --voc VOCdevkit --davis DAVIS \\
        --imagenette imagenette --out out/benchmark                    # --quick: minutes, on small subsets
    torchrun --nproc_per_node=8 benchmark.py ...                       # the ranks share out the measurements

The evaluations are those of the scripts, with their protocols; a checkpoint is loaded once.  Written to OUT:
results.jsonl, the lines that the scripts' --json has; report.md; report.html, one file with all pictures.
The same command goes on after an interruption: what results.jsonl has, with the same weights, images and
protocol, is not done again.  A measurement that a checkpoint is not fit for is left out, and the report says
why.  The ranks of torchrun do not wait for each other; the last to end has written the whole report.

Networks of other patch sizes: --grid 30 compares all at 30x30 tokens, --size 480 at 480 pixels (the paper).
--also changes the options of one script: --also linseg "--iters 300 --lr 3e-3".
Cost: the networks', said before the work begins; --quick is made for 10 minutes on two CPU cores."""
import argparse
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import checkpoint
import data
import davis
import figure
import linseg
import probes
import retrieval
import run
import videos
import zeroshot
from distributed import say
from images import crop_size, read_image
from labelmaps import Pairs
from model import ViT
from report import TABLES, find_pictures, write_report
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
PHOTOS = [str(Path(__file__).parent / "docs" / name) for name in ("cat.jpg", "coffee.jpg")]
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
    seeds: list[int]
    options: Callable
    work: Callable
    cost: Callable


def parse(args, eval: str, get_args: Callable, ckpt: str, *words) -> argparse.Namespace:
    """The options of a script: `words`, what all scripts share, then --quick, then --also."""
    shared = ["--ckpt", ckpt, "--device", args.device, "--precision", args.precision,
              "--json", Path(args.out) / "results.jsonl"]
    own = QUICK.get(eval, "").split() if args.quick else []
    for which, text in args.also:
        if which == eval:
            own += shlex.split(text)
    return get_args([str(word) for word in [*words, *shared, *own]])


def dense_size(args, vit: ViT) -> int:
    """Pixels of the side of an image whose patches are compared."""
    if args.grid:
        return args.grid * vit.patch_size
    return zeroshot.working_size(args.size, vit.patch_size)


def prompt_job(args, option: str, folder: str, device: torch.device) -> Job:
    """Tables 1 and 5, Fig. 5.  option: coco or voc."""
    def options(network: Network, seed: int):
        size = dense_size(args, network.vit)
        picture = Path(args.out) / f"pictures/similarity_{option}_{network.weights}_{size}.png"
        return parse(args, "zeroshot", zeroshot.get_args, network.ckpt, f"--{option}", folder, "--size", size,
                     "--seed", seed, "--similarity", picture, "--num_workers", args.num_workers)

    any_network = parse(args, "zeroshot", zeroshot.get_args, "-", f"--{option}", folder)
    scenes = zeroshot.open_scenes(any_network)
    return Job("zeroshot", scenes.title, data.digest(scenes), args.seeds, options,
               lambda own, network: zeroshot.table_main(own, [network.vit], device),
               lambda own: (len(scenes), own.size))


def probe_job(args, probe: str, folder: str, device: torch.device) -> Job:
    """k-NN, few-shot or variance on a folder of classes."""
    val = Path(folder) / "val"
    if probe == "variance" and val.is_dir():
        folder = str(val)
    sources = probes.open_sources(parse(args, probe, probes.get_args, "-", probe, "--data", folder))
    if args.quick and probe != "variance":
        each = [TRAIN, TEST][-len(sources):]
        sources = [few_of_each(images, n) for images, n in zip(sources, each, strict=True)]

    def options(network: Network, seed: int):
        size = args.crop_size or crop_size(network.vit.patch_size, None)
        more = ["--seed", seed] if probe != "knn" else []
        more += ["--num_workers", args.num_workers] if probe != "variance" else []
        return parse(args, probe, probes.get_args, network.ckpt, probe, "--data", folder, "--size", size,
                     *more)

    def work(own, network: Network):
        size = crop_size(network.vit.patch_size, own.size)
        probes.run_one(own, network.ckpt, network.vit, sources, size, device)

    def cost(own):
        images = 2 * own.limit * own.views if probe == "variance" else sum(map(len, sources))
        return images, own.size
    digest = "-".join(data.digest(images) for images in sources)
    return Job(probe, folder, digest, [0] if probe == "knn" else args.seeds, options, work, cost)


def few_of_each(images, n: int) -> data.Subset:
    """The first n images of each of the first CLASSES classes."""
    taken = Counter()
    index = []
    for i, label in enumerate(images.labels):
        if label < CLASSES and taken[label] < n:
            taken[label] += 1
            index.append(i)
    return data.Subset(images, index)


def davis_job(args, folder: str, device: torch.device) -> Job:
    """Table 2."""
    words = ["--davis", folder, "--overlay"]
    clips = videos.find_clips(parse(args, "davis", davis.get_args, "-", *words), Counter())
    if args.quick:
        clips = clips[:1]
        words += ["--sequences", clips[0].name]

    def options(network: Network, _seed: int):
        size = args.grid * network.vit.patch_size if args.grid else args.size
        return parse(args, "davis", davis.get_args, network.ckpt, *words, "--size", size,
                     "--size_multiple", max(1, 64 * size // 480),
                     "--output_dir", Path(args.out) / f"davis/{network.weights}_{size}")

    def work(own, network: Network):
        entry = davis.entry_of(own, network.ckpt, network.vit, Path(own.output_dir))
        davis.run_one(own, clips, entry, device)

    frames = sum(len(clip.frames) for clip in clips)
    first_masks = {clip.name: torch.from_numpy(clip.first) for clip in clips}
    return Job("davis", folder, checkpoint.digest(first_masks), [0], options, work,
               lambda own: (2 * frames, own.size))                     # wide frames, and the propagation


def linseg_job(args, folder: str, device: torch.device) -> Job:
    """Table 3, and the last column of Table 1."""
    given = parse(args, "linseg", probes.get_args, "-", "linseg", "--data", folder)
    train = Pairs(folder, "train", given.layout)
    val = Pairs(folder, "val", given.layout)
    if args.quick:
        val.pairs = val.pairs[:TEST]

    def options(network: Network, seed: int):
        own = parse(args, "linseg", probes.get_args, network.ckpt, "linseg", "--data", folder, "--seed", seed,
                    "--num_workers", args.num_workers)
        own = linseg.own_args(own, network.ckpt, network.vit, train)
        chosen = [getattr(own, name) for name in linseg.PROTOCOL]
        own.output_dir = f"{args.out}/linseg/{network.weights}_{data.seed_of(chosen):x}"
        return own

    digest = f"{data.digest(train)}-{data.digest(val)}"
    return Job("linseg", folder, digest, args.seeds, options,
               lambda own, network: linseg.run_one(own, network.vit, train, val, device),
               lambda own: (own.iters * own.batch_size + 4 * len(val), own.crop))


def retrieval_job(args, folder: str, device: torch.device) -> Job:
    """Table 9."""
    images = retrieval.Revisited(folder)

    def options(network: Network, _seed: int):
        return parse(args, "retrieval", probes.get_args, network.ckpt, "retrieval", "--data", folder)

    return Job("retrieval", folder, data.digest(images), [0], options,
               lambda own, network: retrieval.run_one(own, network.ckpt, network.vit, images, device),
               lambda own: (len(images) * len(own.scales), own.imsize))


def open_jobs(args, device: torch.device) -> tuple[list[Job], list[str]]:
    """The evaluations whose data is given, and what is not measured and why.  Raises Mistake for data that is
    not there or is no such set."""
    missing = [f"{what}: needs --{option}" for option, what in NEEDS.items() if not getattr(args, option)]
    jobs = [prompt_job(args, option, getattr(args, option), device)
            for option in ("voc", "coco") if getattr(args, option)]
    for folder in args.imagenette:
        jobs.append(probe_job(args, "knn", folder, device))
    for probe in ("fewshot", "variance"):
        jobs += [probe_job(args, probe, folder, device) for folder in args.imagenette[:1]]
    if args.davis:
        jobs.append(davis_job(args, args.davis, device))
    for option in ("voc", "coco", "ade20k", "cityscapes"):
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
def open_network(args, ckpt: str, name: str, device: torch.device) -> Network:
    """Raises Mistake for a file that is not there; one without a network, or a broken one, has a fault."""
    try:
        vit = checkpoint.open_backbone(args, ckpt, device)
    except Mistake as e:
        if not Path(ckpt).is_file():
            raise
        return Network(ckpt, name, None, "", str(e))
    tokens = vit(torch.ones(1, 3, 4 * vit.patch_size, 4 * vit.patch_size, device=device))
    fault = "" if tokens.isfinite().all() else "its features are not finite"
    return Network(ckpt, name, vit, checkpoint.digest(vit), fault)


def is_there(lines: list[dict], job: Job, network: Network, own: argparse.Namespace) -> bool:
    """Whether a line has this measurement: each choice in its protocol is that of the option of its name."""
    for line in lines:
        if (line["eval"], line["weights"], line["data_digest"]) != (job.eval, network.weights, job.digest):
            continue
        asked = {name: getattr(own, name, None) for name in line["protocol"] if name != "sequences"}
        if all(value in (None, line["protocol"][name]) for name, value in asked.items()):
            return True
    return False


def seconds_of(network: Network, images: int, side: int, device: torch.device, known: dict) -> float:
    """How long that many images will take, from one that is timed."""
    side = zeroshot.working_size(side, network.vit.patch_size)
    x = torch.zeros(1, 3, side, side, device=device)
    key = network.ckpt, side
    for _ in range(0 if key in known else 2):                          # the first one warms up
        start = time.perf_counter()
        network.vit(x).sum().item()
        known[key] = time.perf_counter() - start
    return images * known[key]


def note_failure(args, job: Job, network: Network, why: str) -> None:
    say(f"{network.name}, {job.eval} on {job.data}, left out: {why}")
    run.append_json(Path(args.out) / "failed.jsonl", {
        "name": network.name, "eval": job.eval, "data": str(job.data), "why": why})


def plan(args, cells: list[tuple], device: torch.device) -> list[tuple]:
    """(job, network, its options, seconds) of the cells that are still to be done."""
    lines = run.read_lines(Path(args.out) / "results.jsonl")
    todo = []
    known = {}
    for job, network, seed in cells:
        try:
            if network.fault:
                raise Mistake(network.fault)
            own = job.options(network, seed)
        except Mistake as e:
            note_failure(args, job, network, str(e))
            continue
        if not is_there(lines, job, network, own):
            todo.append((job, network, own, seconds_of(network, *job.cost(own), device, known)))
    return todo


def measure(args, job: Job, network: Network, own: argparse.Namespace) -> None:
    """One measurement; one that fails is noted, and the others go on."""
    try:
        job.work(own, network)
    except Mistake as e:
        note_failure(args, job, network, str(e))
    except SystemExit as e:                                            # of a training, which has said why
        if e.code == run.STOPPED:
            raise
        note_failure(args, job, network, f"its training ended with code {e.code}")


def draw(args, network: Network, photo: str, device: torch.device) -> None:
    """Fig. 1 and 6 of one photo, clicked in its middle."""
    if network.fault:
        return
    size = dense_size(args, network.vit)
    path = Path(args.out) / "pictures" / f"prompt_{Path(photo).stem}_{network.weights}_{size}.png"
    if path.exists():
        return
    image = read_image(photo)
    _, H, W = image.shape
    own = zeroshot.get_args(["--ckpt", network.ckpt, "--image", photo, "--size", str(size),
                             "--point", f"{W // 2},{H // 2}"])
    try:
        row = zeroshot.picture_row(network.vit, image, device, own)
    except Mistake as e:                                               # too many tokens
        say(f"no picture of {photo}, {network.name}: {e}")
        return
    temporary = path.with_name(f".{path.name}")
    with run.writing(path):
        figure.sheet([(network.name, row)]).save(temporary, "PNG")
        temporary.replace(path)


def main(args: argparse.Namespace) -> None:
    rank = int(os.environ.pop("RANK", 0))
    ranks = int(os.environ.pop("WORLD_SIZE", 1))                       # each works as if it were alone
    device = run.begin(args)
    out = Path(args.out)
    with run.writing(out, "--out "):
        (out / "pictures").mkdir(parents=True, exist_ok=True)
    if rank == 0:
        run.lock(out)
        (out / "failed.jsonl").unlink(missing_ok=True)
        with open(out / "results.jsonl", "a+") as f:
            if f.tell() and not (out / "results.jsonl").read_text().endswith("\n"):
                f.write("\n")                                          # after half a line, left by a kill

    names = args.names or [checkpoint.short_name(ckpt) for ckpt in args.ckpt]
    titles = dict(zip(args.ckpt, names, strict=True))
    networks = [open_network(args, ckpt, name, device) for ckpt, name in titles.items()]
    jobs, missing = open_jobs(args, device)
    for network in networks[rank::ranks]:
        for photo in args.photos:
            draw(args, network, photo, device)
    cells = [(job, network, seed) for job in jobs for network in networks for seed in job.seeds]
    todo = plan(args, cells[rank::ranks], device)

    def report() -> None:
        pictures = find_pictures(out, args.photos, {network.name: network.weights for network in networks})
        write_report(out, titles, missing, pictures)

    total = sum(seconds for *_, seconds in todo)
    say(f"{len(todo)} of {len(cells)} measurements are to be done here, about {total / 60:.0f} minutes")
    form = "{desc} {percentage:3.0f}% |{bar}| {elapsed} < {remaining}"
    with tqdm(total=total, bar_format=form, disable=None) as bar:
        for number, (job, network, own, seconds) in enumerate(todo, 1):
            bar.set_description(f"{number}/{len(todo)} {job.eval}, {network.name}")
            measure(args, job, network, own)
            bar.update(seconds)
            report()
    report()
    say(f"look at {out / 'report.html'}")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = run.Parser(description=__doc__)
    a = p.add_argument
    run.add_shared(p, "ckpt checkpoint_key num_heads")
    a("--names", nargs="+", help="titles of the checkpoints in the report, one each (default: of the files)")
    a("--out", default="out/benchmark", help="folder of results and report (default: %(default)s)")
    a("--quick", action="store_true", help="small subsets and short trainings: to see that all works")
    a("--size", type=run.at_least(1), default=480, help="pixels of a side where patches are compared, to the "
      "nearest multiple of the patch (paper 480)")
    a("--grid", type=run.at_least(1), metavar="N", help="in its place N x N tokens for every network")
    a("--crop_size", type=run.at_least(1), help="pixels for k-NN, few-shot, variance (224, to whole patches)")
    a("--seeds", type=int, nargs="+", default=[0], help="the report has their mean and spread (default: 0)")
    a("--also", nargs=2, action="append", default=[], metavar=("EVAL", "OPTIONS"),
      help=f"more options for the script of EVAL: {', '.join(TABLES)}")
    a("--skip", nargs="+", default=[], choices=list(TABLES), help="leave these out")
    a("--photos", nargs="+", default=PHOTOS, help="of Fig. 1 and 6, clicked in their middle")

    a = p.add_argument_group("data").add_argument
    for option in ("coco", "voc", "ade20k", "cityscapes", "davis"):
        a(f"--{option}", metavar="DIR", help=NEEDS[option])
    a("--imagenette", nargs="+", default=[], metavar="DIR", help="folders with train/ and val/ of classes: "
      "imagenette, ImageNet or others; few-shot and variance take the first")
    a("--retrieval", nargs="+", default=[], metavar="DIR", help=NEEDS["retrieval"])
    run.add_shared(p, "num_workers device precision")
    args = p.parse_args(argv)

    if args.names and len(args.names) != len(args.ckpt):
        raise Mistake(f"--names: {len(args.names)} names for {len(args.ckpt)} checkpoints")
    unknown = sorted({eval for eval, _ in args.also} - set(TABLES))
    if unknown:
        raise Mistake(f"--also {unknown[0]}: expected one of {', '.join(TABLES)}")
    return args


if __name__ == "__main__":
    run.script(main, get_args)
