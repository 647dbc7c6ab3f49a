"""Proves: the ViT is timm's, weight for weight, at any size; intermediate outputs, registers, overlap,
attention and bfloat16 are what they say; heads, momentum teacher and EMA do what the paper says, and leave
alone what a student adds to them."""
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import nn

from model import (
    ARCHS,
    MMC,
    DropPath,
    ViT,
    contrastive_head,
    cosine_schedule,
    ema_update,
    mlp_head,
    momentum_teacher,
    patchify,
    unpatchify,
    vit,
)


# ---- the ViT
@pytest.fixture(scope="module")
def pair():
    """Ours and timm's with the same random weights, positions and gains well away from zero."""
    torch.manual_seed(0)
    ours = vit("vit_t", 224, 16).eval()
    for p in ours.parameters():
        p.data += 0.1 * torch.randn_like(p)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    theirs.load_state_dict(ours.state_dict())                          # strict: the names are timm's
    return ours, theirs


@pytest.fixture
def without_antialias(monkeypatch):
    """timm's positions are resized as ours."""
    def resample(*args, **kwargs):
        return resample_abs_pos_embed(*args, **kwargs | {"antialias": False})
    monkeypatch.setattr("timm.models.vision_transformer.resample_abs_pos_embed", resample)


@pytest.mark.parametrize("size", [(224, 224), (96, 96), (288, 288), (128, 208)])
def test_forward_equals_timm(pair, size, without_antialias):
    ours, theirs = pair
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs.forward_features(x), atol=2e-4)


def test_intermediate_counts_blocks_from_one(pair, without_antialias):
    ours, theirs = pair
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        third, last = ours.intermediate(x, [3, -1])
        expected = theirs.forward_intermediates(x, indices=[2], output_fmt="NLC", intermediates_only=True)[0]
        assert third.shape == (1, 17, 192)
        assert torch.allclose(third[:, 1:], expected, atol=2e-4)
        assert torch.allclose(ours.norm(last), ours(x), atol=1e-5)
        assert torch.allclose(ours.intermediate(x, [12], norm=True)[0], ours(x), atol=1e-5)
        for wrong in (0, 13, -13):
            with pytest.raises(ValueError, match="1 ... 12"):
                ours.intermediate(x, [wrong])
            with pytest.raises(ValueError, match="1 ... 12"):
                ours.attention(x, wrong)
    assert expected.shape == (1, 16, 192)


def test_attention_is_that_of_cls():
    torch.manual_seed(0)
    m = ViT(32, 8, 32, 2, 4, reg_tokens=3).eval()
    x = torch.randn(2, 3, 32, 48)
    a = m.attention(x)
    assert a.shape == (2, 4, 24) and (a >= 0).all() and (a.sum(-1) < 1).all()
    tokens = m.embed(x)
    for number in (1, 2):
        block = m.blocks[number - 1]
        q, k, _ = (t.reshape(2, -1, 4, 8) for t in block.attn.qkv(block.norm1(tokens)).chunk(3, -1))
        plain = (torch.einsum("bhc,bthc->bht", q[:, 0], k) / 8 ** 0.5).softmax(-1)[:, :, 4:]
        assert torch.allclose(m.attention(x, number), plain, atol=1e-6)
        tokens = block(tokens)
    assert torch.equal(m.attention(x, 2), a)


def test_registers_layerscale_and_tokens():
    m = ViT(32, 8, 32, 2, 4, init_values=0.1, reg_tokens=2).eval()
    assert m(torch.randn(1, 3, 32, 32)).shape == (1, 1 + 2 + 16, 32) and m.num_prefix_tokens == 3
    assert m.pos_embed.shape == (1, 17, 32) and "blocks.1.ls2.gamma" in m.state_dict()


def test_config_builds_the_same_network():
    m = ViT(32, 8, 32, 2, 4, mlp_ratio=2.0, drop_path=0.1, init_values=0.1, reg_tokens=2)
    again = ViT(**m.config)
    again.load_state_dict(m.state_dict())
    assert again.config == m.config and "fixed_pos" not in m.config


def test_overlapping_patches():
    m = ViT(32, 8, 32, 1, 4).eval()
    x = torch.randn(1, 3, 32, 32)
    m.patch_embed.stride = 4
    dense = m.patch_embed(x).transpose(1, 2).view(1, 32, 7, 7)
    m.patch_embed.stride = 8
    assert torch.allclose(dense[:, :, ::2, ::2].flatten(2).transpose(1, 2), m.patch_embed(x), atol=1e-5)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="multiple of 16"):
        vit("vit_t")(torch.zeros(1, 3, 224, 230))
    with pytest.raises(ValueError, match="vit_x"):
        vit("vit_x")
    with pytest.raises(ValueError, match="not divisible"):
        ViT(embed_dim=32, num_heads=5)


def test_names_and_widths():
    assert set(ARCHS) == {"vit_micro", "vit_mini", "vit_t", "vit_s", "vit_b"}
    for short, long, params in (
        ("vit_t", "vit_tiny", 5.5),
        ("vit_s", "vit_small", 21.7),
        ("vit_b", "vit_base", 85.8),
    ):
        with torch.device("meta"):                                     # counted, not computed
            n = [sum(p.numel() for p in vit(name).parameters()) / 1e6 for name in (short, long)]
        assert n[0] == n[1] == pytest.approx(params, abs=0.1)


def test_patchify_is_the_convolutions_order():
    x = torch.randn(2, 3, 8, 12)
    assert torch.equal(unpatchify(patchify(x, 4), 4, 2, 3), x)
    w = torch.randn(5, 3, 4, 4)
    linear = F.linear(patchify(x, 4), w.flatten(1))
    convolution = F.conv2d(x, w, stride=4).flatten(2).transpose(1, 2)
    assert torch.allclose(linear, convolution, atol=1e-5)


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    d = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    y = d(x)
    rows = y.flatten(1)
    assert ((rows == 0).all(1) | torch.isclose(rows, torch.tensor(4 / 3)).all(1)).all()
    assert y.mean().item() == pytest.approx(1, abs=0.04)
    assert torch.equal(d.eval()(x), x)
    rates = [b.drop_path.p for b in ViT(32, 8, 32, 3, 4, drop_path=0.1).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1])


def test_cls_only_and_checkpointing_change_nothing():
    """Values and gradients, drop path included."""
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for cls_only, checkpointing in ((False, False), (True, False), (False, True), (True, True)):
        torch.manual_seed(0)
        net = vit("vit_micro", 32, 8, drop_path=0.5, init_values=0.1, reg_tokens=2).train()
        net.checkpointing = checkpointing
        torch.manual_seed(1)
        out = net(x, cls_only=cls_only)
        assert out.shape[1] == (1 if cls_only else 19)
        out[:, 0].square().sum().backward()
        found.append((out[:, 0], [p.grad for p in net.parameters()]))
    for out, grads in found[1:]:
        torch.testing.assert_close(out, found[0][0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(grads, found[0][1], atol=1e-5, rtol=1e-4)


def outputs(net, x):
    """By name, what the three ways through a ViT return."""
    return {
        "all": net(x),
        "cls": net(x, cls_only=True),
        "first": net.intermediate(x, [1])[0],
        "normed": net.intermediate(x, [-1], norm=True)[0],
        "attention": net.attention(x),
    }


@torch.no_grad()
def test_bf16_returns_float32_of_nearly_the_same_value():
    torch.manual_seed(0)
    net = vit("vit_micro", 32, 8).eval()
    x = torch.randn(2, 3, 32, 48)
    exact = outputs(net, x)
    net.bf16 = True
    for name, y in outputs(net, x).items():
        assert y.dtype == torch.float32 and not torch.equal(y, exact[name]), name
        cosine = F.cosine_similarity(y.flatten(), exact[name].flatten(), dim=0)
        assert cosine > 0.999, name
    net.bf16 = False
    assert all(torch.equal(y, exact[name]) for name, y in outputs(net, x).items())


@torch.no_grad()
def test_without_bf16_the_callers_autocast_stays():
    net = vit("vit_micro", 32, 8).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = net(x)
    assert not torch.equal(cast, net(x))
    net.bf16 = True
    assert torch.equal(cast.float(), net(x))


# ---- the heads
def test_contrastive_head_in_bf16_is_not_blinded_by_what_all_tokens_share():
    """Tokens whose mean is 300 times their spread, more than bf16 has digits for."""
    torch.manual_seed(0)
    head = contrastive_head(64, 32, 8)
    shared = torch.randn(64)
    x = (300 * shared + torch.randn(40, 64)).requires_grad_()
    exact = head(x)
    weights = torch.randn(40, 8)
    gradient, = torch.autograd.grad((weights * exact).sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(x)
        blind = nn.Sequential.forward(head, x)
    found_gradient, = torch.autograd.grad((weights * found).sum(), x)
    assert torch.cosine_similarity(exact, found.float()).mean() > 0.999
    assert torch.cosine_similarity(exact, blind.float()).mean() < 0.9
    assert torch.cosine_similarity(gradient.flatten(), found_gradient.flatten(), 0) > 0.98
    assert torch.equal(head(x), exact)                 # and in float32 nothing is taken out


def test_contrastive_head_uses_batch_statistics():
    head = contrastive_head(8, 16, 4)
    x = torch.randn(64, 8)
    for mode in (True, False):                                         # no running statistics in eval either
        y = head.train(mode)(x)
        assert torch.allclose(y.mean(0), torch.zeros(4), atol=1e-5)
        assert torch.allclose(y.var(0, unbiased=False), torch.ones(4), atol=1e-2)

    layers = [type(m).__name__ for m in head]
    assert layers == ["Linear", "BatchNorm1d", "GELU"] * 2 + ["Linear", "BatchNorm1d"]
    layers = [type(m).__name__ for m in contrastive_head(8, 16, 4, norm=False)]
    assert layers == ["Linear", "GELU"] * 2 + ["Linear"]


def test_student_forward_reads_the_tokens_it_is_asked_for():
    torch.manual_seed(0)
    m = MMC(ViT(32, 8, 32, 1, 4), hidden=16, out=4, head_norm=False)
    x = torch.randn(4, 3, 32, 32)
    local = torch.randn(6, 3, 16, 16)
    every = m(x)
    some = m(x, local, rec_index=torch.tensor([3, 20]), pat_index=torch.tensor([63]))
    assert every["rec"].shape == (64, 192) and every["pat"].shape == (64, 4) and every["cls"].shape == (4, 4)
    assert torch.allclose(some["rec"], every["rec"][[3, 20]], atol=1e-5)
    assert torch.allclose(some["pat"], every["pat"][[63]], atol=1e-5)
    assert some["cls"].shape == (10, 4) and torch.allclose(some["cls"][:4], every["cls"], atol=1e-5)
    assert set(MMC(ViT(32, 8, 32, 1, 4), rec=False, pat=False, hidden=16, out=4)(x)) == {"cls"}


def test_heads_draw_all_defaults_and_then_their_weights():
    """The order in which random numbers are drawn is part of every stored result."""
    torch.manual_seed(0)
    found = MMC(ViT(32, 8, 32, 1, 4), hidden=16, out=4)
    torch.manual_seed(0)
    ViT(32, 8, 32, 1, 4)
    heads = {
        "h_rec": mlp_head(32, 16, 192),
        "h_pat": contrastive_head(32, 16, 4),
        "h_cls": contrastive_head(32, 16, 4),
    }
    for name, head in heads.items():
        for i, layer in enumerate(head):
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                assert torch.equal(layer.weight, getattr(found, name)[i].weight)
                bias = getattr(found, name)[i].bias
                assert bias is None or (bias == 0).all()


class WithCentre(MMC):
    """A head of a student's own, with its own weights and the state of a loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.h_new = nn.Linear(32, 4)
        nn.init.constant_(self.h_new.weight, 7.0)
        self.h_new.register_buffer("centre", torch.zeros(4))


def test_a_head_that_a_student_adds_is_left_alone():
    torch.manual_seed(0)
    plain = MMC(ViT(32, 8, 32, 1, 4), hidden=16, out=4)
    torch.manual_seed(0)
    student = WithCentre(ViT(32, 8, 32, 1, 4), hidden=16, out=4)
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in plain.state_dict().items())
    assert (student.h_new.weight == 7).all()

    teacher = momentum_teacher(student)
    teacher.h_new.centre += 1                                          # as a loss would move it
    student.h_new.weight.data.zero_()
    ema_update(teacher, student, 0.5)
    assert (teacher.h_new.weight == 3.5).all()
    assert (teacher.state_dict()["h_new.centre"] == 1).all() and (student.h_new.centre == 0).all()


# ---- the teacher
def test_teacher_and_ema_by_hand():
    torch.manual_seed(0)
    student = MMC(ViT(32, 8, 32, 2, 4, drop_path=0.5), hidden=16, out=4)
    teacher = momentum_teacher(student)
    assert teacher.h_rec is None and not any(p.requires_grad for p in teacher.parameters())
    assert all(m.p == 0 for m in teacher.modules() if isinstance(m, DropPath))
    assert student.backbone.blocks[1].drop_path.p == 0.5
    before = {k: v.clone() for k, v in teacher.named_parameters()}
    for p in student.parameters():
        p.data += torch.randn_like(p)
    ema_update(teacher, student, 0.9)
    after = dict(student.named_parameters())
    for k, v in teacher.named_parameters():
        assert torch.allclose(v, 0.9 * before[k] + 0.1 * after[k], atol=1e-6)
    ema_update(teacher, student, 1.0)
    x = torch.randn(4, 3, 32, 32)
    assert teacher(x)["cls"].requires_grad is False


def test_cosine_schedule():
    values = cosine_schedule(1.0, 0.1, 7, warmup=2)
    assert values == pytest.approx([0.5, 1.0, 1.0, 0.868198, 0.55, 0.231802, 0.1], abs=1e-6)
    assert cosine_schedule(1.0, 0.1, 2, warmup=4) == [0.25, 0.5]       # the beginning of a warm-up
    assert cosine_schedule(0.9, 1.0, 1) == [0.9]
