"""Proves: a checkpoint of each published layout, and of our own, gives the tokens of the model that was
saved; what is missing, unknown, of another shape or not finite is fatal and named; no file can run code;
nothing is read by its name."""

import argparse
import builtins
import json
import os
import re

import pytest
import timm
import torch
from safetensors.torch import save_file

import checkpoint
from checkpoint import load, load_backbone
from model import MMC, ViT, momentum_teacher

SMALL = dict(img_size=32, patch_size=16, embed_dim=128, depth=2, num_heads=2)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def source(seed=0, **changed) -> ViT:
    """A ViT none of whose weights is at its initial value."""
    torch.manual_seed(seed)
    vit = ViT(**(SMALL | changed)).eval()
    for p in vit.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return vit


def prefixed(state, prefix):
    return {prefix + k: v for k, v in state.items()}


def heads(prefix=""):
    return {f"{prefix}head.mlp.0.weight": torch.randn(8, 128), f"{prefix}head.mlp.0.bias": torch.randn(8)}


def tokens(vit, x=IMAGES):
    with torch.no_grad():
        return vit(x)


def other():
    """What must not be taken in place of the teacher's."""
    return source(seed=9).state_dict()


def chunked(state):
    return {
        re.sub(r"^blocks\.(\d+)\.", r"blocks.0.\1.", k).replace("reg_token", "register_tokens"): v
        for k, v in state.items()
    }


# name: (changes to the source, its state dict -> the file, words of the report)
LAYOUTS = {
    "ours, backbone.pth": (
        {},
        lambda s: {"arch": source().config, "step": 7, "backbone": s},
        "MMC (7 steps)",
    ),
    "DINO, backbone": ({}, lambda s: s, "flat file"),
    "DINO, full": (
        {},
        lambda s: {
            "student": prefixed(other(), "module.backbone.") | heads("module."),
            "teacher": prefixed(s, "backbone.") | heads(),
            "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.1}]},
            "epoch": 100,
            "args": argparse.Namespace(arch="vit_small", lr=0.1),
            "dino_loss": {"center": torch.zeros(1, 8)},
        },
        "teacher",
    ),
    "iBOT, backbone": ({}, lambda s: {"state_dict": s | {"masked_embed": torch.zeros(1, 128)}}, "iBOT"),
    "iBOT, full": (
        {},
        lambda s: {
            "student": prefixed(other(), "module.backbone."),
            "teacher": prefixed(s, "module.backbone.")
            | heads("module.")
            | {"module.backbone.masked_embed": torch.zeros(1, 128)},
            "ibot_loss": {"center": torch.zeros(8)},
        },
        "iBOT",
    ),
    "MAE": (
        dict(fixed_pos=True),
        lambda s: {
            "model": s
            | {
                "mask_token": torch.zeros(1, 1, 64),
                "decoder_pos_embed": torch.zeros(1, 5, 64),
                "decoder_blocks.0.norm1.weight": torch.ones(64),
            }
        },
        "MAE",
    ),
    "MAE, fine-tuned": (
        {},
        lambda s: {
            "model": {k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v for k, v in s.items()}
            | heads()
        },
        "MAE",
    ),
    "solo-learn, with momentum": (
        {},
        lambda s: {"state_dict": prefixed(other(), "backbone.") | prefixed(s, "momentum_backbone.")},
        "momentum_backbone",
    ),
    "lightly, with momentum": (
        {},
        lambda s: {"state_dict": prefixed(other(), "backbone.") | prefixed(s, "backbone_momentum.")},
        "backbone_momentum",
    ),
    "MSN": (
        {},
        lambda s: {
            "target_encoder": prefixed(s, "module.") | {"module.fc.fc1.weight": torch.zeros(4, 128)},
            "encoder": prefixed(other(), "module."),
            "prototypes": torch.zeros(4, 4),
            "epoch": 3,
        },
        "MSN",
    ),
    "MoCo-v3": (
        dict(embed_dim=384, num_heads=12, fixed_pos=True),
        lambda s: {
            "state_dict": prefixed(
                source(9, embed_dim=384, num_heads=12).state_dict(), "module.base_encoder."
            )
            | prefixed(s, "module.momentum_encoder.")
            | heads("module.momentum_encoder."),
            "arch": "vit_small",
            "epoch": 300,
        },
        "MoCo-v3",
    ),
    "MoCo-v3, base only": (
        dict(embed_dim=384, num_heads=12),
        lambda s: {"state_dict": prefixed(s, "module.base_encoder.") | heads("module.base_encoder.")},
        "MoCo-v3",
    ),
    "SiT": (
        {},
        lambda s: {
            "teacher": prefixed(s, "backbone.") | {"rec_head.mlp.0.weight": torch.zeros(8, 128)} | heads(),
            "student": prefixed(other(), "module.backbone."),
        },
        "SiT",
    ),
    "MC-SSL, student only": (
        {},
        lambda s: {
            "student": prefixed(s, "module.backbone.") | {"module.recons_head.0.weight": torch.zeros(8, 128)}
        },
        "student",
    ),
    "DINOv2": (
        dict(patch_size=14, img_size=42, init_values=1e-5),
        lambda s: s | {"mask_token": torch.zeros(1, 128)},
        "DINOv2",
    ),
    "DINOv2, registers": (
        dict(patch_size=14, img_size=42, init_values=1.0, reg_tokens=4),
        lambda s: chunked(s) | {"mask_token": torch.zeros(1, 128)},
        "DINOv2",
    ),
    "DINOv2, training": (
        dict(patch_size=14, img_size=42, init_values=1.0),
        lambda s: {
            "teacher": prefixed(chunked(s) | {"mask_token": torch.zeros(1, 128)}, "backbone.")
            | prefixed(heads(), "dino_head.")
        },
        "DINOv2",
    ),
    "DeiT": (
        {},
        lambda s: {"model": s | {"head.weight": torch.zeros(9, 128), "head.bias": torch.zeros(9)}},
        "model",
    ),
    "timm, wrapped": ({}, lambda s: {"state_dict": prefixed(s, "model.")}, "model"),
    "solo-learn": (
        {},
        lambda s: {
            "state_dict": prefixed(s, "backbone.") | {"projector.0.weight": torch.zeros(8, 128)},
            "pytorch-lightning_version": "2",
            "hyper_parameters": {"lr": 1.0},
        },
        "solo-learn or lightly",
    ),
    "lightly": (
        {},
        lambda s: {
            "state_dict": prefixed(s, "teacher_backbone.")
            | prefixed(other(), "student_backbone.")
            | {"projection_head.0.weight": torch.zeros(8, 128)}
        },
        "solo-learn or lightly",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name, tmp_path):
    changed, layout, words = LAYOUTS[name]
    vit = source(**changed)
    torch.save(layout(vit.state_dict()), tmp_path / "named_nothing.bin")
    found, report = load_backbone(tmp_path / "named_nothing.bin")
    x = torch.randn(1, 3, 42, 42) if vit.patch_size == 14 else IMAGES
    assert torch.equal(tokens(found, x), tokens(vit, x))
    assert words in report and f"{len(vit.state_dict())} keys matched" in report and "\n" not in report
    assert not found.training and not any(p.requires_grad for p in found.parameters())


def test_our_own_run_gives_the_teacher_or_what_is_asked_for(tmp_path):
    vit = source()
    student = MMC(vit, hidden=16, out=8)
    teacher = momentum_teacher(student)
    for p in teacher.parameters():
        p.add_(0.1)
    torch.save(
        {
            "arch": vit.config,
            "step": 5,
            "options": {"lr": 1.0},
            "student": student.state_dict(),
            "teacher": teacher.state_dict(),
            "optimizer": {"state": {}},
        },
        tmp_path / "last.pth",
    )
    found, report = load_backbone(tmp_path / "last.pth")
    assert (
        torch.equal(tokens(found), tokens(teacher.backbone.eval()))
        and "teacher" in report
        and "h_pat" in report
    )
    found, report = load_backbone(tmp_path / "last.pth", "student")
    assert torch.equal(tokens(found), tokens(vit)) and "student" in report
    with pytest.raises(ValueError, match="no ViT under the key 'encoder'.*student/backbone"):
        load_backbone(tmp_path / "last.pth", "encoder")


def test_half_precision_becomes_float32(tmp_path):
    vit = source()
    for dtype in (torch.float16, torch.bfloat16):
        state = {k: v.to(dtype) for k, v in vit.state_dict().items()}
        torch.save(state, tmp_path / "x.pth")
        found, _ = load_backbone(tmp_path / "x.pth")
        assert all(torch.equal(v, state[k].float()) for k, v in found.state_dict().items())


def test_number_of_heads_can_be_given(tmp_path):
    vit = source(num_heads=4)
    torch.save(vit.state_dict(), tmp_path / "x.pth")
    assert torch.equal(tokens(load_backbone(tmp_path / "x.pth", num_heads=4)[0]), tokens(vit))


# ------------------------------------------------- timm, where its forward differs from a plain one
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(reg_tokens=4, no_embed_class=True),
        dict(reg_tokens=4),
        dict(no_embed_class=True),
        dict(init_values=0.5),
        dict(mlp_ratio=2.0),
    ],
    ids=str,
)
def test_timm_models_give_the_same_tokens(options, tmp_path):
    torch.manual_seed(0)
    theirs = timm.models.VisionTransformer(
        img_size=64, patch_size=16, embed_dim=128, depth=2, num_heads=2, num_classes=5, **options
    ).eval()
    for p in theirs.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    save_file(theirs.state_dict(), tmp_path / "x.safetensors")
    with torch.no_grad():
        x = torch.randn(2, 3, 64, 64)
        expected = theirs.forward_features(x)
    for name in ("x.pth", "x.safetensors"):
        found, report = load_backbone(tmp_path / name)
        assert (tokens(found, x) - expected).abs().max() < 1e-4 and "2 dropped (head.*)" in report


def test_distilled_deit(tmp_path):
    torch.manual_seed(0)
    theirs = timm.models.deit.VisionTransformerDistilled(
        img_size=32, patch_size=16, embed_dim=128, depth=2, num_heads=2, num_classes=5
    ).eval()
    for p in theirs.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    torch.save({"model": theirs.state_dict()}, tmp_path / "x.pth")
    found, report = load_backbone(tmp_path / "x.pth")
    with torch.no_grad():
        assert (tokens(found) - theirs.forward_features(IMAGES)).abs().max() < 1e-4
    assert found.num_prefix_tokens == 2 and "DeiT" in report


# ------------------------------------------------- what must be refused
def without(state, *keys):
    return {k: v for k, v in state.items() if k not in keys}


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: without(s, "blocks.1.attn.qkv.weight"), r"lacks 1 keys: blocks\.1\.attn\.qkv\.weight"),
        (lambda s: without(s, "norm.weight", "norm.bias"), r"lacks 2 keys: norm\.weight, norm\.bias"),
        (lambda s: without(s, "pos_embed"), "pos_embed is missing"),
        (lambda s: without(s, "cls_token"), "lacks 1 keys: cls_token"),
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("blocks.0.")},
            r"lacks 12 keys: blocks\.0",
        ),
        (
            lambda s: s | {"blocks.1.attn.q_norm.weight": torch.ones(64)},
            r"unknown 1 keys: blocks\.1\.attn\.q_norm\.weight",
        ),
        (
            lambda s: s | {"blocks.1.mlp.fc1.weight": torch.ones(300, 128)},
            r"another shape in 1 keys: blocks\.1\.mlp\.fc1\.weight",
        ),
        (lambda s: s | {"pos_embed": torch.zeros(1, 7, 128)}, r"pos_embed is \(1, 7, 128\)"),
        (lambda s: s | {"pos_embed": torch.zeros(1, 5, 64)}, "another shape in 1 keys: pos_embed"),
        (
            lambda s: s | {"patch_embed.proj.weight": torch.zeros(128, 1, 16, 16)},
            r"\(128, 1, 16, 16\), expected \(D, 3, P, P\)",
        ),
        (
            lambda s: s | {"blocks.0.norm1.bias": torch.full((128,), torch.nan)},
            r"not finite in 1 keys: blocks\.0\.norm1\.bias",
        ),
        (lambda s: s | {"fc_norm.weight": s["norm.weight"]}, "mean 'norm.weight'"),
        (
            lambda s: {"epoch": 3, "model": {"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(2)}},
            r"no ViT in it.*found epoch, model\.conv1\.\*, model\.fc\.\*",
        ),
        (lambda s: {}, "found nothing"),
        (lambda s: [s], "expected a dict of tensors, found list"),
        (lambda s: {"arch": source(depth=3).config, "backbone": s}, r"lacks 12 keys: blocks\.2"),
    ],
)
def test_what_is_no_plain_vit_is_refused(change, words, tmp_path):
    torch.save(change(source().state_dict()), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=words) as e:
        load_backbone(tmp_path / "x.pth")
    assert "x.pth" in str(e.value) and "\n" not in str(e.value)


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_does_not_run(tmp_path):
    torch.save({"model": source().state_dict(), "args": Malicious(tmp_path / "owned")}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"asks for \w+\.system, which is refused"):
        load_backbone(tmp_path / "x.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04broken", bytes(range(256)) * 9])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_damaged_files(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: not a checkpoint") as e:
        load(tmp_path / name)
    assert "\n" not in str(e.value)


def test_truncated_and_missing_files(tmp_path):
    torch.save(source().state_dict(), tmp_path / "x.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:40000])
    for name in ("half.pth", "none.pth", "."):
        with pytest.raises(ValueError, match="half.pth: not a checkpoint|no such checkpoint"):
            load_backbone(tmp_path / name)


def test_without_safetensors_it_says_what_to_install(tmp_path, monkeypatch):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match="pip install safetensors"):
        load(tmp_path / "x.safetensors")


def test_random_weights_say_so_and_repeat():
    before = torch.random.get_rng_state()
    (a, report), (b, _) = load_backbone("random:vit_micro/8"), load_backbone("random:vit_micro/8")
    assert torch.equal(before, torch.random.get_rng_state()) and "RANDOM" in report
    assert (
        all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
        and a.patch_size == 8
    )
    for name in (
        "random:vit_x",
        "random:",
        "random:vit_s/x",
        "random:vit_s/0",
        "random:vit_s/-16",
        "random:vit_s/13",
    ):
        with pytest.raises(ValueError, match="not known|expected random:ARCH|does not divide"):
            load_backbone(name)


def test_the_real_foreign_file(real_data):
    path = real_data / "weights/vits14_dinov2_saliency_fp16.pth"
    vit, report = load_backbone(path)
    assert vit.config | dict(img_size=518, patch_size=14, embed_dim=384, depth=12, num_heads=6) == vit.config
    assert "174 keys matched, 0 dropped" in report
    theirs = timm.create_model("vit_small_patch14_dinov2", img_size=56, num_classes=0, init_values=1.0).eval()
    state = dict(vit.state_dict()) | {"pos_embed": vit.interpolate_pos_embed(4, 4)}
    theirs.load_state_dict(state)
    x = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (vit(x) - theirs.forward_features(x)).abs().max() < 1e-3


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        checkpoint.save(tmp_path / "file" / "x.pth", {})


def test_files_are_as_readable_as_any_other(tmp_path):
    before = os.umask(0o027)
    try:
        checkpoint.save(tmp_path / "x.pth", {"a": torch.zeros(1)})
    finally:
        os.umask(before)
    assert (tmp_path / "x.pth").stat().st_mode & 0o777 == 0o640


def test_a_run_starts_without_git_and_clears_what_a_kill_left(tmp_path, monkeypatch):
    (tmp_path / ".last.pth.123").write_text("half a file")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkpoint.open_run(argparse.Namespace(output_dir=str(tmp_path)), set()) is None
    assert json.loads((tmp_path / "run.json").read_text())["commit"] is None
    assert not (tmp_path / ".last.pth.123").exists()


def test_digest_and_short_name():
    a = source().state_dict()
    b = {k: v.clone() for k, v in a.items()}
    assert checkpoint.digest(a) == checkpoint.digest(b)
    b["cls_token"][0, 0, 0] += 1e-6
    assert checkpoint.digest(a) != checkpoint.digest(b)
    names = [checkpoint.short_name(x) for x in ("random:vit_s/16", "out/a/backbone.pth", "weights/dino.pth")]
    assert names == ["random:vit_s/16", "a/backbone", "dino"]
