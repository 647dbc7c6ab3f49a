"""What a pretraining run shows: k-NN and prompt IoU before, while and after it trains, curves and a picture.

log.jsonl holds a line for every --log_every steps, means over the ranks: loss and its parts rec, pat, cls;
pat_pos, pat_neg, cls_pos, cls_neg: mean cosine of positives and of negatives; pat_std, cls_std: spread of the
teacher's keys (1: over the whole sphere, 0: collapsed); grad_norm before clipping; lr, momentum; images_per_s
since this start, without evaluations; seconds since the first start, with them.  After a kill the steps since
the last save appear twice, with the same values.  Each evaluation adds a line with epoch, knn_cls, knn_pat
(k = 10) and, in the toy world, prompt_iou, all in percent."""
import json
import math
from collections.abc import Callable
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

import clicks
import figure
import prompts
import run
from data import Subset, ToyImages, evenly, labelled, open_val, with_classes_of
from distributed import is_main, say
from images import BadImage, centre_crop, denormalize, normalize
from knn import knn_of
from losses import mean_cosines, unit
from masking import GMML, corruption_of_views, gmml
from model import MMC, ViT, patchify, unpatchify
from run import Mistake
from scenes import ToyScenes
from training import Guard, bad_names, warmup_epochs

MOST_TRAIN, MOST_VAL, SCENES = 50_000, 10_000, 200                     # images of k-NN, scenes of prompt IoU
NAMES = {"knn_cls": "k-NN CLS", "knn_pat": "k-NN PAT", "prompt_iou": "prompt IoU"}


@torch.no_grad()
def similarities(out: dict, target: dict, inputs) -> dict[str, Tensor]:
    """For the log: mean cosines of positives and negatives, and the spread of the teacher's keys."""
    found = {}
    B = len(inputs.clean) // 2
    if "pat" in out:
        k, _ = target["pat"].unflatten(0, (2, B, -1))                  # (B, N, C), of view 1
        anchors = inputs.anchors[0]
        q = out["pat"][:len(anchors)]
        found["pat_pos"], found["pat_neg"] = mean_cosines(q, k, anchors)
    if "cls" in out:
        other_view = target["cls"][B:, None]                           # (B, 1, C)
        found["cls_pos"], found["cls_neg"] = mean_cosines(out["cls"][:B], other_view)
    for name, keys in target.items():
        spread = unit(keys).std(0).mean()
        found[f"{name}_std"] = spread * keys.shape[-1] ** 0.5
    return found


def test_images(args):
    """Images for the k-NN of the monitor, or None: training does not need them.  Raises Mistake only for
    --val_data."""
    try:
        return open_val(args, toy_seed=args.seed)
    except Mistake as why:
        if args.val_data:
            raise
        say(f"no test images: {why}")
        return None


class Monitor(Guard):
    """The guard of a pretraining run, which also evaluates the teacher.  val: labelled images for k-NN, or
    None; those of the toy world have masks for prompt IoU.  Rank 0 evaluates while the others wait.

    untrained: the backbone as the run began, to be shown beside the trained one."""

    def __init__(
        self, args, images, val, device: torch.device, steps_per_epoch: int, save: Callable,
        student: MMC, teacher: MMC, untrained: ViT,
    ):
        super().__init__(args, images, device, steps_per_epoch, save)
        self.size = args.global_crops_size
        self.P = args.patch_size
        self.g = self.size // self.P                                   # patches of a side
        self.student = student
        self.backbone = teacher.backbone
        self.untrained = untrained.eval()
        self.warned = False
        self.threshold = "auto"                                        # of the masks in the picture
        self.val = images if val is None else val                      # what the picture shows
        self.knn_pair = None
        try:
            train = labelled(images, "train")
            known = with_classes_of(train, labelled(val, "val"), "val")
            self.knn_pair = thin(train, MOST_TRAIN), thin(known, MOST_VAL)
        except Mistake as why:
            say(f"no k-NN while training: {why}")
        self.scenes = ToyScenes(val, SCENES) if isinstance(val, ToyImages) else None

    def begin(self, step: int) -> None:
        """Evaluate the untrained teacher, or what a killed run did not come to evaluate."""
        epoch, rest = divmod(step, self.steps_per_epoch)
        if rest == 0 and not self.evaluation(epoch):
            self.end_epoch(epoch)

    def due(self, epoch: int) -> bool:
        """Before the first epoch and after every --knn_every; `finish` evaluates after the last."""
        every = self.args.knn_every or self.args.epochs
        return epoch % every == 0 and epoch < self.args.epochs

    # ---- while it trains
    def after_step(self, step: int) -> None:
        super().after_step(step)
        on_cpu = self.device.type == "cpu" and self.args.data != "toy"
        if on_cpu and step == self.first + 10:
            minutes = self.images_seen / 10 * self.steps_per_epoch / self.speed() / 60
            days = minutes * self.args.epochs / (24 * 60)
            line = f"an epoch takes about {minutes:.1f} minutes on this machine"
            if days > 1:
                line += (f", and all {self.args.epochs} take {days:.1f} days: README.md has a recipe for a "
                         'laptop under "Your own photos"')
            say(line)

    def log(self, step: int) -> dict[str, float]:
        means = super().log(step)
        if step > warmup_epochs(self.args) * self.steps_per_epoch:
            self.watch_collapse(step, means)
        return means

    def watch_collapse(self, step: int, means: dict[str, float]) -> None:
        """One warning when the teacher's keys have lost their spread, or Eq. (2) sits at chance level."""
        signs = []
        for name, value in means.items():
            if name.endswith("_std") and value < 0.05:
                signs.append(f"{name} {value:.3f} is near 0")
        places = self.g ** 2
        asked = self.args.patch_negatives
        if asked != "others":
            places = 1 if asked == "position" else min(asked, places)
        chance = math.log(1 + (self.args.batch_size - 1) * places)
        if means.get("pat", 0.0) > 0.98 * chance:
            signs.append(f"pat {means['pat']:.3f} sits at chance level, {chance:.3f}")
        if signs and not self.warned:
            say(f"warning: the features may have collapsed by step {step}: {'; '.join(signs)}. Try a lower "
                "--lr or a longer warm-up")
        self.warned = bool(signs)

    # ---- evaluations
    def evaluation(self, epoch: int) -> dict:
        """The last line that an evaluation of this epoch wrote to log.jsonl; empty where there is none."""
        found = {}
        for line in run.read_lines(self.folder / "log.jsonl"):
            if "step" not in line and line["epoch"] == epoch:
                found = line
        return found

    def evaluate(self, epoch: int) -> dict[str, float]:
        """{"knn_cls", "knn_pat", "prompt_iou"} in percent, as far as the data allow; said, logged, drawn."""
        if not is_main():
            return {}
        self.backbone.eval()
        result = self.knn(self.backbone) if self.knn_pair else {}
        if self.scenes:
            features = prompts.network_features(self.backbone, self.device)
            table = self.prompt_iou(features)
            result["prompt_iou"] = table["best"]
            self.threshold = table["best_threshold"]
        if result:
            when = f"epoch {epoch}" if epoch else "untrained"
            words = [f"{NAMES[name]} {value:.1f} %" for name, value in result.items()]
            say(f"{when}: {', '.join(words)}")
            self.write({"epoch": epoch, **result})
        self.draw()
        self.backbone.train()
        return result

    def knn(self, backbone: ViT) -> dict[str, float]:
        """Nothing, from now on, where no image can be read: training goes on."""
        workers = self.args.num_workers
        try:
            knn = knn_of(backbone, *self.knn_pair, self.size, self.device, [10], workers=workers)
        except BadImage as why:
            say(f"no k-NN while training: {why}")
            self.knn_pair = None
            return {}
        return {"knn_cls": knn["cls"][10], "knn_pat": knn["pat"][10]}

    def prompt_iou(self, features: Callable) -> dict:
        """The summary of the default protocol; "best" is the mIoU in percent at the best threshold."""
        protocol = prompts.Protocol(size=self.size)
        return prompts.prompt_table(features, self.scenes, protocol, self.P).summary()

    def finish(self) -> None:
        """Evaluate, write results.json, and say in one line what came out."""
        super().finish()
        seconds = self.seconds()
        results = self.evaluation(self.args.epochs) or self.evaluate(self.args.epochs)
        results.pop("epoch", None)
        if not is_main():
            return
        untrained = self.evaluation(0)
        said = []
        for name, value in list(results.items()):
            results[f"{name}_untrained"] = untrained.get(name)
            before = f"{untrained[name]:.1f} -> " if name in untrained else ""
            said.append(f"{NAMES[name]} {before}{value:.1f} %")
        if self.scenes:
            colours = self.prompt_iou(self.patch_colours)
            results["prompt_iou_colours"] = colours["best"]
            results["prompt_iou_everything"] = colours["everything"]
            said[-1] += f" (raw colours {colours['best']:.1f} %, everything {colours['everything']:.1f} %)"
        for name, value in results.items():
            results[name] = value and round(value, 2)
        results["n_unreadable_train"] = len(bad_names(self.folder))
        results["seconds"] = round(seconds, 2)
        (self.folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        found = f": {', '.join(said)}" if said else ""
        say(f"done in {seconds:.0f} s{found}; look at {self.folder / 'result.png'} and curves.png")

    def patch_colours(self, images: Tensor) -> Tensor:
        """What one can do without any network: the mean colour of each patch, (B, N, 3)."""
        patches = patchify(normalize(images), self.P)                  # (B, N, 3*P*P)
        mean = patches.unflatten(-1, (3, -1)).mean(-1)
        return unit(mean)

    # ---- pictures
    def draw(self) -> None:
        """curves.png and result.png, as far as the run has come."""
        lines = run.read_lines(self.folder / "log.jsonl")
        charts = []
        for title, names, y_label in (("losses", ["rec", "pat", "cls"], "loss"), ("the teacher", NAMES, "%")):
            series = {}
            for name in names:
                points = [(line["epoch"], line[name]) for line in lines if name in line]
                if points:
                    series[NAMES.get(name, name)] = points
            if series:
                chart = figure.line_chart(series, title, "epoch", y_label)
                charts.append(chart)
        if charts:
            figure.beside(charts).save(self.folder / "curves.png")

        images = {}                                                    # number: (3, S, S) uint8
        for i in range(min(len(self.val), 60)):
            with suppress(BadImage):
                image = self.val.read(i)
                images[i] = centre_crop(image, self.size, self.size)
            if len(images) == 6:
                break
        if len(images) > 1:                                            # GMML needs another image
            self.picture(images).save(self.folder / "result.png")

    @torch.no_grad()
    def picture(self, images: dict[int, Tensor]):
        """A row for each of these images of `self.val`: a clicked patch, what is similar to it before and
        after training, with the masks (and, in the toy world, the truth and their IoU), the corrupted image,
        its reconstruction."""
        x = torch.stack([*images.values()])
        x = normalize(x.to(self.device))
        tokens = {}                                                    # of a network: (n, N, D)
        for name, network in (("untrained", self.untrained), ("trained", self.backbone)):
            tokens[name] = clicks.patch_features(network.to(self.device), x).cpu()
        self.untrained.cpu()
        corrupted = self.corrupted(x, images)

        rows = []
        g = self.g
        for row, i in enumerate(images):
            truth = self.truth(i)
            at = g * g // 2 + g // 2 if truth is None else int(truth.argmax())
            photo = self.photo(images[i])
            down, across = divmod(at, g)
            panels = [("clicked patch", figure.marked(photo, (g, g), [(across, down)], []))]
            found = {}
            for name, z in tokens.items():
                maps, auto = clicks.prompt_maps(z[row], torch.tensor([[at]]))
                t = auto.item() if self.threshold == "auto" else self.threshold
                found[name] = (maps, t)
            low = min(maps.min().item() for maps, _ in found.values())
            for name, (maps, threshold) in found.items():
                similarity = self.enlarged(maps.view(1, g, g))[0]
                mask = similarity >= threshold
                title = "mask"
                if truth is not None:
                    inside = self.enlarged(truth[None])[0] >= 0.5
                    iou = (mask & inside).sum() / (mask | inside).sum()
                    title = f"mask, IoU {iou:.2f}"
                heat = figure.heat(similarity, low, 1)
                panels.append((name, heat, (low, 1)))
                panels.append((title, figure.cut_out(photo, mask.numpy())))
            if truth is not None:
                panels.append(("truth", figure.cut_out(photo, inside.numpy())))
            for name, batch in corrupted.items():
                panels.append((name, self.photo(denormalize(batch[row]))))
            rows.append((self.val.name(i), panels))
        return figure.sheet(rows)

    def corrupted(self, x: Tensor, numbers) -> dict[str, Tensor]:
        """The images corrupted, and as the student completes them, if it has h_rec; (n, 3, S, S) each."""
        generators = [torch.Generator().manual_seed(i) for i in numbers]
        draws = corruption_of_views(GMML(0.0, align=self.args.drop_align), self.size, generators)
        mask = draws.mask.to(self.device)                              # (n, S, S)
        out = {"corrupted": gmml(x, mask, draws.alien, draws.noise_seed)}
        student = self.student
        if student.h_rec is not None:
            student.eval()
            tokens = student.backbone(out["corrupted"])
            patches = tokens[:, student.backbone.num_prefix_tokens:]
            painted = unpatchify(student.h_rec(patches).float(), self.P, self.g, self.g)
            out["reconstruction"] = torch.where(mask[:, None], painted, x)
            student.train()
        return out

    def truth(self, i: int) -> Tensor | None:
        """(g, g) which share of each patch belongs to the largest class of a toy scene; None elsewhere."""
        if self.scenes is None:
            return None
        masks = [torch.from_numpy(mask) for mask in self.scenes.classes(i).values()]
        masks = torch.stack(masks).float()
        shares = F.adaptive_avg_pool2d(masks, self.g)                  # (K, g, g)
        return shares[shares.sum((1, 2)).argmax()]

    def enlarged(self, x: Tensor) -> Tensor:
        """(C, h, w) pixels or patches, each repeated until the image is large enough to be looked at."""
        side = self.size * max(1, figure.CELL // self.size)
        return F.interpolate(x[None].float(), side)[0]

    def photo(self, image: Tensor):
        """(3, S, S) uint8 -> (H, W, 3) array."""
        return self.enlarged(image.cpu()).byte().permute(1, 2, 0).numpy()


def thin(images, most: int):
    """The source itself, or `most` images of it, evenly spaced."""
    return images if len(images) <= most else Subset(images, evenly(most, len(images)))
