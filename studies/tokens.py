"""What do the patch tokens of a network have in common?  Their mean squared length, block by block, in three
shares: what all tokens of all images share, what tells images apart, and what tells the patches of an image
apart.  A click needs the last; a network that has lost it has collapsed.

    python -m studies.tokens --ckpt mmc.pth --data imagenette/val --size 112 --limit 500

The tokens are those after the final norm, as every evaluation sees them.  Appends the shares to --json."""
import time
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import data
import run
from distributed import say
from images import crop_size, normalize, to_device
from model import ViT
from report import markdown, spread

HEADS = {"common": "common to all, %", "between": "between images", "within": "within an image"}


def shares(z: Tensor) -> dict[str, float]:
    """z: (n, N, D), the tokens of n images.  In percent; by the law of total variance they add up to 100."""
    of_image = z.mean(1)                                               # (n, D)
    of_all = of_image.mean(0)                                          # (D)
    whole = z.pow(2).sum(-1).mean()
    common = of_all.pow(2).sum()
    between = (of_image - of_all).pow(2).sum(-1).mean()
    within = (z - of_image[:, None]).pow(2).sum(-1).mean()
    parts = {"common": common, "between": between, "within": within}
    return {name: round(100 * (part / whole).item(), 2) for name, part in parts.items()}


@torch.inference_mode()
def shares_of_blocks(vit: ViT, images, index: list[int], size: int, device) -> dict[int, dict[str, float]]:
    """{block: its shares} over the centre crops of those of these images that can be read."""
    blocks = list(range(1, vit.depth + 1))
    tokens = {block: [] for block in blocks}
    crops = data.CentreCrop(images, size)
    for i in index:
        crop, *_, readable = crops[i]
        if not readable:
            continue
        outputs = vit.intermediate(normalize(to_device(crop[None], device)), blocks, norm=True)
        for block, z in zip(blocks, outputs, strict=True):
            tokens[block].append(z[:, vit.num_prefix_tokens:].float().cpu())
    return {block: shares(torch.cat(parts)) for block, parts in tokens.items()}


def table(lines: list[dict]) -> str:
    """Markdown: the shares in the last block of the networks of a study, whose folders are VARIANT_SEED, by
    variant, with the deviation over the seeds."""
    groups = {}
    for line in lines:
        variant = "untrained"
        if not line["ckpt"].startswith("random:"):
            variant, _ = Path(line["ckpt"]).parent.name.rsplit("_", 1)
        *_, last = line["metrics"].values()
        groups.setdefault(variant, []).append(last)
    rows = []
    for variant, found in groups.items():
        cells = [spread([shares[name] for shares in found], 1) for name in HEADS]
        rows.append([variant, *cells])
    return markdown(["rec cls pat", *HEADS.values()], rows)


def get_args(argv=None):
    p = run.Parser(description=__doc__)
    run.add_shared(p, "ckpt checkpoint_key num_heads size limit json device", limit=500)
    p.add_argument("--data", required=True, help="'toy' or a folder of images")
    return p.parse_args(argv)


def main(args) -> None:
    device = run.begin(args, one_process=True)
    images = data.open_images(args)
    index = data.evenly(args.limit, len(images))
    for ckpt in args.ckpt:
        start = time.perf_counter()
        vit = checkpoint.open_backbone(args, ckpt, device)
        size = crop_size(vit.patch_size, args.size)
        found = shares_of_blocks(vit, images, index, size, device)
        run.record(
            args.json, eval="tokens", ckpt=ckpt, weights=checkpoint.digest(vit),
            data=args.data, data_digest=data.digest(images),
            protocol={"size": size, "limit": args.limit}, metrics=found,
            seconds=time.perf_counter() - start, device=device,
        )
        rows = [[str(block), *(f"{share:.1f}" for share in found[block].values())] for block in found]
        say(f"{checkpoint.short_name(ckpt)}, {size} px\n{markdown(['block', *HEADS.values()], rows)}")


if __name__ == "__main__":
    run.script(main, get_args)
