"""What a training run watches: its log, NaN, collapse, unreadable images, when to save, and whether the
features improve.

`Guard` serves every training script.  `Monitor` adds what pretraining shows: k-NN and prompt IoU of the
teacher before, during and after, and a picture of held-out images.

log.jsonl, one line per --log_every steps, means over the ranks: loss and its parts rec, pat, cls; pat_pos,
pat_neg, cls_pos, cls_neg = mean cosine of positives and negatives; pat_std, cls_std = spread of the teacher's
keys (1: over the whole sphere, 0: collapsed); grad_norm before clipping; lr, momentum; images_per_s; seconds
since the start.  After a kill -9 the steps since the last save appear twice, with the same values."""
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

import distributed
import probes
import zeroshot
from data import denormalize, normalize
from distributed import say
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
    """Keeps a run honest: needs args.output_dir, log_every, save_every, max_bad, and the image source for
    names."""

    def __init__(self, args, images, device: torch.device):
        self.args, self.images, self.device, self.stopping = args, images, device, False
        self.out, self.bad = Path(args.output_dir), set()
        self.every, minutes = args.save_every, args.save_every.endswith("m")
        try:
            self.save_steps, self.save_seconds = (
                (0, 60 * float(self.every[:-1])) if minutes else (int(self.every), math.inf)
            )
        except ValueError as e:
            raise ValueError(f"--save_every {self.every}: expected steps (500) or minutes (15m)") from e
        self.started = self.saved = time.time()
        self.seen, self.warned, self.before = 0, False, None

    def elapsed(self) -> float:
        """Seconds of training, those before an interruption included."""
        if self.before is None:
            self.before = max(
                (x.get("seconds", 0.0) for x in read_lines(self.out / "log.jsonl")), default=0.0
            )
        return self.before + time.time() - self.started

    def check(
        self, batch: dict, log: dict[str, Tensor], lr: float, step: int, stop: distributed.StopSignal
    ) -> None:
        """Once a step, before the weights change, agreed by all ranks: is the step finite, was a stop asked
        for, are there too many unreadable images?  Ends every rank with code 3 on NaN or inf, 2 on the
        ceiling."""
        finite = torch.stack([log["loss"], log["grad_norm"]]).isfinite().all()
        self.note_bad([i for i in batch["bad"].tolist() if i >= 0])
        flags = torch.tensor([float(stop.asked), 0.0, float(len(self.bad))], device=self.device)
        flags[1] = ~finite
        asked, broken, bad = distributed.all_sum(flags).tolist()
        if broken:
            values = ", ".join(f"{k} {v.item():.4g}" for k, v in log.items())
            files = ", ".join(self.images.name(i) for i in batch["index"].tolist())
            distributed.fail(
                f"rank {distributed.rank()}: "
                + (
                    f"not finite at step {step}, lr {lr:.3g}: {values}; files: {files}; "
                    if not finite
                    else f"another rank was not finite at step {step}; "
                )
                + "nothing of this step was kept, last.pth is as it was: "
                "lower --lr, or look at these files",
                distributed.FAILED,
            )
        if bad > self.args.max_bad * len(self.images):
            distributed.fail(
                f"{bad:.0f} of {len(self.images)} images are unreadable, more than --max_bad {self.args.max_bad:g}; "
                f"their names are in {self.out / 'bad_images.txt'}"
            )
        self.stopping = asked > 0

    def note_bad(self, indices: list[int]) -> None:
        """Name unreadable images in bad_images.txt, each once."""
        new = {self.images.name(i) for i in indices if i not in self.bad}
        self.bad.update(indices)
        path = self.out / "bad_images.txt"
        if new:
            known = set(path.read_text().splitlines()) if path.exists() else set()
            with open(path, "a") as f:
                f.writelines(name + "\n" for name in sorted(new - known))

    def time_to_save(self, step: int) -> bool:
        due = (
            step % self.save_steps == 0 if self.save_steps else time.time() - self.saved >= self.save_seconds
        )
        self.saved = time.time() if due else self.saved
        return due

    def write(self, line: dict) -> None:
        if distributed.is_main():
            with open(self.out / "log.jsonl", "a") as f:
                f.write(
                    json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()})
                    + "\n"
                )

    def log(
        self, values: dict[str, Tensor], step: int, per_epoch: int, lr: float, momentum: float, bar
    ) -> None:
        """Every --log_every steps, and at an epoch's end: means over the ranks to log.jsonl and the progress
        bar."""
        bar.update()
        self.seen += self.args.batch_size * distributed.world_size()
        if step % self.args.log_every and step % per_epoch:
            return
        means = distributed.all_mean(torch.stack(list(values.values()))).tolist()
        values = dict(zip(values, means, strict=True))
        speed = self.seen / (time.time() - self.started)
        self.write(
            {
                "step": step,
                "epoch": step / per_epoch,
                **values,
                "lr": lr,
                "momentum": momentum,
                "images_per_s": speed,
                "seconds": self.elapsed(),
            }
        )
        bar.set_postfix_str(
            " ".join(f"{k} {values[k]:.3f}" for k in ("rec", "pat", "cls") if k in values)
            + f" {speed:.0f} images/s"
        )
        if step > self.args.warmup_epochs * per_epoch:
            self.watch_collapse(values, step)

    def watch_collapse(self, values: dict[str, float], step: int) -> None:
        """One warning when the teacher's keys have lost their spread, or the patch loss sits at ln(1 +
        negatives)."""
        N = (self.args.global_crops_size // self.args.patch_size) ** 2
        negatives = (self.args.batch_size - 1) * (N if self.args.patch_negatives == "others" else 1)
        signs = [f"{k} {values[k]:.3f} is near 0" for k in ("pat_std", "cls_std") if values.get(k, 1) < 0.05]
        if values.get("pat", 0) > 0.98 * math.log(1 + negatives):
            signs.append(
                f"pat {values['pat']:.3f} sits at ln(1 + {negatives}) = {math.log(1 + negatives):.3f}"
            )
        if signs and not self.warned:
            say(
                f"\nwarning: the features may have collapsed by step {step}: {'; '.join(signs)}. "
                "Try a lower --lr or a longer warm-up"
            )
        self.warned = bool(signs)


def thin(images, most: int):
    """The source itself, or `most` images of it, evenly spaced."""
    return (
        images
        if len(images) <= most
        else Part(images, torch.linspace(0, len(images) - 1, most).long().tolist())
    )


class Part:
    """Chosen images of a source."""

    def __init__(self, images, index: list[int]):
        self.images, self.index, self.classes = images, index, images.classes
        self.labels = [images.labels[i] for i in index]

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: int) -> Tensor:
        return self.images.read(self.index[i])


class Monitor(Guard):
    """Guard of a pretraining run.  val: labelled images for k-NN, or None; toy images have masks for prompt
    IoU as well. At most 50,000 train and 10,000 val images are used, evenly spaced; rank 0 evaluates while
    the others wait."""

    def __init__(self, args, images, val, device: torch.device):
        super().__init__(args, images, device)
        self.val, self.size, self.P = val, args.global_crops_size, args.patch_size
        self.labelled = val is not None and images.labels is not None and val.labels is not None
        if self.labelled and list(images.classes) != list(val.classes):
            raise ValueError(
                f"the classes of train ({len(images.classes)}) and val ({len(val.classes)}) differ: k-NN cannot compare them"
            )

    def epoch_end(self, epoch: int, backbone) -> None:
        """k-NN every --knn_every epochs; the count of unreadable images."""
        if self.bad:
            say(
                f"\nepoch {epoch}: {len(self.bad)} unreadable images replaced, see {self.out / 'bad_images.txt'}"
            )
        self.bad = set()
        if self.args.knn_every and epoch % self.args.knn_every == 0 and epoch < self.args.epochs:
            self.evaluate(epoch, backbone)

    def untrained(self, backbone) -> None:
        self.evaluate(0, backbone)

    def evaluate(self, epoch: int, backbone) -> dict[str, float]:
        """{"knn_cls", "knn_pat", "prompt_iou"} in percent, those that the data allows; said, and written to
        the log."""
        result = {}
        if distributed.is_main() and self.val is not None:
            backbone.eval()
            if self.labelled:
                train, val = thin(self.images, 50_000), thin(self.val, 10_000)
                knn = probes.knn_of(
                    backbone, train, val, self.size, self.device, [10], workers=self.args.num_workers
                )
                result = {"knn_cls": knn["cls"][10], "knn_pat": knn["pat"][10]}
            if hasattr(self.val, "scene"):
                result["prompt_iou"], _ = self.prompt_iou(self.tokens(backbone))
            backbone.train()
        if result:
            say(
                ("untrained" if epoch == 0 else f"epoch {epoch}")
                + ": "
                + ", ".join(f"{k} {v:.1f} %" for k, v in result.items())
            )
            self.write({"epoch": epoch, **result})
        return result

    def tokens(self, backbone):
        return lambda image: zeroshot.patch_features(backbone, normalize(image[None].to(self.device)))[
            0
        ].cpu()

    def prompt_iou(self, features) -> tuple[float, float]:
        """Best mean IoU over the thresholds, in percent, and that threshold, on 200 val scenes of the toy
        world; the targets are the objects of one class together."""
        grid = (self.size // self.P, self.size // self.P)
        iou = zeroshot.prompt_iou(features, (self.scene(i) for i in range(min(200, len(self.val)))), grid)
        return 100 * iou.max().item(), zeroshot.THRESHOLDS[int(iou.argmax())]

    def scene(self, i: int) -> tuple[Tensor, Tensor]:
        s = self.val.scene(i)
        ids, kinds = torch.from_numpy(s.instances).long(), torch.tensor([-1, *s.categories])
        return self.resized(i), torch.stack([kinds[ids] == c for c in kinds[1:].unique()])

    def resized(self, i: int) -> Tensor:
        return F.interpolate(
            self.val.read(i)[None], size=(self.size, self.size), mode="bicubic", antialias=True
        )[0]

    def finish(self, student, teacher) -> None:
        """Evaluate, write results.json and result.png, and say in one line what came out."""
        seconds, after = self.elapsed(), self.evaluate(self.args.epochs, teacher.backbone)
        if not distributed.is_main():
            return
        before = next(
            (x for x in read_lines(self.out / "log.jsonl") if x.get("epoch") == 0 and "step" not in x), {}
        )
        results = {**after, **{f"{k}_untrained": before.get(k) for k in after}, "seconds": round(seconds, 1)}
        threshold = 0.4
        if hasattr(self.val, "scene"):
            def patch_colours(image):                                  # what one can do without any network
                mean = patchify(normalize(image[None]), self.P)[0].unflatten(1, (3, -1)).mean(-1)
                return F.normalize(mean, dim=-1)
            results["prompt_iou_colours"] = self.prompt_iou(patch_colours)[0]
            threshold = self.prompt_iou(self.tokens(teacher.backbone.eval()))[1]
        results = {k: round(v, 2) if isinstance(v, float) else v for k, v in results.items()}
        (self.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        self.picture(student, teacher.backbone, threshold).save(self.out / "result.png")
        names = {"knn_cls": "k-NN CLS", "knn_pat": "k-NN PAT", "prompt_iou": "prompt IoU"}
        said = [
            f"{n} {results[k + '_untrained'] or 0:.1f} -> {results[k]:.1f} %"
            for k, n in names.items()
            if k in results
        ]
        extra = (
            f" (raw colours {results['prompt_iou_colours']:.1f} %)" if "prompt_iou_colours" in results else ""
        )
        say(f"done in {seconds:.0f} s: " + ", ".join(said) + extra + f"; look at {self.out / 'result.png'}")

    @torch.no_grad()
    def picture(self, student, backbone, threshold: float, n: int = 6) -> Image.Image:
        """One row per held-out image: the clicked patch, similarity, mask, corrupted input, the student's
        reconstruction."""
        source, P, g = self.val if self.val is not None else self.images, self.P, self.size // self.P
        n, zoom = min(n, len(source)), max(1, 192 // self.size)
        images = torch.stack(
            [
                self.resized(i)
                if source is self.val
                else probes.centre_crop(self.images.read(i), self.size, self.size)
                for i in range(n)
            ]
        )
        x = normalize(images.to(self.device))
        crop = MultiCrop(
            Augmentation(self.size, local_number=0), GMML(0.0, block=0.3, align=self.args.drop_align)
        )
        draws = [crop.draw_blocks(torch.Generator().manual_seed(i)) for i in range(n)]
        corrupted, mask = gmml(x, *(torch.stack([d[k][0] for d in draws]) for k in ("blocks", "kind")))
        student.eval(), backbone.eval()
        z = zeroshot.patch_features(backbone, x)                       # (n, N, D)
        rows = []
        for i in range(n):
            at = self.click(i, g) if source is self.val else g * g // 2 + g // 2
            similarity = (z[i] @ z[i, at]).view(g, g).cpu()
            cells = [
                dotted(images[i], at, P, g),
                heat(similarity, self.size),
                masked(images[i], similarity >= threshold),
            ]
            cells += [denormalize(corrupted[i]).cpu()]
            if student.h_rec is not None:
                patches = student.h_rec(student.backbone(corrupted[i:i + 1])[0, backbone.num_prefix_tokens:])
                painted = unpatchify(patches[None].float(), P, g, g)[0]
                cells.append(denormalize(torch.where(mask[i], painted, x[i])).cpu())
            rows.append(torch.cat([F.pad(c, (2, 2, 2, 2), value=255) for c in cells], 2))
        sheet = torch.cat(rows, 1).permute(1, 2, 0).numpy()
        picture = Image.fromarray(sheet).resize(
            (sheet.shape[1] * zoom, sheet.shape[0] * zoom), Image.Resampling.NEAREST
        )
        return titled(
            picture,
            ["clicked patch", "similarity", f"mask (>= {threshold:g})", "corrupted", "reconstruction"][
                : len(cells)
            ],
        )

    def click(self, i: int, g: int) -> int:
        """A patch well inside the largest object of a toy scene; the middle of any other image."""
        if not hasattr(self.val, "scene"):
            return g * g // 2 + g // 2
        truth = F.adaptive_avg_pool2d(self.scene(i)[1].float(), (g, g))
        largest = truth.sum((1, 2)).argmax()
        return int(truth[largest].argmax())


def dotted(image: Tensor, at: int, P: int, g: int) -> Tensor:
    """(3, S, S) uint8 with the border of patch `at` of a g x g grid in red."""
    image, y, x = image.clone(), at // g * P, at % g * P
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)
    image[:, y:y + P, [x, x + P - 1]], image[:, [y, y + P - 1], x:x + P] = red, red
    return image


def heat(similarity: Tensor, size: int) -> Tensor:
    """(g, g) cosines -> (3, size, size) uint8: from blue at -0.2 or below to yellow at 1."""
    t = F.interpolate(((similarity + 0.2) / 1.2).clamp(0, 1)[None, None], size=(size, size), mode="nearest")[
        0
    ]
    low, high = (torch.tensor(c).view(3, 1, 1) for c in ([30.0, 30.0, 90.0], [255.0, 230.0, 60.0]))
    return (low + t * (high - low)).byte()


def masked(image: Tensor, mask: Tensor) -> Tensor:
    """(3, S, S) uint8 with what is outside a (g, g) mask darkened."""
    inside = F.interpolate(mask[None, None].float(), size=image.shape[-2:], mode="nearest")[0]
    return (image * (0.25 + 0.75 * inside)).byte()


def titled(picture: Image.Image, words: list[str]) -> Image.Image:
    """A line of column titles above a picture of equally wide columns."""
    out = Image.new("RGB", (picture.width, picture.height + 18), "white")
    out.paste(picture, (0, 18))
    for i, word in enumerate(words):
        ImageDraw.Draw(out).text((i * picture.width // len(words) + 6, 3), word, fill="black")
    return out
