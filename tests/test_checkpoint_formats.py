"""Proves: a checkpoint of each published layout, and of our own, gives the tokens of the model that was
saved.  The heads come from the file, --num_heads or a known width, and never from a guess.  What is missing,
unknown, of another shape, not finite or no plain ViT is refused in one line.  Nothing is read by its name."""
import argparse
import re

import pytest
import timm
import torch
from safetensors.torch import save_file

from checkpoint import load_backbone
from model import MMC, ViT, momentum_teacher
from run import Mistake

SMALL = dict(img_size=32, patch_size=16, embed_dim=128, depth=2, num_heads=4)
DINOV2 = dict(patch_size=14, img_size=42, init_values=1.0)
MOCO = dict(embed_dim=384, num_heads=12)
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


def other(**changed):
    """What must not be taken in place of the teacher's."""
    return source(seed=9, **changed).state_dict()


def chunked(state):
    return {re.sub(r"^blocks\.(\d+)\.", r"blocks.0.\1.", k).replace("reg_token", "register_tokens"): v
            for k, v in state.items()}


def inside(state, wrapper):
    """What torch.compile or activation checkpointing of each block does to the keys."""
    return {re.sub(r"^(blocks\.\d+)\.", rf"\1.{wrapper}.", k): v for k, v in state.items()}


def zeros(**shapes):
    return {k.replace("__", "."): torch.zeros(*shape) for k, shape in shapes.items()}


def read(content, folder, **options):
    """What load_backbone makes of a file with this content."""
    torch.save(content, folder / "named_nothing.bin")
    return load_backbone(folder / "named_nothing.bin", **options)


# ------------------------------------------------- the layouts
# name: (changes to the source, its state dict -> the file, words of the report)
LAYOUTS = {
    "ours, backbone.pth": (
        {}, lambda s: {"arch": source().config, "step": 7, "backbone": s}, "MMC (7 steps)"),
    "ours, before fixed_pos was cut": (
        {}, lambda s: {"arch": source().config | {"fixed_pos": False}, "backbone": s}, "(the file says so)"),
    "DINO, backbone": ({}, lambda s: s, "flat file"),
    "DINO, full": ({}, lambda s: {
        "student": prefixed(other(), "module.backbone.") | heads("module."),
        "teacher": prefixed(s, "backbone.") | heads(),
        "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", lr=0.1),
        "dino_loss": {"center": torch.zeros(1, 8)},
    }, "teacher"),
    "iBOT, backbone": ({}, lambda s: {"state_dict": s | zeros(masked_embed=(1, 128))}, "iBOT"),
    "iBOT, full": ({}, lambda s: {
        "student": prefixed(other(), "module.backbone."),
        "teacher": prefixed(s | zeros(masked_embed=(1, 128)), "module.backbone.") | heads("module."),
        "ibot_loss": {"center": torch.zeros(8)},
    }, "iBOT"),
    "MAE": ({}, lambda s: {"model": s | zeros(
        mask_token=(1, 1, 64), decoder_pos_embed=(1, 5, 64), decoder_blocks__0__norm1__weight=(64,),
    )}, "MAE"),
    "MAE, fine-tuned": ({}, lambda s: {"model": heads() | {
        k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v for k, v in s.items()
    }}, "MAE"),
    "solo-learn, with momentum": ({}, lambda s: {
        "state_dict": prefixed(other(), "backbone.") | prefixed(s, "momentum_backbone."),
    }, "momentum_backbone"),
    "lightly, with momentum": ({}, lambda s: {
        "state_dict": prefixed(other(), "backbone.") | prefixed(s, "backbone_momentum."),
    }, "backbone_momentum"),
    "MSN": ({}, lambda s: {
        "target_encoder": prefixed(s, "module.") | zeros(module__fc__fc1__weight=(4, 128)),
        "encoder": prefixed(other(), "module."),
        "prototypes": torch.zeros(4, 4),
        "epoch": 3,
    }, "MSN"),
    "MoCo-v3": (MOCO, lambda s: {
        "state_dict": prefixed(other(**MOCO), "module.base_encoder.")
        | prefixed(s, "module.momentum_encoder.") | heads("module.momentum_encoder."),
        "arch": "vit_small",
        "epoch": 300,
    }, "MoCo-v3"),
    "MoCo-v3, base only": (MOCO, lambda s: {
        "state_dict": prefixed(s, "module.base_encoder.") | heads("module.base_encoder."),
    }, "MoCo-v3"),
    "SiT": ({}, lambda s: {
        "teacher": prefixed(s, "backbone.") | zeros(rec_head__mlp__0__weight=(8, 128)) | heads(),
        "student": prefixed(other(), "module.backbone."),
    }, "SiT"),
    "MC-SSL, student only": ({}, lambda s: {
        "student": prefixed(s, "module.backbone.") | zeros(module__recons_head__0__weight=(8, 128)),
    }, "student"),
    "DINOv2": (DINOV2 | dict(init_values=1e-5), lambda s: s | zeros(mask_token=(1, 128)), "DINOv2"),
    "DINOv2, registers": (
        DINOV2 | dict(reg_tokens=4), lambda s: chunked(s) | zeros(mask_token=(1, 128)), "DINOv2"),
    "DINOv2, training": (DINOV2, lambda s: {
        "teacher": prefixed(chunked(s) | zeros(mask_token=(1, 128)), "backbone.")
        | prefixed(heads(), "dino_head."),
    }, "DINOv2"),
    "DeiT": ({}, lambda s: {"model": s | zeros(head__weight=(9, 128), head__bias=(9,))}, "model"),
    "timm, wrapped": ({}, lambda s: {"state_dict": prefixed(s, "model.")}, "model"),
    "solo-learn": ({}, lambda s: {
        "state_dict": prefixed(s, "backbone.") | zeros(projector__0__weight=(8, 128)),
        "pytorch-lightning_version": "2",
        "hyper_parameters": {"lr": 1.0},
    }, "solo-learn or lightly"),
    "lightly": ({}, lambda s: {
        "state_dict": prefixed(s, "teacher_backbone.") | prefixed(other(), "student_backbone.")
        | zeros(projection_head__0__weight=(8, 128)),
    }, "solo-learn or lightly"),
    # wrappers of torch, wherever they stand in a key, and weights further down
    "compiled": ({}, lambda s: {"model": prefixed(s, "_orig_mod.")}, "'model'"),
    "compiled, data parallel": (
        {}, lambda s: {"state_dict": prefixed(s, "module._orig_mod.backbone.")}, "'state_dict/backbone'"),
    "each block compiled": ({}, lambda s: {"model": inside(s, "_orig_mod")}, "'model'"),
    "each block checkpointed": (
        {}, lambda s: {"teacher": prefixed(inside(s, "_checkpoint_wrapped_module"), "backbone.")}, "teacher"),
    "each block in FSDP": ({}, lambda s: inside(s, "_fsdp_wrapped_module.module"), "flat file"),
    "with and without a wrapper": (
        {}, lambda s: s | prefixed(other(), "module."), "'flat file' (not of 'module')"),
    "two levels down": ({}, lambda s: {"state": {"model": s}}, "'state/model'"),
    "four levels down": ({}, lambda s: {"a": {"b": {"c": {"d": s}}}}, "'a/b/c/d'"),
    "an average beside the model": (
        {}, lambda s: {"model": other(), "model_ema": s}, "'model_ema' (not of 'model')"),
    "a schema is no ema": ({}, lambda s: {"model": s, "schema": other()}, "'model' (not of 'schema')"),
    "keys that are no names": ({}, lambda s: {0: 1, None: torch.zeros(2), "model": s | {5: 1}}, "'model'"),
    "an arch of somebody else": (
        {}, lambda s: {"arch": {"name": "vit", "depth": [2], "num_heads": 5}, "model": s}, "usual at this"),
    "an arch of somebody else, with heads": (
        dict(num_heads=8), lambda s: {"arch": {"num_heads": 8}, "model": s}, "8 heads (the file says so)"),
    "an arch that is a name": ({}, lambda s: {"arch": "vit_large", "model": s}, "'model'"),
    "Lightning's EMA callback": ({}, lambda s: {
        "state_dict": prefixed(other(), "net."), "callbacks": {"EMA": {"ema_state": prefixed(s, "net.")}},
    }, "'callbacks/EMA/ema_state/net'"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name, tmp_path):
    changed, layout, words = LAYOUTS[name]
    vit = source(**changed)
    found, report = read(layout(vit.state_dict()), tmp_path)
    x = torch.randn(1, 3, 42, 42) if vit.patch_size == 14 else IMAGES
    assert torch.equal(tokens(found, x), tokens(vit, x))
    assert words in report and f"{len(vit.state_dict())} keys matched" in report and "\n" not in report
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    assert ("fc_norm" in report) == (name == "MAE, fine-tuned")        # it is said that this is another norm


def test_our_own_run_gives_the_teacher_or_what_is_asked_for(tmp_path):
    vit = source()
    student = MMC(vit, hidden=16, out=8)
    teacher = momentum_teacher(student)
    for p in teacher.parameters():
        p.add_(0.1)
    content = {"arch": vit.config, "step": 5, "options": {"lr": 1.0}, "student": student.state_dict(),
               "teacher": teacher.state_dict(), "optimizer": {"state": {}}}
    found, report = read(content, tmp_path)
    assert torch.equal(tokens(found), tokens(teacher.backbone.eval()))
    assert "teacher" in report and "h_pat" in report
    found, report = read(content, tmp_path, checkpoint_key="student")
    assert torch.equal(tokens(found), tokens(vit)) and "student" in report
    with pytest.raises(Mistake, match="no ViT under the key 'encoder'.*student/backbone"):
        read(content, tmp_path, checkpoint_key="encoder")


def test_half_precision_becomes_float32(tmp_path):
    vit = source()
    for dtype in (torch.float16, torch.bfloat16):
        state = {k: v.to(dtype) for k, v in vit.state_dict().items()}
        found, _ = read(state, tmp_path)
        assert all(torch.equal(v, state[k].float()) for k, v in found.state_dict().items())


def test_loading_draws_no_random_numbers(tmp_path):
    torch.save(source().state_dict(), tmp_path / "x.pth")
    before = torch.get_rng_state()
    load_backbone(tmp_path / "x.pth")
    assert torch.equal(before, torch.get_rng_state())


# ------------------------------------------------- the number of heads
def test_number_of_heads_can_be_given(tmp_path):
    vit = source(num_heads=2)
    found, report = read(vit.state_dict(), tmp_path, num_heads=2)
    assert torch.equal(tokens(found), tokens(vit)) and "2 heads (--num_heads)" in report


def test_the_heads_that_our_file_says_are_taken(tmp_path):
    vit = source(num_heads=8)
    content = {"arch": vit.config, "backbone": vit.state_dict()}
    assert torch.equal(tokens(read(content, tmp_path)[0]), tokens(vit))
    found, report = read(content, tmp_path, num_heads=2)
    assert torch.equal(tokens(found), tokens(vit)) and "8 heads (the file says so, not 2)" in report


@pytest.mark.parametrize("width, right", [(128, 4), (192, 3), (384, 6), (768, 12), (1024, 16)])
def test_known_widths(width, right, tmp_path):
    vit = source(embed_dim=width, num_heads=right, depth=1)
    found, report = read(vit.state_dict(), tmp_path)
    assert torch.equal(tokens(found), tokens(vit)) and f" {right} heads (usual at this width" in report
    assert ("MoCo-v3 has 12: --num_heads" in report) == (width == 384)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1152, 1280, 1408, 1664])
def test_widths_of_giants_have_16_heads(width, tmp_path):
    test_known_widths(width, 16, tmp_path)


def test_a_hidden_width_that_is_no_round_multiple(tmp_path):
    vit = source(embed_dim=1152, num_heads=16, depth=1, mlp_ratio=(4304 + 0.5) / 1152)     # SigLIP's so400m
    assert torch.equal(tokens(read(vit.state_dict(), tmp_path)[0]), tokens(vit))


@pytest.mark.parametrize("width", [176, 200, 264])
def test_an_unknown_width_needs_num_heads(width, tmp_path):
    vit = source(embed_dim=width, num_heads=8, depth=1)
    with pytest.raises(Mistake, match=f"{width} wide, which no ViT known here is: give --num_heads"):
        read(vit.state_dict(), tmp_path)
    assert torch.equal(tokens(read(vit.state_dict(), tmp_path, num_heads=8)[0]), tokens(vit))
    with pytest.raises(Mistake, match=f"7 heads .* do not divide its width {width}"):
        read(vit.state_dict(), tmp_path, num_heads=7)


def position_table(D, g, first):
    """The fixed positions of MoCo-v3 (first: rows) or MAE (first: columns), (1, 1 + g*g, D)."""
    table = torch.zeros(1, 1 + g * g, D)
    for row in range(g):
        for column in range(g):
            place = (row, column) if first == "rows" else (column, row)
            for axis in range(2):
                for i in range(D // 4):
                    angle = torch.tensor(place[axis] / 10000 ** (i / (D // 4)))
                    table[0, 1 + row * g + column, axis * D // 2 + i] = angle.sin()
                    table[0, 1 + row * g + column, axis * D // 2 + D // 4 + i] = angle.cos()
    return table


def test_moco_v3_in_a_flat_file_has_12_heads(tmp_path):
    """Its convert_to_deit.py leaves nothing but the fixed position table to know it by."""
    vit = source(**MOCO, depth=1)
    vit.pos_embed.data.copy_(position_table(384, 2, "rows"))
    for state in (vit.state_dict(), {k: v.half() for k, v in vit.state_dict().items()}):
        found, report = read({"model": state}, tmp_path)
        assert found.config["num_heads"] == 12 and "MoCo-v3" in report
    assert torch.equal(tokens(read({"model": vit.state_dict()}, tmp_path)[0]), tokens(vit))


@pytest.mark.parametrize("width, first", [(192, "rows"), (192, "columns"), (384, "columns")])
def test_a_sine_cosine_table_at_a_width_of_two_answers_is_refused(width, first, tmp_path):
    vit = source(embed_dim=width, num_heads=12, depth=1)
    vit.pos_embed.data.copy_(position_table(width, 2, first))
    with pytest.raises(Mistake, match="give --num_heads"):
        read(vit.state_dict(), tmp_path)
    assert torch.equal(tokens(read(vit.state_dict(), tmp_path, num_heads=12)[0]), tokens(vit))


# ------------------------------------------------- the grid of positions
def test_a_grid_is_said_to_be_read_as_a_square_or_refused_where_the_file_tells(tmp_path):
    state = source(patch_size=8, img_size=48).state_dict()             # 36 positions: 6x6, or was it 4x9?
    assert "(positions read as a square grid 6x6)" in read(state, tmp_path)[1]
    assert "square" not in read({"arch": source(patch_size=8, img_size=48).config, "m": state}, tmp_path)[1]
    for options in ({"args": argparse.Namespace(img_size=[32, 72])},
                    {"config": {"model": {"input_size": (3, 32, 72)}}}):
        with pytest.raises(Mistake, match="says a grid of 4x9 patches; only square ones are read"):
            read({"model": state, **options}, tmp_path)
    for options in ({"args": argparse.Namespace(img_size=[48, 48])}, {"config": {"img_size": [64, 96, "x"]}}):
        read({"model": state, **options}, tmp_path)
    with pytest.raises(Mistake, match=r"pos_embed is \(1, 33, 128\)"):
        read(state | {"pos_embed": torch.zeros(1, 1 + 4 * 8, 128)}, tmp_path)


# ------------------------------------------------- timm, where its forward differs from a plain one
@pytest.mark.parametrize("options", [
    {}, dict(reg_tokens=4, no_embed_class=True), dict(reg_tokens=4), dict(no_embed_class=True),
    dict(init_values=0.5), dict(mlp_ratio=2.0),
], ids=str)
def test_timm_models_give_the_same_tokens(options, tmp_path):
    torch.manual_seed(0)
    theirs = timm.models.VisionTransformer(
        img_size=64, patch_size=16, embed_dim=128, depth=2, num_heads=4, num_classes=5, **options).eval()
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
        img_size=32, patch_size=16, embed_dim=128, depth=2, num_heads=4, num_classes=5).eval()
    for p in theirs.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    found, report = read({"model": theirs.state_dict()}, tmp_path)
    with torch.no_grad():
        assert (tokens(found) - theirs.forward_features(IMAGES)).abs().max() < 1e-4
    assert found.num_prefix_tokens == 2 and "DeiT" in report


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


# ------------------------------------------------- what must be refused
def without(state, *keys):
    return {k: v for k, v in state.items() if not k.startswith(keys)}


def renamed(state, old, new):
    return {k.replace(old, new): v for k, v in state.items()}


QKV, FC1, BIAS = "blocks.1.attn.qkv.weight", "blocks.1.mlp.fc1.weight", "blocks.0.norm1.bias"
REFUSED = [
    (lambda s: without(s, QKV), r"lacks 1 keys: blocks\.1\.attn\.qkv\.weight"),
    (lambda s: without(s, "norm."), r"lacks 2 keys: norm\.weight, norm\.bias"),
    (lambda s: without(s, "pos_embed"), "pos_embed is missing"),
    (lambda s: without(s, "cls_token"), "lacks 1 keys: cls_token"),
    (lambda s: without(s, "blocks.0."), r"lacks 12 keys: blocks\.0"),
    (lambda s: without(s, "blocks."), r"no blocks\.0"),
    (lambda s: s | {"blocks.1.attn.q_norm.weight": torch.ones(64)},
     r"unknown 1 keys: blocks\.1\.attn\.q_norm\.weight"),
    (lambda s: s | {"blocks.999999999.x": torch.ones(64)}, r"lacks .* keys: blocks\.2"),
    (lambda s: s | {"blocks.x.y": torch.ones(64)}, r"unknown 1 keys: blocks\.x\.y"),
    (lambda s: s | {FC1: torch.ones(300, 128)}, r"another shape in 1 keys: blocks\.1\.mlp\.fc1\.weight"),
    (lambda s: s | {"blocks.0.mlp.fc1.bias": torch.ones(())}, r"another shape in"),
    (lambda s: s | {"pos_embed": torch.zeros(1, 7, 128)}, r"pos_embed is \(1, 7, 128\)"),
    (lambda s: s | {"pos_embed": torch.zeros(5, 128)}, r"pos_embed is \(5, 128\)"),
    (lambda s: s | {"pos_embed": torch.zeros(0, 5, 128)}, "another shape in 1 keys: pos_embed"),
    (lambda s: s | {"pos_embed": torch.zeros(1, 5, 64)}, "another shape in 1 keys: pos_embed"),
    (lambda s: s | {"pos_embed": torch.zeros(1, 7, 64), "reg_token": torch.zeros(1, 2, 128)}, "pos_embed is"),
    (lambda s: s | {"reg_token": torch.zeros(128)}, r"registers are \(128,\), expected \(1, R, 128\)"),
    (lambda s: s | {"patch_embed.proj.weight": torch.zeros(128, 1, 16, 16)},
     r"\(128, 1, 16, 16\), expected \(D, 3, P, P\)"),
    (lambda s: s | {"patch_embed.proj.weight": torch.zeros(128, 3, 0, 0)}, r"expected \(D, 3, P, P\)"),
    (lambda s: s | {BIAS: torch.full((128,), torch.nan)}, r"not finite in 1 keys: blocks\.0\.norm1\.bias"),
    (lambda s: s | {BIAS: torch.full((128,), 1e300, dtype=torch.float64)}, "not finite in 1 keys"),
    (lambda s: s | {BIAS: torch.ones(128, dtype=torch.int8)}, "norm1.bias is torch.int8.*plain floats"),
    (lambda s: s | {BIAS: torch.ones(128, dtype=torch.complex64)}, "norm1.bias is torch.complex64"),
    (lambda s: s | {BIAS: torch.ones(128).to(torch.float8_e4m3fn)}, "norm1.bias is torch.float8"),
    (lambda s: s | {BIAS: torch.ones(128).to_sparse()}, "norm1.bias is .*torch.sparse_coo"),
    (lambda s: s | {BIAS: torch.ones(128, device="meta")}, "norm1.bias is .*on meta"),
    (lambda s: s | {BIAS: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, "plain floats"),
    (lambda s: s | {"fc_norm.weight": s["norm.weight"]}, "mean 'norm.weight'"),
    (lambda s: {"epoch": 3, "model": {"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(2)}},
     r"no ViT in it.*found epoch, model\.conv1\.\*, model\.fc\.\*"),
    (lambda s: {"decoder_patch_embed.proj.weight": s["patch_embed.proj.weight"]}, "no ViT in it"),
    (lambda s: {}, "found nothing"),
    (lambda s: [s], "expected a dict of tensors, found list"),
    (lambda s: {"arch": source(depth=3).config, "backbone": s}, "its arch says depth 3, its weights say 2"),
    # other networks, said as what they are
    (lambda s: renamed(without(s, FC1), "mlp.fc2", "mlp.w3"), "its MLP is SwiGLU"),
    (lambda s: s | {f"blocks.{i}.mlp.fc2.weight": torch.zeros(128, 256) for i in range(2)},
     r"its MLP is gated \(SwiGLU\)"),
    (lambda s: s | {"norm_pre.weight": torch.ones(128)}, r"a norm before its blocks \(norm_pre\)"),
    (lambda s: s | {"rope_embed.periods": torch.ones(16)}, "rotary positions"),
    (lambda s: s | {"rel_pos_bias.relative_position_bias_table": torch.ones(9, 4)}, "relative positions"),
    (lambda s: prefixed(renamed(s, "qkv.", "qkv.base_layer."), "base_model.model."), "LoRA adapters"),
    (lambda s: {"vit.encoder.layer.0.output.dense.weight": torch.zeros(2, 2)}, "Hugging Face's names"),
    (lambda s: {"model": {"encoder.layers.encoder_layer_0.ln_1.bias": torch.zeros(2)}}, "torchvision's"),
    (lambda s: {"visual.transformer.resblocks.0.ln_1.weight": torch.zeros(2)}, "CLIP's names"),
]


@pytest.mark.parametrize("change, words", REFUSED)
def test_what_is_no_plain_vit_is_refused(change, words, tmp_path):
    with pytest.raises(Mistake, match=words) as e:
        read(change(source().state_dict()), tmp_path)
    assert "named_nothing.bin: " in str(e.value) and "\n" not in str(e.value)


def test_a_file_that_holds_itself_ends(tmp_path):
    content = {"model": {}}
    content["model"]["again"] = content
    with pytest.raises(Mistake, match="no ViT in it"):
        read(content, tmp_path)
