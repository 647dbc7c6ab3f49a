"""Proves: colours never repeat, no text or legend is cut off, sheets fit a screen, and a picture shows what
it was given."""
import numpy as np
import pytest
import torch
from PIL import Image

import figure

LONG = "a name that is much longer than its place, of a run that has had every option that there is"


def photo(height=200, width=300):
    rng = np.random.default_rng(0)
    return rng.integers(0, 255, (height, width, 3), np.uint8)


def is_white(picture):
    return (np.asarray(picture) == 255).all()


# ------------------------------------------------- colours
def test_palette_has_no_two_colours_alike():
    colours = figure.palette(64).astype(float)
    apart = np.linalg.norm(colours[:, None] - colours, axis=-1)
    np.fill_diagonal(apart, np.inf)
    assert apart[:32, :32].min() > 60
    assert apart[0].min() > 60                             # the background
    assert np.linalg.norm(colours - 255, axis=-1).min() > 60
    assert len(np.unique(figure.palette(), axis=0)) == 256


def test_colour_of_a_number_does_not_depend_on_how_many_there_are():
    assert (figure.palette(5) == figure.palette(40)[:5]).all()


def test_first_colours_differ_for_colour_blind_eyes():
    """Machado et al. 2009: what is left of linear red, green and blue without one kind of cone."""
    deutan = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    protan = np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]])
    linear = (figure.palette(8) / 255) ** 2.2
    for loss in (deutan, protan):
        seen = (linear @ loss.T).clip(0, 1) ** (1 / 2.2) * 255
        apart = np.linalg.norm(seen[:, None] - seen, axis=-1) + 999 * np.eye(8)
        assert apart.min() > 45


def test_voc_palette():
    colours = np.array(figure.voc_palette()).reshape(256, 3).tolist()
    assert colours[:4] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert colours[15] == [192, 128, 128]                  # person
    assert colours[255] == [224, 224, 192]                 # not scored


def test_heat_is_darkest_at_low_and_lightest_at_high():
    values = torch.tensor([[-5.0, 0.2, 0.6, 1.0, 9.0]])
    row = figure.heat(values, 0.2, 1)[0].astype(int)
    assert (row[0] == figure.HEAT[0]).all() and (row[1] == row[0]).all()
    assert (row[4] == figure.HEAT[-1]).all() and (row[3] == row[4]).all()
    assert row[0].sum() < row[2].sum() < row[4].sum()


# ------------------------------------------------- on a photo
def test_cut_out_keeps_the_inside_outlines_it_and_dims_the_rest():
    picture = photo()
    mask = np.zeros((200, 300), bool)
    mask[50:100, 60:120] = True
    out = figure.cut_out(picture, mask)
    assert (out[55:95, 65:115] == picture[55:95, 65:115]).all()
    assert is_white(out[49, 60:120])
    assert out[:40].max() <= 105 and (out[:40, :, 0] == out[:40, :, 2]).all()


def test_painted_gives_more_than_eight_numbers_their_own_colour():
    numbers = np.arange(32).repeat(10)[None].repeat(10, 0)
    out = figure.painted(np.full((10, 320, 3), 100, np.uint8), numbers)
    assert len(np.unique(out.reshape(-1, 3), axis=0)) == 32


def test_marked_puts_dots_where_the_points_are():
    black = np.zeros((100, 200, 3), np.uint8)
    out = figure.marked(black, (50, 100), [(24.5, 9.5)], [(75, 40)])
    green, red = out[[20, 81], [50, 151]].astype(int)      # points are (x, y) in an image of half the size
    assert np.abs(green - (60, 220, 90)).max() < 5
    assert np.abs(red - (235, 50, 50)).max() < 5
    assert not out[60:, :100].any()


# ------------------------------------------------- text
@pytest.mark.parametrize("width", [60, 120, 300])
def test_long_text_is_shortened_in_its_middle(width):
    short = figure.fitted(LONG, width)
    assert figure.font(figure.SMALL).getlength(short) <= width
    start, end = short.split("...")
    assert LONG.startswith(start) and LONG.endswith(end)


@pytest.mark.parametrize("text, shown", [
    ("/data/my photos/cat.jpg", "cat.jpg"), ("val/n02/a.JPEG: tench, man", "a.JPEG: tench, man"),
    ("random weights, ViT-S/16", "random weights, ViT-S/16"), ("overlap / O = 0.5", "overlap / O = 0.5")])
def test_a_path_is_shown_as_its_name(text, shown):
    assert figure.fitted(text, 1000) == shown


def test_legend_shows_every_name_whole():
    colours = {f"class number {i}": tuple(map(int, colour)) for i, colour in enumerate(figure.palette(30))}
    picture = figure.legend(colours)
    pixels = np.asarray(picture)
    assert is_white(pixels[:, -8:]) and is_white(pixels[-4:])
    for colour in colours.values():
        assert (pixels == colour).all(-1).sum() >= 100     # its square


# ------------------------------------------------- sheets
def test_sheet_shows_pictures_in_their_order():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    panels = [("", np.full((10, 20, 3), colour, np.uint8)) for colour in colours]
    pixels = np.asarray(figure.sheet([("row", panels)]))
    places = [np.argwhere((pixels == colour).all(-1)) for colour in colours]
    for place in places:
        height, width = place.max(0) - place.min(0) + 1
        assert (height, width) == (figure.CELL // 2, figure.CELL)
    assert places[0].max(0)[1] < places[1].min(0)[1] < places[2].min(0)[1]


@pytest.mark.parametrize("rows, panels", [(1, 1), (2, 5), (6, 3), (6, 5), (3, 16), (8, 8),
                                          pytest.param(30, 3, marks=pytest.mark.slow)])
def test_sheet_fits_a_screen(rows, panels):
    panel = ("similarity", photo(), (0, 1))
    picture = figure.sheet([(LONG, [panel] * panels)] * rows)
    assert max(picture.size) <= figure.SIDE
    assert is_white(np.asarray(picture)[:, -6:])


def test_sheet_says_low_and_high_below_a_heat_map():
    values = torch.zeros(20, 20)
    plain = figure.sheet([("", [("similarity", figure.heat(values, 0, 1))])])
    barred = figure.sheet([("", [("similarity", figure.heat(values, 0, 1), (0, 1))])])
    assert barred.height > plain.height
    below = np.asarray(barred)[plain.height - figure.GAP:]
    for end in (figure.HEAT[0], figure.HEAT[-1]):
        assert (below == end).all(-1).any()


def test_beside_takes_pictures_of_several_heights():
    assert figure.beside([Image.new("RGB", (30, 10)), Image.new("RGB", (20, 40))]).size == (50, 40)


# ------------------------------------------------- charts
@pytest.mark.parametrize("low, high", [
    (0, 1), (0, 6), (17.2, 73.8), (-1, 1), (3, 3), (0, 0), (-5, -5), (0, 1e-4)])
def test_ticks_are_few_and_hold_the_range(low, high):
    ticks = figure.ticks(low, high)
    assert ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9
    assert 2 <= len(ticks) <= 8
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_chart_of_many_lines_cuts_nothing_and_repeats_no_colour():
    series = {f"{LONG} {i}": [(0, i), (1, 2 * i)] for i in range(26)}
    pixels = np.asarray(figure.line_chart(series, LONG, "epoch", "top-1, %"))
    assert is_white(pixels[:, -6:]) and is_white(pixels[-4:])
    right = pixels[:, figure.RIGHT + 30:]
    squares = np.uint8(0.85 * figure.palette(27)[1:])
    assert len(np.unique(squares, axis=0)) == 26
    for colour in squares:
        assert (right == colour).all(-1).sum() >= 144


def test_chart_draws_a_point_where_its_numbers_are():
    pixels = np.asarray(figure.line_chart({"k-NN": [(0, 0), (5, 50), (10, 100)]}, "", "", "")).astype(int)
    middle = pixels[(figure.TOP + figure.BOTTOM) // 2, (figure.LEFT + figure.RIGHT) // 2]
    assert np.abs(middle - 0.85 * figure.palette(2)[1]).max() < 8


@pytest.mark.parametrize("series", [
    {}, {"none": []}, {"one": [(0, 17.2)]}, {"nan": [(0, float("nan")), (1, 2.0)]}])
def test_chart_of_little_or_nothing(series):
    figure.line_chart(series, "title", "x", "y")


def test_densities():
    p = np.full((3, 200), 1 / 200)
    p[1] = np.nan
    names = ["intra", "inter", "other"]
    picture = figure.densities(p, [0.5, float("nan"), 0.1], names, "out/last.pth", "overlap O = 0.5")
    pixels = np.asarray(picture)
    assert is_white(pixels[:, -6:])
    shown = [((pixels == np.uint8(0.85 * figure.palette(4)[i])).all(-1)).any() for i in (1, 2, 3)]
    assert shown == [True, False, True]                    # the second row is not a number
