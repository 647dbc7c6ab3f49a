"""Better masks from the same click: each protocol of docs/MASKS.md, in one pass of the network over a set.

    python -m studies.masks --ckpt mmc.pth --size 240 --coco COCO --voc VOCdevkit --toy --json masks.jsonl

Protocols: as in the paper, --contiguous, --centre, both; with 1, 3 and 5 clicks; for classes and for objects.
Prints a table, and appends to --json the lines that zeroshot.py would write, one for each cell."""
import time
from dataclasses import asdict, replace

import torch

import checkpoint
import data
import run
from clicks import working_size
from distributed import say
from model import ViT
from prompts import PromptScenes, Protocol, Result, network_features
from report import markdown
from scenes import Coco, Scenes, ToyScenes, Voc

WAYS = {
    "paper": {},
    "contiguous": {"contiguous": True},
    "centre": {"centre": True},
    "both": {"contiguous": True, "centre": True},
}
CLICKS = (1, 3, 5)
TARGETS = {"class": "class", "instance": "object"}                     # as options say it, as tables do


def measure(vit: ViT, scenes: Scenes, size: int, device: torch.device,
            seed: int = 0) -> dict[tuple[str, int], Result]:
    """The result of each (way, number of clicks)."""
    P = vit.patch_size
    grid = PromptScenes(scenes, Protocol(size, P), P)
    results = {}
    for clicks in CLICKS:
        for way, options in WAYS.items():
            protocol = Protocol(size, P, points=clicks, seed=seed, **options)
            results[way, clicks] = Result(protocol, grid)

    features = network_features(vit, device)
    start = time.perf_counter()
    for scene in grid.prepared():
        z = features(scene.image[None])[0]                             # (N, D)
        for result in results.values():
            result.add(scene, z)
    for result in results.values():
        result.seconds = time.perf_counter() - start
    return results


def column(args, ckpt: str, vit: ViT, scenes: Scenes, target: str, results: dict, device) -> list[str]:
    """The cells of a column, "best (its t) / auto", and at the end the mask that takes everything."""
    cells = []
    for result in results.values():
        result.protocol = replace(result.protocol, target=target)
        summary = result.summary()
        run.record(
            args.json, eval="zeroshot", ckpt=ckpt, weights=checkpoint.digest(vit),
            data=scenes.title, data_digest=data.digest(scenes),
            protocol=asdict(result.protocol) | {"precision": "fp32"},
            metrics=summary, seconds=result.seconds, device=device,
        )
        cells.append(f"{summary['best']:.1f} ({summary['best_threshold']:g}) / {summary['auto']:.1f}")
    return [*cells, f"{summary['everything']:.1f}"]


def get_args(argv=None):
    p = run.Parser(description=__doc__)
    run.add_shared(p, "ckpt checkpoint_key num_heads size seed json device", size=480)
    p.add_argument("--coco", metavar="DIR", help="COCO")
    p.add_argument("--voc", metavar="DIR", help="VOCdevkit")
    p.add_argument("--train", action="store_true", help="on their train images, to choose constants, and not "
                   "on val")
    p.add_argument("--toy", action="store_true", help="200 generated scenes, where the truth is exact")
    return p.parse_args(argv)


def main(args) -> None:
    device = run.begin(args, one_process=True)
    sets = []
    if args.coco:
        sets.append(Coco(args.coco, "train2017" if args.train else "val2017"))
    if args.voc:
        sets.append(Voc(args.voc, "train" if args.train else "val"))
    if args.toy:
        sets.append(ToyScenes(data.ToyImages("val", 200)))
    for ckpt in args.ckpt:
        vit = checkpoint.open_backbone(args, ckpt, device)
        size = working_size(args.size, vit.patch_size)
        heads = ["clicks", ""]
        rows = [[str(clicks), way] for clicks in CLICKS for way in WAYS] + [["", "everything"]]
        for scenes in sets:
            results = measure(vit, scenes, size, device, args.seed)
            for target, word in TARGETS.items():
                heads.append(f"{scenes.title} {word}")
                cells = column(args, ckpt, vit, scenes, target, results, device)
                for row, cell in zip(rows, cells, strict=True):
                    row.append(cell)
        say(f"{checkpoint.short_name(ckpt)}, {size} px\n{markdown(heads, rows)}")


if __name__ == "__main__":
    run.script(main, get_args)
