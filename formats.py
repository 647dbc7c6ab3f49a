"""The ViT inside anybody's checkpoint: where its weights are, what its shapes say, what it is not.

Reads our files and those of DINO, iBOT, MAE, MSN, MoCo-v3, SiT / MC-SSL, DINOv2, timm, DeiT, solo-learn and
lightly.  It looks at keys and shapes, never at the name of the file, and it is strict: a weight of the
backbone that is missing, unknown, of another shape or not finite is a Mistake, so that random weights are
never evaluated.  The number of heads is the one thing that shapes do not tell; see `count_heads`.

A `State` is a dict of tensors by timm's names.  Shapes: N patches, R registers, D width, P patch size."""
import argparse
import math
import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from model import ViT
from run import Mistake

State = dict[str, Tensor]
TEACHERS = ["teacher", "target", "momentum", "ema"]    # words in a name; the first ones are preferred
WRAPPERS = re.compile(r"\b(module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
PATCH_EMBED = re.compile(r"(|.*\.)patch_embed\.proj\.weight")
BACKBONE = re.compile(r"(blocks|patch_embed|norm)\.|(cls_token|pos_embed|reg_token)$")
RENAMES = [
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),         # DINOv2 keeps its blocks in chunks
    (r"^(register_tokens|dist_token)$", "reg_token"),  # DINOv2, DeiT
    (r"^fc_norm\.", "norm."),                          # MAE after fine-tuning
]
# Heads of the published ViTs with CLS, by their width; 128 is our vit_micro.
HEADS = {
    128: 4, 192: 3, 256: 4, 320: 5, 384: 6, 512: 8, 640: 10, 768: 12, 832: 13, 896: 14,
    1024: 16, 1152: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16,
}
TWELVE_HEADS = {192: "MAE-Lite", 384: "MoCo-v3"}       # who has 12 at a width where 3 or 6 are usual
SIZES = ("img_size", "patch_size", "embed_dim", "depth", "reg_tokens")     # what shapes tell of a ViT
DEEPEST = 9                                            # dicts in dicts; one that holds itself must end
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Networks that this ViT is not, by a key of theirs.
OTHER_NETWORKS = [
    (r"\.mlp\.w(1|2|3|12)\.", "its MLP is SwiGLU (w12, w3)"),
    (r"lora_|\.base_layer\.", "it has LoRA adapters; merge them into the weights (peft: merge_and_unload)"),
    (r"(^|\.)encoder\.layer\.\d", "it has Hugging Face's names; export the same model from timm"),
    (r"encoder_layer_\d", "it has torchvision's names; export the same model from timm"),
    (r"resblocks\.\d", "it has CLIP's names, and a norm before its blocks"),
    (r"^(norm_pre|ln_pre)\.", "it has a norm before its blocks (norm_pre)"),
    (r"^(rope|rope_embed|storage_tokens)\b", "it has rotary positions (DINOv3)"),
    (r"rel_pos|relative_position", "it has relative positions (BEiT, Swin)"),
]
# The method that wrote a file, by its keys; for the report only.
METHODS = [
    ("MSN", r"^target_encoder/"),
    ("MoCo-v3", r"(momentum|base)_encoder\."),
    ("MAE", r"decoder_|^model/.*fc_norm"),
    ("iBOT", r"masked_embed"),
    ("DINOv2", r"(?s)(?=.*ls1\.gamma).*(mask_token|register_tokens|blocks\.0\.0\.)"),
    ("SiT / MC-SSL", r"rec_head|recons"),
    ("DINO or iBOT", r"^teacher/|dino_loss"),
    ("solo-learn or lightly", r"projector|projection_head"),
    ("DeiT", r"dist_token"),
]


def build(content: dict, checkpoint_key: str | None, num_heads: int | None) -> tuple[ViT, str]:
    """The encoder in the content of a checkpoint file, and a line about it: source, which weights, matched
    and dropped keys, heads.  Raises Mistake that says what is wrong, without the file's name."""
    found = find_backbones(content)
    name = choose(content, found, checkpoint_key)
    under, beside = found.pop(name)
    state, dropped = select(under)
    state = fold_prefix(state)
    config = read_config(content, state)
    H, reason = count_heads(content, name, state, num_heads)
    with torch.device("meta"):                         # no memory and no random numbers: all is replaced
        vit = ViT(**config, num_heads=H)
    check_keys(vit.state_dict(), state)
    vit.load_state_dict(state, assign=True)
    vit.eval().requires_grad_(False)

    P = config["patch_size"]
    S = config["img_size"]
    dropped += beside
    report = f"{method(content)}, weights of '{name}'"
    if found:
        others = [f"'{other}'" for other in found]
        report += f" (not of {', '.join(others)})"
    report += f", {len(state)} keys matched, {len(dropped)} dropped"
    if dropped:
        report += f" ({', '.join(summary(dropped))})"
    report += f"; ViT {vit.embed_dim}-{vit.depth}-{H}, {H} heads {reason}, patch {P}, trained at {S} px"
    if not is_ours(content):
        report += f" (positions read as a square grid {S // P}x{S // P})"
    if "fc_norm.weight" in under:
        report += "; its fc_norm, trained on the mean of the patches, stands in for the final norm"
    return vit, report


def method(content: dict) -> str:
    """The method that wrote a file."""
    if is_ours(content):
        return f"MMC ({content.get('step', 0)} steps)"
    keys = "\n".join(f"{place}{key}" for place, inner in walk(content) for key in inner)
    for name, pattern in METHODS:
        if re.search(pattern, keys, re.MULTILINE):
            return name
    return "timm, DINO or another plain ViT"


def is_ours(content: dict) -> bool:
    """Whether a file has our "arch", the arguments of ViT()."""
    arch = content.get("arch")
    return isinstance(arch, dict) and {*SIZES, "num_heads"} <= arch.keys()


# ------------------------------------------------- where the weights are
def walk(content: dict) -> Iterator[tuple[str, dict]]:
    """Every dict and Namespace in a file with its place, such as 'state/model/', outer before inner."""
    places = [("", content)]
    for place, inner in places:                        # grows while it is walked
        yield place, inner
        for key, value in inner.items():
            if isinstance(value, argparse.Namespace):
                value = vars(value)
            if isinstance(value, dict) and place.count("/") < DEEPEST:
                places.append((f"{place}{key}/", value))


def find_backbones(content: dict) -> dict[str, tuple[State, list[str]]]:
    """Every place that holds a patch embedding is a backbone.  Returns for its name, such as
    'teacher/backbone': (the tensors under it, keys of the tensors beside it)."""
    found = {}
    for place, inner in walk(content):
        tensors = unwrapped(inner)
        prefixes = [match[1] for match in map(PATCH_EMBED.fullmatch, tensors) if match]
        for prefix in prefixes:
            under = {}
            beside = []
            for key, value in tensors.items():
                if key.startswith(prefix):
                    under[key.removeprefix(prefix)] = value
                else:
                    beside.append(key)
            name = (place + prefix).rstrip("/.") or "flat file"
            found[name] = (under, beside)
    return found


def unwrapped(inner: dict) -> State:
    """The tensors of a dict, without the names that torch's wrappers put into their keys; a name that would
    then be there twice stays as it is."""
    tensors = {}
    for key, value in inner.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            short = WRAPPERS.sub("", key)
            taken = short in inner or short in tensors
            tensors[key if taken else short] = value
    return tensors


def choose(content: dict, found: dict, checkpoint_key: str | None) -> str:
    """The name of the backbone to take: the teacher's before others, or one with `checkpoint_key` in it."""
    names = [n for n in found if checkpoint_key in (None, *re.split(r"[/.]", n))]
    if names:
        return min(names, key=rank_of)
    if found:
        raise Mistake(f"no ViT under the key '{checkpoint_key}' (there is: {', '.join(found)})")
    keys = []
    for place, inner in walk(content):
        plain = [str(k) for k, v in inner.items() if not isinstance(v, dict)]
        refuse_other_network(plain)
        keys += [place.replace("/", ".") + part for part in summary(plain)]
    raise Mistake("no ViT in it: expected a tensor ...patch_embed.proj.weight, "
                  f"found {', '.join(keys[:12]) or 'nothing'}")


def rank_of(name: str) -> int:
    words = re.split(r"[/._]", name)
    for rank, teacher in enumerate(TEACHERS):
        if teacher in words:
            return rank
    return len(TEACHERS)


def refuse_other_network(keys: Iterable[str]) -> None:
    """Raises Mistake that says what the network is, where we know it and this ViT is not it."""
    for key in keys:
        for pattern, what in OTHER_NETWORKS:
            if re.search(pattern, key):
                raise Mistake(f"not a plain ViT: {what}; found {key}")


def summary(keys: Iterable[str]) -> list[str]:
    """Key names by their first part: ['head.*', 'mask_token']."""
    parts = set()
    for key in keys:
        first, dot, _ = key.partition(".")
        parts.add(f"{first}.*" if dot else first)
    return sorted(parts)


# ------------------------------------------------- the weights in our layout
def select(under: State) -> tuple[State, list[str]]:
    """Part the backbone, in timm's names, from the keys of heads, decoders and mask tokens."""
    refuse_other_network(under)
    state = {}
    dropped = []
    for key, value in under.items():
        name = key
        for pattern, to in RENAMES:
            name = re.sub(pattern, to, name)
        if not BACKBONE.match(name):
            dropped.append(key)
        elif name in state:
            raise Mistake(f"both '{key}' and another key mean '{name}'")
        else:
            state[name] = as_float32(key, value)
    return state, dropped


def as_float32(key: str, value: Tensor) -> Tensor:
    """The same tensor where it is float32, a copy where it is half, bfloat16 or double.  Raises Mistake for
    numbers that need more than a cast (quantised, sparse) and for those that are not there (meta device)."""
    plain = value.layout == torch.strided and not value.is_nested and not value.is_meta
    if not plain or value.dtype not in FLOATS:
        raise Mistake(f"{key} is {value.dtype}, {value.layout}, on {value.device}; expected plain floats")
    return value.detach().float().contiguous()


def fold_prefix(state: State) -> State:
    """Bring position embeddings of other layouts to ours, (1, 1 + N, D) with CLS first and registers without
    position: timm's without CLS gets a zero row, those of registers and of DeiT's distillation token are
    added to the tokens."""
    shape = tuple(state["patch_embed.proj.weight"].shape)
    if len(shape) != 4 or 0 in shape or shape[1:] != (3, shape[3], shape[3]):
        raise Mistake(f"patch_embed.proj.weight is {shape}, expected (D, 3, P, P)")
    D = shape[0]
    pos = state.get("pos_embed")
    registers = state.get("reg_token", torch.zeros(1, 0, D))
    if registers.ndim != 3:
        raise Mistake(f"the registers are {tuple(registers.shape)}, expected (1, R, {D})")
    R = registers.shape[1]
    n = pos.shape[1] if pos is not None and pos.ndim == 3 else 0
    if is_square(n - 1):
        return state
    if is_square(n):
        nothing = torch.zeros_like(pos[:, :1])                         # for CLS
        return state | {"pos_embed": torch.cat([nothing, pos], dim=1)}
    if R and is_square(n - 1 - R) and registers.shape[2] == pos.shape[2]:
        cls, prefix, patches = pos.split([1, R, n - 1 - R], dim=1)
        return state | {
            "reg_token": registers + prefix,
            "pos_embed": torch.cat([cls, patches], dim=1),
        }
    what = "missing" if pos is None else tuple(pos.shape)
    raise Mistake(f"pos_embed is {what}, expected (1, 1 + g*g, {D})")


def is_square(n: int) -> bool:
    return n > 0 and math.isqrt(n) ** 2 == n


# ------------------------------------------------- the arguments of ViT()
def read_config(content: dict, state: State) -> dict:
    """Arguments of ViT() from the shapes of its weights, without the heads.  Raises Mistake where the file's
    own "arch" or options say something else."""
    D, _, _, P = state["patch_embed.proj.weight"].shape
    N = state["pos_embed"].shape[1] - 1
    refuse_oblong(content, N, P)
    blocks = {key.split(".")[1] for key in state if re.match(r"blocks\.\d+\.", key)}
    if not blocks:
        raise Mistake("not a plain ViT: it has no blocks.0 ...")
    hidden = state.get("blocks.0.mlp.fc1.bias", torch.empty(4 * D)).numel()
    fc2 = state.get("blocks.0.mlp.fc2.weight", torch.empty(D, hidden))
    if hidden * D == 2 * fc2.numel():
        raise Mistake("not a plain ViT: its MLP is gated (SwiGLU)")
    mlp_ratio = hidden / D
    if int(D * mlp_ratio) != hidden:                   # ViT() rounds down
        mlp_ratio = (hidden + 0.5) / D
    config = {
        "img_size": P * math.isqrt(N),
        "patch_size": P,
        "embed_dim": D,
        "depth": len(blocks),
        "mlp_ratio": mlp_ratio,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "reg_tokens": state["reg_token"].shape[1] if "reg_token" in state else 0,
    }
    if is_ours(content):
        for key in SIZES:
            said = content["arch"][key]
            if said != config[key]:
                raise Mistake(f"its arch says {key} {said}, its weights say {config[key]}")
    return config


def refuse_oblong(content: dict, N: int, P: int) -> None:
    """Raises Mistake where the options in a file say that its N positions are no square."""
    for place, inner in walk(content):
        for key in ("img_size", "input_size", "image_size"):
            match inner.get(key):
                case [*_, int(height), int(width)]:
                    h = height // P
                    w = width // P
                    if h != w and h * w == N:
                        raise Mistake(f"its {place}{key} says a grid of {h}x{w} patches; only square ones "
                                      "are read")


def count_heads(content: dict, name: str, state: State, num_heads: int | None) -> tuple[int, str]:
    """The number of heads, and why: the file's own "arch", --num_heads, MoCo-v3's marks, or the table HEADS.
    Raises Mistake where none of them tells."""
    D = len(state["patch_embed.proj.weight"])
    arch = content.get("arch")
    said = arch.get("num_heads") if isinstance(arch, dict) else None
    if type(said) is int and said > 0 and D % said == 0:
        asked = f", not {num_heads}" if num_heads not in (None, said) else ""
        return said, f"(the file says so{asked})"
    if num_heads:
        if D % num_heads:
            raise Mistake(f"{num_heads} heads (--num_heads) do not divide its width {D}: give another "
                          "--num_heads")
        return num_heads, "(--num_heads)"
    if D not in HEADS:
        raise Mistake(f"{D} wide, which no ViT known here is: give --num_heads")
    table = sine_cosine(state["pos_embed"])
    if D == 384 and (table == "rows" or re.search(r"(momentum|base)_encoder", name)):
        return 12, "(as MoCo-v3's of this width)"
    if D not in TWELVE_HEADS:
        return HEADS[D], "(usual at this width)"
    if table:
        raise Mistake(f"{D} wide with a fixed sine-cosine position table has {HEADS[D]} heads or, in "
                      f"{TWELVE_HEADS[D]}, 12: give --num_heads")
    return HEADS[D], f"(usual at this width; {TWELVE_HEADS[D]} has 12: --num_heads)"


def sine_cosine(pos_embed: Tensor) -> str | None:
    """What the first half of the channels encodes if positions are a fixed sine-cosine table: 'rows' in
    MoCo-v3, 'columns' in MAE.  None for learned positions."""
    D = pos_embed.shape[-1]
    if D % 4:
        return None
    waves = pos_embed[:, 1:].unflatten(-1, (2, 2, D // 4))             # (1, N, axis, sine and cosine, D/4)
    if not torch.allclose(waves.square().sum(-2), torch.ones(()), atol=0.01):
        return None
    first = waves[:, 0:1, 0]
    second = waves[:, 1:2, 0]                                          # the next patch of the first row
    return "rows" if torch.allclose(first, second, atol=0.01) else "columns"


def check_keys(expected: State, state: State) -> None:
    """Raises Mistake that names the backbone's keys that are missing, unknown, misshapen or not finite."""
    misshapen = []
    for key, tensor in expected.items():
        found = state.get(key, tensor)
        if found.shape != tensor.shape:
            misshapen.append(f"{key} {tuple(found.shape)} for {tuple(tensor.shape)}")
    complaints = {
        "lacks": [key for key in expected if key not in state],
        "has unknown": [key for key in state if key not in expected],
        "has another shape in": misshapen,
        "is not finite in": [key for key, value in state.items() if not value.isfinite().all()],
    }
    for what, keys in complaints.items():
        if keys:
            shown = ", ".join(keys[:4]) + " ..." * (len(keys) > 4)
            raise Mistake(f"not a plain ViT: the backbone {what} {len(keys)} keys: {shown}")
