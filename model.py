"""A plain Vision Transformer, the three MMC heads, and the momentum teacher (Sec. "Implementation").

Nothing here knows about losses, data or files.  The ViT's parameter names are timm's, so that weights move in
both directions; widths are those of DeiT.  Contrastive heads: 3-layer MLP 4096-4096-256 with BatchNorm;
reconstruction head: 3-layer MLP to the pixels of a patch, no norm.  Departs from the paper: nothing.

Shapes: B images, H x W pixels, P patch size, N = h*w patches, R registers, T = 1 + R + N tokens, D width.
Token order is always [cls, registers, patches]: tokens[:, 0] is CLS, and the patches are
tokens[:, vit.num_prefix_tokens:]."""
import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# name: (width D, blocks, heads); change this line to add an architecture
ARCHS = {"vit_micro": (128, 4, 4), "vit_t": (192, 12, 3), "vit_s": (384, 12, 6), "vit_b": (768, 12, 12)}
ALIASES = {"vit_tiny": "vit_t", "vit_small": "vit_s", "vit_base": "vit_b"}


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): while training, drop a residual branch for whole images with
    probability p."""

    def __init__(self, p: float = 0.0):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.p
        return x * (keep / (1 - self.p)).to(x.dtype)


class LayerScale(nn.Module):
    """Per-channel gain of a residual branch (CaiT; DINOv2 has it, MMC does not)."""

    def __init__(self, dim: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor, first: int | None):
        """q of the `first` tokens (None: of all), k and v of all: 3 x (B, heads, T, D/heads)."""
        D, W, b = x.shape[-1], self.qkv.weight, self.qkv.bias

        def split(y: Tensor):
            return y.unflatten(2, (-1, self.num_heads, D // self.num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
        if first is None:
            return split(self.qkv(x))
        return (*split(F.linear(x[:, :first], W[:D], b[:D])), *split(F.linear(x, W[D:], b[D:])))

    def forward(self, x: Tensor, first: int | None = None) -> Tensor:
        q, k, v = self.heads(x, first)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def cls_map(self, x: Tensor) -> Tensor:
        q, k, _ = self.heads(x, 1)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0]            # (B, heads, T)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block.  Asked for the `first` tokens only, it spends most of its work on these."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float,
                 init_values: float | None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, first: int | None = None) -> Tensor:
        x = x[:, :first] + self.drop_path(self.ls1(self.attn(self.norm1(x), first)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nn.Module):
    """Cut the image into patches and project each to D.  A stride below the patch size makes them overlap."""

    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.patch_size = self.stride = patch_size
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)          # kept as a convolution for its names

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image.  Raises ValueError if it is not made of whole patches."""
        P, S = self.patch_size, self.stride
        if height < P or width < P or (height - P) % S or (width - P) % S:
            raise ValueError(f"image of {height}x{width} pixels does not divide into patches of {P} at "
                             f"stride {S}: give sides that are a multiple of {P}")
        return (height - P) // S + 1, (width - P) // S + 1

    def forward(self, x: Tensor) -> Tensor:
        if self.stride != self.patch_size:
            return F.conv2d(x, self.proj.weight, self.proj.bias, self.stride).flatten(2).transpose(1, 2)
        # (B, N, D)
        return F.linear(patchify(x, self.patch_size), self.proj.weight.flatten(1), self.proj.bias)


class ViT(nn.Module):
    """Vision Transformer encoder, any patch size, any input made of whole patches, square or not.

    img_size: pixels of one side of the training images (fixes the size of `pos_embed` only).
    drop_path: stochastic depth at the last block, linear from 0 at the first.
    init_values: LayerScale initial gain, None for none.  reg_tokens: registers, without position, after CLS.
    fixed_pos: `pos_embed` is the fixed 2-D sine-cosine table of MAE / MoCo-v3, not learned."""

    def __init__(self, img_size: int = 224, patch_size: int = 16, embed_dim: int = 384, depth: int = 12,
                 num_heads: int = 6, mlp_ratio: float = 4.0, drop_path: float = 0.0,
                 init_values: float | None = None, reg_tokens: int = 0, fixed_pos: bool = False):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}")
        self.config = dict(img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth,
                           num_heads=num_heads, mlp_ratio=mlp_ratio, init_values=init_values,
                           reg_tokens=reg_tokens, fixed_pos=fixed_pos)
        self.patch_size, self.embed_dim, self.depth, self.num_prefix_tokens = (
            patch_size, embed_dim, depth, 1 + reg_tokens)
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.base_grid = self.patch_embed.grid(img_size, img_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if reg_tokens:
            self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.base_grid), embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, drop_path * i / max(depth - 1, 1), init_values)
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.checkpointing = False             # True: activations of a block are computed again in backward
        self.init_weights(fixed_pos)

    def init_weights(self, fixed_pos: bool) -> None:
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        for p in [self.cls_token, self.pos_embed] + ([self.reg_token] if self.num_prefix_tokens > 1 else []):
            nn.init.trunc_normal_(p, std=0.02)
        if fixed_pos:
            self.pos_embed.data.copy_(sincos_pos_embed(self.embed_dim, *self.base_grid))
            self.pos_embed.requires_grad_(False)

    def interpolate_pos_embed(self, h: int, w: int) -> Tensor:
        """Position embedding for a grid of h x w patches, (1, 1 + h*w, D): bicubic, by size and not by scale
        factor, whose rounding loses a row on some sizes."""
        if (h, w) == self.base_grid:
            return self.pos_embed
        cls, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid = grid.reshape(1, *self.base_grid, -1).permute(0, 3, 1, 2).float()
        grid = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
        return torch.cat([cls, grid.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)

    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels -> (B, T, D) tokens before the first block."""
        pos = self.interpolate_pos_embed(*self.patch_embed.grid(*x.shape[-2:]))
        cls = (self.cls_token + pos[:, :1]).expand(len(x), -1, -1)
        prefix = [cls, self.reg_token.expand(len(x), -1, -1)] if self.num_prefix_tokens > 1 else [cls]
        patches = self.patch_embed(x) + pos[:, 1:]
        return torch.cat([p.to(patches.dtype) for p in prefix] + [patches], dim=1)                 # (B, T, D)

    def forward(self, x: Tensor, cls_only: bool = False) -> Tensor:
        """(B, 3, H, W) normalised pixels -> (B, T, D) all tokens after the final norm; (B, 1, D) where only
        CLS is read, which spares most of the last block.  Raises ValueError where the image does not divide
        into patches."""
        x = self.embed(x)
        for i, block in enumerate(self.blocks, start=1):
            first = 1 if cls_only and i == self.depth else None
            x = (checkpoint(block, x, first, use_reentrant=False)
                 if self.checkpointing and torch.is_grad_enabled() else block(x, first))
        return self.norm(x)

    def intermediate(self, x: Tensor, blocks: list[int], norm: bool = False) -> list[Tensor]:
        """Outputs of chosen blocks, counted from 1 as the paper does (block `depth` is the last; negative
        from the end: -1 is the last).  Returns a list of (B, T, D) in the order asked; `norm` applies the
        final norm to each."""
        wanted = [b + self.depth + 1 if b < 0 else b for b in blocks]
        if not all(1 <= b <= self.depth for b in wanted):
            raise ValueError(f"blocks {blocks}: this network has blocks 1 ... {self.depth}")
        out, x = {}, self.embed(x)
        for i, block in enumerate(self.blocks[:max(wanted)], start=1):
            x = block(x)
            if i in wanted:
                out[i] = self.norm(x) if norm else x
        return [out[b] for b in wanted]

    def attention(self, x: Tensor, block: int = -1) -> Tensor:
        """Attention of the CLS query in one block (from 1; -1 is the last), per head, over the patches:
        (B, heads, N).  Sums to one minus what CLS gives to itself and the registers."""
        index = (block + self.depth + 1 if block < 0 else block) - 1
        x = self.embed(x) if index == 0 else self.intermediate(x, [index])[0]
        return self.blocks[index].attn.cls_map(self.blocks[index].norm1(x))[:, :, self.num_prefix_tokens:]


def vit(arch: str, img_size: int = 224, patch_size: int = 16, **kwargs) -> ViT:
    """Build a ViT by name ('vit_s', or 'vit_small').  Raises ValueError for a name that does not exist."""
    name = ALIASES.get(arch, arch)
    if name not in ARCHS:
        raise ValueError(f"arch '{arch}' is not known: choose from {', '.join([*ARCHS, *ALIASES])}")
    dim, depth, heads = ARCHS[name]
    return ViT(img_size, patch_size, dim, depth, heads, **kwargs)


def sincos_pos_embed(dim: int, h: int, w: int) -> Tensor:
    """Fixed 2-D sine-cosine table, (1, 1 + h*w, dim), zeros for CLS (MAE, MoCo-v3): the first half of the
    channels encodes the column, the second the row, each as sines then cosines of dim/4 frequencies."""
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, cols = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    angles = [p.flatten()[:, None] * omega for p in (cols, rows)]
    table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, dim), table.float()])[None]


def patchify(x: Tensor, p: int) -> Tensor:
    """(B, C, H, W) -> (B, N, C*p*p), patches row by row, channels first inside a patch."""
    B, C, H, W = x.shape
    return x.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * p * p)


def unpatchify(x: Tensor, p: int, h: int, w: int) -> Tensor:
    """(B, h*w, C*p*p) -> (B, C, h*p, w*p): the inverse of `patchify`."""
    return x.reshape(len(x), h, w, -1, p, p).permute(0, 3, 1, 4, 2, 5).reshape(len(x), -1, h * p, w * p)


def contrastive_head(dim: int, hidden: int = 4096, out: int = 256, norm: bool = True) -> nn.Sequential:
    """(n, D) -> (n, out): Linear-BN-GELU-Linear-BN-GELU-Linear-BN, the last BN without affine.

    The norms always use the statistics of the batch, in the teacher too, so they keep none; a batch of one
    is invalid."""
    def bn(width, affine=True):
        return [nn.BatchNorm1d(width, affine=affine, track_running_stats=False)] if norm else []
    return nn.Sequential(nn.Linear(dim, hidden, bias=not norm), *bn(hidden), nn.GELU(),
                         nn.Linear(hidden, hidden, bias=not norm), *bn(hidden), nn.GELU(),
                         nn.Linear(hidden, out, bias=not norm), *bn(out, affine=False))


def reconstruction_head(dim: int, patch_size: int, hidden: int = 4096) -> nn.Sequential:
    """(n, D) -> (n, 3*P*P): the normalised pixels of a patch from its token."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                         nn.Linear(hidden, 3 * patch_size ** 2))


class MMC(nn.Module):
    """A backbone with the heads whose losses are on: the student, and, without `h_rec`, the teacher.

    rec, pat, cls: which heads exist.  hidden, out: widths of the heads.  head_norm: BatchNorm in the
    contrastive ones.  One forward call does a whole step, as DistributedDataParallel wants it."""

    def __init__(self, backbone: ViT, rec: bool = True, pat: bool = True, cls: bool = True,
                 hidden: int = 4096, out: int = 256, head_norm: bool = True):
        super().__init__()
        self.backbone = backbone
        D = backbone.embed_dim
        self.h_rec = reconstruction_head(D, backbone.patch_size, hidden) if rec else None
        self.h_pat = contrastive_head(D, hidden, out, head_norm) if pat else None
        self.h_cls = contrastive_head(D, hidden, out, head_norm) if cls else None
        for head in (self.h_rec, self.h_pat, self.h_cls):
            for m in head.modules() if head is not None else ():
                if isinstance(m, nn.Linear):
                    nn.init.trunc_normal_(m.weight, std=0.02)
                    if m.bias is not None:
                        nn.init.zeros_(m.bias)

    def forward(self, images: Tensor, local: Tensor | None = None, rec_tokens: Tensor | None = None,
                pat_tokens: Tensor | None = None) -> dict[str, Tensor]:
        """images: (V*B, 3, H, W) global views, view by view.
        local: (L*B, 3, h, w) local crops, of which only CLS is read.
        rec_tokens, pat_tokens: indices into the V*B*N patches; `h_rec` and `h_pat` run on these only
        (None: on all).

        Returns {"rec": (M, 3*P*P), "pat": (A, out), "cls": ((V+L)*B, out)}, keys of existing heads only."""
        tokens = self.backbone(images, cls_only=self.h_rec is None and self.h_pat is None)     # (V*B, T, D)
        cls, patches = tokens[:, 0], tokens[:, self.backbone.num_prefix_tokens:].flatten(0, 1)    # (V*B*N, D)
        if local is not None and self.h_cls is not None:
            cls = torch.cat([cls, self.backbone(local, cls_only=True)[:, 0]])
        def chosen(index): return patches if index is None else patches[index]
        out = {}
        if self.h_rec is not None:
            out["rec"] = self.h_rec(chosen(rec_tokens))
        if self.h_pat is not None:
            out["pat"] = self.h_pat(chosen(pat_tokens))
        if self.h_cls is not None:
            out["cls"] = self.h_cls(cls)
        return out


def momentum_teacher(student: MMC) -> MMC:
    """A copy of the student that no gradient reaches: no drop path, no reconstruction head.  It stays in
    train mode, where BatchNorm uses (and synchronises) batch statistics."""
    teacher = copy.deepcopy(student)
    teacher.h_rec = None
    for m in teacher.modules():
        if isinstance(m, DropPath):
            m.p = 0.0
    return teacher.requires_grad_(False)


@torch.no_grad()
def ema_update(teacher: MMC, student: MMC, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, in float32, in place, for each parameter."""
    source = dict(student.named_parameters())
    names, params = zip(*teacher.named_parameters(), strict=True)
    torch._foreach_lerp_(list(params), [source[n] for n in names], 1.0 - momentum)


def cosine_schedule(base: float, final: float, steps: int, warmup: int = 0) -> list[float]:
    """Value per step: linear from base/warmup to base in `warmup` steps, then half a cosine to `final`.
    The first value is not 0, and a warm-up longer than the run is only its beginning."""
    ramp = [base * (i + 1) / warmup for i in range(min(warmup, steps))]
    n = steps - len(ramp)
    return ramp + [final + (base - final) * (1 + math.cos(math.pi * i / max(n - 1, 1))) / 2 for i in range(n)]
