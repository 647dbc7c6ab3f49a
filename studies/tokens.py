"""What do the patch tokens of a network have in common?  Their mean squared length, block by block, in three
shares: what all tokens of all images share, what tells images apart, and what tells the patches of an image
apart.  They are equal everywhere in a network that has collapsed: then all is in the first share.

    python -m studies.tokens --ckpt mmc.pth --data imagenette/val --size 112

The tokens are those after the final norm, as every evaluation sees them.  Appends the shares to --json."""
import time
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import data
import run
from distributed import say
from images import BadImage, Unreadable, crop_size, normalize, to_device
from model import ViT
from report import markdown, spread

HEADS = {"common": "common to all, %", "between": "between images, %", "within": "within an image, %"}


def shares(means: Tensor, squares: Tensor) -> dict[str, float]:
    """means: (n, D), the mean token of each image.  squares: (n), the mean squared length of its tokens.  In
    percent; by the law of total variance they add up to 100."""
    of_all = means.mean(0)                                             # (D)
    whole = squares.mean()
    common = of_all.pow(2).sum()
    between = (means - of_all).pow(2).sum(-1).mean()
    within = (squares - means.pow(2).sum(-1)).mean()
    parts = {"common": common, "between": between, "within": within}
    return {name: round(100 * (part / whole).item(), 2) for name, part in parts.items()}


@torch.inference_mode()
def shares_of_blocks(vit: ViT, images, index: list[int], size: int, device: torch.device,
                     unreadable: Unreadable) -> dict[int, dict[str, float]]:
    """{block: its shares} over the centre crops of these images.  Raises BadImage if none can be read."""
    blocks = list(range(1, vit.depth + 1))
    means = {block: [] for block in blocks}
    squares = {block: [] for block in blocks}
    crops = data.CentreCrop(images, size)
    for i in index:
        crop, *_, readable = crops[i]
        if not readable:
            unreadable.note(images.name(i))
            continue
        outputs = vit.intermediate(normalize(to_device(crop[None], device)), blocks, norm=True)
        for block, tokens in zip(blocks, outputs, strict=True):
            z = tokens[0, vit.num_prefix_tokens:].double().cpu()       # (N, D)
            means[block].append(z.mean(0))
            squares[block].append(z.pow(2).sum(-1).mean())
    if not squares[1]:
        raise BadImage(f"none of the {len(index)} images can be read, such as {images.name(index[0])}")
    return {block: shares(torch.stack(means[block]), torch.stack(squares[block])) for block in blocks}


def table(lines: list[dict]) -> str:
    """Markdown: the last block of the networks of a study, whose folders are VARIANT_SEED, by variant, with
    the deviation over the seeds."""
    groups = {}
    for line in lines:
        variant, _ = Path(line["ckpt"]).parent.name.rsplit("_", 1)
        blocks = line["metrics"]["blocks"]
        groups.setdefault(variant, []).append(blocks[max(blocks, key=int)])
    rows = []
    for variant, found in groups.items():
        cells = [spread([one[name] for one in found], 1) for name in HEADS]
        rows.append([variant, *cells])
    return markdown(["rec cls pat", *HEADS.values()], rows)


def get_args(argv=None):
    p = run.Parser(description=__doc__)
    run.add_shared(p, "ckpt checkpoint_key num_heads data data_root download size max_bad json device")
    p.add_argument("--limit", type=run.count, default=500, help="images, evenly spaced (default: 500)")
    return p.parse_args(argv)


def main(args) -> None:
    device = run.begin(args, one_process=True)
    run.check_outputs(args, "json")
    images = data.open_images(args)
    index = data.evenly(args.limit, len(images))
    for ckpt in args.ckpt:
        start = time.perf_counter()
        vit = checkpoint.open_backbone(args, ckpt, device)
        size = crop_size(vit.patch_size, args.size)
        unreadable = Unreadable(len(index), args.max_bad)
        found = shares_of_blocks(vit, images, index, size, device, unreadable)
        unreadable.say()
        run.record(
            args.json, eval="tokens", ckpt=ckpt, weights=checkpoint.digest(vit),
            data=args.data, data_digest=data.digest(images),
            protocol={"size": size, "limit": args.limit}, metrics={"blocks": found} | unreadable.for_json(),
            seconds=time.perf_counter() - start, device=device,
        )
        rows = [[str(block), *(f"{share:.1f}" for share in found[block].values())] for block in found]
        say(f"{checkpoint.short_name(ckpt)}, {size} px\n{markdown(['block', *HEADS.values()], rows)}")


if __name__ == "__main__":
    run.script(main, get_args)
