"""Checkpoint files: atomic save, load without running a pickle, the backbone of anybody's ViT, and export.

    vit, report = load_backbone("dino_deitsmall16_pretrain.pth")      # report: one line to print
    vit, report = load_backbone("random:vit_b/16")                    # the untrained row of a table
    python checkpoint.py FILE                                         # prints the report
    python checkpoint.py FILE --to out.safetensors                    # or out.pth, out.pt2, out.onnx
    python checkpoint.py FILE --to out.pth --blocks 4                 # its first four blocks alone

formats.py knows how the files of other methods look."""
import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor, nn

import formats
import run
from distributed import is_main, say
from model import ALIASES, ARCHS, ViT, vit
from run import Mistake

EXPORTS = {                                    # the packages that each format needs
    ".pth": "",
    ".safetensors": "safetensors",
    ".pt2": "",
    ".onnx": "onnx onnxscript",
}


# ------------------------------------------------- files
@contextlib.contextmanager
def whole_file(path: str | Path):
    """Around what writes a file, so that there is never half of it: gives the name of a file beside it, which
    is flushed to disk and then renamed over it.  Raises Mistake for a full disk or a lack of permission."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__         # torch's writer hides the disk's error
        if not isinstance(cause, OSError):
            raise
        raise Mistake(f"{path}: cannot be written ({cause.strerror or cause}); what was there is as it was. "
                      "Make room, then start the same command again") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save(path: str | Path, content: dict) -> None:
    """torch.save that cannot leave half a file.  Rank 0 writes, the others return."""
    if is_main():
        with whole_file(path) as temporary, open(temporary, "wb") as f:
            torch.save(content, f)


def load(path: str | Path) -> dict:
    """What a file of torch.save or safetensors holds, on the CPU.  Only tensors, containers, numbers, paths
    and argparse.Namespace are allowed.  Raises Mistake for a file that is missing, damaged, or that wants to
    run anything else."""
    path = Path(path)
    if not path.is_file():
        raise Mistake(f"{path}: no such checkpoint file{folder_hint(path)}")
    try:
        file = open(path, "rb")
    except OSError as e:
        raise Mistake(f"{path}: cannot be read ({e.strerror})") from e
    with file, torch.serialization.safe_globals(allowed_globals()):
        start = file.read(9)
        if start[8:] == b"{":                          # safetensors: its header, after 8 bytes of length
            return load_safetensors(path)
        file.seek(0)
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as e:                         # a damaged file can raise almost any kind
            raise Mistake(f"{path}: not a checkpoint of tensors ({why_refused(str(e) or repr(e))})") from e
    if not isinstance(content, dict):
        raise Mistake(f"{path}: expected a dict of tensors, found {type(content).__name__}")
    return content


def folder_hint(path: Path) -> str:
    if not path.is_dir():
        return ""
    if list(path.glob("*.distcp")):
        return (", but a folder of shards: join them with "
                f"'python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} joined.pth'")
    return ", but a folder: give a file in it"


def allowed_globals() -> list:
    """What a pickle may ask for besides torch's own: options, paths (they become pure ones, also those of
    another system), numpy's numbers and arrays."""
    allowed = [argparse.Namespace, bytes, np.ndarray, np.dtype]
    allowed += {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + "?efdSU"}
    for maker in (np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]):
        allowed += [(maker, f"numpy.{core}.multiarray.{maker.__name__}") for core in ("core", "_core")]
    for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
        allowed += [(PurePosixPath, f"{module}.{name}") for module in ("pathlib", "pathlib._local")]
    return allowed


def why_refused(message: str) -> str:
    """One short line of torch's message."""
    wanted = re.search(r"GLOBAL ([\w.]+)", message)
    if wanted:
        return (f"it asks for {wanted[1]}, which is refused; if you trust the file, keep only its weights: "
                "torch.save(torch.load(FILE, weights_only=False)['model'], 'weights.pth')")
    reason = re.search(r"WeightsUnpickler error:\s*(.*)", message)
    return (reason[1] if reason else message.strip().splitlines()[0])[:150]


def load_safetensors(path: Path) -> dict:
    """The tensors, and under "arch" the ViT's arguments where our export has left them in the header."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as e:
        raise Mistake(f"{path}: to read this format: pip install safetensors") from e
    try:
        with safe_open(path, "pt") as f:
            content = {key: f.get_tensor(key) for key in f.keys()}
            about = f.metadata() or {}
    except SafetensorError as e:
        raise Mistake(f"{path}: not a checkpoint of tensors ({e})") from e
    with contextlib.suppress(ValueError):              # somebody else's "arch" is not JSON
        content["arch"] = json.loads(about.get("arch", ""))
    return content


def restore(
    path: str | Path,
    parts: list[tuple[nn.Module, dict[str, Tensor]]],
) -> None:
    """Load (module, state dict) pairs from a training run's file `path`.  Raises Mistake for a tensor that is
    missing, unknown or of another shape."""
    for module, state in parts:
        try:
            module.load_state_dict(state)
        except RuntimeError as e:
            what = str(e).splitlines()[1].strip()
            raise Mistake(f"{path}: of a run of other sizes ({what}); give another --output_dir") from e


# ------------------------------------------------- the backbone in a file
def open_backbone(args, ckpt: str, device: torch.device) -> ViT:
    """`load_backbone` for a script, with --checkpoint_key, --num_heads and --precision where it has them;
    prints the report."""
    options = vars(args)
    model, report = load_backbone(ckpt, options.get("checkpoint_key"), options.get("num_heads"))
    model.bf16 = options.get("precision") == "bf16"
    say(report)
    return model.to(device)


def load_backbone(path: str, checkpoint_key: str | None = None,
                  num_heads: int | None = None) -> tuple[ViT, str]:
    """The encoder in a checkpoint file of any method, in eval mode, without gradients, in float32.

    path: a file, or 'random:ARCH' or 'random:ARCH/PATCH' for seeded random weights.  checkpoint_key: take the
    weights whose place in the file has this name (such as student), and not the teacher's.  num_heads: for a
    file that does not tell.  Returns (vit, one line: source, which weights, matched and dropped keys, heads).
    Raises Mistake that names what is wrong."""
    if str(path).startswith("random:"):
        model, report = random_backbone(str(path))
        if checkpoint_key or num_heads:
            report += "; --checkpoint_key and --num_heads do not apply to it"
        return model, report
    return read_backbone(path, load(path), checkpoint_key, num_heads)


def read_backbone(path: str, content: dict, checkpoint_key: str | None,
                  num_heads: int | None) -> tuple[ViT, str]:
    """`load_backbone` for the content of a file that is loaded already."""
    try:
        model, report = formats.build(content, checkpoint_key, num_heads)
    except Mistake as e:
        raise Mistake(f"{path}: {e}") from e
    return model, f"{path}: {report}"


def random_backbone(path: str) -> tuple[ViT, str]:
    """An untrained ViT, the same each time, for 'random:ARCH/PATCH'."""
    arch, _, patch = path.removeprefix("random:").partition("/")
    patch = patch or "16"
    patches = [str(n) for n in range(1, 225) if 224 % n == 0]
    known = [*ARCHS, *ALIASES]
    if arch not in known or patch not in patches:
        raise Mistake(f"{path}: expected random:ARCH or random:ARCH/PATCH, with ARCH one of "
                      f"{', '.join(known)} and a PATCH that divides 224")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = vit(arch, patch_size=int(patch)).eval().requires_grad_(False)
    return model, f"{path}: RANDOM weights, seed 0 (the untrained row of a table)"


def digest(weights: nn.Module | dict[str, Tensor]) -> str:
    """16 hex digits that change with any weight."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    h = hashlib.blake2b(digest_size=8)
    for value in state.values():
        h.update(value.cpu().contiguous().float().numpy())
    return h.hexdigest()


def short_name(path: str) -> str:
    """A title for a checkpoint: random:ARCH as it is; backbone, last and checkpoint with their folder."""
    if str(path).startswith("random:"):
        return str(path)
    stem = Path(path).stem
    if stem in ("backbone", "last", "checkpoint"):
        return f"{Path(path).absolute().parent.name}/{stem}"
    return stem


# ------------------------------------------------- export
def first_blocks(model: ViT, n: int) -> ViT:
    """A ViT of the first n blocks and the final norm.  Raises Mistake for more than there are."""
    if n > model.depth:
        raise Mistake(f"--blocks {n}: the network has {model.depth}")
    config = model.config | {"depth": n}
    short = ViT(**config)
    state = model.state_dict()
    short.load_state_dict({name: state[name] for name in short.state_dict()})
    return short.eval().requires_grad_(False)


def export(model: ViT, path: str, step: int) -> None:
    """Write a backbone in the format that the name ends in.

    .pth and .safetensors are read by `load_backbone` again.  .pt2 (torch.export) and .onnx hold a program:
    normalised images (B, 3, S, S), of the size of training and any B -> tokens (B, T, D)."""
    kind = Path(path).suffix
    if kind == ".pth":
        return save(path, {"arch": model.config, "step": step, "backbone": model.state_dict()})
    if kind == ".safetensors":
        from safetensors.torch import save_file
        return save_file(model.state_dict(), path, {"arch": json.dumps(model.config)})
    S = model.config["img_size"]
    images = torch.zeros(2, 3, S, S, dtype=model.cls_token.dtype)
    any_batch = {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (images,), dynamic_shapes=any_batch)
    if kind == ".pt2":
        torch.export.save(program, path)
    else:
        torch.onnx.export(program, f=path, dynamo=True, external_data=False)


def get_args(argv=None):
    p = run.Parser(description=__doc__)
    p.add_argument("file", help="a checkpoint of any method")
    p.add_argument("--to", metavar="OUT", help=f"write the backbone; the name ends in {', '.join(EXPORTS)}")
    p.add_argument("--half", action="store_true", help="in float16")
    p.add_argument("--blocks", type=run.count, metavar="N", help="keep the first N blocks and the final "
                   "norm; `probes.py layers` tells how good each block is")
    run.add_shared(p, "checkpoint_key num_heads")
    args = p.parse_args(argv)
    kind = Path(args.to or "x.pth").suffix
    if kind not in EXPORTS:
        raise Mistake(f"--to {args.to}: expected a name that ends in {', '.join(EXPORTS)}")
    for name in ("half", "blocks"):
        if getattr(args, name) and not args.to:
            raise Mistake(f"--{name} has no effect without --to")
    if not all(importlib.util.find_spec(name) for name in EXPORTS[kind].split()):
        raise Mistake(f"--to {args.to}: to write this format: pip install {EXPORTS[kind]}")
    run.check_outputs(args, "to")
    return args


def main(args) -> None:
    content = load(args.file)
    model, report = read_backbone(args.file, content, args.checkpoint_key, args.num_heads)
    say(report)
    if args.to:
        if args.blocks:
            model = first_blocks(model, args.blocks)
        if args.half:
            model.half()
            if not all(p.isfinite().all() for p in model.parameters()):
                raise Mistake(f"--half: {args.file} has weights beyond the range of float16")
        export(model, args.to, content.get("step", 0))
        say(f"{args.to}: written, {Path(args.to).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run.script(main, get_args)
