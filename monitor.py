"""What a training run watches: its log, NaN, collapse, unreadable images, when to save, and whether the
features improve.

`Guard` serves every training script.  `Monitor` adds what pretraining shows: k-NN and prompt IoU of the
teacher before, during and after, and a picture of held-out images.

log.jsonl, one line per --log_every steps, means over the ranks: loss and its parts rec, pat, cls; pat_pos,
pat_neg, cls_pos, cls_neg = mean cosine of positives and negatives; pat_std, cls_std = spread of the teacher's
keys (1: over the whole sphere, 0: collapsed); grad_norm before clipping; lr, momentum; images_per_s since
this start, evaluations left out; seconds since the first start, evaluations included.  After a kill -9 the
steps since the last save appear twice, with the same values."""
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import distributed
import figure
import probes
import zeroshot
from data import BadImage, Part, denormalize, labelled, normalize, same_classes
from distributed import say
from features import centre_crop
from masking import GMML, Augmentation, MultiCrop, gmml
from model import patchify, unpatchify


def read_lines(path: Path) -> list[dict]:
    """The lines of a jsonl file; a half line at the end, left by a kill, is passed over."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


class Guard:
    """Keeps a run honest.  args: output_dir, log_every, save_every, max_bad; images: a source with names."""

    def __init__(self, args, images, device: torch.device):
        self.args, self.images, self.device, self.stopping = args, images, device, False
        self.out, self.bad = Path(args.output_dir), set()
        every = args.save_every
        try:
            self.save_steps, self.save_seconds = ((0, 60 * float(every[:-1])) if every.endswith("m") else
                                                  (int(every), math.inf))
        except ValueError as e:
            raise ValueError(f"--save_every {every}: expected steps (500) or minutes (15m)") from e
        self.started = self.saved = time.time()
        self.seen, self.evaluating = 0, 0.0                            # images; seconds of evaluations
        self.warned, self.before, self.due = False, None, False
        self.late, self.unread = device.type == "cuda", []             # flags that are still on their way

    def elapsed(self) -> float:
        """Seconds of training, those before an interruption included."""
        if self.before is None:
            lines = read_lines(self.out / "log.jsonl")
            self.before = max((x.get("seconds", 0.0) for x in lines), default=0.0)
        return self.before + time.time() - self.started

    def check(self, batch: dict, log: dict[str, Tensor], lr: float, step: int,
              stop: distributed.StopSignal) -> None:
        """Once a step, agreed by all ranks: is the step finite, was a stop asked for, are too many images
        unreadable?  Ends every rank with code 3 on NaN or inf, 2 on the ceiling.

        On CUDA the answer is read one step later, so that the CPU runs ahead of the device; `settle` before
        a save keeps what follows a bad step out of it.  Elsewhere it is read before the weights change."""
        finite = torch.stack([log["loss"], log["grad_norm"]]).isfinite().all()
        self.note_bad([i for i in batch["bad"].tolist() if i >= 0])
        due = distributed.is_main() and time.time() - self.saved >= self.save_seconds
        self.saved = time.time() if due else self.saved
        flags = torch.tensor([float(stop.asked), 0.0, float(len(self.bad)), float(due)]).to(self.device)
        flags[1] = ~finite
        flags = distributed.all_sum(flags).to("cpu", non_blocking=self.late)
        arrived = torch.cuda.Event() if self.device.type == "cuda" else None
        if arrived:
            arrived.record()
        self.settle()
        self.unread.append((flags, arrived, finite, batch["index"], log, lr, step))
        if not self.late:
            self.settle()

    def settle(self) -> None:
        """Read what `check` left on its way, and act on it."""
        while self.unread:
            self.act(*self.unread.pop())

    def act(self, flags: Tensor, arrived, finite: Tensor, index: Tensor, log: dict[str, Tensor], lr: float,
            step: int) -> None:
        if arrived:
            arrived.synchronize()
        asked, broken, bad, due = flags.tolist()
        if broken:
            values = ", ".join(f"{k} {v.item():.4g}" for k, v in log.items())
            files = ", ".join(self.images.name(i) for i in index.tolist())
            said = (f"another rank was not finite at step {step}" if finite else
                    f"not finite at step {step}, lr {lr:.3g}: {values}; files: {files}")
            distributed.fail(f"rank {distributed.rank()}: {said}; nothing of this step was kept, last.pth is "
                             "as it was: lower --lr, or look at these files", distributed.FAILED, True)
        if bad > self.args.max_bad * len(self.images):
            distributed.fail(f"{bad:.0f} of {len(self.images)} images are unreadable, more than --max_bad "
                             f"{self.args.max_bad:g}; their names are in {self.out / 'bad_images.txt'}",
                             together=True)
        self.stopping, self.due = asked > 0, self.due or due > 0

    def note_bad(self, indices: list[int]) -> None:
        """Name unreadable images in bad_images.txt, each once."""
        new = {self.images.name(i) for i in indices if i not in self.bad}
        self.bad.update(indices)
        path = self.out / "bad_images.txt"
        if new:
            known = set(path.read_text().splitlines()) if path.exists() else set()
            with open(path, "a") as f:
                f.writelines(name + "\n" for name in sorted(new - known))

    def epoch_end(self, epoch: int) -> None:
        """The count of unreadable images; it starts anew, or ranks would count each other's again."""
        if self.bad:
            say(f"\nepoch {epoch}: {len(self.bad)} unreadable images replaced, "
                f"see {self.out / 'bad_images.txt'}")
        self.bad = set()

    def time_to_save(self, step: int) -> bool:
        """By the number of steps, or by rank 0's clock as `check` told all ranks."""
        due, self.due = step % self.save_steps == 0 if self.save_steps else self.due, False
        return due

    def write(self, line: dict) -> None:
        line = {k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()}
        distributed.append_json(self.out / "log.jsonl", line)

    def log(self, values: dict[str, Tensor], step: int, per_epoch: int, rates: dict[str, float], bar) -> None:
        """Every --log_every steps, and at an epoch's end: means over the ranks to log.jsonl and the bar.
        rates: what is the same on all ranks, such as lr."""
        bar.update()
        self.seen += self.args.batch_size * getattr(self.args, "accum", 1) * distributed.world_size()
        if step % self.args.log_every and step % per_epoch:
            return
        means = distributed.all_mean(torch.stack(list(values.values()))).tolist()
        values = dict(zip(values, means, strict=True))
        speed = self.seen / (time.time() - self.started - self.evaluating)
        self.write({"step": step, "epoch": step / per_epoch, **values, **rates,
                    "images_per_s": speed, "seconds": self.elapsed()})
        parts = [f"{k} {values[k]:.3f}" for k in ("rec", "pat", "cls") if k in values]
        parts = parts or [f"loss {values['loss']:.3f}"]
        bar.set_postfix_str(" ".join([*parts, f"{speed:.0f} images/s"]))
        if step > self.args.warmup_epochs * per_epoch:
            self.watch_collapse(values, step)

    def watch_collapse(self, values: dict[str, float], step: int) -> None:
        """One warning when the teacher's keys have lost their spread, or the patch loss sits at
        ln(1 + negatives)."""
        N, which = (self.args.global_crops_size // self.args.patch_size) ** 2, self.args.patch_negatives
        places = {"others": N, "position": 1}.get(which) or min(which, N)
        negatives = (self.args.batch_size - 1) * places
        signs = [f"{k} {values[k]:.3f} is near 0" for k in ("pat_std", "cls_std") if values.get(k, 1) < 0.05]
        if values.get("pat", 0) > 0.98 * math.log(1 + negatives):
            signs.append(f"pat {values['pat']:.3f} sits at ln(1 + {negatives}) = "
                         f"{math.log(1 + negatives):.3f}")
        if signs and not self.warned:
            say(f"\nwarning: the features may have collapsed by step {step}: {'; '.join(signs)}. "
                "Try a lower --lr or a longer warm-up")
        self.warned = bool(signs)


def thin(images, most: int):
    """The source itself, or `most` images of it, evenly spaced."""
    if len(images) <= most:
        return images
    return Part(images, torch.linspace(0, len(images) - 1, most).long().tolist())


class Monitor(Guard):
    """Guard of a pretraining run.  val: labelled images for k-NN, or None; toy images have masks for prompt
    IoU as well.  At most 50,000 train and 10,000 val images are used, evenly spaced; rank 0 evaluates while
    the others wait."""

    def __init__(self, args, images, val, device: torch.device):
        super().__init__(args, images, device)
        self.val, self.size, self.P = val, args.global_crops_size, args.patch_size
        self.threshold = "auto"                                        # of the picture's masks
        both = val is not None and images.labels is not None and val.labels is not None
        self.known = labelled(images, "train images") if both else None                # for k-NN
        if both:
            same_classes(images.classes, val.classes, "k-NN while training: train and val")

    def epoch_end(self, epoch: int, backbone) -> None:
        """The count of unreadable images; k-NN every --knn_every epochs."""
        super().epoch_end(epoch)
        if self.args.knn_every and epoch % self.args.knn_every == 0 and epoch < self.args.epochs:
            self.evaluate(epoch, backbone)

    def untrained(self, backbone) -> None:
        self.evaluate(0, backbone)

    def evaluate(self, epoch: int, backbone) -> dict[str, float]:
        """{"knn_cls", "knn_pat", "prompt_iou"} in percent, those that the data allows; said and logged."""
        result, began = {}, time.time()
        if distributed.is_main() and self.val is not None:
            backbone.eval()
            if self.known is not None:
                train, val = thin(self.known, 50_000), thin(self.val, 10_000)
                knn = probes.knn_of(backbone, train, val, self.size, self.device, [10],
                                    workers=self.args.num_workers)
                result = {"knn_cls": knn["cls"][10], "knn_pat": knn["pat"][10]}
            if hasattr(self.val, "scene"):
                result["prompt_iou"], self.threshold = self.prompt_iou(self.tokens(backbone))
            backbone.train()
        self.evaluating += time.time() - began
        if result:
            when = f"epoch {epoch}" if epoch else "untrained"
            say(f"{when}: " + ", ".join(f"{k} {v:.1f} %" for k, v in result.items()))
            self.write({"epoch": epoch, **result})
        return result

    def tokens(self, backbone):
        def features(image: Tensor) -> Tensor:
            return zeroshot.patch_features(backbone, normalize(image[None].to(self.device)))[0].cpu()
        return features

    def prompt_iou(self, features) -> tuple[float, float]:
        """Best mean IoU over the thresholds, in percent, on 200 val scenes of the toy world, and its
        threshold; the targets are the objects of one class together."""
        grid = (self.size // self.P, self.size // self.P)
        iou = zeroshot.prompt_iou(features, (self.scene(i) for i in range(min(200, len(self.val)))), grid)
        return 100 * iou.max().item(), zeroshot.THRESHOLDS[int(iou.argmax())]

    def scene(self, i: int) -> tuple[Tensor, Tensor]:
        s = self.val.scene(i)
        ids, kinds = torch.from_numpy(s.instances).long(), torch.tensor([-1, *s.categories])
        return self.resized(i), torch.stack([kinds[ids] == c for c in kinds[1:].unique()])

    def resized(self, i: int) -> Tensor:
        size = self.size, self.size
        return F.interpolate(self.val.read(i)[None], size=size, mode="bicubic", antialias=True)[0]

    def finish(self, student, teacher) -> None:
        """Evaluate, write results.json and result.png, and say in one line what came out."""
        seconds, after = self.elapsed(), self.evaluate(self.args.epochs, teacher.backbone)
        if not distributed.is_main():
            return
        lines = read_lines(self.out / "log.jsonl")
        before = next((x for x in lines if x.get("epoch") == 0 and "step" not in x), {})
        results = {**after, **{f"{k}_untrained": before.get(k) for k in after}, "seconds": round(seconds, 1)}
        if hasattr(self.val, "scene"):
            def patch_colours(image):                                  # what one can do without any network
                mean = patchify(normalize(image[None]), self.P)[0].unflatten(1, (3, -1)).mean(-1)
                return F.normalize(mean, dim=-1)
            results["prompt_iou_colours"] = self.prompt_iou(patch_colours)[0]
        results = {k: round(v, 2) if isinstance(v, float) else v for k, v in results.items()}
        (self.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        picture = self.picture(student, teacher.backbone)
        if picture is not None:
            picture.save(self.out / "result.png")
        names = {"knn_cls": "k-NN CLS", "knn_pat": "k-NN PAT", "prompt_iou": "prompt IoU"}
        said = [f"{n} {results[k + '_untrained'] or 0:.1f} -> {results[k]:.1f} %"
                for k, n in names.items() if k in results]
        if "prompt_iou_colours" in results:
            said[-1] += f" (raw colours {results['prompt_iou_colours']:.1f} %)"
        found = f": {', '.join(said)}" if said else ""
        look = f"look at {self.out / 'result.png'}" if picture else "no picture: fewer than 2 readable images"
        say(f"done in {seconds:.0f} s{found}; {look}")

    @torch.no_grad()
    def picture(self, student, backbone, n: int = 6) -> Image.Image | None:
        """One row per held-out image: the clicked patch, similarity from its least to its largest, mask at
        the best threshold of the toy scenes, else the automatic one, corrupted input, the student's
        reconstruction.  None where fewer than two images can be read."""
        source, P, g = self.val if self.val is not None else self.images, self.P, self.size // self.P
        zoom, images = max(1, figure.CELL // self.size), {}            # number: pixels
        for i in range(len(source)):
            try:
                images[i] = (self.resized(i) if source is self.val else
                             centre_crop(self.images.read(i), self.size, self.size))
            except BadImage:
                continue
            if len(images) == n:
                break
        if len(images) < 2:
            return None
        x = normalize(torch.stack(list(images.values())).to(self.device))
        crop = MultiCrop(Augmentation(self.size, local_number=0),
                         GMML(0.0, block=0.3, align=self.args.drop_align))
        draws = [crop.draw_masks(torch.Generator().manual_seed(i)) for i in images]
        mask, kind = (torch.stack([d[k][0] for d in draws]) for k in ("mask", "kind"))
        mask = mask.to(self.device)
        corrupted = gmml(x, mask, kind)
        student.eval(), backbone.eval()
        z = zeroshot.patch_features(backbone, x)                       # (n, N, D)

        def larger(t: Tensor, k: int) -> Tensor:                       # each pixel as k x k
            return t.cpu().repeat_interleave(k, -1).repeat_interleave(k, -2)

        def photo(image: Tensor):
            return larger(image, zoom).permute(1, 2, 0).numpy()
        rows = []
        for i, number in enumerate(images):
            at = self.click(number, g) if source is self.val else g * g // 2 + g // 2
            picture = photo(images[number])
            s = zeroshot.similarity_map(z[i], torch.tensor([[at]], device=z.device))
            chosen = larger(zeroshot.segment(s, self.threshold).view(g, g), P * zoom).numpy()
            low, similarity = s.min().item(), larger(s.view(g, g), P * zoom)
            cells = [("clicked patch", figure.marked(picture, (g, g), [(at % g, at // g)], [])),
                     (f"similarity, {low:.2f} to 1", figure.heat(similarity, low, 1)),
                     (f"mask, threshold {self.threshold}", figure.cut_out(picture, chosen)),
                     ("corrupted", photo(denormalize(corrupted[i])))]
            if student.h_rec is not None:
                patches = student.h_rec(student.backbone(corrupted[i:i + 1])[0, backbone.num_prefix_tokens:])
                painted = unpatchify(patches[None].float(), P, g, g)[0]
                cells.append(("reconstruction", photo(denormalize(torch.where(mask[i], painted, x[i])))))
            rows.append((source.name(number), cells))
        return figure.sheet(rows)

    def click(self, i: int, g: int) -> int:
        """A patch well inside the largest object of a toy scene; the middle of any other image."""
        if not hasattr(self.val, "scene"):
            return g * g // 2 + g // 2
        truth = F.adaptive_avg_pool2d(self.scene(i)[1].float(), (g, g))
        largest = truth.sum((1, 2)).argmax()
        return int(truth[largest].argmax())
