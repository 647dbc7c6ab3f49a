"""Click on a picture and see what the network holds to be the same object: a local page, made with gradio.

    pip install -r requirements-demo.txt
    python demo.py                                       # mmc.pth, two photographs and some toy scenes
    python demo.py --ckpt mmc.pth dino.pth random:vit_s --images photos/       # any of them, side by side

Masks are those of `zeroshot.py --image --contiguous`; here are a user's clicks, a cache of features that all
users share, and the page.  The network runs once for each (picture, checkpoint, stride, layer); a click after
that is one matrix product and drawing.  ViT-S/16 at 480x480 on one core: 0.7 s for the first answer, then
20 ms a click; the first at a stride of half a patch takes 5 s, at a quarter 52 s, and others' pictures wait.

It asks nothing of any other host and listens on 127.0.0.1 unless --host, or $GRADIO_SERVER_NAME, says
otherwise.  Visitors send pictures, points and settings: sizes are bounded, no path or address is opened.

Shapes: N = h*w tokens, D width, H x W pixels of the picture as shown, H' x W' as the network sees it."""
import hashlib
import io
import os
import re
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

import run
from checkpoint import open_backbone, short_name
from clicks import Tokens, picture_tokens, select
from data import ImageFolder, ToyImages, evenly
from distributed import say
from figure import cut_out, heat, marked
from images import BadImage, pil_to_tensor, read_image, resize_short
from model import ViT
from run import Mistake

HERE = Path(__file__).parent
BOX = HERE / "mmc.pth"                         # the weights in the box
PHOTOS = ("docs/cat.jpg", "docs/coffee.jpg")   # the photographs in the box
CREDIT = "Photographs: cat by Stéfan van der Walt, coffee by Rachel Michetti, from scikit-image, CC0."
EXAMPLES = 10                                  # of a folder
UPLOAD_PIXELS = 50_000_000                     # of an uploaded picture
FORMATS = "JPEG PNG WEBP BMP GIF TIFF PPM".split()
LONGEST = 8                                    # the sides' ratio; beyond it a picture is all tokens
CACHE = 512 << 20                              # bytes of features: 300 pictures of ViT-S/16 at 480
FINE = (("patch", 1), ("1/2", 2), ("1/4", 4))  # strides, and how many make a patch
NONE = "(none)"
OFFLINE = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
TEXT = """## Click on the picture
Nobody told the network what an object is. It compares the patch under your click with all others; the mask is
what is more similar than the threshold, and connected with the click. Weights: {}."""
STYLE = """
#examples .grid-container {display: flex; overflow-x: auto; padding-bottom: 4px}
#examples .grid-container * {width: auto; height: 84px; aspect-ratio: auto; flex: none}
[data-testid=block-label] {position: static; border: none; background: none; overflow-wrap: anywhere}
[data-testid=block-label] span {display: none}"""      # thumbnails whole, in one line; labels above pictures


# ------------------------------------------------- a user's picture and clicks
class Picture(NamedTuple):
    """image: (3, H, W) uint8 as shown.  key: hash of its pixels.  full: (height, width) as uploaded."""
    image: Tensor
    key: str
    full: tuple[int, int]


def shown(image: Tensor, size: int) -> Picture:
    """(3, H, W) uint8 -> the picture, its short side `size`.  Raises BadImage for a strip."""
    full = tuple(image.shape[1:])
    if max(full) > LONGEST * min(full):
        raise BadImage(f"{full[1]}x{full[0]} pixels: one side is more than {LONGEST} times the other")
    image = resize_short(image, size)
    content = image.numpy().tobytes() + repr(image.shape).encode()
    key = hashlib.blake2b(content).hexdigest()
    return Picture(image, key, full)


def open_upload(content: bytes | None, size: int) -> Picture:
    """A file's content -> the picture.  Its size is looked at before it is unpacked.  Raises BadImage."""
    try:
        file = Image.open(io.BytesIO(content or b""), formats=FORMATS)
        image = pil_to_tensor(file) if file.width * file.height <= UPLOAD_PIXELS else None
    except Exception as e:                     # decoders raise many kinds, as images.decoding says
        raise BadImage(f"this file is not a picture that can be read ({', '.join(FORMATS)})") from e
    if image is None:
        raise BadImage(f"{file.width}x{file.height} pixels, more than {UPLOAD_PIXELS // 10**6} million: make "
                       "the picture smaller")
    return shown(image, size)


class Clicks(NamedTuple):
    """What one user sees.  points: (x, y, on the object?) in pixels of the picture as shown, in order."""
    picture: Picture | None = None
    points: tuple = ()

    def of(self, kind: bool) -> list:
        return [(x, y) for x, y, on in self.points if on == kind]

    def add(self, x: float, y: float, on: bool = True) -> "Clicks":
        """One more point.  Raises Mistake without a picture, or outside of it."""
        if self.picture is None:
            raise Mistake("first upload a picture, or pick an example")
        _, height, width = self.picture.image.shape
        if not (0 <= x < width and 0 <= y < height):
            raise Mistake(f"{x:g}, {y:g} is outside of the picture, {width} pixels wide and {height} high")
        return self._replace(points=(*self.points, (x, y, on)))

    def undo(self) -> "Clicks":
        return self._replace(points=self.points[:-1])

    def clear(self) -> "Clicks":
        return self._replace(points=())


# ------------------------------------------------- the networks, and what they said of the last pictures
class Networks:
    """Checkpoints by name, and a bounded cache of features, the least recently used dropped first.  All users
    share it; one forward runs at a time, and clicks on a picture that is known do not wait for it."""

    def __init__(self, vits: dict[str, ViT], device, size: int):
        self.vits = vits
        self.device = device
        self.size = size
        self.budget = CACHE
        self.kept = {}                         # (picture, name, fine, layer): features, the last used last
        self.cache = threading.Lock()
        self.forward = threading.Lock()

    def tokens(self, picture: Picture, name: str, fine: int = 1, layer: int = 0) -> Tokens:
        """The picture as a network sees it.  fine: strides in a patch.  layer: blocks before the last.
        Raises Mistake for what the network does not have, and for too many tokens."""
        vit = self.vits[name]
        P = vit.patch_size
        if P % fine:
            raise Mistake(f"{name}: a patch of {P} pixels has no stride of 1/{fine}; choose a larger one")
        if not 0 <= layer < vit.depth:
            raise Mistake(f"{name} has {vit.depth} blocks: at most {vit.depth - 1} before the last")
        key = (picture.key, name, fine, layer)
        found = self.recall(key)
        if found:
            return found
        with self.forward:
            found = self.recall(key)           # another user may have asked for it meanwhile
            if found is None:
                found = picture_tokens(vit, picture.image, self.device, self.size, P // fine, -1 - layer)
                self.recall(key, found)
        return found

    def recall(self, key: tuple, new=None):
        """The features that are kept, or the new ones, which are kept from now on."""
        with self.cache:
            found = self.kept.pop(key, new)
            if found:
                self.kept[key] = found
            while self.nbytes() > self.budget:
                del self.kept[next(iter(self.kept))]
            return found

    def nbytes(self) -> int:
        return sum(tokens.image.nbytes + tokens.z.nbytes for tokens in self.kept.values())


class Answer(NamedTuple):
    """heat, cut: (H', W', 3) uint8.  mask: (H', W') bool.  t: threshold.  low, high: of the similarity."""
    heat: np.ndarray
    cut: np.ndarray
    mask: np.ndarray
    t: float
    low: float
    high: float

    def file(self, full: tuple[int, int]) -> Image.Image:
        """The mask in black and white, at the size (height, width) of the upload."""
        return Image.fromarray(self.mask).resize(full[::-1], Image.Resampling.NEAREST)


def answer(
    networks: Networks,
    clicks: Clicks,
    name: str,
    threshold: float | str = "auto",
    fine: int = 1,
    layer: int = 0,
    paper: bool = False,
) -> Answer | None:
    """What a network says of the clicks; None as long as there is none on an object.

    The mask is the part that was clicked, with smooth edges; paper: all patches that are similar, as in the
    paper.  Raises Mistake."""
    on = clicks.of(True)
    if not on:
        return None
    refined = not paper
    tokens = networks.tokens(clicks.picture, name, fine, layer)
    values, t, mask = select(tokens, on, clicks.of(False), threshold, smooth=refined, contiguous=refined)
    pixels = tokens.pixels(values, refined)                            # (H', W')
    photo = tokens.image.permute(1, 2, 0).numpy()
    mask = mask.numpy()
    low = values.min().item()
    high = values.max().item()
    colours = Image.fromarray(heat(pixels, low, high))
    over = Image.blend(Image.fromarray(photo), colours, 0.7)
    return Answer(np.asarray(over), cut_out(photo, mask), mask, t, low, high)


def box_examples(size: int) -> list[Picture]:
    """The photographs in the box, and toy scenes."""
    toys = ToyImages("test", 4, size)
    images = [read_image(HERE / name) for name in PHOTOS]
    images += map(toys.read, range(4))
    return [shown(image, size) for image in images]


def folder_examples(folder: str, size: int) -> list[Picture]:
    """Pictures spread evenly over the folder.  Raises Mistake if none can be shown."""
    images = ImageFolder(folder)
    found = []
    for i in evenly(EXAMPLES, len(images)):
        try:
            found.append(shown(images.read(i), size))
        except BadImage as e:
            say(e)
    if not found:
        raise Mistake(f"--images {folder}: none of its pictures can be shown")
    return found


# ------------------------------------------------- the page
def layout(gr, networks, examples, credit) -> SimpleNamespace:
    """All that is to see, by name, the pictures before the settings, so that they are near on a phone.
    rows: of one or two checkpoints, each with choice, box, heat, cut and download."""
    names = list(networks.vits)
    deepest = max(vit.depth for vit in networks.vits.values()) - 1
    thumbs = [resize_short(example.image, 96).permute(1, 2, 0).numpy() for example in examples]
    picture = partial(gr.Image, interactive=False, format="jpeg", min_width=130)
    small = dict(size="sm", min_width=60)
    w = SimpleNamespace(rows=[SimpleNamespace(), SimpleNamespace()])
    w.state = gr.State(Clicks(), time_to_live=3600)
    gr.Markdown(TEXT.format(", ".join(names)))
    w.examples = gr.Gallery(
        thumbs, show_label=False, height=106, allow_preview=False, buttons=[], elem_id="examples")
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            w.photo = picture(label="click here", buttons=[], elem_id="photo")
            w.message = gr.Markdown("Pick an example, or upload a picture.")
        with gr.Column(scale=2, min_width=300):
            for i, row in enumerate(w.rows):
                with gr.Row(visible=i == 0) as row.box:
                    row.heat = picture(label="similarity", buttons=["fullscreen"])
                    row.cut = picture(label="mask", buttons=["fullscreen"], elem_id=f"mask{i}")
    with gr.Row():
        kinds = [("click: object", "object"), ("click: background", "background")]
        w.mode = gr.Radio(
            kinds, value="object", show_label=False, container=False, scale=4, min_width=300)
        w.undo = gr.Button("undo", elem_id="undo", **small)
        w.clear = gr.Button("clear", elem_id="clear", **small)
        w.upload = gr.UploadButton("upload", type="binary", file_types=["image"], **small)
        for i, row in enumerate(w.rows):
            title = ("save mask", "second mask")[i]
            row.download = gr.DownloadButton(
                title, interactive=False, visible=i == 0, elem_id=f"download{i}", **small)
    with gr.Row(visible=len(names) > 1):
        w.rows[0].choice = gr.Dropdown(names, value=names[0], label="checkpoint")
        w.rows[1].choice = gr.Dropdown([NONE, *names], value=NONE, label="beside it", elem_id="second")
    with gr.Row():
        with gr.Group():
            w.auto = gr.Checkbox(True, label="automatic threshold", elem_id="auto")
            w.t = gr.Slider(0, 1, 0.5, step=0.01, label="threshold (cosine)", buttons=[], elem_id="threshold")
        w.fine = gr.Radio(FINE, value=1, label="stride, in patches: less is finer, and slower")
        with gr.Group():
            w.paper = gr.Checkbox(False, label="as in the paper: all similar patches", elem_id="paper")
            w.layer = gr.Slider(0, deepest, 0, step=1, label="layer: blocks before the last", buttons=[])
    gr.Markdown(credit)
    return w


def drawn(gr, w, networks, clicks, values) -> dict:
    """What the page shows for these clicks and the values of its settings.  Raises Mistake."""
    if clicks.picture is None:
        raise Mistake("first upload a picture, or pick an example")
    start = time.perf_counter()
    threshold = "auto" if values[w.auto] else values[w.t]
    out = {w.state: clicks, w.auto: values[w.auto]}
    text = "Now click on an object."
    for row in w.rows:
        name = values[row.choice]
        out[row.box] = gr.update(visible=name != NONE)
        out[row.download] = gr.update(visible=name != NONE, interactive=False)
        if name == NONE:
            continue
        title = f"{name}: " if len(networks.vits) > 1 else ""
        a = answer(networks, clicks, name, threshold, values[w.fine], values[w.layer], values[w.paper])
        if a is None:
            out[row.heat] = gr.update(value=None, label=f"{title}similarity")
            out[row.cut] = gr.update(value=None, label=f"{title}mask")
            continue
        out[row.heat] = gr.update(value=a.heat, label=f"{title}similarity, {a.low:.2f} to {a.high:.2f}")
        out[row.cut] = gr.update(value=a.cut, label=f"{title}mask, t = {a.t:.2f}")
        image = a.file(clicks.picture.full)
        file = gr.processing_utils.save_pil_to_cache(image, row.download.GRADIO_CACHE, "mask", "png")
        out[row.download] = gr.update(value=file, visible=True, interactive=True)
        if row is w.rows[0]:
            text = f"The mask is {a.mask.mean():.1%} of the picture."
            if values[w.auto]:
                level = min(max(a.t, 0), 1)
                out[w.t] = round(level, 2)
    milliseconds = 1000 * (time.perf_counter() - start)
    out[w.message] = f"{text} {milliseconds:.0f} ms"
    return out


def connect(gr, w, networks, examples) -> None:
    """What the page does when something is clicked or moved.  A user's clicks live in w.state."""
    def act(change, values):
        """Change the clicks and draw; a user's mistake is a message, and all stays as it was."""
        before = values[w.state]
        try:
            clicks = change(before)
            out = drawn(gr, w, networks, clicks, values)
        except Mistake as e:
            return {w.message: f"**{e}**"}
        if clicks is not before:
            photo = clicks.picture.image.permute(1, 2, 0).numpy()
            out[w.photo] = marked(photo, photo.shape[:2], clicks.of(True), clicks.of(False))
        return out

    def on_click(event: gr.SelectData, values):
        return act(lambda clicks: clicks.add(*event.index, values[w.mode] == "object"), values)

    def on_example(event: gr.SelectData, values):
        return act(lambda _: Clicks(examples[event.index]), values)

    def on_upload(values):
        return act(lambda _: Clicks(open_upload(values[w.upload], networks.size)), values)

    def on_level(values):
        return act(lambda clicks: clicks, values | {w.auto: False})

    settings = {w.auto, w.fine, w.paper, w.layer, w.rows[0].choice, w.rows[1].choice}
    inputs = {w.state, w.mode, w.t} | settings
    outputs = {w.state, w.photo, w.message, w.auto, w.t}
    for row in w.rows:
        outputs |= {row.box, row.heat, row.cut, row.download}

    def listen(event, answer_to, inputs=inputs, **options):
        event(
            answer_to,
            inputs,
            outputs,
            api_visibility="private",
            show_progress="minimal",
            show_progress_on=[w.photo],
            concurrency_id="answers",
            concurrency_limit=4,
            **options,
        )

    listen(w.photo.select, on_click)
    listen(w.examples.select, on_example)
    listen(w.upload.upload, on_upload, inputs | {w.upload})
    listen(w.undo.click, partial(act, Clicks.undo))
    listen(w.clear.click, partial(act, Clicks.clear))
    listen(w.t.input, on_level, trigger_mode="always_last")
    for setting in settings:
        listen(setting.input, partial(act, lambda clicks: clicks), trigger_mode="always_last")


def page(gr, networks: Networks, examples: list[Picture], credit: str):
    """The gradio Blocks, not yet started.  gr: the module."""
    async def no_address(fetch, path):
        if "://" in str(path):
            raise ValueError("a picture is uploaded, not named by its address")
        return await fetch(path)

    with gr.Blocks(title="MMC demo", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        w = layout(gr, networks, examples, credit)
        connect(gr, w, networks, examples)
    for part in blocks.blocks.values():        # gradio would fetch any input named by its address
        part.async_move_resource_to_block_cache = partial(no_address, part.async_move_resource_to_block_cache)
    return blocks


def launch(blocks, host: str, port: int) -> str:
    """Start the server and return its address.  Raises Mistake for a port that is taken."""
    try:
        blocks.launch(
            server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, css=STYLE,
            share=False, ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False,
            footer_links=[], max_file_size="32mb", allowed_paths=[], state_session_capacity=200,
        )
    except OSError as e:
        raise Mistake(f"cannot listen on {host}, port {port}: give another --port, or --host") from e
    return blocks.local_url


# ------------------------------------------------- the command
def default_ckpt() -> str:
    """mmc.pth, or else the newest backbone.pth below out/.  Raises Mistake, saying how to make one."""
    if BOX.exists():
        return str(BOX)
    found = sorted(Path("out").rglob("backbone.pth"), key=os.path.getmtime)
    if not found:
        raise Mistake("no mmc.pth beside demo.py and no backbone.pth below out/: run python "
                      "pretrain.py, which makes one in minutes, or give --ckpt FILE or --ckpt random:vit_s")
    return str(found[-1])


def new_name(path: str, taken) -> str:
    """out/vit_s/backbone.pth -> vit_s/backbone, dino.pth -> dino, the second of a name -> dino (2)."""
    name = short_name(path)
    same = sum(re.sub(r" \(\d+\)$", "", other) == name for other in taken)
    return f"{name} ({1 + same})" if same else name


def get_args(argv=None):
    p = run.Parser(description=__doc__)
    p.add_argument("--ckpt", nargs="+", help="checkpoints of any method, or random:ARCH/PATCH (default: "
                   "mmc.pth, or else the newest backbone.pth below out/)")
    p.add_argument("--images", metavar="DIR", help=f"folder of examples; {EXAMPLES} are shown")
    p.add_argument("--size", type=run.between(16, 2048), default=480, help="pixels of the short side "
                   "(default: %(default)s); the first answer costs its 2nd to 4th power")
    p.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="address to "
                   "listen on; 0.0.0.0 lets other machines in (default: $GRADIO_SERVER_NAME, or 127.0.0.1)")
    p.add_argument("--port", type=run.between(1, 65535), default=7860, help="default 7860")
    run.add_shared(p, "checkpoint_key num_heads device precision")
    return p.parse_args(argv)


def main(args) -> None:
    os.environ |= OFFLINE                      # before gradio is imported
    try:
        import gradio
    except ImportError as e:
        raise Mistake("gradio is missing: pip install -r requirements-demo.txt") from e
    device = run.begin(args, one_process=True)
    examples = folder_examples(args.images, args.size) if args.images else box_examples(args.size)
    vits = {}
    for path in args.ckpt or [default_ckpt()]:
        vits[new_name(path, vits)] = open_backbone(args, path, device)
    blocks = page(gradio, Networks(vits, device, args.size), examples, "" if args.images else CREDIT)
    say(f"open {launch(blocks, args.host, args.port)}")
    blocks.block_thread()


if __name__ == "__main__":
    run.script(main, get_args)
