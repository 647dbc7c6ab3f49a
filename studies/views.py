"""Draw what pretraining makes of an image: crops, colours, and GMML corruption (the paper's Fig. 8).

    python -m studies.views --image docs/cat.jpg                  # the paper's views of a photograph
    python -m studies.views                                       # those of the toy world, with its settings
    python -m studies.views --image docs/cat.jpg --drop_align 1 --local_crops_number 4 --seed 7

Every option of pretrain.py may be added.  The pixels come from the very functions that feed the networks:
`MultiCrop`, `colour` and `gmml` of masking.py, by way of `pretrain.prepare`.  Each global view is shown
clean, as the teacher sees it, and corrupted twice, by noise and by alien pixels; in training a coin decides
which of the two the student sees.

Shapes: B images, V = 2 views, L local crops, S pixels of a side."""
import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import default_collate

import data
import figure
import pretrain
import run
from images import denormalize, read_image

LOCAL = 7                                      # as many local crops are drawn as global panels stand above


def inputs_of(images: list[Tensor], args: argparse.Namespace, noise_p: float) -> pretrain.Inputs:
    """What the networks would get of these images (3, H, W) uint8, all views corrupted by noise (noise_p 1)
    or all by alien pixels (0).  args: options of pretrain.py.  The crops do not depend on noise_p."""
    args.noise_p = noise_p
    transform = pretrain.crops(args)
    samples = []
    for i, image in enumerate(images):
        generator = data.generator_of(args.seed, "view", 0, i)
        samples.append(transform(image, generator))
    return pretrain.prepare(default_collate(samples), args, torch.device("cpu"))


def panel(title: str, x: Tensor) -> tuple[str, figure.Array]:
    """A titled picture of (3, H, W) normalised pixels."""
    return title, denormalize(x).permute(1, 2, 0).numpy()


def draw(images: list[Tensor], names: list[str], args: argparse.Namespace) -> figure.Picture:
    """One row for each image, and a row of its local crops, if there are any."""
    noise = inputs_of(images, args, noise_p=1.0)
    alien = inputs_of(images, args, noise_p=0.0)
    B = len(images)
    rows = []
    for i in range(B):
        panels = [("image", images[i].permute(1, 2, 0).numpy())]
        for v in range(2):
            row = v * B + i                                            # views stand one after another
            panels.append(panel(f"view {v + 1}", noise.clean[row]))
            for kind, inputs in (("noise", noise), ("alien", alien)):
                share = 100 * inputs.mask[row].float().mean()
                panels.append(panel(f"{kind}, {share:.0f} %", inputs.corrupted[row]))
        rows.append((names[i], panels))
        if noise.local is not None:
            local = noise.local.unflatten(0, (-1, B))[:LOCAL, i]       # (L, 3, s, s)
            crops = [panel(f"local {n}", x) for n, x in enumerate(local, start=1)]
            rows.append(("", crops))
    return figure.sheet(rows)


def main(args: argparse.Namespace) -> None:
    run.check_outputs(args, "out")
    images = [read_image(path) for path in args.image]
    names = [Path(path).name for path in args.image]
    scenes = data.ToyImages("train", args.scenes, seed=args.options.seed)
    if len(images) < 2:                        # alien pixels need another image: a scene of the toy world
        needed = 1 if images else args.scenes
        images += [scenes.read(i) for i in range(needed)]
        names += [scenes.name(i) for i in range(needed)]
    with run.writing(args.out, "--out "):
        draw(images, names, args.options).save(args.out)
    print(f"drawn in {args.out}")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """args.options: those of pretrain.py."""
    p = run.Parser(description=__doc__)
    p.add_argument("--image", nargs="+", default=[], metavar="FILE",
                   help="photographs (default: toy scenes)")
    p.add_argument("--scenes", type=run.at_least(2), default=3,
                   help="how many toy scenes, without --image (default 3)")
    p.add_argument("--out", default="views.png", help="where the picture goes (default views.png)")
    args, others = p.parse_known_args(argv)
    world = ["--data", str(Path(args.image[0]).parent)] if args.image else []     # settings of the paper
    args.options = pretrain.get_args([*world, *others])
    return args


if __name__ == "__main__":
    run.script(main, get_args)
