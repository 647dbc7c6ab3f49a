"""What pretrain.py, finetune.py and linseg.py share: the folder of a run, where it goes on, its guard.

The guard looks after NaN, unreadable images, signals, saves and the log, the same on all ranks.  last.pth
holds "step", "options", "optimizer" and the state of each network, by its name."""
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import checkpoint
import distributed
import run
from data import LoaderDied, digest
from distributed import is_main, say, world_size
from images import to_device
from run import Mistake, end, writing

MAY_CHANGE = set("""output_dir device data num_workers max_bad save_every log_every stop_at tensorboard
    force""".split())                          # options that may differ when a run goes on


def global_lr(args) -> float:
    """--lr is for 256 images of the global batch."""
    return args.lr * args.batch_size * args.accum * world_size() / 256


def warmup_epochs(args) -> float:
    """--warmup_epochs, or a tenth of a run that is shorter than that."""
    if args.warmup_epochs > args.epochs:
        return args.epochs / 10
    return args.warmup_epochs


def on_all_ranks(model: nn.Module, device: torch.device) -> nn.Module:
    """The model itself, or with several ranks one that takes the mean of their gradients."""
    if world_size() == 1:
        return model
    devices = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, devices, gradient_as_bucket_view=True)


# ------------------------------------------------- the folder of a run
def fingerprint(images) -> str:
    """Which images: stored with the options, so that a resume compares them."""
    return f"{len(images)} ({digest(images)})"


def resume(args, may_change: set[str], parts: dict[str, nn.Module], optimizer) -> int:
    """Claim args.output_dir, and go on from the last.pth in it, if there is one.  Returns the steps done.

    may_change: options that may differ, besides MAY_CHANGE.  parts: networks, by their names in the file.
    The rates and decays of the optimizer are those of this run.  Raises Mistake."""
    path = Path(args.output_dir) / "last.pth"
    last = checkpoint.load(path) if os.path.exists(path) else None
    claim_folder(args, may_change, last)
    if last is None:
        begin_log(args, new=True)
        return 0
    step = last["step"]
    stored = last["optimizer"]
    groups = optimizer.state_dict()["param_groups"]
    there = [group["params"] for group in stored["param_groups"]]
    if [group["params"] for group in groups] != there:
        raise Mistake(f"{path}: its run trained other weights; give another --output_dir")
    if args.stop_at and step >= args.stop_at:
        raise Mistake(f"--stop_at {args.stop_at}: {path} is at step {step} already; give a larger one, or "
                      "another --output_dir")
    pairs = [(part, last[name]) for name, part in parts.items()]
    checkpoint.restore(path, pairs)
    optimizer.load_state_dict(stored | {"param_groups": groups})
    say(f"going on from {path}, step {step}")
    before = last["options"].get("epochs")
    if before != getattr(args, "epochs", None):
        say(f"--epochs {before} -> {args.epochs}: rates and momentum go on as in such a run")
    begin_log(args, new=False)
    return step


def claim_folder(args, may_change: set[str], last: dict | None) -> None:
    """Claim args.output_dir for this run, before any work.  last: what its last.pth holds, or None.

    A folder whose run had other options is refused, with their names, unless all of them may change or
    --force is given.  An option that the stored run did not know counts as its default.  Raises Mistake."""
    folder = Path(args.output_dir)
    with writing(folder, "--output_dir "):
        folder.mkdir(parents=True, exist_ok=True)
        run.lock(folder)
    steps = distributed.everywhere(last and last.get("step"))
    if len(set(steps)) > 1:
        raise Mistake(f"{folder}/last.pth: the ranks find steps {steps} in it; --output_dir must be a folder "
                      "that all machines share")
    if last is None:
        return
    if not isinstance(last.get("options"), dict):
        raise Mistake(f"{folder}/last.pth: not written by this script; give another --output_dir")
    changes = []
    for name, value in options_of(args).items():
        before = last["options"].get(name, args.defaults.get(name, value))
        if before != value and name not in MAY_CHANGE | may_change:
            changes.append(f"--{name} {before} -> {value}")
    changed = ", ".join(changes)
    if changed and not args.force:
        raise Mistake(f"{folder} holds a run with other options: {changed}; give another --output_dir, or "
                      "--force to go on with the new ones")
    if changed:
        say(f"--force: going on with other options: {changed}")


def options_of(args) -> dict:
    """The options as a run stores them, in JSON's types; the number of ranks is one of them."""
    plain = (str, int, float, list, tuple, type(None))
    options = {k: v for k, v in vars(args).items() if isinstance(v, plain)}
    options["world_size"] = world_size()
    return json.loads(json.dumps(options))


def begin_log(args, new: bool) -> None:
    """Write run.json: command, options, versions, commit.  A new run begins its log anew, so that it does not
    take over the lines of one that died here before its first save."""
    if not is_main():
        return
    folder = Path(args.output_dir)
    about = {
        "command": sys.argv,
        "options": options_of(args),
        "torch": torch.__version__,
        "commit": run.commit(),
    }
    with writing(folder):
        for left in folder.glob(".*.pth.*[0-9]"):                      # by a kill in the middle of a save
            left.unlink()
        if new:
            for name in ("log.jsonl", "bad_images.txt", "results.json"):
                (folder / name).unlink(missing_ok=True)
        (folder / "run.json").write_text(json.dumps(about, indent=1) + "\n")


def bad_names(folder: str | os.PathLike) -> set[str]:
    """The training images that a run could not read."""
    path = Path(folder) / "bad_images.txt"
    if not path.exists():
        return set()
    return set(path.read_text("utf-8", "surrogateescape").splitlines())


# ------------------------------------------------- the loop
class Guard:
    """Keeps a training run honest.

        for step, batches in guard.steps(steps, first, last):
            ...                                            # forward, backward
            guard.check(step, values, rates, batches)      # the gradient is there
            optimizer.step()
            guard.after_step(step + 1)
        guard.finish()

    images: a source with names.  save: writes the checkpoint after a number of steps.  values: scalars of
    this rank, among them "loss" and "grad_norm".  rates: what all ranks share, such as lr."""

    def __init__(self, args, images, device: torch.device, steps_per_epoch: int, save: Callable):
        self.args = args
        self.images = images
        self.device = device
        self.steps_per_epoch = steps_per_epoch
        self.save = save
        self.folder = Path(args.output_dir)
        self.save_steps = self.save_seconds = math.inf                 # between saves
        if args.save_every.endswith("m"):
            self.save_seconds = 60 * float(args.save_every[:-1])
        else:
            self.save_steps = int(args.save_every)
        self.stop = distributed.StopSignal()
        self.stopping = self.save_asked = False                        # as all ranks have agreed
        self.bad: set[int] = set()                                     # unreadable images of this epoch
        self.waiting = None                                            # what `check` has not read yet
        self.late = device.type == "cuda"
        self.board = open_board(self.folder) if args.tensorboard else None
        self.started = self.saved = time.time()
        self.images_seen = 0
        self.evaluating = 0.0                                          # seconds of evaluations
        lines = run.read_lines(self.folder / "log.jsonl")
        self.before = max([line.get("seconds", 0.0) for line in lines], default=0.0)

    def steps(self, steps: Iterable, first: int, last: int) -> Iterator:
        """The same steps, from `first` to before `last`, under a progress bar.  When a loader process of rank
        0 dies, what is trained until then is saved."""
        self.first = first
        self.last = last
        self.bar = tqdm(
            total=last, initial=first, disable=not is_main(),
            unit="step", mininterval=1, dynamic_ncols=True,
        )
        try:
            yield from steps
        except LoaderDied:
            self.settle()
            self.save(self.bar.n)
            raise

    def seconds(self) -> float:
        """Of this run, those before an interruption included."""
        return self.before + time.time() - self.started

    def speed(self) -> float:
        """Images a second since this start, without evaluations."""
        return self.images_seen / (time.time() - self.started - self.evaluating)

    def check(self, step: int, values: dict, rates: dict, batches: list) -> None:
        """All ranks agree: is the step finite, was a stop asked for, are too many images unreadable?  NaN or
        inf in the loss or the gradient ends every rank with code 3, too many bad images with 2.

        On CUDA the answer is read one step later, so that the CPU can run ahead of the device; `settle`
        before a save keeps what follows a bad step out of it.  Elsewhere it is read before the weights
        change."""
        self.settle()
        self.values = values
        self.rates = rates
        for batch in batches:
            self.images_seen += len(batch["index"]) * world_size()
            self.note_bad(set(batch["bad"].tolist()) - {-1})
        vital = torch.stack([values["loss"], values["grad_norm"]])
        finite = vital.isfinite().all()
        save_asked = is_main() and time.time() - self.saved >= self.save_seconds
        flags = torch.tensor([self.stop.asked > 0, len(self.bad), save_asked, 0.0])
        flags = to_device(flags, self.device)
        flags[3] = ~finite
        flags = distributed.all_sum(flags).to("cpu", non_blocking=self.late)
        self.waiting = flags, finite, step, values, rates, batches
        if self.late:
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        else:
            self.settle()

    def settle(self) -> None:
        """Read what `check` left on its way, and act on it."""
        if self.waiting is None:
            return
        flags, finite, *about = self.waiting
        self.waiting = None
        if self.late:
            self.arrived.synchronize()
        asked, bad, save_asked, broken = flags.tolist()
        if broken:
            self.end_not_finite(finite, *about)
        if bad > self.args.max_bad * len(self.images):
            end(f"{bad:.0f} of {len(self.images)} images are unreadable, more than --max_bad "
                f"{self.args.max_bad:g}; see {self.folder / 'bad_images.txt'}", together=True)
        self.stopping = asked > 0
        self.save_asked |= save_asked > 0

    def end_not_finite(self, finite, step: int, values: dict, rates: dict, batches: list):
        what = f"another rank was not finite at step {step}"
        if not finite:
            numbers = [f"{name} {float(value):.4g}" for name, value in (rates | values).items()]
            index = torch.cat([batch["index"] for batch in batches])
            files = map(self.images.name, index.tolist())
            what = f"not finite at step {step}: {', '.join(numbers)}; files: {', '.join(files)}"
        end(f"rank {distributed.rank()}: {what}; nothing of this step was kept, last.pth is as it was: lower "
            "--lr, or look at these files", run.NOT_FINITE, together=True)

    def note_bad(self, numbers: set[int]) -> None:
        """Name unreadable images in bad_images.txt, each once."""
        names = {self.images.name(i) for i in numbers - self.bad}
        self.bad |= numbers
        path = self.folder / "bad_images.txt"
        if names:
            with writing(path), open(path, "a", encoding="utf-8", errors="surrogateescape") as f:
                f.writelines(name + "\n" for name in sorted(names - bad_names(self.folder)))

    def after_step(self, step: int) -> None:
        """Log, save, evaluate, and only then stop where a signal asked for it.  step: steps done so far."""
        self.bar.update()
        epoch, rest = divmod(step, self.steps_per_epoch)
        if step % self.args.log_every == 0 or rest == 0 or step == self.args.stop_at:
            self.log(step)
        due = rest == 0 or self.save_asked or step % self.save_steps == 0
        last = step in (self.args.stop_at, self.last)
        if due or last or self.stopping:
            self.settle()                                              # nothing is saved unchecked
            self.save(step)
            self.saved = time.time()
            self.save_asked = False
        if rest == 0:
            self.end_epoch(epoch)
        if self.stopping or step == self.args.stop_at:
            self.bar.close()
            why = f"--stop_at after step {step}, saved; a larger --stop_at, or none, goes on"
            if self.stopping:
                why = f"a signal after step {step}, saved; start the same command again to go on"
            end(f"stopped by {why}", run.STOPPED, together=True)

    def log(self, step: int) -> dict[str, float]:
        """Means over the ranks, to log.jsonl and the progress bar.  Returns them."""
        means = distributed.all_mean(torch.stack([*self.values.values()]))
        means = dict(zip(self.values, means.tolist(), strict=True))
        speed = self.speed()
        place = {"step": step, "epoch": step / self.steps_per_epoch}
        times = {"images_per_s": speed, "seconds": self.seconds()}
        self.write(place | means | self.rates | times)
        shown = [f"{k} {means[k]:.3f}" for k in ("loss", "rec", "pat", "cls") if k in means]
        self.bar.set_postfix_str(" ".join([*shown, f"{speed:.0f} images/s"]))
        return means

    def write(self, line: dict) -> None:
        """One line of log.jsonl, numbers to seven digits, and the same to TensorBoard."""
        rounded = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in line.items()}
        run.append_json(self.folder / "log.jsonl", rounded)
        if self.board and is_main():
            step = line.get("step", line["epoch"] * self.steps_per_epoch)
            for name, value in rounded.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()

    def end_epoch(self, epoch: int) -> None:
        """Report this epoch's unreadable images, count anew, and evaluate where that is due."""
        if self.bad:
            say(f"epoch {epoch}: {len(self.bad)} unreadable images replaced: {self.folder}/bad_images.txt")
        self.bad = set()
        if self.due(epoch):
            began = time.time()
            self.evaluate(epoch)
            self.evaluating += time.time() - began

    def due(self, epoch: int) -> bool:
        """Is there an evaluation after this epoch?  A subclass says when, and has `evaluate`."""
        return False

    def finish(self) -> None:
        """After the last step; a signal that came too late for the loop ends the script now."""
        self.bar.close()
        self.stop.release()
        if self.stop.asked:
            end("stopped by a signal after the last step, saved; start the same command again", run.STOPPED)


def open_board(folder: Path):
    """TensorBoard's writer.  Raises Mistake where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise Mistake("--tensorboard: it is not installed here: pip install tensorboard") from e
    return SummaryWriter(folder)
