"""Proves: each study's variants are options that pretrain.py takes, Table 4's losses are on and off as named;
a study runs, evaluates, goes on after an interruption without doing a run twice, and draws what it found; the
stored results give the stored tables."""
import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from test_exercises import load
from test_pretrain import TINY

import figure
import pretrain as core
import run
from model import MMC, patchify, vit
from pretrain import get_args
from run import Mistake
from studies import ablation
from toy import scene

ROOT = Path(__file__).parent.parent
STORED = sorted(path.parent for path in ROOT.glob("results/*/table.md"))


# ------------------------------------------------- studies
def test_variants_are_options_of_pretrain():
    for study in ablation.STUDIES.values():
        for options in study.values():
            get_args(options.split())
    assert set(ablation.STUDIES["table4"]) == set(ablation.PAPER)
    for name, options in ablation.STUDIES["table4"].items():
        args = get_args(options.split())
        weights = args.w_rec, args.w_cls, args.w_pat
        assert name == "".join(str(int(w > 0)) for w in weights)


def test_a_wrong_name_is_named():
    with pytest.raises(Mistake, match="--variants 222: table4 has 111"):
        ablation.get_args(["--out", "x", "--variants", "222"])


# ------------------------------------------------- table and curves
def row(variant, seed, value):
    return {"variant": variant, "seed": seed, "knn_cls": value, "knn_pat": 2 * value, "coco_overlap": 0.5,
            "knn_cls_untrained": 9.0 + seed, "curve": [[0, 10.0, 10.0], [2, value, 2 * value]]}


def test_table_by_hand():
    rows = [row("111", 0, 30.0), row("111", 1, 32.0), row("100", 0, 11.0)]
    lines = ablation.table(rows, "table4").splitlines()
    assert lines[0] == ("| rec cls pat | seeds | k-NN CLS | k-NN PAT | O | "
                        "*paper: CLS / PAT / fine-tuned* |")
    assert lines[1] == "|---|---|---|---|---|---|"
    assert lines[2] == "| untrained | 2 | 9.5 +- 0.7 |  |  |  |"                    # once per seed
    assert lines[3] == "| 111 | 2 | 31.0 +- 1.4 | 62.0 +- 2.8 | 0.500 +- 0.000 | *77.5 / 77.0 / 91.0* |"
    assert lines[4] == "| 100 | 1 | 11.0 | 22.0 | 0.500 | *17.2 / 14.7 / 89.9* |"


def test_cells_have_digits_that_mean_something():
    for values, text in (([], ""), ([1234.5], "1234"), ([38.93, None, 40.07], "39.5 +- 0.8"),
                         ([0.8095], "0.809")):
        assert ablation.cell([{"x": value} for value in values], "x") == text


def test_curves_show_each_variant_twice():
    rows = [row("111", 0, 30.0), row("111", 1, 32.0), row("100", 0, 11.0)]
    picture = np.asarray(ablation.curves(rows, "table4"))
    for half in np.array_split(picture, 2, axis=1):                    # CLS and PAT
        for colour in np.uint8(0.85 * figure.palette(3)[1:]):
            assert (half == colour).all(-1).sum() > 144                # more than its square in the legend


def test_curves_join_the_epochs_that_all_seeds_have():
    holes = [row("111", 0, 30.0), row("111", 1, 32.0)]
    holes[1]["curve"] = [[2, 32.0, 64.0]]
    whole = [row("111", 0, 30.0), row("111", 1, 32.0)]
    for r in whole:
        r["curve"] = r["curve"][1:]
    assert ablation.mean_curve(holes, 1) == ablation.mean_curve(whole, 1) == [(2, 31.0)]
    assert ablation.mean_curve(holes, 2) == [(2, 62.0)]
    a, b = (ablation.curves(rows, "table4").tobytes() for rows in (holes, whole))
    assert a == b


@pytest.mark.parametrize("folder", STORED, ids=lambda folder: folder.name)
def test_stored_results_give_the_stored_table(folder):
    rows = run.read_lines(folder / "results.jsonl")
    assert ablation.table(rows, rows[0]["study"]) == (folder / "table.md").read_text()
    ablation.curves(rows, rows[0]["study"])


@pytest.mark.parametrize("folder", STORED, ids=lambda folder: folder.name)
def test_stored_runs_are_recognised(folder):
    file = folder / "results.jsonl"
    for stored in run.read_lines(file):
        evaluation = stored["evaluation"]
        command = ["--out", "x", "--study", stored["study"]]
        for name in ("coco", "voc"):
            command += [f"--{name}", evaluation[name]] if evaluation[name] else []
        if evaluation["zeroshot"]:
            command += ["--zeroshot_options", evaluation["zeroshot"]]
        if evaluation["finetune"]:
            data, options = evaluation["finetune"]
            command += ["--finetune", data, "--finetune_options", options]
        own = ablation.STUDIES[stored["study"]][stored["variant"]].split()
        shared = stored["options"][:len(stored["options"]) - len(own)]
        args = ablation.get_args([*command, "--", *shared])
        assert ablation.is_done(file, stored["variant"], stored["seed"], args)


# ------------------------------------------------- runs
@pytest.mark.slow
def test_a_study_runs_once_and_goes_on(tmp_path, monkeypatch, capsys):
    for split, n in (("train", 12), ("val", 6)):
        for i in range(n):
            folder = tmp_path / "data" / split / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(scene(i, size=32).image).save(folder / f"{i}.png")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--variants", "100", "010",
               "--finetune", str(tmp_path / "data"), "--finetune_options",
               "--epochs 1 --warmup_epochs 0 --batch_size 4 --size 32 --num_workers 0 --augment none",
               "--", *TINY, "--data", str(tmp_path / "data"), "--epochs", "1"]
    ablation.main(ablation.get_args(command))
    found = (tmp_path / "out" / "results.jsonl").read_text()
    rows = [json.loads(x) for x in found.splitlines()]
    assert [(r["variant"], r["seed"]) for r in rows] == [("010", 0), ("100", 0)]
    assert all(0 <= r[k] <= 100 for r in rows for k in ("knn_cls", "knn_pat", "finetune"))
    assert [p[0] for p in rows[0]["curve"]] == [0, 1]
    assert (tmp_path / "out" / "curves.png").exists() and "| 010 | 1 |" in capsys.readouterr().out

    def never(*_):
        raise AssertionError("ran twice")
    monkeypatch.setattr(ablation, "call", never)
    ablation.main(ablation.get_args(command))
    assert (tmp_path / "out" / "results.jsonl").read_text() == found


class Scripts:
    """Stands in for our scripts: writes what they write, and notes how they were called."""

    def __init__(self):
        self.calls = []

    def __call__(self, script, *options):
        options = [str(option) for option in options]
        self.calls.append([script.__name__, *options])
        if script is ablation.pretrain:
            self.pretrain(Path(options[options.index("--output_dir") + 1]))
            return
        metrics = {"best": 30.0, "auto": 31.0, "overlap": 0.7}
        if script is ablation.finetune:
            metrics = {"top1": 50.0}
        file = options[options.index("--json") + 1]
        run.record(file, eval=script.__name__, ckpt="", weights="", data="", data_digest="", protocol={},
                   metrics=metrics, seconds=1.0, device=Mock(type="cpu"))

    def pretrain(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        results = {"knn_cls": 40.0, "knn_pat": 20.0, "knn_cls_untrained": 10.0, "knn_pat_untrained": 10.0,
                   "seconds": 7.5}
        about = {"options": {"device": "cpu"}, "torch": "2.11", "commit": "abc1234"}
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "run.json").write_text(json.dumps(about))
        for epoch, value in ((0, 10.0), (2, 30.0), (2, 40.0)):         # the last epoch ran twice
            run.append_json(folder / "log.jsonl", {"epoch": epoch, "knn_cls": value, "knn_pat": value / 2})
        run.append_json(folder / "log.jsonl", {"step": 1, "loss": 3.0})


def test_a_line_holds_all_that_was_measured_and_where_it_comes_from(tmp_path, monkeypatch):
    scripts = Scripts()
    monkeypatch.setattr(ablation, "call", scripts)
    command = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--study", "decisions",
               "--variants", "w_pat 3", "--seeds", "3", "--coco", "COCO", "--voc", "VOC",
               "--finetune", "DATA", "--zeroshot_options", "--size 240", "--finetune_options", "--epochs 1",
               "--", "--lr", "1e-3"]
    ablation.main(ablation.get_args(command))

    work = tmp_path / "work" / "w_pat_3_3"
    file = str(work / "evaluation.jsonl")
    weights = ["--ckpt", str(work / "backbone.pth")]
    assert scripts.calls == [
        ["pretrain", "--output_dir", str(work), "--seed", "3", "--lr", "1e-3", "--w_pat", "3"],
        ["zeroshot", "--coco", "COCO", "--size", "240", *weights, "--json", file],
        ["zeroshot", "--voc", "VOC", "--size", "240", *weights, "--json", file],
        ["finetune", "--data", "DATA", "--output_dir", str(work / "finetune"), "--seed", "3",
         "--epochs", "1", *weights, "--json", file]]

    line, = run.read_lines(tmp_path / "out" / "results.jsonl")
    today = line.pop("date")
    assert len(today.split("-")) == 3
    assert line.pop("command").startswith("python -m studies.ablation --out ")
    assert line == {
        "study": "decisions", "variant": "w_pat 3", "seed": 3, "options": ["--lr", "1e-3", "--w_pat", "3"],
        "evaluation": {"coco": "COCO", "voc": "VOC", "zeroshot": "--size 240",
                       "finetune": ["DATA", "--epochs 1"]},
        "knn_cls": 40.0, "knn_pat": 20.0, "knn_cls_untrained": 10.0, "knn_pat_untrained": 10.0,
        "seconds": 7.5, "curve": [[0, 10.0, 5.0], [2, 40.0, 20.0]],
        "coco": 30.0, "coco_auto": 31.0, "coco_overlap": 0.7, "voc": 30.0, "voc_auto": 31.0,
        "voc_overlap": 0.7, "finetune": 50.0, "patch": None, "device": "cpu", "torch": "2.11",
        "commit": "abc1234"}
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| w_pat 3 | 1 | 40.0 | 20.0 | 30.0 | 31.0 | 0.700 | 30.0 | 31.0 | 0.700 | 50.0 | 7.5 |" in table


def test_an_interrupted_study_does_only_what_is_missing(tmp_path, monkeypatch):
    scripts = Scripts()
    monkeypatch.setattr(ablation, "call", scripts)
    command = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--variants", "111", "010"]
    ablation.main(ablation.get_args(command))
    file = tmp_path / "out" / "results.jsonl"
    first, second = file.read_text().splitlines()
    file.write_text(first + "\n")
    ablation.main(ablation.get_args(command))
    assert len(scripts.calls) == 3
    assert file.read_text().splitlines() == [first, second]


def test_a_run_with_other_options_is_refused(tmp_path):
    (tmp_path / "results.jsonl").write_text(json.dumps(row("100", 0, 30.0) | {"options": ["--epochs", "9"]}))
    command = ["--out", str(tmp_path), "--variants", "100", "--voc", "VOCdevkit"]
    with pytest.raises(Mistake, match="other options, .'--epochs', '9'.* give another --out"):
        ablation.main(ablation.get_args(command))
    args = ablation.get_args(command)
    stored = row("100", 0, 30.0) | ablation.settings_of("100", args)
    (tmp_path / "results.jsonl").write_text(json.dumps(stored))
    ablation.main(args)
    with pytest.raises(Mistake, match="'--limit 80'.*, not .*'--size 240'.* give another --out"):
        ablation.main(ablation.get_args([*command, "--zeroshot_options", "--size 240"]))


# ------------------------------------------------- variants that change the code
def test_the_middle_block_alone_feeds_the_reconstruction(tmp_path):
    """In the patched network the last two of four blocks change pat, and not rec."""
    code = ablation.copy_of_code(tmp_path / "code", ablation.PATCHES["from the middle block"])
    model = load(code, "model")
    torch.manual_seed(0)
    mmc = model.MMC(model.vit("vit_micro", 32, 8), hidden=16, out=8)
    images = torch.randn(3, 3, 32, 32)
    before = mmc(images)
    with torch.no_grad():
        for block in mmc.backbone.blocks[mmc.backbone.depth // 2:]:
            block.mlp.fc2.bias += 1 + torch.arange(mmc.backbone.embed_dim)
    after = mmc(images)
    assert torch.equal(before["rec"], after["rec"])
    assert not torch.allclose(before["pat"], after["pat"])

    plain = MMC(vit("vit_micro", 32, 8), hidden=16, out=8)
    plain.load_state_dict(mmc.state_dict())                            # nothing else is another
    torch.testing.assert_close(plain(images)["pat"], after["pat"])


def test_pixels_normalised_per_patch_have_mean_0_and_variance_1(tmp_path):
    """A prediction that is 0.5 off everywhere has a loss of 0.5, whatever brightness and contrast."""
    code = ablation.copy_of_code(tmp_path / "code", ablation.PATCHES["pixels normalised per patch"])
    args = get_args(["--data", "toy", "--w_pat", "0", "--w_cls", "0"])
    clean = torch.randn(2, 3, 16, 16) * torch.tensor([1.0, 5.0])[:, None, None, None] + 3
    pixels = patchify(clean, 8).flatten(0, 1)
    normal = (pixels - pixels.mean(1, keepdim=True)) / pixels.std(1, keepdim=True, correction=0)
    mask = torch.ones(2, 16, 16, dtype=torch.bool)
    inputs = core.Inputs(clean, clean, None, mask, torch.arange(8), [], None)
    losses = load(code, "pretrain").mmc_losses({"rec": normal + 0.5}, {}, inputs, args)
    assert losses["rec"].item() == pytest.approx(0.5, abs=1e-4)


@pytest.mark.slow
def test_a_patched_variant_trains_in_its_own_process(images, tmp_path):
    command = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--study", "reconstruction",
               "--variants", "from the middle block", "--", *TINY, "--data", str(images),
               "--stop_at", "2"]
    with pytest.raises(SystemExit) as e:
        ablation.main(ablation.get_args(command))
    assert e.value.code == run.STOPPED
    assert (tmp_path / "work" / "from_the_middle_block_0" / "last.pth").exists()


def test_a_patch_that_does_not_fit_is_named(tmp_path):
    with pytest.raises(Mistake, match="prototypes.patch no longer applies"):
        ablation.copy_of_code(tmp_path / "code", "prototypes")         # it goes on top of another


def test_the_exit_code_of_a_stopped_run_is_passed_on(tmp_path, monkeypatch):
    def stopped(args):
        run.end("stopped by a signal", run.STOPPED)
    monkeypatch.setattr(ablation.pretrain, "main", stopped)
    with pytest.raises(SystemExit) as e:
        ablation.main(ablation.get_args(["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]))
    assert e.value.code == 75 and not (tmp_path / "out" / "results.jsonl").exists()
