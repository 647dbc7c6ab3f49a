"""What every script shares: options, beginning and end, results, and for training a run folder and a guard.

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
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

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


def interval(text: str) -> str:
    """Type of --save_every: '500' steps or '15m' minutes."""
    if not re.fullmatch(r"\d+(\.\d*)?m|[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected steps (500) or minutes (15m)")
    return text


SHARED = {  # options that several scripts have
    "ckpt": dict(nargs="+", required=True, help="checkpoints of any method, or random:ARCH/PATCH, untrained"),
    "checkpoint_key": dict(help="take the weights of this name in the file, and not the teacher's"),
    "num_heads": dict(type=at_least(1), help="attention heads, where the file does not tell"),
    "data": dict(required=True, help="folder with train/ and val/ of class folders, 'toy', or cifar10, "
                 "cifar100, stl10, flowers102, pets, cars, aircraft"),
    "val_data": dict(help="folder of the test images, if it is not beside the train images"),
    "classes": dict(metavar="FILE", help="these classes only: a file with a folder name a line, or in100"),
    "data_root": dict(default="data", help="where torchvision keeps its sets"),
    "download": dict(action="store_true", help="let torchvision download the set"),
    "num_workers": dict(type=at_least(0), default=2, help="loader processes; results do not change"),
    "batch_size": dict(type=at_least(1), default=128, help="images per forward"),
    "max_bad": dict(type=between(0.0, 1.0), default=0.01, help="largest share of unreadable images"),
    "size": dict(type=at_least(1), help="pixels of a side"),
    "limit": dict(type=at_least(1), help="only the first images"),
    "seed": dict(type=int, default=0, help="of everything random"),
    "device": dict(default="auto", help="auto (cuda, then mps, then cpu) or a name that torch knows"),
    "precision": dict(default="fp32", choices=["auto", "fp32", "bf16"], help="auto: bf16 where it is faster"),
    "json": dict(metavar="FILE", help="append the result to this file, one JSON line per checkpoint"),
    "output_dir": dict(default="out", help="folder of this run; an interrupted run in it goes on"),
    "force": dict(action="store_true", help="go on although options differ from the stored run's"),
    "save_every": dict(type=interval, default="15m", help="steps (500) or minutes (15m) between saves"),
    "stop_at": dict(type=at_least(1), metavar="STEP", help="save and stop after this step, with code 75"),
    "log_every": dict(type=at_least(1), default=10, help="steps between lines of log.jsonl"),
}


def add_shared(parser, names: str, **defaults) -> None:
    """Add options of the table SHARED to a parser or a group; `defaults` replace those of the table."""
    for name in names.split():
        settings = SHARED[name] | ({"default": defaults[name]} if name in defaults else {})
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
    for name in [name for name in names if getattr(args, name, None)]:
        given = getattr(args, name)
        path = Path(given)
        if name in ("picture", "similarity", "out") and path.suffix.lower() not in (".png", ".jpg", ".webp"):
            raise Mistake(f"--{name} {given}: expected a name that ends in .png, .jpg or .webp")
        existed = path.exists()
        with writing(path, f"--{name} "):
            open(path, "a").close()
        if not existed:
            path.unlink(missing_ok=True)


# ------------------------------------------------- results
def read_lines(path: Path) -> list[dict]:
    """The lines of a jsonl file; half a line at the end, left by a kill, is passed over."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def append_json(path: str | os.PathLike | None, line: dict) -> None:
    """One more line of a jsonl file, on rank 0; nothing without a path.  NaN becomes null."""
    if path and distributed.is_main():
        with writing(path), open(path, "a") as f:
            f.write(json.dumps(without_nan(line), allow_nan=False) + "\n")


def without_nan(value):
    """The same nested value, with None in place of numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {str(k): without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def record(path: str | None, *, eval: str, ckpt: str, weights: str, data: str, data_digest: str,
           protocol: dict, metrics: dict, seconds: float, device: torch.device) -> dict:
    """Append the line of one evaluation of one checkpoint to --json, and return it.

    weights, data_digest: digests of what was evaluated, and on what.  protocol: every choice that changes the
    numbers.  metrics: shares in percent."""
    line = {"eval": eval, "ckpt": str(ckpt), "weights": weights, "data": data, "data_digest": data_digest,
            "protocol": protocol, "metrics": metrics, "seconds": round(seconds, 1), "device": device.type,
            "torch": torch.__version__, "commit": commit(), "date": date.today().isoformat()}
    append_json(path, line)
    return line


def commit() -> str | None:
    """The commit of this code, where it is a clone and git is installed."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    with suppress(OSError):
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        return found.stdout.strip() or None
    return None


# ------------------------------------------------- a training run
def claim_folder(args, parser: argparse.ArgumentParser, may_change: set[str], last: dict | None) -> None:
    """Claim args.output_dir for this run, before any work.  last: what its last.pth holds, or None.

    A folder whose run had other options is refused, with their names, unless all are in `may_change` or
    --force is given.  An option that the stored run did not know counts as its default.  Raises Mistake."""
    folder = Path(args.output_dir)
    with writing(folder, "--output_dir "):
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
    steps = distributed.everywhere(last and last.get("step"))
    if len(set(steps)) > 1:
        raise Mistake(f"{folder}/last.pth: the ranks find steps {steps} in it; --output_dir must be a folder "
                      "that all machines share")
    if last is None:
        return
    if not isinstance(last.get("options"), dict):
        raise Mistake(f"{folder}/last.pth: not written by this script; give another --output_dir")
    changed = []
    for name, value in options_of(args).items():
        before = last["options"].get(name, parser.get_default(name))
        if name not in may_change and before != value:
            changed.append(f"--{name} {before} -> {value}")
    if changed and not args.force:
        raise Mistake(f"{folder} holds a run with other options: {', '.join(changed)}; give another "
                      "--output_dir, or --force to go on with the new ones")
    if changed:
        say(f"--force: going on with other options: {', '.join(changed)}")


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


def options_of(args) -> dict:
    """The options as a run stores them, in JSON's types; the number of ranks is one of them."""
    plain = (str, int, float, list, tuple, type(None))
    options = {k: v for k, v in vars(args).items() if isinstance(v, plain)}
    return json.loads(json.dumps(options | {"world_size": distributed.world_size()}))


def begin_log(args, new: bool) -> None:
    """Write run.json: command, options, versions, commit.  A new run begins its log anew, so that it does not
    take over the lines of one that died here before its first save."""
    if not distributed.is_main():
        return
    folder = Path(args.output_dir)
    about = {"command": sys.argv, "options": options_of(args), "torch": torch.__version__, "commit": commit()}
    with writing(folder):
        for left in folder.glob(".*.pth.*[0-9]"):                      # by a kill in the middle of a save
            left.unlink()
        for name in ("log.jsonl", "bad_images.txt", "results.json") if new else ():
            (folder / name).unlink(missing_ok=True)
        (folder / "run.json").write_text(json.dumps(about, indent=1) + "\n")


def bad_names(folder: str | os.PathLike) -> set[str]:
    """The training images that a run could not read."""
    path = Path(folder) / "bad_images.txt"
    return set(path.read_text("utf-8", "surrogateescape").splitlines() if path.exists() else ())


class Guard:
    """Keeps a training run honest: NaN, unreadable images, signals, saves, and its log.

    images: a source with names.  A loop calls `check` when the gradient is there and `after_step` when the
    weights have changed.  args: output_dir, max_bad, save_every, log_every."""

    def __init__(self, args, images, device: torch.device, steps_per_epoch: int):
        self.args, self.images, self.device = args, images, device
        self.steps_per_epoch = steps_per_epoch
        self.folder = Path(args.output_dir)
        minutes = args.save_every.endswith("m")                        # between saves, or steps
        self.save_seconds = 60 * float(args.save_every[:-1]) if minutes else math.inf
        self.save_steps = math.inf if minutes else int(args.save_every)
        self.stop = distributed.StopSignal()
        self.stopping = self.save_asked = False                        # as all ranks have agreed
        self.bad: set[int] = set()                                     # unreadable images of this epoch
        self.waiting: list[tuple] = []                                 # what `check` has not read yet
        self.late = device.type == "cuda"
        self.started = self.saved = time.time()
        self.images_seen = 0
        self.evaluating = 0.0                                          # seconds of evaluations
        lines = read_lines(self.folder / "log.jsonl")
        self.before = max((line.get("seconds", 0.0) for line in lines), default=0.0)

    def start_bar(self, step: int, steps: int) -> None:
        self.bar = tqdm(total=steps, initial=step, disable=not distributed.is_main(), unit="step",
                        mininterval=1, dynamic_ncols=True)

    def seconds(self) -> float:
        """Of this run, those before an interruption included."""
        return self.before + time.time() - self.started

    def check(self, step: int, values: dict[str, Tensor], rates: dict[str, float], batches: list) -> None:
        """All ranks agree: is the step finite, was a stop asked for, are too many images unreadable?  NaN or
        inf in values["loss"] or values["grad_norm"] ends every rank with code 3, too many bad images with 2.

        On CUDA the answer is read one step later, so that the CPU can run ahead of the device; `settle`
        before a save keeps what follows a bad step out of it.  Elsewhere it is read before the weights
        change."""
        finite = torch.stack([values["loss"], values["grad_norm"]]).isfinite().all()
        self.note_bad([i for batch in batches for i in batch["bad"].tolist() if i >= 0])
        save_asked = distributed.is_main() and time.time() - self.saved >= self.save_seconds
        flags = torch.tensor([self.stop.asked > 0, len(self.bad), save_asked, 0], dtype=torch.float32)
        flags = flags.to(self.device, non_blocking=self.late)
        flags[3] = ~finite
        flags = distributed.all_sum(flags).to("cpu", non_blocking=self.late)
        arrived = torch.cuda.Event() if self.late else None
        if arrived:
            arrived.record()
        self.settle()
        self.waiting.append((flags, arrived, finite, step, values, rates, batches))
        if not self.late:
            self.settle()

    def settle(self) -> None:
        """Read what `check` left on its way, and act on it."""
        while self.waiting:
            flags, arrived, finite, *about = self.waiting.pop()
            if arrived:
                arrived.synchronize()
            asked, bad, save_asked, broken = flags.tolist()
            if broken:
                self.end_not_finite(bool(finite), *about)
            if bad > self.args.max_bad * len(self.images):
                end(f"{bad:.0f} of {len(self.images)} images are unreadable, more than --max_bad "
                    f"{self.args.max_bad:g}; see {self.folder / 'bad_images.txt'}", together=True)
            self.stopping = asked > 0
            self.save_asked = self.save_asked or save_asked > 0

    def end_not_finite(self, finite: bool, step: int, values: dict, rates: dict, batches: list) -> None:
        what = f"another rank was not finite at step {step}"
        if not finite:
            numbers = ", ".join(f"{k} {float(v):.4g}" for k, v in (rates | values).items())
            files = ", ".join(self.images.name(i) for batch in batches for i in batch["index"].tolist())
            what = f"not finite at step {step}: {numbers}; files: {files}"
        end(f"rank {distributed.rank()}: {what}; nothing of this step was kept, last.pth is as it was: lower "
            "--lr, or look at these files", NOT_FINITE, together=True)

    def note_bad(self, indices: list[int]) -> None:
        """Name unreadable images in bad_images.txt, each once."""
        new = {self.images.name(i) for i in indices if i not in self.bad}
        self.bad.update(indices)
        if new := new - bad_names(self.folder):
            path = self.folder / "bad_images.txt"
            with writing(path), open(path, "a", encoding="utf-8", errors="surrogateescape") as f:
                f.writelines(name + "\n" for name in sorted(new))

    def after_step(self, step: int, values: dict[str, Tensor], rates: dict[str, float], images: int,
                   save: Callable[[int], None]) -> None:
        """Log, save, evaluate, and only then stop where a signal asked for it.

        step: steps done so far.  values: scalars of this rank.  rates: what all ranks share, such as lr.
        images: how many this rank used.  save: writes the checkpoint."""
        self.bar.update()
        self.images_seen += images * distributed.world_size()
        epoch, rest = divmod(step, self.steps_per_epoch)
        asked = getattr(self.args, "stop_at", None)
        if step % self.args.log_every == 0 or rest == 0:
            self.log(step, values, rates)
        due = self.save_asked or step % self.save_steps == 0
        if rest == 0 or self.stopping or step == asked or due:
            self.settle()                                              # nothing is saved unchecked
            save(step)
            self.saved, self.save_asked = time.time(), False
        if rest == 0:
            self.end_epoch(epoch)
        if self.stopping or step == asked:
            self.bar.close()
            why = "a signal" if self.stopping else "--stop_at"
            end(f"stopped by {why} after step {step}, saved; start the same command again to go on",
                STOPPED, together=True)

    def log(self, step: int, values: dict[str, Tensor], rates: dict[str, float]) -> dict[str, float]:
        """Means over the ranks, to log.jsonl and the progress bar.  Returns them."""
        means = distributed.all_mean(torch.stack(list(values.values())))
        means = dict(zip(values, means.tolist(), strict=True))
        speed = self.images_seen / (time.time() - self.started - self.evaluating)
        self.write({"step": step, "epoch": step / self.steps_per_epoch, **means, **rates,
                    "images_per_s": speed, "seconds": self.seconds()})
        shown = [f"{k} {v:.3f}" for k, v in means.items() if k in ("loss", "rec", "pat", "cls")]
        self.bar.set_postfix_str(" ".join([*shown, f"{speed:.0f} images/s"]))
        return means

    def write(self, line: dict) -> None:
        """One line of log.jsonl, numbers to seven digits."""
        rounded = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in line.items()}
        append_json(self.folder / "log.jsonl", rounded)

    def end_epoch(self, epoch: int) -> None:
        """Report this epoch's unreadable images, then count anew.  A subclass evaluates here."""
        if self.bad:
            say(f"epoch {epoch}: {len(self.bad)} unreadable images replaced: {self.folder}/bad_images.txt")
        self.bad = set()

    def finish(self) -> None:
        """After the last step; a signal that came too late for the loop ends the script now."""
        self.bar.close()
        self.stop.release()
        if self.stop.asked:
            end("stopped by a signal after the last step, saved; start the same command again", STOPPED)
