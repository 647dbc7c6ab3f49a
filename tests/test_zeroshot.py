"""Proves: the table and the picture are written as asked, in strict JSON, and every mistake of a user is one
clear line before any work.  With MMC_TEST_DATA also on real annotations, images and weights."""

import csv
import json
import math
import runpy
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_scenes import note, small_coco

import toy
import zeroshot
from checkpoint import load_backbone, save
from run import Mistake
from zeroshot import kmeans

MICRO = "random:vit_micro/8"


def run(*words):
    zeroshot.main(zeroshot.get_args([str(w) for w in (*words, "--num_workers", 0)]))


def run_picture(*words):
    zeroshot.main(zeroshot.get_args([str(w) for w in words]))


def lines(path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# ------------------------------------------------- the table
def test_files_of_a_table(tmp_path, capsys):
    notes = [
        note(1, id=1),
        note(1, id=2, segmentation=[[1, 1, 5, 5]]),
        note(1, id=3, iscrowd=1, segmentation={"size": [40, 60], "counts": [2400]}),
        note(1, id=4, image_id=77),
        note(1, id=5, category_id=5, segmentation=[[0, 0, 3, 0, 3, 3, 0, 3]]),
    ]
    path = small_coco(tmp_path / "c", annotations=notes)
    table, line = tmp_path / "o.csv", tmp_path / "o.jsonl"
    run(
        "--ckpt",
        MICRO,
        "--coco",
        path,
        "--size",
        48,
        "--json",
        line,
        "--csv",
        table,
        "--similarity",
        tmp_path / "s.png",
    )
    got = lines(line)[0]
    metrics = got["metrics"]
    assert metrics["left_out"] == {
        "annotations of unlisted images": 1,
        "objects of zero area": 1,
        "crowd regions": 1,
    }
    assert metrics["n_prompts"] == 1 and metrics["n_skipped"] == 1 and metrics["n_images"] == 1
    assert metrics["inter"] is None and metrics["overlap"] is None and -1 <= metrics["intra"] <= 1
    assert got["eval"] == "zeroshot" and got["protocol"]["size"] == 48 and got["data"] == "COCO val2017"
    rows = list(csv.DictReader(open(table)))
    assert [r["prompts"] for r in rows] == ["1", "0"] and rows[1]["t0.0"] == ""
    assert float(rows[0]["auto"]) == pytest.approx(metrics["auto"], abs=0.01)
    assert float(rows[0]["everything"]) == pytest.approx(metrics["everything"], abs=0.01)
    assert Image.open(tmp_path / "s.png").size[0] > 300
    out = capsys.readouterr().out
    assert (
        "COCO val2017: 2 images, 2 classes; left out: 1 annotations of unlisted images, 1 crowd regions"
        in out
    )
    assert "left out: 1 targets below 3 patches" in out and "inter without pairs" in out
    assert "contiguous False" in out and "best (t)    auto     all" in out


def test_a_set_without_targets_is_named(tmp_path):
    with pytest.raises(Mistake, match="no class of 3 or more patches in 2 images"):
        run("--ckpt", MICRO, "--coco", small_coco(tmp_path / "c", annotations=[]), "--size", 32)
    with pytest.raises(Mistake, match="no class of 9999"):
        run("--ckpt", MICRO, "--toy", "--limit", 2, "--min_patches", 9999)


def test_a_kind_without_targets_has_a_line(capsys):
    summary = {
        "miou": {"0.0": 1.0},
        "auto_others": {"miou": 1.0},
        "everything_others": {"miou": 2.0},
        **dict.fromkeys(("intra", "inter", "overlap"), math.nan),
        **dict.fromkeys(("n_prompts", "n_categories", "n_images", "n_skipped", "images_per_s"), 0),
        "left_out": {},
    }
    table = zeroshot.table_of(summary, zeroshot.Protocol())
    assert "instances  no target of 3 or more patches" in table


def test_unreadable_images_are_counted_and_named(tmp_path, capsys):
    path = small_coco(tmp_path / "c")
    (path / "val2017/2.png").write_bytes(b"no picture")
    words = ["--ckpt", MICRO, "--coco", path, "--size", 48, "--json", tmp_path / "o.jsonl"]
    with pytest.raises(
        Mistake, match="1 of 2 images cannot be read, more than --max_bad 0.01, such as .*2.png"
    ):
        run(*words)
    run(*words, "--max_bad", 0.5)
    (got,) = lines(tmp_path / "o.jsonl")
    assert got["metrics"]["n_unreadable"] == 1 and got["metrics"]["n_images"] == 1
    assert "2.png" in got["metrics"]["unreadable"][0]
    assert "left out: 1 unreadable images: " in capsys.readouterr().out


def test_names_in_any_alphabet(tmp_path):
    path = small_coco(tmp_path / "c", categories=[{"id": 3, "name": "苹果"}])
    ckpt = tmp_path / "netz\udce9.pth"  # a byte that is no UTF-8
    vit = load_backbone(MICRO)[0]
    save(ckpt, {"arch": vit.config, "backbone": vit.state_dict()})
    table, line = tmp_path / "o.csv", tmp_path / "o.jsonl"
    run("--ckpt", ckpt, "--coco", path, "--size", 48, "--json", line, "--csv", table)
    assert lines(line)[0]["ckpt"].endswith("netz\udce9.pth")
    rows = list(csv.DictReader(open(table, encoding="utf-8", errors="surrogateescape")))
    assert rows[0]["category"] == "苹果" and rows[0]["ckpt"] == str(ckpt)


def test_options_beside_the_paper(tmp_path):
    """--contiguous and --centre change the masks, and the JSON says so; the paper's row has none of them."""
    words = ["--ckpt", MICRO, "--toy", "--limit", 8, "--size", 64, "--json", tmp_path / "o.jsonl"]
    for more in (
        [],
        ["--contiguous"],
        ["--centre"],
        ["--centre", "--contiguous", "--truth", "pixel", "--upsample"],
    ):
        run(*words, *more)
    rows = lines(tmp_path / "o.jsonl")
    chosen = [(row["protocol"]["centre"], row["protocol"]["contiguous"]) for row in rows]
    assert chosen == [(False, False), (False, True), (True, False), (True, True)]
    assert len({row["metrics"]["best"] for row in rows}) == 4
    assert rows[0]["metrics"]["everything"] == rows[2]["metrics"]["everything"]


def test_centre_is_written_both_ways():
    for word in ("center", "centre"):
        assert zeroshot.get_args(["--ckpt", MICRO, "--toy", "--prompt", word]).prompt == "center"


# ------------------------------------------------- pictures
def test_kmeans_finds_what_is_apart():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 9)
    noise = torch.randn(79, 3, generator=torch.Generator().manual_seed(0))
    z = F.normalize(torch.eye(3)[labels] + 0.05 * noise, dim=-1)
    assert torch.equal(kmeans(z, 3), labels)  # numbered by size
    assert kmeans(z, 1).unique().tolist() == [0]
    assert kmeans(torch.ones(6, 3) / 3**0.5, 4).max() < 4  # fewer tokens apart than clusters


@pytest.mark.parametrize(
    "words, cells",
    [
        (["--point", "20,30"], 5),
        (["--point", "20,30", "--point", "70,10", "--background_point", "1,1", "--threshold", "0.3"], 5),
        ([], 3),
        (["--heads", "--stride", "4", "--no-upsample", "--point", "99,49"], 8),
        (["--centre", "--contiguous", "--point", "20,30", "--point", "70,10"], 5),
    ],
)
def test_pictures(tmp_path, words, cells, monkeypatch):
    drawn = []
    sheet = zeroshot.figure.sheet
    monkeypatch.setattr(zeroshot.figure, "sheet", lambda rows: drawn.append(rows) or sheet(rows))
    image = tmp_path / "photo.png"
    Image.fromarray(toy.scene(0, size=(50, 100)).image).save(image)
    out = tmp_path / "f.png"
    run_picture("--ckpt", MICRO, "random:vit_micro/16", "--image", image, "--size", 48, "--out", out, *words)
    assert [len(panels) for _, panels in drawn[0]] == [cells, cells]
    assert all(panel[1].shape == (48, 96, 3) for _, panels in drawn[0] for panel in panels)
    assert np.asarray(Image.open(out)).std() > 20


# ------------------------------------------------- mistakes
@pytest.mark.parametrize(
    "words, reason",
    [
        ("--image nope.jpg", "nope.jpg"),
        ("--toy --image x.jpg", "not allowed with"),
        ("", "one of the arguments --coco --voc --toy --image is required"),
        ("--toy --stride 5", "does not divide"),
        ("--toy --upsample", "--truth pixel"),
        ("--toy --limit 0", "--limit: '0'"),
        ("--coco nowhere", "nowhere.*no such file"),
        ("--voc nowhere", "no PASCAL VOC"),
        ("--toy --split foo", "foo"),
        ("--toy --background_points -1", "0 or more"),
        ("--toy --json nowhere/x.json", "nowhere/x.json: cannot be written"),
        ("--image x --background_point 1,1", "give one"),
        ("--image x --threshold 0.3", "give one"),
        ("--image x --point 3,4 --threshold nan", "--threshold: 'nan': expected a number, -1.0 to 1.0"),
        ("--image x --point 3,4 --threshold high", "--threshold: 'high': expected a number"),
        ("--image x --json o.jsonl", "--json has no effect with --image"),
        ("--image x --csv o.csv", "--csv has no effect with --image"),
        ("--image x --limit 3", "--limit has no effect with --image"),
        ("--image x --num_workers 0", "--num_workers has no effect with --image"),
        ("--toy --threshold 0.3", "--threshold has no effect with --toy"),
        ("--toy --out x.png", "--out has no effect with --toy"),
        ("--voc x --point 3,4", "--point has no effect with --voc"),
        ("--voc x --crowd", "--crowd has no effect with --voc"),
        ("--image x --point 3", "expected x,y"),
    ],
)
def test_mistakes_are_one_line(words, reason):
    with pytest.raises(Mistake, match=reason) as e:
        run_picture("--ckpt", MICRO, *words.split())
    assert "\n" not in str(e.value)


def test_all_checkpoints_are_opened_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(zeroshot, "prompt_table", lambda *_: pytest.fail("worked first"))
    table = tmp_path / "kept.csv"
    table.write_text("an older table")
    for more, reason in (
        (["no.pth"], "no such checkpoint"),
        (["random:vit_micro/14", "--stride", "4"], "does not divide the patch size 14"),
    ):
        with pytest.raises(Mistake, match=reason):
            run("--ckpt", MICRO, *more, "--toy", "--csv", table)
    assert table.read_text() == "an older table"


def test_exit_code(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (64, 48)).save(tmp_path / "x.png")
    for words in (
        ["--image", str(tmp_path / "x.png"), "--point", "64,3"],
        ["--image", "x", "--point", "3"],
        ["--bogus"],
    ):
        monkeypatch.setattr(sys, "argv", ["zeroshot.py", "--ckpt", MICRO, *words])
        with pytest.raises(SystemExit) as e:
            runpy.run_path(zeroshot.__file__, run_name="__main__")
        assert e.value.code == 2
    err = capsys.readouterr().err
    assert "point 64,3 is outside" in err and "64 pixels wide" in err
    assert "Traceback" not in err and "expected x,y" in err


# ------------------------------------------------- real images and weights
@pytest.mark.slow
def test_foreign_weights_beat_random_ones(real_data, tmp_path):
    weights = real_data / "weights/vits14_dinov2_saliency_fp16.pth"
    words = ["--coco", real_data / "coco", "--limit", 12, "--size", 224, "--json", tmp_path / "o.jsonl"]
    run("--ckpt", weights, "random:vit_s/14", *words)
    foreign, random = lines(tmp_path / "o.jsonl")
    assert foreign["protocol"]["size"] == 224
    foreign, random = foreign["metrics"], random["metrics"]
    assert foreign["n_prompts"] == random["n_prompts"]
    assert foreign["best"] > random["best"] + 5 and foreign["overlap"] < random["overlap"]
    assert zeroshot.working_size(480, 14) == 476 and zeroshot.working_size(480, 16) == 480
