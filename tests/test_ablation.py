"""Proves: each study's variants are options that pretrain.py takes, Table 4's losses are on and off as named;
a study runs, evaluates, goes on after an interruption without doing a run twice, and draws what it found."""
import json
from unittest.mock import Mock

import pytest
from PIL import Image
from test_pretrain import TINY

import ablation
from pretrain import get_args
from toy import scene


def test_variants_are_options_of_pretrain():
    for study in ablation.STUDIES.values():
        for options in study.values():
            get_args(options)
    assert set(ablation.STUDIES["table4"]) == set(ablation.PAPER)
    for name, options in ablation.STUDIES["table4"].items():
        args = get_args(options)
        assert name == "".join(str(int(w > 0)) for w in (args.w_rec, args.w_cls, args.w_pat))


def row(variant, seed, value):
    return {"variant": variant, "seed": seed, "knn_cls": value, "knn_pat": 2 * value, "coco_overlap": 0.5,
            "knn_cls_untrained": 9.0 + seed, "curve": [[0, 10.0, 10.0], [2, value, 2 * value]]}


def test_table_by_hand():
    rows = [row("111", 0, 30.0), row("111", 1, 32.0), row("100", 0, 11.0)]
    lines = ablation.table(rows, "table4").splitlines()
    assert lines[0] == ("| rec cls pat | seeds | k-NN CLS | k-NN PAT | COCO O | "
                        "*paper: CLS / PAT / fine-tuned* |")
    assert lines[2] == "| untrained | 2 | 9.5 +- 0.7 |  |  | |"                     # once per seed
    assert lines[3] == "| 111 | 2 | 31.0 +- 1.4 | 62.0 +- 2.8 | 0.500 +- 0.000 | *77.5 / 77.0 / 91.0* |"
    assert lines[4] == "| 100 | 1 | 11.0 | 22.0 | 0.500 | *17.2 / 14.7 / 89.9* |"
    picture = ablation.curves(rows, "table4")
    assert picture.size == (920, 320) and len(picture.getcolors(100_000)) > 20


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


def test_curves_join_the_epochs_that_all_seeds_have():
    holes = [row("111", 0, 30.0), row("111", 1, 32.0)]
    holes[1]["curve"] = [[2, 32.0, 64.0]]
    whole = [row("111", 0, 30.0), row("111", 1, 32.0)]
    for r in whole:
        r["curve"] = r["curve"][1:]
    a, b = (ablation.curves(rows, "table4").tobytes() for rows in (holes, whole))
    assert a == b


def test_a_run_with_other_options_is_refused(tmp_path):
    (tmp_path / "results.jsonl").write_text(json.dumps(row("100", 0, 30.0) | {"options": ["--epochs", "9"]}))
    command = ["--out", str(tmp_path), "--variants", "100", "--voc", "VOCdevkit"]
    with pytest.raises(ValueError, match="other options, .'--epochs', '9'.* give another --out"):
        ablation.main(ablation.get_args(command))
    args = ablation.get_args(command)
    (tmp_path / "results.jsonl").write_text(json.dumps(
        row("100", 0, 30.0) | ablation.how(ablation.STUDIES["table4"]["100"], args)))
    ablation.main(args)
    with pytest.raises(ValueError, match="'--limit 80'.*, not .*'--size 240'.* give another --out"):
        ablation.main(ablation.get_args([*command, "--zeroshot_options", "--size 240"]))


def test_the_exit_code_of_a_stopped_run_is_passed_on(monkeypatch):
    for code, wanted in ((75, 75), (3, 3), (1, 2), (-9, 2)):
        monkeypatch.setattr(ablation.subprocess, "Popen", lambda _, code=code: Mock(wait=lambda: code))
        with pytest.raises(SystemExit) as e:
            ablation.call("pretrain.py")
        assert e.value.code == wanted


def test_a_wrong_name_is_named():
    with pytest.raises(ValueError, match="--variants 222: table4 has 111"):
        ablation.get_args(["--out", "x", "--variants", "222"])
