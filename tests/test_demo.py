"""Proves: the page's masks are zeroshot.py's, pixel by pixel; a click, a slider or another user's same
picture never runs the network again; strange files are one message; and in a real browser a click draws the
mask, the slider changes it, nothing but our own host is asked, no file or address a client names is opened.

The page's tests skip without gradio, the browser's without playwright and a Chromium too."""
import argparse
import io
import os
import runpy
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import label

import demo
import zeroshot
from checkpoint import load_backbone
from clicks import (
    agreement,
    auto_threshold,
    picture_tokens,
    segment,
    similarity_map,
    take_away,
    to_pixels,
    token_at,
)
from images import BadImage
from run import Mistake
from toy import scene

CPU = torch.device("cpu")
SIZE = 64
NAME = "random:vit_micro/8"
OTHER = "random:vit_micro/14"


def content(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def toy_picture(i: int = 0, size=(64, 80)) -> demo.Picture:
    image = torch.from_numpy(scene(i, size=size).image)
    return demo.shown(image.permute(2, 0, 1), SIZE)


def opened(*paths: str) -> demo.Networks:
    vits = {}
    for path in paths:
        vits[demo.new_name(path, vits)], _ = load_backbone(path)
    return demo.Networks(vits, CPU, SIZE)


@pytest.fixture
def networks():
    """Two small networks that count their forwards in `calls`."""
    made = opened(NAME, OTHER)
    made.calls = []
    for name, vit in made.vits.items():
        vit.blocks[0].register_forward_hook(lambda *_, name=name: made.calls.append(name))
    return made


# ------------------------------------------------- pictures and clicks
@pytest.mark.parametrize("bad", [
    b"hello, I am a picture",
    b"",
    None,
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    content(Image.new("RGB", (64, 64)))[:60],
    content(Image.new("RGB", (64, 64), "red"), "JPEG")[:300],
])
def test_a_file_that_is_no_picture_is_a_message(bad):
    with pytest.raises(BadImage, match="not a picture") as e:
        demo.open_upload(bad, SIZE)
    assert "\n" not in str(e.value) and os.sep not in str(e.value)


def test_sizes(monkeypatch):
    large = content(Image.new("1", (12_000, 12_000)))
    with monkeypatch.context() as m:
        m.setattr(demo, "pil_to_tensor", None)                   # it must not be unpacked
        with pytest.raises(BadImage, match="12000x12000 pixels, more than 50 million: "):
            demo.open_upload(large, SIZE)
    assert demo.shown(torch.zeros(3, 2, 4, dtype=torch.uint8), 8).image.shape == (3, 8, 16)
    with pytest.raises(BadImage, match="4x400 pixels: one side"):
        demo.open_upload(content(Image.new("RGB", (4, 400))), SIZE)
    p = demo.open_upload(content(Image.new("RGB", (1200, 900))), SIZE)
    assert p.image.shape == (3, 64, 85) and p.full == (900, 1200)
    exif = Image.Exif()
    exif[274] = 6                                                # lies on its side
    turned = demo.open_upload(content(Image.new("RGB", (80, 60)), "JPEG", exif=exif), 60)
    assert turned.image.shape == (3, 80, 60) and turned.full == (80, 60)


def test_one_pixel(networks):
    p = demo.open_upload(content(Image.new("RGB", (1, 1), "red")), SIZE)
    a = demo.answer(networks, demo.Clicks(p).add(0, 0), NAME)
    assert a.mask.shape == a.heat.shape[:2] == (64, 64)
    assert a.file(p.full).size == (1, 1)


def test_clicks():
    start = demo.Clicks(toy_picture())
    for x, y in ((-1, 3), (80, 3), (3, 64), (float("nan"), 3), (3, float("inf"))):
        with pytest.raises(Mistake, match="outside of the picture, 80 pixels wide and 64 high"):
            start.add(x, y)
    with pytest.raises(Mistake, match="first upload"):
        demo.Clicks().add(1, 1)
    two = start.add(79, 63).add(5, 6, on=False)
    assert two.of(True) == [(79, 63)] and two.of(False) == [(5, 6)] and start.points == ()
    assert two.undo() == start.add(79, 63)
    assert two.clear() == start == start.undo()


def test_keys_name_the_pixels():
    a = toy_picture(0)
    b = toy_picture(1)
    assert a.key == toy_picture(0).key != b.key
    flat = demo.shown(torch.zeros(3, 20, 30, dtype=torch.uint8), SIZE)
    high = demo.shown(torch.zeros(3, 30, 20, dtype=torch.uint8), SIZE)
    assert flat.key != high.key


# ------------------------------------------------- the answer
@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("threshold, stride", [("auto", None), (0.9, None), ("auto", 4)])
def test_the_mask_is_that_of_zeroshot(networks, threshold, stride, paper):
    """Exactly the cells that `zeroshot.py --image` draws, and the mask by hand: the similarities above the
    threshold, and but for the paper's, the parts of it that hold a click."""
    picture = toy_picture()
    on = [(40, 30), (20, 33)]
    off = [(1, 1)]
    clicks = demo.Clicks(picture).add(*on[0]).add(*on[1]).add(*off[0], on=False)
    S = stride or 8
    a = demo.answer(networks, clicks, NAME, threshold, 8 // S, paper=paper)
    args = argparse.Namespace(size=SIZE, stride=stride, point=on, background_point=off, threshold=threshold,
                              combine="max", centre=False, contiguous=not paper,
                              upsample=not paper, heads=False, kmeans=2, seed=0)
    cells = zeroshot.picture_row(networks.vits[NAME], picture.image, CPU, args)
    assert cells[2][0].startswith("mask") and np.array_equal(a.cut, cells[2][1])

    tokens = networks.tokens(picture, NAME, 8 // S)
    z, grid = tokens.z, tokens.grid
    on = [token_at(p, (64, 80), (64, 80), 8, S) for p in on]
    off = [token_at(p, (64, 80), (64, 80), 8, S) for p in off]
    maps = similarity_map(z, torch.tensor([on]))
    t = threshold
    if threshold == "auto":
        t = auto_threshold(maps, 2, agreement(z, torch.tensor([on]))).item()
    maps = take_away(maps, z, torch.tensor([off]))
    mask = segment(to_pixels(maps, grid, 8, S, not paper), t)[0].numpy()
    if not paper:
        parts, _ = label(mask, np.ones((3, 3)))
        clicked = [parts[i // grid[1] * S + 4, i % grid[1] * S + 4] for i in on]     # the middles of tokens
        mask = np.isin(parts, clicked) & mask
    assert a.t == pytest.approx(t, abs=1e-6) and (a.mask != mask).mean() < 1e-3 and 0 < mask.mean() < 1


def test_as_in_the_paper_a_mask_is_of_whole_patches_anywhere(networks):
    clicks = demo.Clicks(toy_picture()).add(40, 30)
    patches = demo.answer(networks, clicks, NAME, paper=True).mask.reshape(8, 8, 10, 8)
    assert (patches == patches[:, :1, :, :1]).all()
    smooth = demo.answer(networks, clicks, NAME).mask.reshape(8, 8, 10, 8)
    assert not (smooth == smooth[:, :1, :, :1]).all()


def test_background_layers_and_double_clicks(networks):
    start = demo.Clicks(toy_picture())
    assert demo.answer(networks, start, NAME) is None
    assert demo.answer(networks, start.add(1, 1, on=False), NAME) is None and not networks.calls
    one = start.add(40, 30)
    a = demo.answer(networks, one, NAME)
    twice = demo.answer(networks, one.add(40, 30), NAME)
    assert np.array_equal(a.mask, twice.mask)
    earlier = demo.answer(networks, one, NAME, layer=1)
    z = picture_tokens(networks.vits[NAME], start.picture.image, CPU, SIZE, None, -2).z
    assert torch.equal(z, networks.tokens(start.picture, NAME, 1, 1).z) and earlier.low != a.low
    beside = demo.answer(networks, one.add(2, 2, on=False), NAME)
    assert a.mask[30, 40] and beside.mask.sum() < a.mask.sum()


def test_a_second_click_does_not_run_the_network(networks):
    clicks = demo.Clicks(toy_picture()).add(40, 30)
    first = demo.answer(networks, clicks, NAME)
    for c in (clicks.add(10, 10), clicks.undo(), clicks.clear(), clicks):
        for threshold in ("auto", 0.2, 0.8):
            again = demo.answer(networks, c, NAME, threshold)
            demo.answer(networks, c, NAME, threshold, paper=True)
    assert networks.calls == [NAME] and not np.array_equal(first.mask, again.mask)
    demo.answer(networks, clicks, NAME, fine=2)
    demo.answer(networks, clicks, NAME, layer=1)
    demo.answer(networks, clicks, OTHER)
    demo.answer(networks, demo.Clicks(toy_picture(1)).add(3, 3), NAME)
    assert len(networks.calls) == 5
    again = demo.answer(networks, demo.Clicks(toy_picture(0)).add(40, 30), NAME)     # uploaded again
    assert len(networks.calls) == 5 and np.array_equal(first.mask, again.mask)


def test_the_cache_is_bounded(networks):
    pictures = [toy_picture(i) for i in range(4)]
    networks.tokens(pictures[0], NAME)
    networks.budget = int(2.5 * networks.nbytes())               # room for two
    for i in (1, 0, 2, 0, 1):                                    # 2 drops 1; then 1 is computed anew
        networks.tokens(pictures[i], NAME)
    assert len(networks.calls) == 4 and len(networks.kept) == 2
    assert networks.nbytes() == sum(t.image.nbytes + t.z.nbytes for t in networks.kept.values()) > 0


def test_users_at_once(networks):
    """Eight users, two pictures, two strides, one network: answers as of one alone, and four forwards."""
    jobs = [(i % 2, 1 + i // 2 % 2) for i in range(8)]
    clicks = [demo.Clicks(toy_picture(i)).add(40, 30) for i in range(2)]
    alone = opened(NAME)
    wanted = {job: demo.answer(alone, clicks[job[0]], NAME, fine=job[1]) for job in jobs}
    found = {}
    start = threading.Barrier(len(jobs))

    def user(number, job):
        start.wait()
        for _ in range(5):
            found[number] = demo.answer(networks, clicks[job[0]], NAME, fine=job[1])

    threads = [threading.Thread(target=user, args=x) for x in enumerate(jobs)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert len(networks.calls) == 4
    assert all(np.array_equal(found[i].mask, wanted[job].mask) for i, job in enumerate(jobs))


def test_what_a_network_does_not_have_is_a_message(networks):
    clicks = demo.Clicks(toy_picture()).add(40, 30)
    with pytest.raises(Mistake, match="a patch of 14 pixels has no stride of 1/4"):
        demo.answer(networks, clicks, OTHER, fine=4)
    with pytest.raises(Mistake, match="4 blocks: at most 3 before the last"):
        demo.answer(networks, clicks, NAME, layer=4)
    networks.size = 800
    with pytest.raises(Mistake, match="tokens, more than"):
        demo.answer(networks, clicks, NAME, fine=2)
    assert not networks.calls


# ------------------------------------------------- the command
def test_names(tmp_path):
    assert list(opened("random:vit_micro/16", "random:vit_micro/16").vits) == [
        "random:vit_micro/16", "random:vit_micro/16 (2)"]
    assert demo.new_name("out/a/backbone.pth", {}) == "a/backbone"
    assert demo.new_name("x/dino.pth", {}) == "dino"


def test_the_weights_in_the_box_or_the_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "BOX", tmp_path / "mmc.pth")
    with pytest.raises(Mistake, match="run python pretrain.py"):
        demo.default_ckpt()
    for age, name in ((5, "out/b/backbone.pth"), (1, "out/backbone.pth"), (9, "out/a/backbone.pth")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    assert demo.default_ckpt() == os.path.join("out", "backbone.pth")
    (tmp_path / "mmc.pth").touch()
    os.utime(tmp_path / "mmc.pth", (0, 0))
    assert demo.default_ckpt() == str(tmp_path / "mmc.pth")


def test_examples_in_the_box():
    found = demo.box_examples(60)
    assert [p.full for p in found] == [(300, 451), (400, 600)] + 4 * [(60, 60)]
    for name in demo.PHOTOS:
        assert Path(name).stem in demo.CREDIT


def test_example_folders(tmp_path, capsys):
    for i in range(30):
        Image.new("RGB", (40, 30), (8 * i, 0, 0)).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "00.png").write_text("no picture")
    found = demo.folder_examples(str(tmp_path), 30)
    assert len(found) == demo.EXAMPLES - 1 and found[-1].image[0, 0, 0] == 8 * 29
    assert "00.png" in capsys.readouterr().out
    with pytest.raises(Mistake, match="nowhere: expected a folder"):
        demo.folder_examples("nowhere", SIZE)


@pytest.mark.parametrize("words, reason", [
    ("", "pip install -r requirements-demo.txt"),
    ("--size 5", "16 to 2048"),
    ("--bogus", "unrecognized"),
    ("--size 16", "run python pretrain.py"),
    ("--size 16 --ckpt nope.pth", "nope.pth: no such checkpoint"),
    ("--images nowhere", "nowhere: expected a folder"),
])
def test_mistakes_are_one_line_and_code_2(words, reason, tmp_path, monkeypatch, capsys):
    """demo.py alone, with its photographs, as in a clone without mmc.pth."""
    monkeypatch.setitem(sys.modules, "gradio", None if not words else argparse)
    monkeypatch.setattr(sys, "argv", ["demo.py", *words.split()])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    for name in ("demo.py", *demo.PHOTOS):
        shutil.copy(demo.HERE / name, tmp_path / name)
    with pytest.raises(SystemExit) as e:
        runpy.run_path("demo.py", run_name="__main__")
    err = capsys.readouterr().err
    assert e.value.code == 2 and reason in err and err.count("\n") == 1 and err.startswith("demo.py: ")


# ------------------------------------------------- the page, in a browser
@pytest.fixture(scope="module")
def gradio():
    os.environ |= demo.OFFLINE
    return pytest.importorskip("gradio", reason="pip install -r requirements-demo.txt")


@pytest.fixture(scope="module")
def server(gradio):
    """(address, networks, examples) of a running page."""
    networks = opened(NAME, OTHER)
    examples = [toy_picture(i, (96, 120)) for i in range(3)]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    blocks = demo.page(gradio, networks, examples, "Photographs: by Someone.")
    yield demo.launch(blocks, "127.0.0.1", port), networks, examples
    blocks.close()


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright, and a Chromium")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    with api.sync_playwright() as p:
        found = next(filter(None, map(shutil.which, names)), p.chromium.executable_path)
        if not os.path.exists(found):
            pytest.skip("no Chromium: apt-get install chromium, or playwright install chromium")
        chromium = p.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def test_a_port_that_is_taken_is_a_message(gradio, server):
    port = int(server[0].rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(Mistake, match=f"port {port}: give another --port"):
        demo.launch(demo.page(gradio, *server[1:], ""), "127.0.0.1", port)


def visit(browser, address, width=1300, height=900):
    """A new user's tab; what it asks for and complains about is in `tab.asked` and `tab.errors`."""
    size = {"width": width, "height": height}
    tab = browser.new_context(viewport=size, accept_downloads=True).new_page()
    tab.set_default_timeout(30_000)
    tab.asked = []
    tab.errors = []
    tab.on("request", lambda r: tab.asked.append(r.url))
    tab.on("console", lambda m: tab.errors.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda e: tab.errors.append(str(e)))
    tab.goto(address)
    return tab


def pick(tab, i):
    tab.locator("#examples img").nth(i).click()
    tab.locator("#photo img").wait_for()


def click_at(tab, picture, x, y):
    box = tab.locator("#photo img").bounding_box()
    h, w = picture.image.shape[1:]
    tab.mouse.click(box["x"] + (x + 0.5) / w * box["width"], box["y"] + (y + 0.5) / h * box["height"])


def mask_of(tab):
    with tab.expect_download() as download:
        tab.locator("#download0").click()
    assert download.value.suggested_filename.endswith(".png")
    return np.asarray(Image.open(download.value.path()).convert("1"))


def wanted(networks, picture, points, threshold="auto", paper=False):
    """What the file should hold, and the answer that it is made of."""
    a = demo.answer(networks, demo.Clicks(picture, tuple(points)), NAME, threshold, paper=paper)
    return np.asarray(a.file(picture.full)), a


@pytest.mark.slow
def test_click_slider_undo_in_a_browser(server, browser):
    address, networks, examples = server
    tab = visit(browser, address)
    picture = examples[1]
    x, y = 40, 32                                                # both in the middle of a pixel's patch
    pick(tab, 1)
    tab.get_by_text("Now click on an object.").wait_for()
    click_at(tab, picture, x, y)
    mask, a = wanted(networks, picture, [(x, y, True)])
    tab.locator("#mask0").get_by_text(f"t = {a.t:.2f}").wait_for()
    assert np.array_equal(mask_of(tab), mask) and 0 < mask.mean() < 1
    assert float(tab.locator("#threshold input[type=number]").input_value()) == pytest.approx(a.t, abs=0.006)

    level = 0.15
    tab.locator("#threshold input[type=range]").fill(f"{level}")
    tab.locator("#mask0").get_by_text(f"t = {level:.2f}").wait_for()
    moved, _ = wanted(networks, picture, [(x, y, True)], level)
    assert np.array_equal(mask_of(tab), moved) and moved.sum() > mask.sum()
    assert not tab.locator("#auto input").is_checked()
    tab.locator("#auto input").check()
    tab.locator("#mask0").get_by_text(f"t = {a.t:.2f}").wait_for()

    tab.get_by_label("background").check()
    click_at(tab, picture, 2, 2)
    less, b = wanted(networks, picture, [(x, y, True), (2, 2, False)])
    tab.get_by_text(f"The mask is {b.mask.mean():.1%}").wait_for()
    assert np.array_equal(mask_of(tab), less)
    tab.locator("#undo").click()
    tab.get_by_text(f"The mask is {a.mask.mean():.1%}").wait_for()

    tab.locator("#paper input").check()
    patches, c = wanted(networks, picture, [(x, y, True)], paper=True)
    tab.get_by_text(f"The mask is {c.mask.mean():.1%}").wait_for()
    assert np.array_equal(mask_of(tab), patches) and not np.array_equal(patches, mask)
    tab.locator("#clear").click()
    tab.get_by_text("Now click on an object.").wait_for()
    assert not tab.errors and tab.asked
    assert all(url.startswith((address, "data:", "blob:")) for url in tab.asked)


@pytest.mark.slow
def test_what_is_to_see_on_a_screen_and_on_a_phone(server, browser):
    """Weights and credit are named, thumbnails are whole, results have their labels, and the pictures come
    before the settings."""
    address, networks, examples = server
    for width, height in ((1280, 860), (390, 844)):
        tab = visit(browser, address, width, height)
        tab.get_by_text(f"Weights: {NAME}, {OTHER}.").wait_for()
        tab.get_by_text("Photographs: by Someone.").wait_for()
        thumb = tab.locator("#examples img").nth(0)
        thumb.wait_for()
        whole = thumb.evaluate("i => i.naturalWidth / i.naturalHeight / (i.clientWidth / i.clientHeight)")
        assert whole == pytest.approx(1, abs=0.05)
        pick(tab, 0)
        click_at(tab, examples[0], 50, 30)
        tab.locator("#mask0 img").wait_for()
        assert tab.locator("label").get_by_text("similarity, ").is_visible()
        assert tab.locator("label").get_by_text("mask, t = ").is_visible()
        settings = tab.locator("#auto").bounding_box()["y"]
        for name in ("#photo img", "#mask0 img"):
            box = tab.locator(name).bounding_box()
            assert box["y"] + box["height"] < min(settings, height)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_two_users_and_strange_files_in_a_browser(server, browser, tmp_path):
    address, networks, examples = server
    one = visit(browser, address)
    other = visit(browser, address)
    pick(one, 0)
    click_at(one, examples[0], 50, 30)
    one.locator("#mask0 img").wait_for()
    assert other.locator("#mask0 img").count() == 0
    other.locator("#clear").click()
    other.get_by_text("first upload a picture, or pick an example").wait_for()
    (tmp_path / "letter.png").write_text("Dear network,")
    Image.new("1", (12_000, 12_000)).save(tmp_path / "huge.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    for name, reason in (("letter", "not a picture"), ("huge", "12000x12000 pixels"), ("one", "Now click")):
        other.locator("input[type=file]").first.set_input_files(tmp_path / f"{name}.png")
        other.get_by_text(reason).wait_for()
    click_at(other, demo.shown(torch.zeros(3, 1, 1, dtype=torch.uint8), SIZE), 9, 9)
    other.locator("#mask0 img").wait_for()
    mask, _ = wanted(networks, examples[0], [(50, 30, True)])
    assert np.array_equal(mask_of(one), mask)                    # nothing of this changed the other's
    one.locator("#second input").click()
    one.get_by_role("option", name=OTHER).click()
    one.locator("#mask1 img").wait_for()
    assert not one.errors and not other.errors


def test_no_file_and_no_address_of_a_client_is_opened(gradio, server, tmp_path, monkeypatch):
    """Events made by hand, not by the page: a picture, or a setting, named by a path or by an address."""
    import httpx
    address = server[0]
    asked = []

    async def fetched(url, **_):
        asked.append(url)
        raise ValueError("fetched")
    monkeypatch.setattr(gradio.processing_utils, "async_ssrf_protected_download", fetched)
    api = f"{address}gradio_api/"
    for path in ("/etc/passwd", os.path.abspath("README.md"), f"{tmp_path}/x", "../README.md"):
        assert httpx.get(f"{api}file={path}").status_code in (403, 404)

    config = httpx.get(f"{address}config").json()
    event = next(d for d in config["dependencies"] if d["api_name"] == "on_upload")
    parts = {part["id"]: part for part in config["components"]}
    kinds = [parts[i]["type"] for i in event["inputs"]]
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    for path in (str(tmp_path / "x.png"), "http://example.org/x.png"):
        for kind in ("uploadbutton", "dropdown"):
            data = [parts[i]["props"].get("value") for i in event["inputs"]]
            file = {"path": path, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}
            data[kinds.index(kind)] = file
            body = {"fn_index": event["id"], "session_hash": "byhand", "data": data}
            assert httpx.post(f"{api}queue/join", json=body).status_code == 200
            with httpx.stream("GET", f"{api}queue/data?session_hash=byhand", timeout=20) as lines:
                done = next(line for line in lines.iter_lines() if "process_completed" in line)
            assert '"success":false' in done, done
    assert not asked
