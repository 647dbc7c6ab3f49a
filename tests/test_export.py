"""Proves: a backbone leaves this code as it is: into timm, through torch.hub, and in each format that
`python checkpoint.py FILE --to OUT` writes."""
import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch

import checkpoint
from checkpoint import get_args, load, load_backbone, main
from model import ViT, vit
from run import Mistake

ROOT = Path(__file__).parent.parent
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ours(tmp_path):
    """A backbone.pth whose heads no width tells, and its network."""
    torch.manual_seed(0)
    network = ViT(img_size=32, patch_size=8, embed_dim=96, depth=2, num_heads=6).eval().requires_grad_(False)
    for p in network.parameters():
        p.add_(0.05 * torch.randn_like(p))
    path = tmp_path / "backbone.pth"
    checkpoint.save(path, {"arch": network.config, "step": 7, "backbone": network.state_dict()})
    return path, network


def export(path, to, *options):
    main(get_args([str(path), "--to", str(to), *options]))


# ------------------------------------------------- timm
def test_our_backbone_goes_strictly_into_timm(tmp_path):
    torch.manual_seed(0)
    ours = vit("vit_t").eval()
    for p in ours.parameters():
        p.data.add_(0.02 * torch.randn_like(p))
    checkpoint.save(tmp_path / "backbone.pth", {"arch": ours.config, "backbone": ours.state_dict()})

    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    theirs.load_state_dict(torch.load(tmp_path / "backbone.pth")["backbone"], strict=True)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert (theirs.forward_features(x) - ours(x)).abs().max() < 1e-5


# ------------------------------------------------- torch.hub
def test_hub_opens_any_file(ours, capsys):
    path, network = ours
    found = torch.hub.load(str(ROOT), "load", str(path), source="local")
    assert torch.equal(found(IMAGES), network(IMAGES)) and "MMC (7 steps)" in capsys.readouterr().out
    torch.save(network.state_dict(), path)
    found = torch.hub.load(str(ROOT), "load", str(path), source="local", num_heads=6)
    assert found.config == network.config


def test_hub_opens_the_file_beside_it_or_says_that_it_is_not_there(ours, monkeypatch):
    path, network = ours
    hub = runpy.run_path(str(ROOT / "hubconf.py"))
    monkeypatch.setitem(hub["mmc_mini"].__globals__, "__file__", str(path.parent / "hubconf.py"))
    with pytest.raises(Mistake, match="mmc.pth: no such checkpoint file"):
        hub["mmc_mini"]()
    path.rename(path.parent / "mmc.pth")
    assert torch.equal(hub["mmc_mini"]()(IMAGES), network(IMAGES))
    assert [k for k, v in hub.items() if callable(v) and k[0] != "_"] == ["load", "mmc_mini", "mmc_micro"]
    assert all(importlib.util.find_spec(name) for name in hub["dependencies"])


# ------------------------------------------------- files that load_backbone reads again
@pytest.mark.parametrize("name", ["out.pth", "out.safetensors"])
def test_weights_come_back(name, ours, tmp_path, capsys):
    path, network = ours
    export(path, tmp_path / name)
    found, report = load_backbone(tmp_path / name)
    assert found.config == network.config and torch.equal(found(IMAGES), network(IMAGES))
    assert "6 heads (the file says so)" in report and f"{name}: written" in capsys.readouterr().out

    export(path, tmp_path / f"half.{name}", "--half")
    found, _ = load_backbone(tmp_path / f"half.{name}")
    for key, value in found.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, network.state_dict()[key].half().float())
    assert (tmp_path / f"half.{name}").stat().st_size < 0.6 * (tmp_path / name).stat().st_size


def test_a_file_of_another_method_becomes_one_of_ours(ours, tmp_path):
    _, network = ours
    teacher = {f"module.backbone.{k}": v for k, v in network.state_dict().items()}
    torch.save({"teacher": teacher}, tmp_path / "dino.pth")
    export(tmp_path / "dino.pth", tmp_path / "out.pth", "--num_heads", "6", "--checkpoint_key", "teacher")
    content = load(tmp_path / "out.pth")
    assert list(content) == ["arch", "step", "backbone"] and content["step"] == 0
    assert torch.equal(load_backbone(tmp_path / "out.pth")[0](IMAGES), network(IMAGES))


# ------------------------------------------------- programs
@pytest.mark.slow
def test_a_program_of_torch_export(ours, tmp_path):
    path, network = ours
    export(path, tmp_path / "out.pt2")
    program = torch.export.load(tmp_path / "out.pt2").module()
    for x in (IMAGES, IMAGES[:1]):
        assert (program(x) - network(x)).abs().max() < 1e-5
    export(path, tmp_path / "half.pt2", "--half")
    program = torch.export.load(tmp_path / "half.pt2").module()
    assert (program(IMAGES.half()).float() - network(IMAGES)).abs().max() < 0.05


@pytest.mark.slow
def test_an_onnx_program(ours, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator
    path, network = ours
    export(path, tmp_path / "out.onnx")
    onnx.checker.check_model(str(tmp_path / "out.onnx"))
    program = ReferenceEvaluator(str(tmp_path / "out.onnx"))
    for x in (IMAGES, IMAGES[:1]):
        (tokens,) = program.run(None, {"x": x.numpy()})
        assert (torch.from_numpy(tokens) - network(x)).abs().max() < 1e-4


# ------------------------------------------------- the command
def test_without_to_it_only_reports(ours, capsys):
    path, _ = ours
    before = sorted(path.parent.iterdir())
    main(get_args([str(path)]))
    assert "MMC (7 steps)" in capsys.readouterr().out and sorted(path.parent.iterdir()) == before


def test_mistakes_are_seen_before_the_work(ours, tmp_path, monkeypatch):
    path, _ = ours
    for options, words in (
        (["--to", "out.bin"], r"--to out.bin: expected a name that ends in \.pth, \.safetensors"),
        (["--to", str(tmp_path / "no" / "out.pth")], "cannot be written"),
        (["--half"], "--half has no effect without --to"),
    ):
        with pytest.raises(Mistake, match=words):
            get_args([str(path), *options])
    for package in ("onnx", "onnxscript", "safetensors"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Mistake, match="pip install onnx onnxscript"):
        get_args([str(path), "--to", "out.onnx"])
    with pytest.raises(Mistake, match="pip install safetensors"):
        get_args([str(path), "--to", "out.safetensors"])


def test_weights_that_float16_cannot_hold_are_refused(ours, tmp_path):
    path, network = ours
    network.cls_token[0, 0, 0] = 1e6
    checkpoint.save(path, {"arch": network.config, "backbone": network.state_dict()})
    with pytest.raises(Mistake, match="beyond the range of float16"):
        export(path, tmp_path / "out.pth", "--half")
    assert not (tmp_path / "out.pth").exists()


# ------------------------------------------------- fewer blocks
def test_the_first_blocks_give_what_the_whole_network_has_there(ours, tmp_path):
    path, network = ours
    export(path, tmp_path / "short.pth", "--blocks", "1")
    found, _ = load_backbone(str(tmp_path / "short.pth"))
    assert (found.depth, network.depth) == (1, 2)
    torch.testing.assert_close(found(IMAGES), network.intermediate(IMAGES, [1], norm=True)[0])
    with pytest.raises(Mistake, match="--blocks 3: the network has 2"):
        export(path, tmp_path / "long.pth", "--blocks", "3")
    with pytest.raises(Mistake, match="--blocks has no effect without --to"):
        get_args([str(path), "--blocks", "1"])
