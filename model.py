"""A plain Vision Transformer, the three MMC heads, and the momentum teacher (Sec. "Implementation").

Nothing here knows about losses, data or files.  The parameters of the ViT have timm's names, so that weights
move in both directions; its widths are those of DeiT.  Departs from the paper in nothing.

Shapes: B images, V global views, L local crops, H x W pixels, P patch size, N = h*w patches, R registers,
T = 1 + R + N tokens, D width.  The order of tokens is always [cls, registers, patches]: tokens[:, 0] is CLS,
and tokens[:, vit.num_prefix_tokens:] are the patches."""
import copy
import math
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as computed_again

from distributed import all_mean

# name: (width D, blocks, heads).  Add a line here to add an architecture.
ARCHS = {
    "vit_micro": (128, 4, 4),
    "vit_mini": (160, 6, 5),
    "vit_t": (192, 12, 3),
    "vit_s": (384, 12, 6),
    "vit_b": (768, 12, 12),
}
ALIASES = {"vit_tiny": "vit_t", "vit_small": "vit_s", "vit_base": "vit_b"}


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): while training, a residual branch is dropped for a whole image
    with probability p."""

    def __init__(self, p=0.0):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.p
        return x * (keep / (1 - self.p)).to(x.dtype)


class LayerScale(nn.Module):
    """A learned gain per channel of a residual branch (CaiT).  DINOv2 has it, MMC does not."""

    def __init__(self, dim, init):
        super().__init__()
        self.gamma = nn.Parameter(init * torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Attention(nn.Module):
    """Self-attention, (B, T, D) -> (B, T, D).  With cls_only, CLS alone asks: (B, T, D) -> (B, 1, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x, parts):
        """(B, T, parts*D) -> one tensor (B, heads, T, D/heads) for each part."""
        x = x.unflatten(2, (parts, self.num_heads, -1))                # (B, T, parts, heads, D/heads)
        return x.permute(2, 0, 3, 1, 4).unbind(0)

    def queries_keys_values(self, x, cls_only):
        """Queries of all tokens or of CLS alone, keys and values of all: 3 x (B, heads, T, D/heads)."""
        if not cls_only:
            return self.split(self.qkv(x), 3)
        D = x.shape[-1]
        weight = self.qkv.weight
        bias = self.qkv.bias
        q = F.linear(x[:, :1], weight[:D], bias[:D])
        kv = F.linear(x, weight[D:], bias[D:])
        return *self.split(q, 1), *self.split(kv, 2)

    def forward(self, x, cls_only=False):
        q, k, v = self.queries_keys_values(x, cls_only)
        x = F.scaled_dot_product_attention(q, k, v)                    # (B, heads, T, D/heads)
        return self.proj(x.transpose(1, 2).flatten(2))

    def cls_map(self, x):
        """How much CLS attends to each token, per head: (B, heads, T)."""
        q, k, _ = self.queries_keys_values(x, cls_only=True)
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5         # (B, heads, 1, T)
        return logits.softmax(-1, dtype=torch.float32)[:, :, 0]


class Mlp(nn.Module):
    """The two layers of a block, each token by itself."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block, (B, T, D) -> (B, T, D).  With cls_only it returns CLS alone, (B, 1, D), and
    spares most of its work."""

    def __init__(self, dim, num_heads, mlp_ratio, drop_path, init_values):
        super().__init__()
        scale = nn.Identity if init_values is None else partial(LayerScale, dim, init_values)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = scale()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = scale()
        self.drop_path = DropPath(drop_path)

    def forward(self, x, cls_only=False):
        attended = self.ls1(self.attn(self.norm1(x), cls_only))
        if cls_only:
            x = x[:, :1]
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each of them to D.  A `stride` below the patch size makes the
    patches overlap."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.patch_size = patch_size
        self.stride = patch_size
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)          # a convolution for timm's names

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image.  Raises ValueError if it is not made of whole patches."""
        P = self.patch_size
        S = self.stride
        if height < P or width < P or (height - P) % S or (width - P) % S:
            raise ValueError(f"image of {height}x{width} pixels does not divide into patches of {P} at "
                             f"stride {S}: give sides that are a multiple of {P}")
        return (height - P) // S + 1, (width - P) // S + 1

    def forward(self, x):
        """(B, 3, H, W) -> (B, N, D)."""
        weight = self.proj.weight
        bias = self.proj.bias
        if self.stride == self.patch_size:                             # faster than the convolution
            patches = patchify(x, self.patch_size)
            return F.linear(patches, weight.flatten(1), bias)
        x = F.conv2d(x, weight, bias, self.stride)                     # (B, D, h, w)
        return x.flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """Vision Transformer encoder for any image, square or not, that is made of whole patches.

    img_size: pixels of one side of the training images; it only fixes the size of `pos_embed`.
    drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
    init_values: initial gain of LayerScale, None for no LayerScale.
    reg_tokens: number of registers; they stand after CLS and have no position.

    Two switches may be set at any time.  `checkpointing`: the activations of a block are computed again in
    backward, which needs less memory and more time.  `bf16`: forward, intermediate and attention run under
    bfloat16 autocast and return float32; the evaluations use it, pretraining has its own autocast."""

    def __init__(
        self, img_size: int = 224, patch_size: int = 16,
        embed_dim: int = 384, depth: int = 12, num_heads: int = 6,
        mlp_ratio: float = 4.0, drop_path: float = 0.0,
        init_values: float | None = None, reg_tokens: int = 0,
    ):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}")
        self.config = dict(
            img_size=img_size, patch_size=patch_size,
            embed_dim=embed_dim, depth=depth, num_heads=num_heads,
            mlp_ratio=mlp_ratio, init_values=init_values, reg_tokens=reg_tokens,
        )
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.depth = depth
        self.num_prefix_tokens = 1 + reg_tokens
        self.checkpointing = False
        self.bf16 = False

        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.base_grid = self.patch_embed.grid(img_size, img_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if reg_tokens:
            self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.base_grid), embed_dim))
        self.blocks = nn.ModuleList()
        for i in range(depth):
            rate = drop_path * i / max(depth - 1, 1)
            self.blocks.append(Block(embed_dim, num_heads, mlp_ratio, rate, init_values))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw all weights anew from torch's generator."""
        init_linear(self)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.num_prefix_tokens > 1:
            nn.init.trunc_normal_(self.reg_token, std=0.02)

    def precision(self, x: Tensor):
        """bfloat16 autocast if `bf16` is set, otherwise whatever the caller has chosen.  The tokens between
        the blocks stay float32 in any case."""
        if self.bf16:
            return torch.autocast(x.device.type, torch.bfloat16)
        return nullcontext()

    def interpolate_pos_embed(self, h: int, w: int) -> Tensor:
        """Position embedding for a grid of h x w patches, (1, 1 + h*w, D), bicubic.  It is resized by size,
        not by scale factor, whose rounding loses a row at some sizes."""
        if (h, w) == self.base_grid:
            return self.pos_embed
        cls = self.pos_embed[:, :1]
        grid = self.pos_embed[:, 1:].unflatten(1, self.base_grid)      # (1, rows, columns, D)
        grid = grid.permute(0, 3, 1, 2).float()
        grid = F.interpolate(grid, (h, w), mode="bicubic")
        grid = grid.flatten(2).transpose(1, 2).to(cls.dtype)           # (1, h*w, D)
        return torch.cat([cls, grid], dim=1)

    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels -> (B, T, D) tokens before the first block."""
        grid = self.patch_embed.grid(*x.shape[2:])
        pos = self.interpolate_pos_embed(*grid)
        patches = self.patch_embed(x) + pos[:, 1:]
        prefix = self.cls_token + pos[:, :1]
        if self.num_prefix_tokens > 1:
            prefix = torch.cat([prefix, self.reg_token], dim=1)
        return torch.cat([prefix.expand(x.shape[0], -1, -1), patches], dim=1)

    def forward(self, x: Tensor, cls_only: bool = False) -> Tensor:
        """(B, 3, H, W) normalised pixels -> all tokens after the final norm, (B, T, D).

        With cls_only it returns CLS alone, (B, 1, D), which spares most of the last block.  Raises ValueError
        for an image that does not divide into patches."""
        with self.precision(x):
            x = self.embed(x)
            for block in self.blocks:
                cls_now = cls_only and block is self.blocks[-1]
                if self.checkpointing:
                    x = computed_again(block, x, cls_now, use_reentrant=False)
                else:
                    x = block(x, cls_now)
            return self.norm(x)

    def intermediate(self, x: Tensor, blocks: list[int], norm: bool = False) -> list[Tensor]:
        """Outputs (B, T, D) of the blocks asked for, in that order.

        Blocks count from 1, as in the paper, and negative numbers from the end: -1 is the last.  `norm`
        applies the final norm to each output.  Raises ValueError for a block that is not there."""
        wanted = [self.block_number(b) for b in blocks]
        outputs = {}
        with self.precision(x):
            x = self.embed(x)
            for i, block in enumerate(self.blocks[:max(wanted)], start=1):
                x = block(x)
                if i in wanted:
                    outputs[i] = self.norm(x) if norm else x
        return [outputs[i] for i in wanted]

    def attention(self, x: Tensor, block: int = -1) -> Tensor:
        """Attention of the CLS query over the patches in one block, per head: (B, heads, N).

        Blocks count as in `intermediate`.  A head sums to one minus what CLS gives to itself and to the
        registers."""
        number = self.block_number(block)
        with self.precision(x):
            x = self.embed(x)
            *before, asked = self.blocks[:number]
            for earlier in before:
                x = earlier(x)
            x = asked.attn.cls_map(asked.norm1(x))                     # (B, heads, T)
        return x[:, :, self.num_prefix_tokens:]

    def block_number(self, block: int) -> int:
        """1 ... depth for a number that may count from the end.  Raises ValueError for any other."""
        number = block + self.depth + 1 if block < 0 else block
        if not 1 <= number <= self.depth:
            raise ValueError(f"block {block}: this network has blocks 1 ... {self.depth}")
        return number


def vit(arch: str, img_size: int = 224, patch_size: int = 16, **kwargs) -> ViT:
    """Build a ViT by name ('vit_s', or 'vit_small').  Raises ValueError for a name that does not exist."""
    name = ALIASES.get(arch, arch)
    if name not in ARCHS:
        raise ValueError(f"arch '{arch}' is not known: choose from {', '.join([*ARCHS, *ALIASES])}")
    dim, depth, heads = ARCHS[name]
    return ViT(img_size, patch_size, dim, depth, heads, **kwargs)


def init_linear(module: nn.Module) -> None:
    """Draw the weights of all linear and convolutional layers inside a module anew; biases become 0."""
    for m in module.modules():
        if isinstance(m, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def patchify(x: Tensor, p: int) -> Tensor:
    """(B, C, H, W) -> (B, N, C*p*p): patches row by row, channels first inside a patch."""
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * p * p)


def unpatchify(x: Tensor, p: int, h: int, w: int) -> Tensor:
    """(B, h*w, C*p*p) -> (B, C, h*p, w*p): the inverse of `patchify`."""
    B = len(x)
    x = x.reshape(B, h, w, -1, p, p)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(B, -1, h * p, w * p)


class BatchNormMLP(nn.Sequential):
    """(n, D) -> (n, out).  BatchNorm takes the batch's mean away after the first layer; in bf16 that mean
    would cost the digits that tell images apart, so it is taken away before that layer, too."""

    def forward(self, x):
        if torch.is_autocast_enabled(x.device.type):
            x = x - all_mean(x.detach().float().mean(0))               # over all ranks
        return super().forward(x)


def contrastive_head(dim: int, hidden: int, out: int, norm: bool = True) -> nn.Sequential:
    """(n, D) -> (n, out): Linear-BN-GELU-Linear-BN-GELU-Linear-BN, the last BN without affine.

    BatchNorm uses the statistics of the batch always, in the teacher, too, so it keeps none, and a batch of
    one is invalid.  Without `norm` it is `mlp_head`."""
    if not norm:
        return mlp_head(dim, hidden, out)
    return BatchNormMLP(
        nn.Linear(dim, hidden, bias=False),
        nn.BatchNorm1d(hidden, track_running_stats=False),
        nn.GELU(),
        nn.Linear(hidden, hidden, bias=False),
        nn.BatchNorm1d(hidden, track_running_stats=False),
        nn.GELU(),
        nn.Linear(hidden, out, bias=False),
        nn.BatchNorm1d(out, affine=False, track_running_stats=False),
    )


def mlp_head(dim: int, hidden: int, out: int) -> nn.Sequential:
    """(n, D) -> (n, out): Linear-GELU-Linear-GELU-Linear, with biases."""
    return nn.Sequential(
        nn.Linear(dim, hidden),
        nn.GELU(),
        nn.Linear(hidden, hidden),
        nn.GELU(),
        nn.Linear(hidden, out),
    )


class MMC(nn.Module):
    """A backbone with the heads whose losses are on: the student, and, without `h_rec`, the teacher.

    rec, pat, cls: which heads exist; one that does not is None.  hidden, out: widths of the heads.  `h_rec`
    predicts the normalised pixels of a patch from its token.
    head_norm: BatchNorm in the contrastive heads."""

    def __init__(
        self, backbone: ViT, rec: bool = True, pat: bool = True, cls: bool = True,
        hidden: int = 4096, out: int = 256, head_norm: bool = True,
    ):
        super().__init__()
        D = backbone.embed_dim
        pixels = 3 * backbone.patch_size ** 2                          # of a patch, in all colours
        self.backbone = backbone
        self.h_rec = mlp_head(D, hidden, pixels) if rec else None
        self.h_pat = contrastive_head(D, hidden, out, head_norm) if pat else None
        self.h_cls = contrastive_head(D, hidden, out, head_norm) if cls else None
        for head in (self.h_rec, self.h_pat, self.h_cls):
            if head is not None:
                init_linear(head)
        # Add or replace a head below this line: it keeps the weights that you give it.

    def forward(
        self, images: Tensor, local: Tensor | None = None,
        rec_index: Tensor | None = None, pat_index: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One call does a whole step, as DistributedDataParallel wants it.

        images: (V*B, 3, H, W) global views, view by view.
        local: (L*B, 3, h, w) local crops, of which only CLS is read.
        rec_index, pat_index: the patches, numbered among all V*B*N, on which `h_rec` and `h_pat` run; None
        for all of them.

        Returns {"rec": (M, 3*P*P), "pat": (A, out), "cls": ((V+L)*B, out)}, for the heads that
        exist; A counts the anchors of both views."""
        cls_only = self.h_rec is None and self.h_pat is None
        tokens = self.backbone(images, cls_only)                       # (V*B, T, D)
        cls = tokens[:, 0]                                             # (V*B, D)
        patches = tokens[:, self.backbone.num_prefix_tokens:].flatten(0, 1)           # (V*B*N, D)
        if local is not None and self.h_cls is not None:
            local_cls = self.backbone(local, cls_only=True)[:, 0]
            cls = torch.cat([cls, local_cls])                          # ((V+L)*B, D)

        outputs = {}
        if self.h_rec is not None:
            outputs["rec"] = self.h_rec(patches if rec_index is None else patches[rec_index])
        if self.h_pat is not None:
            outputs["pat"] = self.h_pat(patches if pat_index is None else patches[pat_index])
        if self.h_cls is not None:
            outputs["cls"] = self.h_cls(cls)
        return outputs


def momentum_teacher(student: MMC) -> MMC:
    """A copy of the student that no gradient reaches, without drop path and without reconstruction head.
    Leave it in train mode, where SyncBatchNorm takes the statistics of the batch on all ranks."""
    teacher = copy.deepcopy(student)
    teacher.h_rec = None
    for m in teacher.modules():
        if isinstance(m, DropPath):
            m.p = 0.0
    return teacher.requires_grad_(False)


@torch.no_grad()
def ema_update(teacher: MMC, student: MMC, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student for each parameter, in place, in float32.
    Buffers of the teacher stay its own."""
    source = dict(student.named_parameters())
    new = [source[name] for name, _ in teacher.named_parameters()]
    torch._foreach_lerp_(list(teacher.parameters()), new, 1.0 - momentum)


def cosine_schedule(base: float, final: float, steps: int, warmup: int = 0) -> list[float]:
    """One value per step: linear from base/warmup to base in `warmup` steps, then half a cosine to `final`.
    The first value is not 0.  Of a warm-up longer than the run, the run sees the beginning."""
    values = [base * (i + 1) / warmup for i in range(warmup)]
    left = steps - warmup
    for i in range(left):
        cosine = math.cos(math.pi * i / max(left - 1, 1))
        values.append(final + (base - final) * (1 + cosine) / 2)
    return values[:steps]
