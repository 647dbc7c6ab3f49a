"""Draw the first picture of the README: one click, similarity and mask, for several checkpoints in rows.

    python -m studies.front_picture --ckpt random:vit_mini/8 mmc.pth --names untrained ours
    python -m studies.front_picture --ckpt random:vit_mini/8 mmc.pth dino.pth --names untrained ours DINO

The photographs are those in docs/, the clicks stand below.  All networks see 30 rows of patches, and all
similarities have one scale, 0 to 1, so that rows can be compared.  The mask is its part that holds the click.
A minute on one CPU core.

Shapes: N tokens of a grid, H x W pixels as the network sees them."""
import torch
from PIL import Image

import checkpoint
import figure
import run
from clicks import picture_tokens, select
from distributed import say
from images import read_image
from run import Mistake

CLICKS = {"docs/cat.jpg": (220, 180), "docs/coffee.jpg": (440, 300)}
ROWS = 30                                      # of patches, on the short side
WIDTH = 200                                    # pixels of a panel


def panels_of(vit, path: str, point: tuple[int, int]) -> list[tuple]:
    """Click, similarity and mask of one photograph."""
    image = read_image(path)
    tokens = picture_tokens(vit, image, torch.device("cpu"), ROWS * vit.patch_size)
    values, t, mask = select(tokens, [point], [], contiguous=True)     # (N,), a number, (H, W)
    photo = tokens.image.permute(1, 2, 0).numpy()
    panels = {
        "one click": figure.marked(image.permute(1, 2, 0).numpy(), tokens.given, [point], []),
        "similarity to that patch": figure.heat(tokens.pixels(values), 0, 1),
        f"mask: at least {t:.2f}": figure.cut_out(photo, mask.numpy()),
    }
    return list(panels.items())


def get_args(argv=None):
    p = run.Parser(description=__doc__)
    run.add_shared(p, "ckpt")
    p.add_argument("--names", nargs="+", required=True, help="what to write above the row of each checkpoint")
    p.add_argument("--out", default="docs/prompt.png", help="where the picture goes (default: %(default)s)")
    args = p.parse_args(argv)
    if len(args.names) != len(args.ckpt):
        raise Mistake(f"--names: expected {len(args.ckpt)}, one for each checkpoint, found {len(args.names)}")
    run.check_outputs(args, "out")
    return args


def main(args) -> None:
    networks = [checkpoint.load_backbone(ckpt)[0] for ckpt in args.ckpt]
    rows = []
    for name, vit in zip(args.names, networks, strict=True):
        panels = []
        for path, point in CLICKS.items():
            panels += panels_of(vit, path, point)
        rows.append(figure.draw_row(name, panels, WIDTH))
    bar = figure.colour_bar(0, 1, 2 * WIDTH)
    foot = figure.paper(rows[0].width, bar.height + 12)
    foot.paste(bar, (10, 4))
    figure.write(foot, 2 * WIDTH + 24, 5, "cosine similarity, the same scale in all rows")
    picture = figure.below([*rows, foot])
    picture.quantize(256, Image.Quantize.MAXCOVERAGE).save(args.out, optimize=True)
    say(f"drawn in {args.out}")


if __name__ == "__main__":
    run.script(main, get_args)
