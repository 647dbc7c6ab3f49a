"""Proves: every line that docs/TUTORIAL.md quotes stands in the file that it names, every number in it is
what the code computes, its Python and its commands run in their order (training at a small size), and its
pictures are there and small; studies/views.py draws the views that pretraining trains on."""
import contextlib
import importlib
import io
import json
import math
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import losses
import pretrain
import toy
from images import read_image
from masking import GMML, Augmentation
from model import ARCHS
from run import Mistake
from studies import views

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "TUTORIAL.md").read_text()
PROSE = " ".join(re.sub(r"```.*?```", "", TEXT, flags=re.S).split())
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.S | re.M)
SMALL = {"pretrain": "--batch_size 8 --epochs 1 --log_every 1 --precision fp32 --device cpu"}


def blocks() -> list[tuple[str, str, str]]:
    """(kind, code, file) of each block: "sh", "python", or "quote", which begins with a space and comes from
    the last file named before it."""
    found = []
    for match in FENCE.finditer(TEXT):
        kind, code = match[1], match[2]
        file = ""
        if kind == "python" and code.startswith(" "):
            kind = "quote"
            file = re.findall(r"`(\w+\.py)`", TEXT[:match.start()])[-1]
        found.append((kind, code, file))
    return found


def test_every_quote_stands_in_its_file():
    quotes = [(code, file) for kind, code, file in blocks() if kind == "quote"]
    assert len(quotes) >= 10
    for code, file in quotes:
        assert code in (ROOT / file).read_text(), f"{file} has no\n{textwrap.dedent(code)}"


def test_there_are_eight_chapters_each_with_code_and_all_but_one_with_a_picture():
    chapters = re.split(r"^## \d\. ", TEXT, flags=re.M)[1:]
    assert len(chapters) == 8
    assert all("```" in chapter for chapter in chapters)
    assert sum("![" in chapter for chapter in chapters) >= 7           # one is done with a pencil


def test_pictures_are_small_and_all_shown():
    shown = set(re.findall(r"\(tutorial/(\w+\.png)\)", TEXT))
    assert shown == {path.name for path in (ROOT / "docs" / "tutorial").glob("*.png")}
    for name in shown:
        path = ROOT / "docs" / "tutorial" / name
        assert path.stat().st_size < 150_000, name
        Image.open(path).load()


# ------------------------------------------------- numbers
def says(*phrases: str) -> None:
    for phrase in phrases:
        assert phrase in PROSE, phrase


def test_numbers_of_the_losses():
    """Eq. (1) to (3) on three patches, without losses.py; its own values are in the blocks that run."""
    says(f"2.0 / 3 = {2 / 3:.4f}")
    cosines = {"(0.8, 0.6)": 0.8, "(0, 1)": 0.0, "(-0.6, 0.8)": -0.6}
    for vector, cosine in cosines.items():
        says(f"| {vector} | {cosine:.1f} | {cosine / 0.2:.0f} | {math.exp(cosine / 0.2):.3f} |")
    total = sum(math.exp(c / 0.2) for c in cosines.values())
    p = math.exp(0.8 / 0.2) / total
    says(f"{math.exp(4):.3f} / {total:.3f} = {p:.4f}", f"-ln {p:.4f} = {-math.log(p):.4f}")
    at_one = math.exp(0.8) / sum(math.exp(c) for c in cosines.values())
    says(f"temperature of 1 the loss is {-math.log(at_one):.4f}")
    says(f"ln 3 = {math.log(3):.4f}", f"ln(1 + {47 * 196}) = {math.log(1 + 47 * 196):.4f}")

    q = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    k = torch.tensor([[0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]])
    each = -(q @ k.T / 0.2).log_softmax(1).diagonal()
    says("{:.4f}, {:.4f} and {:.4f}. The mean is {:.4f}".format(*each.tolist(), each.mean().item()))
    alone = [losses.patch_contrast(q[i:i + 1], k[:, None], 0.2, torch.tensor([i])).item() for i in range(3)]
    assert alone == pytest.approx(each.tolist(), abs=1e-5)
    says(f"0.6667 + 0.0190 + 0.1587 = {2 / 3 - math.log(p) + each.mean().item():.4f}")


def test_other_numbers():
    paper = pretrain.get_args(["--data", "toy", "--local_crops_number", "10"])
    corruption = GMML()
    says("ten classes", "chance, 10 %")
    assert len(toy.CLASSES) == 10
    says("{:.0f} to {:.0f} % of the area".format(*(100 * share for share in corruption.drop_perc)))
    says(f"cover {100 * corruption.drop_replace:.0f} %", "In half of the views the blocks are noise")
    assert corruption.noise_p == 0.5
    says("ten small *local* crops")
    assert Augmentation().local_number == paper.local_crops_number == 10
    g, P = 48 // 8, 8
    says(f"{g} rows of {g} patches, each of {P} x {P} pixels in 3 colours: {g * g} patches",
         f"{g * g} patches of {3 * P * P} numbers", f"With CLS there are {1 + g * g} tokens",
         f"`vit_micro` is {ARCHS['vit_micro'][0]}")
    for m in (0.996, 0.8):
        assert f"{math.log(2) / -math.log(m):.0f} steps for the " in PROSE
    toy_run = pretrain.get_args([])
    says(f"batches of {toy_run.batch_size} images", "the paper's, one each")
    assert toy_run.w_rec == toy_run.w_pat == toy_run.w_cls == 1
    assert pretrain.TOY["momentum_teacher"] == 0.8 and paper.temp == 0.2
    assert 625 == toy_run.epochs * (4000 // toy_run.batch_size) and "steps=625" in TEXT
    says(f"each of the {ARCHS[pretrain.TOY['arch']][1]} blocks", "exp(cosine / 0.07)", "with 3 clusters")
    state = torch.load(ROOT / "mmc.pth", weights_only=True)
    says(f"The {state['arch']['num_heads']} heads of `mmc.pth`")
    added = re.findall(r": (\d+) lines? added", (ROOT / "docs/exercises/README.md").read_text())
    says(f"longest solution has {max(map(int, added))} lines")


def test_numbers_of_the_run():
    """Those that `docs/tutorial/make.py` kept with the pictures of the run."""
    run = json.loads((ROOT / "docs/tutorial/results.json").read_text())
    went = {name: f"from {run[f'{name}_untrained']:.1f} to {run[name]:.1f} %"
            for name in ("knn_cls", "prompt_iou", "knn_pat")}
    says(f"k-NN of CLS went {went['knn_cls']}")
    says(f"how well a click finds the objects of its class, went {went['prompt_iou']}")
    says(f"and then rose {went['knn_pat']}", f"network: {run['prompt_iou_colours']:.1f} %")
    batch = pretrain.TOY["batch_size"]
    says(f"ln {batch} = {math.log(batch):.2f}")
    metrics = json.loads((ROOT / "docs/tutorial/layers.jsonl").read_text())["metrics"]
    cls, pat = metrics["knn_cls"], metrics["knn_pat"]
    says(f"k-NN of CLS was {cls['3']:.1f} % after block 3 and {cls['4']:.1f} % after block 4")
    says(f"PAT went from {pat['1']:.1f} after the first block to {pat['4']:.1f} %")
    assert cls["4"] == pytest.approx(run["knn_cls"], abs=0.2)


# ------------------------------------------------- code and commands, in their order
def run_python(code: str) -> None:
    """Whatever a line prints must be the number, or the shape, in its comment."""
    expected = re.findall(r"^print\(.*\) +# (.*)$", code, re.M)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    for said, line in zip(expected, printed.getvalue().splitlines(), strict=True):
        value = re.sub(r"tensor\(([\d.]+)\)", r"\1", line)
        assert value == said or float(value) == pytest.approx(float(said), abs=5e-5)


def run_command(line: str) -> None:
    line = re.sub(r"\\\n *", "", line)                                # a command on two lines
    module, rest = re.fullmatch(r"python (?:-m )?([\w.]+?)(?:\.py)?( .*)", line).groups()
    argv = shlex.split(rest + " " + SMALL.get(module, ""))
    script = importlib.import_module(module)
    script.main(script.get_args(argv))


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder like a fresh clone, with a world of 40 scenes."""
    for name in ("docs", "mmc.pth"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data.ToyImages.__init__, "__defaults__", ("train", 40, 64, 0))
    return tmp_path


def test_the_python_runs_and_prints_what_it_says(clone):
    (clone / "out").mkdir()
    for kind, code, _ in blocks():
        if kind == "python":
            run_python(code)
    assert {path.name for path in (clone / "out").iterdir()} == {"bag.png", "momentum.png"}


@pytest.mark.slow
def test_the_commands_run(clone):
    for kind, code, _ in blocks():
        if kind == "sh":
            run_command(code.strip())
    for name in ("world/sheet.png", "views.png", "click.png", "layers.png", "attention.png",
                 "tutorial/curves.png", "tutorial/result.png"):
        Image.open(clone / "out" / name).load()
    results = json.loads((clone / "out/tutorial/results.json").read_text())
    assert {"knn_cls", "knn_pat", "prompt_iou"} <= results.keys()


# ------------------------------------------------- studies/views.py
def test_views_are_those_of_training():
    """Clean views do not depend on the corruption; outside the mask nothing changes; noise covers what
    --drop_perc says; the clean pixels are those that the loader and `prepare` give to the networks."""
    args = pretrain.get_args(["--drop_perc", "0.6", "0.6", "--local_crops_number", "2", "--seed", "3"])
    scenes = data.ToyImages("train", 4, seed=3)
    images = [scenes.read(i) for i in range(4)]
    noise = views.inputs_of(images, args, noise_p=1.0)
    alien = views.inputs_of(images, args, noise_p=0.0)
    assert torch.equal(noise.clean, alien.clean) and torch.equal(noise.local, alien.local)
    for inputs, share in ((noise, 0.6), (alien, 0.3)):
        outside = ~inputs.mask[:, None].expand_as(inputs.clean)
        assert torch.equal(inputs.corrupted[outside], inputs.clean[outside])
        assert (inputs.mask.float().mean((1, 2)) >= share).all()
    loader = data.Views(scenes, pretrain.crops(args), 3)
    samples = [loader[0, i] for i in range(4)]
    batch = torch.utils.data.default_collate(samples)
    trained = pretrain.prepare(batch, args, torch.device("cpu"))
    assert torch.equal(trained.clean, noise.clean)


def test_views_are_drawn(clone, capsys):
    """A row of global views and one of local crops for each image; one photograph is joined by a scene."""
    out = str(clone / "views.png")
    views.main(views.get_args(["--image", "docs/cat.jpg", "--out", out, "--local_crops_number", "2"]))
    assert "drawn in" in capsys.readouterr().out
    args = views.get_args(["--image", "docs/cat.jpg"])
    assert args.options.global_crops_size == 224 and views.get_args([]).options.global_crops_size == 48
    one = views.draw([read_image("docs/cat.jpg")] * 2, ["a", "b"], args.options)
    assert one.width >= Image.open(out).width > 700

    with pytest.raises(Mistake, match="end"):
        views.main(views.get_args(["--out", str(clone / "views.txt")]))
    with pytest.raises(Mistake, match="--nonsense"):
        views.get_args(["--nonsense"])
    with pytest.raises(Mistake, match="none.jpg"):
        views.main(views.get_args(["--image", "none.jpg", "--out", out]))
