"""Draw the pictures of docs/TUTORIAL.md anew: run its commands and its Python, then shrink the results.

    python docs/tutorial/make.py          # about ten minutes on two CPU cores, for the training of chapter 6

They get at most 1000 pixels a side, and fewer where that would be too much for a repository."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

MOST = 140_000                                 # bytes of a picture
ROOT = Path(__file__).parent.parent.parent
PICTURES = {
    "world.png": "world/sheet.png",
    "views.png": "views.png",
    "bag.png": "bag.png",
    "momentum.png": "momentum.png",
    "curves.png": "tutorial/curves.png",
    "result.png": "tutorial/result.png",
    "click.png": "click.png",
    "layers.png": "layers.png",
    "attention.png": "attention.png",
}


def run_page(text: str) -> None:
    """Run the blocks in their order, but for quotes, which begin with a space."""
    for language, code in re.findall(r"^```(\w+)\n(\S.*?)^```", text, re.S | re.M):
        print("$", code.splitlines()[0], flush=True)
        if language == "sh":
            code = code.replace("--layout sheet", "--layout sheet --force")
            subprocess.run(code, shell=True, check=True)
        else:
            subprocess.run([sys.executable, "-c", code], check=True)


def few_columns(sheet: Image.Image) -> Image.Image:
    """Of the sheet of the toy world, three of the eight scenes of each class, and their masks."""
    names, cell, columns = 68, 132, 3
    masks = names + 8 * cell + 8
    out = Image.new("RGB", (names + 2 * columns * cell + 8, sheet.height), "white")
    out.paste(sheet.crop((0, 0, names + columns * cell, sheet.height)), (0, 0))
    out.paste(sheet.crop((masks, 0, masks + columns * cell, sheet.height)), (names + columns * cell + 8, 0))
    return out


def shrink(source: Path, target: Path) -> None:
    picture = Image.open(source).convert("RGB")
    if target.name == "world.png":
        picture = few_columns(picture)
    picture.thumbnail((1000, 1000), Image.Resampling.LANCZOS)
    for colours in (256, 128, 64):
        few = picture.quantize(colours, kmeans=3, dither=Image.Dither.NONE)
        few.save(target, optimize=True)
        if target.stat().st_size < MOST:
            break
        picture.thumbnail((850, 850), Image.Resampling.LANCZOS)
    print(f"{target.name}: {target.stat().st_size // 1000} KB")


if __name__ == "__main__":
    os.chdir(ROOT)
    Path("out").mkdir(exist_ok=True)
    Path("out/layers.jsonl").unlink(missing_ok=True)
    run_page(Path("docs/TUTORIAL.md").read_text())
    for name, path in PICTURES.items():
        shrink(Path("out") / path, Path("docs/tutorial") / name)
    for name in ("tutorial/results.json", "layers.jsonl"):             # what the page says of the run
        shutil.copy(f"out/{name}", "docs/tutorial")
