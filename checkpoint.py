"""Checkpoint files: atomic save, load without running a pickle, and the backbone of anybody's ViT.

`load_backbone(path)` reads our files and those of DINO, iBOT, MAE, MSN, MoCo-v3, SiT / MC-SSL, DINOv2, timm,
DeiT, solo-learn and lightly.  It probes by keys, never by file name, reads the architecture off the shapes
and is strict: a backbone weight that is missing, unknown or of another shape is an error, so random weights
are never evaluated.

    vit, report = load_backbone("dino_deitsmall16_pretrain.pth")      # report: one line to print
    vit, report = load_backbone("random:vit_b")     # the untrained row of a table; random:vit_s/14 too
"""
import argparse
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from distributed import everywhere, is_main, world_size
from model import ViT, vit

TEACHERS = ("teacher", "target_encoder", "momentum", "ema")       # preferred, in this order, over the rest
RENAMES = [(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),                      # DINOv2's chunked blocks
           (r"^register_tokens$", "reg_token"), (r"^fc_norm\.", "norm.")]  # DINOv2; MAE after fine-tuning
# what a backbone is made of
OURS = re.compile(r"^(blocks|patch_embed|norm)\.|^(cls_token|pos_embed|reg_token)$")


def save(path: str | os.PathLike, content: dict) -> None:
    """torch.save that cannot leave half a file: written beside the target, flushed to disk, renamed over it.
    Rank 0 writes, the others return.  Raises ValueError (disk full, no permission); the old file stays."""
    if not is_main():
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):                    # some network file systems cannot sync a folder
            os.fsync(folder)
        os.close(folder)
    except BaseException as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(e, (OSError, RuntimeError)):                    # torch's zip writer raises RuntimeError
            why = e.strerror if isinstance(e, OSError) and e.strerror else str(e).splitlines()[0]
            raise ValueError(f"{path}: cannot be written ({why}); the file that was there is as it was. Make "
                             "room, then start the same command again") from e
        raise


def load(path: str | os.PathLike) -> dict:
    """What a .pth (or .safetensors) file holds, on the CPU; only tensors, containers and argparse.Namespace
    are allowed. Raises ValueError, in one line, for a file that is missing, damaged, or that wants to run
    anything else."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint file")
    try:
        if path.suffix == ".safetensors":
            try:
                from safetensors.torch import load_file
            except ImportError as e:
                raise ValueError(f"{path}: pip install safetensors, to read this format") from e
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ValueError:
        raise
    except Exception as e:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(e))
        why = (f"it asks for {wanted[1]}, which is refused" if wanted
               else f"{type(e).__name__}: {''.join(str(e).splitlines()[:1])[:150]}")
        raise ValueError(f"{path}: not a checkpoint of tensors ({why})") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of tensors, found {type(content).__name__}")
    return content


def open_run(args: argparse.Namespace, harmless: set[str]) -> dict | None:
    """Claim args.output_dir for this run; returns the content of its last.pth to go on from, or None for a
    new run.

    A folder whose run had other options is refused, with their names, unless they are all `harmless` or
    args.force; one that began with other weights (args.weights, a `digest`) always. Writes run.json:
    options, number of ranks, versions, commit.  Raises ValueError."""
    out, last = Path(args.output_dir), Path(args.output_dir) / "last.pth"
    if out.exists() and not out.is_dir():
        raise ValueError(f"--output_dir {out}: is a file, expected a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(f"--output_dir {out}: cannot be made ({e.strerror})") from e
    options = json.loads(json.dumps(vars(args) | {"world_size": world_size()}))
    content = load(last) if last.exists() else None
    steps = everywhere(content and content.get("step"))
    if len(set(steps)) > 1:
        raise ValueError(f"{last}: the ranks find steps {steps} in it: --output_dir must be one folder that "
                         "all machines share")
    if content is not None:
        if "options" not in content:
            raise ValueError(f"{last}: not written by this script; give another --output_dir")
        if content["options"].get("weights") != options.get("weights"):
            raise ValueError(f"{out} holds a run that began with other weights than {args.ckpt} has now; "
                             "give another --output_dir")
        changed = [f"--{k} {content['options'].get(k)} -> {v}" for k, v in options.items()
                   if k not in harmless and content["options"].get(k) != v]
        if changed and not args.force:
            raise ValueError(f"{out} holds a run with other options: {', '.join(changed)}; "
                             "give another --output_dir, or --force to go on with the new ones")
    if is_main():
        run = {"command": sys.argv, "options": options, "torch": torch.__version__,
               "python": sys.version.split()[0], "commit": commit()}
        try:
            for left in out.glob(".*.pth.*[0-9]"):                     # by a kill in the middle of a save
                left.unlink()
            (out / "run.json").write_text(json.dumps(run, indent=1) + "\n")
        except OSError as e:
            raise ValueError(f"--output_dir {out}: cannot be written ({e.strerror})") from e
    return content


def commit() -> str | None:
    """That of this code, where it is a clone and git is installed."""
    with contextlib.suppress(OSError):
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent,
                               capture_output=True, text=True)
        return found.stdout.strip() or None
    return None


def digest(state: dict[str, Tensor]) -> str:
    """16 hex digits that change with any weight."""
    h = hashlib.blake2b(digest_size=8)
    for v in state.values():
        h.update(v.cpu().contiguous().float().numpy())
    return h.hexdigest()


def short_name(path: str) -> str:
    """A title for a checkpoint: random:ARCH as it is; backbone, last and checkpoint with their folder."""
    stem, folder = Path(path).stem, Path(path).absolute().parent.name
    if str(path).startswith("random:"):
        return str(path)
    return f"{folder}/{stem}" if stem in ("backbone", "last", "checkpoint") else stem


def load_backbone(path: str, checkpoint_key: str | None = None,
                  num_heads: int | None = None) -> tuple[ViT, str]:
    """The encoder in a checkpoint file of any method, in eval mode, without gradients, in float32.

    path: a file, or 'random:ARCH' / 'random:ARCH/PATCH' for seeded random weights.  checkpoint_key: take the
    weights whose container or prefix has this name (e.g. student) and not the teacher's.  num_heads: the one
    thing that shapes do not tell; by default what the method's models of this width have. Returns (vit, one
    line: source, which weights, matched and dropped keys).  Raises ValueError naming what is wrong."""
    if str(path).startswith("random:"):
        arch, _, patch = str(path)[7:].partition("/")
        if patch and not (patch.isdecimal() and int(patch)):
            raise ValueError(f"{path}: expected random:ARCH or random:ARCH/PATCH, such as random:vit_s/16")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = vit(arch, patch_size=int(patch or 16))
        return (model.eval().requires_grad_(False),
                f"{path}: RANDOM weights, seed 0 (the untrained row of a table)")
    content = load(path)
    name, prefix, state = find_weights(path, content, checkpoint_key)
    source = guess_source(content, name, prefix)
    config = content.get("arch") if isinstance(content.get("arch"), dict) else None
    state, dropped = select(path, state)
    dropped += [k for k, v in (content[name] if name else content).items()
                if isinstance(v, Tensor) and not k.startswith(prefix)]
    state = fold_prefix(state)
    config = config or read_config(
        path, state, num_heads or (12 if source == "MoCo-v3" and width(state) == 384 else None))
    model = ViT(**config)
    check_keys(path, model.state_dict(), state)
    model.load_state_dict({k: v.float() for k, v in state.items()})
    which = " / ".join(x for x in (name, prefix.rstrip(".")) if x) or "flat file"
    c = model.config
    report = (
        f"{path}: {source}, weights of '{which}', {len(state)} keys matched, {len(dropped)} dropped"
        f"{' (' + ', '.join(summary(dropped)) + ')' if dropped else ''}; ViT {c['embed_dim']}-{c['depth']}-"
        f"{c['num_heads']}, patch {c['patch_size']}, trained at {c['img_size']} px"
    )
    return model.eval().requires_grad_(False), report


def find_weights(path, content: dict, key: str | None) -> tuple[str, str, dict[str, Tensor]]:
    """Every place that holds a patch embedding is a backbone: (container, prefix, its tensors).
    The teacher's is preferred."""
    containers = {"": content} | {k: v for k, v in content.items() if isinstance(v, dict)}
    found = []
    for name, tensors in containers.items():
        for k in tensors:
            if isinstance(k, str) and k.endswith("patch_embed.proj.weight"):
                prefix = k[:-len("patch_embed.proj.weight")]
                found.append((name, prefix, {n[len(prefix):]: t for n, t in tensors.items()
                                             if n.startswith(prefix) and isinstance(t, Tensor)}))
    names = [f"{name}/{prefix}" for name, prefix, _ in found]
    if key is not None:
        found = [f for f, n in zip(found, names, strict=True) if key in re.split(r"[/.]", n)]
    if not found:
        keys = [f"{n}.{k}" if n else k for n, t in containers.items() for k in summary(map(str, t))
                if n or k not in containers]
        wanted = (f"no ViT under the key '{key}' (there is: {', '.join(names) or 'none'})" if key
                  else "no ViT in it")
        raise ValueError(f"{path}: {wanted}: expected ...patch_embed.proj.weight, "
                         f"found {', '.join(keys[:12]) or 'nothing'}")

    def order(f):
        return next((i for i, t in enumerate(TEACHERS) if t in f[0] + "/" + f[1]), len(TEACHERS))
    return min(found, key=order)


def select(path, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename to timm's names and part the backbone from heads, decoders and mask tokens."""
    kept, dropped = {}, []
    for k, v in state.items():
        name = k
        for pattern, to in RENAMES:
            name = re.sub(pattern, to, name)
        if OURS.match(name) or name == "dist_token":
            if name in kept:
                raise ValueError(f"{path}: both '{k}' and another key mean '{name}'")
            kept[name] = v
        else:
            dropped.append(k)
    return kept, dropped


def fold_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring position embeddings of other layouts to ours, (1, 1 + N, D) with CLS first and registers without
    position: timm's without CLS gets a zero row, those of registers and of DeiT's distillation token are
    added to the tokens."""
    if "dist_token" in state:
        state["reg_token"] = state.pop("dist_token")
    pos, registers = state.get("pos_embed"), state.get("reg_token")
    if pos is None or pos.ndim != 3:
        return state
    R, n = 0 if registers is None else registers.shape[1], pos.shape[1]
    if is_square(n) and not is_square(n - 1):
        state["pos_embed"] = torch.cat([torch.zeros_like(pos[:, :1]), pos], dim=1)
    elif R and not is_square(n - 1) and is_square(n - 1 - R):
        state["reg_token"] = registers + pos[:, 1:1 + R]
        state["pos_embed"] = torch.cat([pos[:, :1], pos[:, 1 + R:]], dim=1)
    return state


def is_square(n: int) -> bool:
    return n > 0 and round(n ** 0.5) ** 2 == n


def width(state: dict[str, Tensor]) -> int:
    return state["patch_embed.proj.weight"].shape[0]


def read_config(path, state: dict[str, Tensor], num_heads: int | None) -> dict:
    """Arguments of ViT() from the shapes of its weights."""
    weight, pos = state["patch_embed.proj.weight"], state.get("pos_embed")
    if weight.ndim != 4 or weight.shape[1] != 3 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"{path}: patch_embed.proj.weight is {tuple(weight.shape)}, expected (D, 3, P, P)")
    if pos is None or pos.ndim != 3 or not is_square(pos.shape[1] - 1):
        raise ValueError(f"{path}: pos_embed is {tuple(pos.shape) if pos is not None else 'missing'}, "
                         f"expected (1, 1 + g*g, {len(weight)})")
    D, P = weight.shape[0], weight.shape[-1]
    fc1 = state.get("blocks.0.mlp.fc1.weight")
    return dict(img_size=P * round((pos.shape[1] - 1) ** 0.5), patch_size=P, embed_dim=D,
                depth=1 + max([int(k.split(".")[1]) for k in state if k.startswith("blocks.")], default=-1),
                num_heads=num_heads or {1280: 16}.get(D, max(1, D // 64)),
                mlp_ratio=fc1.shape[0] / D if fc1 is not None else 4.0,
                init_values=1.0 if "blocks.0.ls1.gamma" in state else None,
                reg_tokens=state["reg_token"].shape[1] if "reg_token" in state else 0)


def check_keys(path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raises ValueError naming the backbone keys that are missing, unknown, misshapen or not finite."""
    shapes = [f"{k} {tuple(found[k].shape)} for {tuple(v.shape)}" for k, v in expected.items()
              if k in found and found[k].shape != v.shape]
    broken = [k for k, v in found.items() if v.is_floating_point() and not v.isfinite().all()]
    for what, keys in (
        ("lacks", [k for k in expected if k not in found]),
        ("has unknown", [k for k in found if k not in expected]),
        ("has another shape in", shapes),
        ("is not finite in", broken),
    ):
        if keys:
            raise ValueError(f"{path}: not a plain ViT: the backbone {what} {len(keys)} keys: "
                             f"{', '.join(keys[:4])}{' ...' if len(keys) > 4 else ''}")


def guess_source(content: dict, name: str, prefix: str) -> str:
    """The method that wrote a file, for the report only."""
    flat = set(content) | set(content.get(name) or {})
    def has(text):
        return any(text in str(k) for k in flat)
    if isinstance(content.get("arch"), dict):
        return f"MMC ({content.get('step', 0)} steps)"
    tests = [
        ("MSN", "target_encoder" in content),
        ("MoCo-v3", "momentum_encoder" in prefix or "base_encoder" in prefix),
        ("MAE", has("decoder_") or (has("fc_norm") and "model" in content)),
        ("iBOT", has("masked_embed")),
        ("DINOv2", has("ls1.gamma") and (has("mask_token") or has("register_tokens") or has("blocks.0.0."))),
        ("SiT / MC-SSL", has("rec_head") or has("recons")),
        ("DINO or iBOT", "teacher" in content or has("dino_loss")),
        ("solo-learn or lightly", has("projector") or has("projection_head")),
        ("DeiT", has("dist_token")),
    ]
    return next((method for method, yes in tests if yes), "timm, DINO or another plain ViT")


def summary(keys: Iterable[str]) -> list[str]:
    """Key names by their first part: ['head.*', 'mask_token']."""
    return sorted({k.split(".")[0] + (".*" if "." in k else "") for k in keys})
