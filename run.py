"""What every script shares: options, beginning and end, results.

Exit codes: 0 done; 2 a user's mistake, told in one line; 3 training was not finite; 75 stopped by a signal
after saving, so that the same command goes on.  Only a `Mistake` becomes one line.  Every other exception
keeps its traceback: it is a bug, and whoever changes this code wants to see where."""
import argparse
import json
import math
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path

import torch

import distributed
from distributed import say

MISTAKE, NOT_FINITE, STOPPED = 2, 3, 75        # 75 is EX_TEMPFAIL of sysexits.h
LOCKS: dict[Path, object] = {}                 # run folders that this process holds


class Mistake(Exception):
    """Something that the user can mend: what was expected, what was found, what to do."""


# ------------------------------------------------- options
class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows its description as it is; a wrong option is a Mistake."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str):
        raise Mistake(message)

    def parse_known_args(self, *args, **kwargs):
        """Besides the options, `defaults`: what each of them is where it is not given."""
        found, rest = super().parse_known_args(*args, **kwargs)
        defaults = {}
        for action in self._actions:
            if action.default is not argparse.SUPPRESS:                # --help has no value
                defaults[action.dest] = self.get_default(action.dest)
        found.defaults = defaults | getattr(found, "defaults", {})     # those of a sub-command come first
        return found, rest


def changed(args: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Those of the options that are not at their default."""
    return [name for name in names if getattr(args, name) != args.defaults[name]]


def refuse_idle(args: argparse.Namespace, names: Iterable[str], beside: str) -> None:
    """Raises Mistake where one of these options is given, as none of them has an effect `beside` another."""
    for name in changed(args, names):
        raise Mistake(f"--{name} has no effect with {beside}")


def ranged(kind: type, allowed: Callable, words: str) -> Callable[[str], int | float]:
    """Type of an option: a finite number of `kind` that is `allowed`; `words` say which are."""
    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not allowed(value):
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r}: expected {noun}, {words}")
        return value
    return convert


def at_least(low: int | float) -> Callable[[str], int | float]:
    """Type of an option: a number of `low` or more, whole if `low` is."""
    return ranged(type(low), lambda v: v >= low, f"{low} or more")


def above(low: int | float) -> Callable[[str], int | float]:
    return ranged(type(low), lambda v: torch.tensor(v).float() > low, f"more than {low} (in float32)")


def between(low: int | float, high: int | float) -> Callable[[str], int | float]:
    return ranged(type(low), lambda v: low <= v <= high, f"{low} to {high}")


count = at_least(1)
number = at_least(0.0)
share = between(0.0, 1.0)


def interval(text: str) -> str:
    """Type of --save_every: '500' steps or '15m' minutes."""
    if not re.fullmatch(r"\d+(\.\d*)?m|[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected steps (500) or minutes (15m)")
    return text


SHARED = {  # options that several scripts have
    "ckpt": dict(nargs="+", required=True, help="checkpoints of any method, or random:ARCH/PATCH, untrained"),
    "checkpoint_key": dict(help="take the weights of this name in the file, and not the teacher's"),
    "num_heads": dict(type=count, help="attention heads, where the file does not tell"),
    "data": dict(type=os.path.normpath, required=True, help="folder with train/ and val/ of class folders, "
                 "'toy', or cifar10, cifar100, stl10, flowers102, pets, cars, aircraft"),
    "val_data": dict(type=os.path.normpath, help="folder of the test images, if it is not beside those of "
                     "--data"),
    "classes": dict(metavar="FILE", help="these classes only: a file with a folder name a line, or in100"),
    "data_root": dict(default="data", help="where torchvision keeps its sets"),
    "download": dict(action="store_true", help="let torchvision download the set"),
    "num_workers": dict(type=at_least(0), default=2, help="loader processes; results do not change"),
    "batch_size": dict(type=count, default=128, help="images per forward"),
    "max_bad": dict(type=share, default=0.01, help="largest share of unreadable images"),
    "size": dict(type=count, help="pixels of a side"),
    "limit": dict(type=count, help="only the first images"),
    "seed": dict(type=between(0, 2 ** 63 - 1), default=0, help="of everything random"),
    "device": dict(default="auto", help="auto (cuda, then mps, then cpu) or a name that torch knows"),
    "precision": dict(default="fp32", choices=["auto", "fp32", "bf16"], help="auto: bf16 where it is faster"),
    "json": dict(metavar="FILE", help="append the result to this file, one JSON line per checkpoint"),
    "output_dir": dict(default="out", help="folder of this run; an interrupted run in it goes on"),
    "force": dict(action="store_true", help="go on although options differ from the stored run's"),
    "save_every": dict(type=interval, default="15m", help="steps (500) or minutes (15m) between saves"),
    "stop_at": dict(type=count, metavar="STEP", help="save and stop after this step, with code 75"),
    "tensorboard": dict(action="store_true", help="write the log for TensorBoard too, if it is installed"),
    "log_every": dict(type=count, default=10, help="steps between lines of log.jsonl"),
}


def option(group, name: str, type: Callable, default, help: str, **more):
    """Add an option to a parser or a group, by position.  more: whatever else argparse takes."""
    group.add_argument(name, type=type, default=default, help=help, **more)


def add_shared(parser, names: str, **defaults) -> None:
    """Add options of the table SHARED to a parser or a group; `defaults` replace those of the table."""
    for name in names.split():
        settings = dict(SHARED[name])
        if name in defaults:
            settings["default"] = defaults[name]
        if settings.get("default") is not None:
            settings["help"] += " (default: %(default)s)"
        parser.add_argument(f"--{name}", **settings)


# ------------------------------------------------- begin and end
def script(main: Callable, get_args: Callable) -> None:
    """Run a script from its command line."""
    for stream in (sys.stdout, sys.stderr):    # a name in another alphabet must not end a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main(get_args())
    except BaseException as e:
        # Lets go of loaders: Python's exit would ask their workers by SIGTERM, which they ignore, and wait.
        traceback.clear_frames(e.__traceback__)
        if not isinstance(e, Mistake):
            raise
        # The mistake alone, where a loader worker met it and sent its traceback along.
        end(re.sub(r"(?s)^Caught .*\n[\w.]+: ", "", str(e).strip()))
    distributed.finish()


def begin(args, one_process: bool = False, width: int = 384) -> torch.device:
    """The device that --device names, after joining the other ranks; resolves --precision auto for a ViT of
    this width.  Raises Mistake for a device that is not here, and under torchrun for a one_process script."""
    if one_process and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise Mistake("this is one process: start it with python, not with torchrun")
    try:
        device = distributed.pick_device(args.device)
    except ValueError as e:
        raise Mistake(f"--device {args.device}: {e}") from e
    distributed.join(device)
    if getattr(args, "precision", None) == "auto":
        args.precision = distributed.fast_precision(device, width)
    return device


def end(message: str, code: int = MISTAKE, together: bool = False) -> None:
    """End the script with one line on stderr.

    together: every rank ends now; wait until all have said why, as torchrun kills the rest when one ends."""
    sys.stderr.write(f"{os.path.basename(sys.argv[0])}: {message}\n")
    sys.stderr.flush()
    if together:
        distributed.barrier()
    distributed.finish()
    raise SystemExit(code)


@contextmanager
def writing(path: str | os.PathLike, option: str = ""):
    """Around what writes `path`: a full disk or a missing folder is the user's to mend.  Raises Mistake."""
    try:
        yield
    except OSError as e:
        raise Mistake(f"{option}{path}: cannot be written ({e.strerror or e})") from e


def check_outputs(args, *names: str) -> None:
    """Try the files that the options ask to write, now and not after hours of work.  Raises Mistake."""
    for name in names:
        given = getattr(args, name, None)
        if not given:
            continue
        path = Path(given)
        if name in ("picture", "similarity", "out") and path.suffix.lower() not in (".png", ".jpg", ".webp"):
            raise Mistake(f"--{name} {given}: expected a name that ends in .png, .jpg or .webp")
        existed = path.exists()
        with writing(path, f"--{name} "):
            open(path, "a").close()
        if not existed:
            path.unlink(missing_ok=True)


def lock(folder: Path) -> None:
    """Hold the folder until this process ends, so that no second run writes into it.  Raises Mistake."""
    folder = folder.resolve()
    if not distributed.is_main() or folder in LOCKS:
        return
    try:
        import fcntl
    except ImportError:                        # Windows has no such lock
        return
    LOCKS[folder] = open(folder / ".lock", "w")
    try:
        fcntl.flock(LOCKS[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise Mistake(f"{folder}: another run writes there; wait for it, or give another --output_dir") from e
    except OSError as e:                       # some network file systems have no locks
        say(f"{folder}: cannot be locked ({e.strerror}): let no second run write there")


# ------------------------------------------------- results
def read_lines(path: Path) -> list[dict]:
    """The lines of a jsonl file; half a line at the end, left by a kill, is passed over."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def append_json(path: str | os.PathLike | None, line: dict) -> None:
    """One more line of a jsonl file, on rank 0; nothing without a path.  NaN becomes null."""
    if not path or not distributed.is_main():
        return
    with writing(path):
        start = "\n" if ends_in_half_a_line(path) else ""
        with open(path, "a") as f:
            f.write(start + json.dumps(without_nan(line)) + "\n")


def ends_in_half_a_line(path: str | os.PathLike) -> bool:
    """Whether a kill left the file without the end of its last line."""
    if not os.path.isfile(path) or os.path.getsize(path) == 0:
        return False
    with open(path, "rb") as f:
        f.seek(-1, os.SEEK_END)
        return f.read() != b"\n"


def without_nan(value):
    """The same nested value, in JSON's types, with None in place of numbers that JSON cannot hold."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def plural(n: int, word: str) -> str:
    """'1 image', '2 images'."""
    return f"{n} {word}{'s' * (n != 1)}"


def record(path: str | None, *, eval: str, ckpt: str, weights: str, data: str, data_digest: str,
           protocol: dict, metrics: dict, seconds: float, device: torch.device) -> dict:
    """Append the line of one evaluation of one checkpoint to --json, and return it.

    weights, data_digest: digests of what was evaluated, and on what.  protocol: every choice that changes the
    numbers.  metrics: shares in percent."""
    line = {
        "eval": eval,
        "ckpt": ckpt,
        "weights": weights,
        "data": data,
        "data_digest": data_digest,
        "protocol": protocol,
        "metrics": metrics,
        "seconds": round(seconds, 1),
        "device": device.type,
        "torch": torch.__version__,
        "commit": commit(),
        "date": date.today().isoformat(),
    }
    append_json(path, line)
    return line


def commit() -> str | None:
    """The commit of this code, where it is a clone and git is installed."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    folder = Path(__file__).parent
    with suppress(OSError):
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        return found.stdout.strip() or None
