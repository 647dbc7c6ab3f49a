"""Proves: what a stranger brings is used rightly, or refused in one line that names it, before the work.
Nothing that a stranger put into a file is run."""
import errno
import os
import pickle
import re
import sys
import types
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import clicks
import davis
import finetune
import linseg
import monitor
import pretrain
import probes
import retrieval
import run
import training
import videos
import zeroshot
from data import ImageFolder, ToyImages, has_splits, open_images
from images import BadImage, read_image
from labelmaps import Pairs
from model import vit
from run import Mistake
from scenes import Coco, Voc
from studies import layouts

CPU = torch.device("cpu")
RANDOM = "--ckpt random:vit_micro/8"


def start(script: str, line: str) -> None:
    """What `python SCRIPT.py LINE` does, without a process of its own."""
    module = sys.modules[script]
    module.main(module.get_args(line.split()))


def picture(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def two_classes(root: Path, n: int = 4) -> Path:
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            for i in range(n):
                picture(root / split / name / f"{i}.png", i)
    return root


# ------------------------------------------------- files that would run
class Evil:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("script, line", [
    ("zeroshot", "--toy"), ("davis", "--davis davis"), ("probes", "linseg --data coco"),
    ("probes", "knn --data toy"), ("probes", "variance --data toy"), ("probes", "layers --data toy"),
    ("probes", "fewshot --data toy"), ("finetune", "--data toy"), ("demo", ""), ("pretrain", ""),
])
def test_a_malicious_checkpoint_is_refused_by_every_script(script, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gradio", types.ModuleType("gradio"))           # demo needs it
    Path("out").mkdir()
    torch.save({"model": {"cls_token": torch.zeros(1)}, "args": Evil(tmp_path / "ran")}, "out/last.pth")
    for layout in ("davis", "coco"):
        if layout in line:
            options = f"--out {layout} --layout {layout} --n 1 --n_val 1"
            layouts.main(layouts.get_args(options.split()))
    line += " --output_dir out" if script == "pretrain" else " --ckpt out/last.pth"
    __import__(script)
    with pytest.raises(Mistake, match="system, which is refused"):
        start(script, line)
    assert not Path("ran").exists()


def test_the_file_would_have_run(tmp_path):
    """The test above proves something only if opening the file without care does run it."""
    torch.save(Evil(tmp_path / "ran"), tmp_path / "evil.pth")
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "ran").exists()
    with pytest.raises(Mistake, match="refused"):
        checkpoint.load(tmp_path / "evil.pth")


# ------------------------------------------------- folders
def test_links_to_themselves_pipes_and_hidden_names_are_no_images(tmp_path):
    two_classes(tmp_path)
    folder = tmp_path / "train/ant"
    (folder / "self").symlink_to("self")
    (folder / "dead.png").symlink_to("gone.png")                       # unreadable, not hidden
    os.mkfifo(folder / "pipe.png")                                     # to open it would wait for ever
    (folder / "._0.png").write_bytes(b"x")
    images = ImageFolder(tmp_path / "train")
    assert images.about == "9 images, 2 classes; left out: 1 .png, 1 hidden, 1 without suffix"
    with pytest.raises(BadImage, match="dead.png"):
        images.read(images.files.index(str(folder / "dead.png")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every folder")
@pytest.mark.parametrize("reader", [
    Coco, Voc, Pairs, ImageFolder, lambda root: retrieval.Revisited(str(root)),
    lambda root: open_images(Namespace(data=str(root))),
    lambda root: checkpoint.load(root / "a.pth"), lambda root: read_image(root / "a.png"),
])
def test_a_folder_without_permission_is_one_line(reader, tmp_path):
    root = tmp_path / "closed"
    root.mkdir(mode=0)
    with pytest.raises(Mistake, match="closed"):
        reader(root)


def test_a_split_is_found_in_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)
    monkeypatch.setattr(os, "scandir", refuse)
    assert has_splits(tmp_path)
    with pytest.raises(Mistake, match="cannot be opened .Permission denied"):
        ImageFolder(tmp_path)


def test_pretraining_does_not_need_test_images(tmp_path, capsys):
    """It says what is wrong with val/ and begins; only a folder that was asked for is a mistake."""
    two_classes(tmp_path)
    for path in (tmp_path / "val").rglob("*.png"):
        path.write_text("broken")
    options = f"--data {tmp_path} --arch vit_micro --patch_size 8"
    args = pretrain.get_args(options.split())
    val = monitor.test_images(args)
    fake = Namespace(knn_pair=(ImageFolder(tmp_path / "train"), val), size=32, device=CPU,
                     args=Namespace(num_workers=0))
    assert monitor.Monitor.knn(fake, vit("vit_micro", 32, 8)) == {} and fake.knn_pair is None
    assert "no k-NN while training: none of the 8 images can be read" in capsys.readouterr().out

    for path in (tmp_path / "val").rglob("*.png"):
        path.unlink()
    assert monitor.test_images(args) is None
    assert "val: holds no image" in capsys.readouterr().out
    args.val_data = str(tmp_path / "val")
    with pytest.raises(Mistake, match="holds no image"):
        monitor.test_images(args)


# ------------------------------------------------- pixels and masks
def test_pixels_that_are_no_numbers_do_not_change_the_others(tmp_path):
    values = np.linspace(1000, 2000, 1024, dtype=np.float32).reshape(32, 32)
    Image.fromarray(values).save(tmp_path / "sound.tif")
    values[3, 3:6] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "holes.tif")
    sound = read_image(tmp_path / "sound.tif")
    holes = read_image(tmp_path / "holes.tif")
    assert holes[0, 3, 3:6].tolist() == [0, 255, 0] and sound[0, -1, -1] == 255
    holes[:, 3, 3:6] = sound[:, 3, 3:6]
    assert torch.equal(holes, sound)
    Image.fromarray(np.full_like(values, np.nan)).save(tmp_path / "none.tif")
    with pytest.raises(BadImage, match="no pixel is a number"):
        read_image(tmp_path / "none.tif")


def test_a_strip_is_refused_before_it_is_enlarged(monkeypatch):
    """4 x 60,000 pixels with a short side of 480 would be 10 GB."""
    monkeypatch.setattr(clicks, "resize", lambda *_: pytest.fail("resized"))
    strip = torch.zeros(3, 4, 60_000, dtype=torch.uint8)
    with pytest.raises(Mistake, match="13500000 tokens, more than 20000"):
        clicks.picture_tokens(vit("vit_micro", 32, 16), strip, CPU, 480)


def test_a_first_mask_with_255_among_other_numbers_is_refused(tmp_path):
    """Such as a JPEG's, clipped: the object would be void, and its fringe three objects."""
    picture(tmp_path / "frames/0.png")
    numbers = np.zeros((32, 32), np.uint8)
    numbers[8:24, 8:24] = 255
    numbers[8] = range(32)
    numbers[8] %= 4
    args = Namespace(video=str(tmp_path / "frames"), first_mask=str(tmp_path / "mask.png"))
    Image.fromarray(numbers).save(args.first_mask)
    with pytest.raises(Mistake, match="has 255 beside 1, 2, 3"):
        videos.find_clips(args, {})
    Image.fromarray(numbers // 255 * 255).save(args.first_mask)
    assert videos.find_clips(args, {})[0].objects() == 1


# ------------------------------------------------- names in other alphabets, lines, locks
def test_an_unreadable_image_with_a_latin1_name_is_named_and_counted(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    guard = Namespace(images=Namespace(name=lambda i: name), bad=set(), folder=tmp_path)
    for _ in range(2):
        training.Guard.note_bad(guard, {7})
        guard.bad.clear()                                              # the next epoch
    assert (tmp_path / "bad_images.txt").read_bytes() == b"caf\xe9.jpg\n"
    assert training.bad_names(tmp_path) == {name} and training.bad_names(tmp_path / "new") == set()


@pytest.mark.parametrize("module", [pretrain, monitor, finetune, linseg, retrieval, davis, zeroshot, probes])
def test_a_reader_that_goes_away_ends_no_script(module):
    """`| head -1` breaks print(), but not distributed.say()."""
    assert not re.findall(r"\bprint\(", Path(module.__file__).read_text())


def test_a_file_system_without_locks_is_no_mistake(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", refuse)
    run.lock(tmp_path)
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().out


def test_force_says_what_it_overrides(tmp_path, capsys):
    parser = run.Parser()
    run.add_shared(parser, "output_dir force seed")
    args = parser.parse_args(["--output_dir", str(tmp_path), "--seed", "3", "--force"])
    stored = {"options": vars(args) | {"seed": 1, "world_size": 1}, "step": 5}
    training.claim_folder(args, set(), stored)
    assert "--force: going on with other options: --seed 1 -> 3" in capsys.readouterr().out


# ------------------------------------------------- options
@pytest.mark.parametrize("script, line", [
    ("probes", f"knn {RANDOM} --data toy --temp 1e-50"), ("davis", f"{RANDOM} --davis x --temp 1e-50"),
    ("pretrain", "--temp 1e-50"),
])
def test_a_temperature_that_float32_takes_for_zero_is_refused(script, line):
    """0 / 0 is NaN, and a vote of NaN is a wrong figure."""
    with pytest.raises(Mistake, match="--temp: '1e-50': expected a number, more than 0"):
        start(script, line)


@pytest.mark.parametrize("script, line, message", [
    ("zeroshot", f"{RANDOM} --image a.png --json x", "--json has no effect with --image"),
    ("zeroshot", f"{RANDOM} --toy --crowd", "--crowd has no effect with --toy"),
    ("davis", "--eval_only x --davis y --topk 3", "--topk has no effect with --eval_only"),
    ("finetune", "--eval x --data y --lr 1", "--lr: no effect with --eval"),
    ("pretrain", "--data toy --local_crops_size 16", "--local_crops_size has no effect"),
    ("pretrain", "--w_pat 0 --patch_negatives position", "--patch_negatives has no effect with --w_pat 0"),
    ("probes", f"knn {RANDOM} --data toy --download", "--download has no effect with --data toy"),
])
def test_an_option_without_effect_is_a_mistake(script, line, message):
    with pytest.raises(Mistake, match=message):
        start(script, line)


def test_a_limit_of_scenes_without_scenes_is_a_mistake(tmp_path):
    two_classes(tmp_path)
    options = f"layers {RANDOM} --data {tmp_path} --size 32 --num_workers 0 --picture {tmp_path}/l.png"
    with pytest.raises(Mistake, match="--limit counts the scenes of --coco or --voc"):
        start("probes", f"{options} --limit 3")


def test_options_that_random_weights_ignore_are_named():
    _, report = checkpoint.load_backbone("random:vit_micro/8", num_heads=3)
    assert "--num_heads do not apply" in report


@pytest.mark.parametrize("module", [linseg, retrieval])
def test_every_script_with_ckpt_takes_num_heads(module):
    parser = run.Parser()
    module.add_options(parser)
    assert parser.parse_args("--ckpt a b --data x --num_heads 4".split()).num_heads == 4
    for other in ("zeroshot --toy", "davis --davis x", "finetune --data x", "probes knn --data x"):
        script, *line = other.split()
        args = sys.modules[script].get_args([*line, "--ckpt", "a", "b", "--num_heads", "4"])
        assert args.num_heads == 4 and args.ckpt == ["a", "b"]


def test_best_stands_beside_everything(capsys):
    """Over thresholds from 0 on, the best of poor features is the mask that takes all."""
    args = Namespace(coco=None, voc=None, limit=4, num_workers=0, max_bad=0.0)
    network = vit("vit_micro", 48, 8).eval()
    toy = ToyImages("val", 4)
    with torch.no_grad():
        found, _ = probes.prompt_iou(args, network, toy, [4], CPU)
    said = re.search(r"takes everything: ([\d.]+)", capsys.readouterr().out)
    assert 5 < float(said[1]) < 60 and found.keys() == {4}


def test_a_truth_that_runs_is_refused(tmp_path):
    (tmp_path / "jpg").mkdir()
    (tmp_path / "gnd_x.pkl").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(Mistake, match="system, which is refused"):
        retrieval.Revisited(str(tmp_path))
    assert not (tmp_path / "ran").exists()
