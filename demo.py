"""Click on a picture and see what the network holds to be the same object: a local page, made with gradio.

    pip install -r requirements-demo.txt
    python demo.py                                       # newest out/**/backbone.pth, generated toy pictures
    python demo.py --ckpt mmc.pth dino.pth random:vit_s --images photos/       # any of them, side by side

Features, similarity, threshold and mask are zeroshot.py's (--image there draws the same in a file); here are
the clicks of a user, a cache of features shared by all users, and the page.  The network runs once for each
(picture, checkpoint, stride, layer); a click after that is one matrix product and some drawing.
Cost of ViT-S/16 at 480x480 on one core: 0.7 s for the first answer, then 20 ms a click; the first at a stride
of half a patch takes 5 s, at a quarter 52 s, and other users' new pictures wait for it.

The page asks nothing of any other host and listens on 127.0.0.1 unless --host, or $GRADIO_SERVER_NAME,
says otherwise.  What a visitor sends is a picture's bytes, points and settings: sizes are bounded, no path or
address of theirs is opened.

Shapes: N = h*w tokens, D width, H x W pixels of the picture as shown."""
import argparse
import hashlib
import io
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import distributed
from checkpoint import load_backbone, short_name
from data import BadImage, Files, pil_to_tensor
from figure import cut_out, heat, marked
from toy import scene
from zeroshot import fit, picture_tokens, prompted, segment, to_pixels, token_at

UPLOAD, UPLOAD_PIXELS = "32mb", 50_000_000               # bounds of a file, before and after it is unpacked
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
LONGEST = 8                                              # sides' ratio; beyond it a picture is all tokens
CACHE = 512 << 20                                        # bytes of features: 300 pictures of ViT-S/16 at 480
EXAMPLES = 10
FINE = (("patch", 1), ("1/2", 2), ("1/4", 4))            # stride: what part of a patch
NONE = "(none)"
OFFLINE = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}


# ------------------------------------------------- a user's picture and clicks
@dataclass(frozen=True)
class Picture:
    """image: (3, H, W) uint8 as shown.  key: hash of its pixels.  full: (height, width) as uploaded."""
    image: Tensor
    key: str
    full: tuple[int, int]


@dataclass(frozen=True)
class Clicks:
    """What one user sees.  points: (x, y, on the object?) in pixels of the picture as shown, in order."""
    picture: Picture | None = None
    points: tuple[tuple[float, float, bool], ...] = ()

    def of(self, kind: bool) -> list[tuple[float, float]]:
        return [(x, y) for x, y, on in self.points if on == kind]


def shown(image: Tensor, size: int) -> Picture:
    """(3, H, W) uint8 -> the picture, its short side `size`.  Raises BadImage for a strip."""
    full = tuple(image.shape[1:])
    if max(full) > LONGEST * min(full):
        raise BadImage(f"{full[1]}x{full[0]} pixels: one side is more than {LONGEST} times the other")
    image = fit(image, size, 1)
    key = hashlib.blake2b(image.numpy().tobytes() + repr(image.shape).encode()).hexdigest()
    return Picture(image, key, full)


def open_upload(content: bytes | None, size: int) -> Picture:
    """A file's content -> the picture.  Its size is looked at before it is unpacked.  Raises BadImage."""
    try:
        with Image.open(io.BytesIO(content or b""), formats=FORMATS) as im:
            too_large = im.width * im.height > UPLOAD_PIXELS
            if not too_large:
                return shown(pil_to_tensor(im), size)
            raise BadImage(f"{im.width}x{im.height} pixels, more than {UPLOAD_PIXELS // 10**6} million: "
                           "make the picture smaller")
    except BadImage:
        raise
    except Exception as e:                               # decoders raise many kinds, as data.read_image says
        raise BadImage(f"this file is not a picture that can be read ({', '.join(FORMATS)})") from e


def click(clicks: Clicks, x: float, y: float, on: bool = True) -> Clicks:
    """One more point.  Raises ValueError without a picture, or outside of it."""
    if clicks.picture is None:
        raise ValueError("first upload a picture, or pick an example")
    h, w = clicks.picture.image.shape[1:]
    if not (0 <= x < w and 0 <= y < h):
        raise ValueError(f"the point {x:g}, {y:g} is outside of the picture, {w} pixels wide and {h} high")
    return replace(clicks, points=(*clicks.points, (x, y, on)))


def undo(clicks: Clicks) -> Clicks:
    return replace(clicks, points=clicks.points[:-1])


def clear(clicks: Clicks) -> Clicks:
    return replace(clicks, points=())


# ------------------------------------------------- the networks, and what they said of the last pictures
@dataclass(frozen=True)
class Tokens:
    """photo: (H', W', 3) uint8, the picture at the network's size.  z: (N, D).  grid: (h, w).
    patch, stride: pixels."""
    photo: np.ndarray
    z: Tensor
    grid: tuple[int, int]
    patch: int
    stride: int


class Networks:
    """Checkpoints by name, and a bounded cache of features, the least recently used dropped first.  All users
    share it; one forward runs at a time, and clicks on a picture that is known do not wait for it."""

    def __init__(self, paths: list[str], device: torch.device, size: int = 480, key: str | None = None,
                 budget: int = CACHE):
        self.vits, self.device, self.size, self.budget = {}, device, size, budget
        for path in paths:
            vit, report = load_backbone(path, key)
            print(report, flush=True)
            self.vits[self.name(str(path))] = vit.to(device)
        self.kept, self.bytes = OrderedDict(), 0
        self.cache, self.forward = threading.Lock(), threading.Lock()

    def name(self, path: str) -> str:
        """out/vit_s/backbone.pth -> vit_s/backbone, dino.pth -> dino, the second of a name -> dino (2)."""
        name = short_name(path)
        return name if name not in self.vits else f"{name} ({1 + sum(n.startswith(name) for n in self.vits)})"

    def recall(self, key: tuple) -> Tokens | None:
        with self.cache:
            if key in self.kept:
                self.kept.move_to_end(key)
            return self.kept.get(key)

    def tokens(self, picture: Picture, name: str, fine: int = 1, layer: int = 0) -> Tokens:
        """fine: strides in a patch.  layer: blocks before the last.  Raises ValueError for what the network
        does not have, and for too many tokens."""
        vit = self.vits[name]
        P, S, key = vit.patch_size, vit.patch_size // fine, (picture.key, name, fine, layer)
        if P % fine:
            raise ValueError(f"{name}: a patch of {P} pixels has no stride of 1/{fine}; choose a larger one")
        if not 0 <= layer < vit.depth:
            raise ValueError(f"{name} has {vit.depth} blocks: at most {vit.depth - 1} before the last")
        found = self.recall(key)
        if found is None:
            with self.forward:
                found = self.recall(key)                 # another user may have asked for it meanwhile
                if found is None:
                    x, z, grid = picture_tokens(vit, picture.image, self.device, self.size, S, -1 - layer)
                    found = Tokens(x.permute(1, 2, 0).numpy(), z, grid, P, S)
                    self.keep(key, found)
        return found

    def keep(self, key: tuple, tokens: Tokens) -> None:
        def cost(t): return t.z.nbytes + t.photo.nbytes
        with self.cache:
            self.kept[key], self.bytes = tokens, self.bytes + cost(tokens)
            while self.bytes > self.budget and len(self.kept) > 1:
                self.bytes -= cost(self.kept.popitem(last=False)[1])


@dataclass(frozen=True)
class Answer:
    """heat, cut: (H', W', 3) uint8.  mask: (H', W') bool.  t: threshold.  low, high: of the similarity."""
    heat: np.ndarray
    cut: np.ndarray
    mask: np.ndarray
    t: float
    low: float
    high: float


def answer(networks: Networks, clicks: Clicks, name: str, threshold: float | str = "auto", fine: int = 1,
           layer: int = 0) -> Answer | None:
    """What a network says of the clicks; None as long as there is none on an object.  Raises ValueError."""
    if clicks.picture is None or not clicks.of(True):
        return None
    k, old = networks.tokens(clicks.picture, name, fine, layer), tuple(clicks.picture.image.shape[1:])
    on, off = ({token_at(p, old, k.photo.shape[:2], k.patch, k.stride) for p in clicks.of(kind)}
               for kind in (True, False))                # a set: a double click is one prompt
    s, t = prompted(k.z, list(on), list(off), threshold)                                              # (N,)
    pixels, low, high = to_pixels(s[None], k.grid, k.patch, k.stride, True)[0], s.min().item(), s.max().item()
    mask = segment(pixels, t).numpy()
    over = Image.blend(*(Image.fromarray(a) for a in (k.photo, heat(pixels, low, high))), 0.7)
    return Answer(np.asarray(over), cut_out(k.photo, mask), mask, t, low, high)


def mask_file(mask: np.ndarray, full: tuple[int, int]) -> Image.Image:
    """(H', W') bool -> black and white, at the size (height, width) of the upload."""
    return Image.fromarray(mask).resize(full[::-1], Image.Resampling.NEAREST)


def toy_examples(size: int) -> list[Picture]:
    return [shown(torch.from_numpy(scene(i, split="test", size=size).image).permute(2, 0, 1), size)
            for i in range(EXAMPLES)]


def folder_examples(folder: str, size: int) -> list[Picture]:
    """Pictures spread evenly over the folder.  Raises ValueError if none can be shown."""
    files, found = Files(folder), []
    for i in np.unique(np.linspace(0, len(files) - 1, EXAMPLES).round()).astype(int).tolist():
        try:
            found.append(shown(files.read(i), size))
        except BadImage as e:
            print(e, flush=True)
    if not found:
        raise ValueError(f"--images {folder}: none of its pictures can be shown")
    return found


# ------------------------------------------------- the page
def layout(gr, names: list[str], deepest: int, examples: list[Picture]) -> SimpleNamespace:
    """All that is to see, by name.  rows: for one or two checkpoints (row, heat, cut, download)."""
    gr.Markdown("## Click on the picture\nNobody told the network what an object is. It compares the patch "
                "under your click with all others; the mask is what is more similar than the threshold.")
    w, picture = SimpleNamespace(rows=[]), partial(gr.Image, interactive=False, format="jpeg")
    w.state = gr.State(Clicks(), time_to_live=3600)
    thumbs = [fit(p.image, 96, 1).permute(1, 2, 0).numpy() for p in examples]
    w.examples = gr.Gallery(thumbs, show_label=False, columns=len(thumbs), height=120, allow_preview=False,
                            object_fit="cover", buttons=[], elem_id="examples")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            w.photo = picture(show_label=False, buttons=[], elem_id="photo")
            w.mode = gr.Radio(["object", "background"], value="object", label="a click is on the")
            with gr.Row():
                w.undo, w.clear = (gr.Button(word, size="sm", min_width=60, elem_id=word)
                                   for word in ("undo", "clear"))
                w.upload = gr.UploadButton("upload", type="binary", file_types=["image"], size="sm",
                                           min_width=60)
            with gr.Group():
                w.auto = gr.Checkbox(True, label="automatic threshold", elem_id="auto")
                w.t = gr.Slider(0, 1, 0.5, step=0.01, label="threshold (cosine)", buttons=[],
                                elem_id="threshold")
            with gr.Row(visible=len(names) > 1):
                w.first = gr.Dropdown(names, value=names[0], label="checkpoint", min_width=120)
                w.second = gr.Dropdown([NONE, *names], value=NONE, label="beside it", min_width=120,
                                       elem_id="second")
            w.fine = gr.Radio(FINE, value=1, label="stride, in patches: less is finer, and slower")
            w.layer = gr.Slider(0, deepest, 0, step=1, label="layer: blocks before the last", buttons=[])
        with gr.Column(scale=4, min_width=300):
            for i in range(min(2, len(names))):
                with gr.Row(visible=i == 0) as row:
                    sides = [picture(label=word, buttons=["fullscreen"], elem_id=f"{word}{i}")
                             for word in ("similarity", "mask")]
                w.rows.append([row, *sides])
            with gr.Row():
                w.message = gr.Markdown("Pick an example, or upload a picture.", elem_id="message")
                for i, row in enumerate(w.rows):
                    row.append(gr.DownloadButton(("mask as PNG", "second mask as PNG")[i], size="sm", scale=0,
                                                 interactive=False, visible=i == 0, min_width=170,
                                                 elem_id=f"download{i}"))
    return w


async def no_address(fetch: Callable, path: str | None) -> str | None:
    if "://" in str(path):
        raise ValueError("a picture is uploaded, not named by its address")
    return await fetch(path)


def page(networks: Networks, examples: list[Picture]):
    """The gradio Blocks, not yet started.  A user's clicks live in a gr.State; all else is shared."""
    import gradio as gr
    from gradio.processing_utils import save_pil_to_cache

    def fill(row, name: str, a: Answer | None, full: tuple[int, int], title: str) -> dict:
        box, warm, cut, download = row
        if a is None:
            return {box: gr.Row(visible=True), warm: gr.Image(None, label=f"{title}similarity"),
                    cut: gr.Image(None, label=f"{title}mask"),
                    download: gr.DownloadButton(interactive=False, visible=True)}
        file = save_pil_to_cache(mask_file(a.mask, full), download.GRADIO_CACHE, "mask", "png")
        return {box: gr.Row(visible=True), cut: gr.Image(a.cut, label=f"{title}mask, t = {a.t:.2f}"),
                warm: gr.Image(a.heat, label=f"{title}similarity, {a.low:.2f} to {a.high:.2f}"),
                download: gr.DownloadButton(value=file, interactive=True, visible=True)}

    def draw(clicks: Clicks, first, second, auto, level, fine, layer) -> dict:
        begin, picture, line = time.perf_counter(), clicks.picture, "Now click on an object."
        if picture is None:
            raise ValueError("first upload a picture, or pick an example")
        out = {w.state: clicks, w.auto: auto}
        for row, name in zip(w.rows, (first, second), strict=False):
            if name == NONE:
                out |= {row[0]: gr.Row(visible=False), row[3]: gr.DownloadButton(visible=False)}
                continue
            a = answer(networks, clicks, name, "auto" if auto else level, fine, layer)
            out |= fill(row, name, a, picture.full, f"{name}: " if len(networks.vits) > 1 else "")
            if a is not None and row is w.rows[0]:
                line = f"The mask is {a.mask.mean():.1%} of the picture."
                out[w.t] = round(min(max(a.t, 0), 1), 2) if auto else level
        return out | {w.message: f"{line} {1000 * (time.perf_counter() - begin):.0f} ms"}

    def act(change: Callable[[Clicks], Clicks], clicks: Clicks, *settings) -> dict:
        """Change the clicks and draw; a user's mistake is a message, and all stays as it was."""
        try:
            new = change(clicks)
            out = draw(new, *settings)
            if new is not clicks:
                photo = new.picture.image.permute(1, 2, 0).numpy()
                out[w.photo] = marked(photo, photo.shape[:2], new.of(True), new.of(False))
            return out
        except ValueError as e:
            return {w.message: f"**{e}**"}

    def on_click(event: gr.SelectData, mode, *inputs):
        x, y = event.index if isinstance(event.index, list) and len(event.index) == 2 else (-1, -1)
        return act(lambda c: click(c, x, y, mode == "object"), *inputs)

    def on_example(event: gr.SelectData, *inputs):
        return act(lambda c: Clicks(examples[event.index]), *inputs)

    def on_upload(content: bytes, *inputs):
        return act(lambda c: Clicks(open_upload(content, networks.size)), *inputs)

    def on_level(clicks, first, second, _auto, *rest):
        return act(lambda c: c, clicks, first, second, False, *rest)

    with gr.Blocks(title="MMC demo", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        w = layout(gr, list(networks.vits), max(v.depth for v in networks.vits.values()) - 1, examples)
        settings = [w.state, w.first, w.second, w.auto, w.t, w.fine, w.layer]
        outputs = [w.state, w.photo, w.message, w.auto, w.t, *(part for row in w.rows for part in row)]

        def listen(event, f, *inputs, **options):
            event(f, [*inputs, *settings], outputs, api_visibility="private", show_progress="minimal",
                  show_progress_on=[w.photo], concurrency_id="answers", concurrency_limit=4, **options)
        listen(w.photo.select, on_click, w.mode)
        listen(w.examples.select, on_example)
        listen(w.upload.upload, on_upload, w.upload)
        listen(w.undo.click, lambda *inputs: act(undo, *inputs))
        listen(w.clear.click, lambda *inputs: act(clear, *inputs))
        listen(w.t.input, on_level, trigger_mode="always_last")
        for setting in (w.first, w.second, w.auto, w.fine, w.layer):
            listen(setting.input, lambda *inputs: act(lambda c: c, *inputs), trigger_mode="always_last")
    for part in blocks.blocks.values():                  # gradio would fetch any input named by its address
        if fetch := getattr(part, "async_move_resource_to_block_cache", None):
            part.async_move_resource_to_block_cache = partial(no_address, fetch)
    return blocks


# ------------------------------------------------- the command
def newest(folder: str = "out") -> str:
    """The newest backbone.pth below the folder.  Raises ValueError, saying how to make one."""
    found = sorted(Path(folder).rglob("backbone.pth"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError(f"no backbone.pth below {folder}/: run python pretrain.py, which makes one in "
                         "minutes, or give --ckpt FILE or --ckpt random:vit_s")
    return str(found[-1])


def get_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error, a = distributed.fail, p.add_argument
    a("--ckpt", nargs="+", help="checkpoints of any method, or random:ARCH/PATCH, to choose from on the page "
      "(default: the newest backbone.pth below out/)")
    a("--checkpoint_key", help="weights other than the teacher's, by their name in the file")
    a("--images", metavar="DIR", help=f"examples: {EXAMPLES} pictures of this folder (default: toy scenes)")
    a("--size", type=int, default=480, help="pixels of the short side (default 480, as in zeroshot.py "
      "--image); the first answer costs its 2nd to 4th power")
    a("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="address to listen on; "
      "0.0.0.0 lets other machines in (default: $GRADIO_SERVER_NAME, which hosts of demos set, or 127.0.0.1)")
    a("--port", type=int, default=7860, help="default 7860")
    a("--device", default="auto", help="auto, cuda, mps or cpu")
    return p


def main(args: argparse.Namespace) -> None:
    os.environ |= OFFLINE                                # before gradio is imported
    try:
        import gradio  # noqa: F401
    except ImportError as e:
        raise ValueError("gradio is missing: pip install -r requirements-demo.txt") from e
    if not 16 <= args.size <= 2048:
        raise ValueError(f"--size {args.size}: expected 16 ... 2048 pixels")
    examples = folder_examples(args.images, args.size) if args.images else toy_examples(args.size)
    paths, device = args.ckpt or [newest()], distributed.init(args.device)
    networks = Networks(paths, device, args.size, args.checkpoint_key)
    launch(page(networks, examples), args.host, args.port)


def launch(blocks, host: str, port: int, wait: bool = True) -> str:
    """Starts the server; returns its address, at once or (`wait`) when it is stopped.  Raises OSError if the
    port is taken."""
    try:
        blocks.launch(server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False,
                      ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, footer_links=[],
                      max_file_size=UPLOAD, allowed_paths=[], state_session_capacity=200)
    except OSError as e:
        raise OSError(f"cannot listen on {host}, port {port}: give another --port, or --host") from e
    print(f"open {blocks.local_url}", flush=True)
    if wait:
        blocks.block_thread()
    return blocks.local_url


if __name__ == "__main__":
    distributed.run(lambda: main(get_parser().parse_args()))
