"""Proves: similarity, thresholds, background and upsampling are what plain forms give; the clicked part of a
mask is that of a flood fill."""

import pytest
import torch
import torch.nn.functional as F

import clicks
from clicks import connected, token_at


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ------------------------------------------------- similarity and threshold
def test_several_points():
    z = unit(30, 8)
    cos = z @ z.T
    points = torch.tensor([[3, 9], [4, 4]])
    best = torch.maximum(cos[3], cos[9])
    got = clicks.similarity_map(z, points)
    assert torch.allclose(got[0], best, atol=1e-6) and torch.allclose(got[1], cos[4], atol=1e-6)
    mean = clicks.similarity_map(z, points, combine="mean")
    assert torch.allclose(mean[0], (cos[3] + cos[9]) / 2, atol=1e-6)
    left = clicks.take_away(got[:1], z, torch.tensor([[20]]))[0]
    assert left[20] == -1 and left[3] > 0.999 and torch.equal(left == -1, cos[20] > best)
    one = clicks.similarity_map(z, points[1:, :1])
    assert torch.equal(clicks.take_away(one, z, points[1:, :1]), one)  # a tie is the object's


def test_background_of_a_target_that_fills_the_image():
    """It has none; the other targets of the image keep theirs."""
    z = unit(30, 8)
    maps = clicks.similarity_map(z, torch.tensor([[3], [4]]))
    taken = clicks.take_away(maps, z, torch.tensor([[20, 21], [-1, -1]]))
    assert torch.equal(taken[1], maps[1])
    assert torch.equal(taken[:1], clicks.take_away(maps[:1], z, torch.tensor([[20, 21]])))


def test_segment():
    s = torch.tensor([[1.0, 0.9, 0.8, 0.1, 0.0, 0.1, 0.05, 0.1], [1.0, 0.5, 0.4, 0.5, 0.45, 0.4, 0.5, 0.3]])
    assert clicks.segment(s).sum(1).tolist() == [3, 1]
    assert (s >= clicks.auto_threshold(s, 8)).sum(1).tolist() == [2, 1]
    assert clicks.auto_threshold(s)[1, 0].item() == pytest.approx((1 + 4.05 / 8) / 2)
    assert clicks.segment(s, 0.45).sum(1).tolist() == [3, 5]
    assert clicks.segment(torch.ones(4)).all()  # nothing to tell apart


def test_the_automatic_threshold_rises_with_the_clicks():
    s = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    shares = [(clicks.auto_threshold(s, n).item() - 0.2) / 0.8 for n in (1, 4, 25)]
    assert shares == pytest.approx([0.5, 0.75, 0.9])
    shares = [(clicks.auto_threshold(s, n, centre=True).item() - 0.2) / 0.8 for n in (1, 4, 25)]
    assert shares == pytest.approx([0.65, 0.825, 0.93])


def test_clicks_that_differ_lower_it_and_none_raise_it():
    """Half of the way is that of the level, which counts from the mean, 0.2, to that of alike clicks, 0.8."""
    s = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    levels = torch.tensor([[-0.5], [0.2], [0.6], [0.8], [1.0]])
    t = clicks.auto_threshold(s, 4, levels)[:, 0].tolist()
    assert t == pytest.approx([0.5, 0.5, 0.7, 0.8, 0.8])
    alike = clicks.auto_threshold(s, 4, torch.tensor([1.0]), centre=True)
    assert torch.equal(alike, clicks.auto_threshold(s, 4, centre=True))


@pytest.mark.parametrize("combine, join", [("max", max), ("mean", lambda values: sum(values) / len(values))])
@pytest.mark.parametrize("centre, c", [(False, 0.5), (True, 0.35)])
def test_several_clicks_by_hand(combine, join, centre, c):
    """A plain loop over prompts: one whose clicks differ, one with a token twice, one of a single token."""
    z = F.normalize(unit(30, 8) + 0.7 * unit(8, seed=5), dim=-1)
    prompts = [[3, 7, 20, 11], [3, 7, 20, 7], [6, 6, 6, 6]]
    maps, got = clicks.prompt_maps(z, torch.tensor(prompts), None, combine, centre)
    z = clicks.centred(z) if centre else z
    for row, line, t in zip(prompts, maps.tolist(), got, strict=True):
        others = [[float(z[i] @ z[j]) for j in row if j != i] for i in row]
        level = sum(join(cosines) if cosines else 1.0 for cosines in others) / 4
        mean = sum(line) / 30
        top = (1 - c / 2) * (max(line) - mean)
        assert t.item() == pytest.approx(mean + (top + min(max(level - mean, 0), top)) / 2, abs=1e-6)


def test_a_click_on_another_part_of_the_object_adds_that_part():
    """Two halves of an object, each alike in itself, and a background that is like neither.  A second click
    on the same half takes nothing away."""
    halves = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0, 0, 1.0]])
    z = F.normalize(halves.repeat_interleave(torch.tensor([5, 5, 20]), 0) + 0.1 * unit(30, 3), dim=-1)
    for points, parts in (([0], [5, 0, 0]), ([0, 7], [5, 5, 0]), ([0, 1], [5, 0, 0])):
        maps, t = clicks.prompt_maps(z, torch.tensor([points]))
        assert [part.sum().item() for part in (maps[0] >= t[0]).split([5, 5, 20])] == parts


def test_centred_tokens_have_lost_what_they_share():
    """A component that all tokens have hides which are alike; a plain loop takes it out."""
    z = F.normalize(unit(30, 8) + 3 * unit(8, seed=5), dim=-1)
    mean = [sum(column) / 30 for column in z.T.tolist()]
    for token, got in zip(z.tolist(), clicks.centred(z).tolist(), strict=True):
        rest = [a - b for a, b in zip(token, mean, strict=True)]
        length = sum(a * a for a in rest) ** 0.5
        assert got == pytest.approx([a / length for a in rest], abs=1e-5)
    assert (z @ z.T).mean() > 0.8 and abs((clicks.centred(z) @ clicks.centred(z).T).mean()) < 0.1
    maps, auto = clicks.prompt_maps(z, torch.tensor([[3]]), centre=True)
    assert torch.equal(maps, clicks.similarity_map(clicks.centred(z), torch.tensor([[3]])))
    assert torch.equal(auto, clicks.auto_threshold(maps, centre=True))


# ------------------------------------------------- mask
def flood(mask, points, h, w):
    """Every place that is reached from a click by steps to the 8 neighbours, within the mask."""
    waiting = [p for p in points if mask[p]]
    reached = set(waiting)
    while waiting:
        y, x = divmod(waiting.pop(), w)
        for v in range(max(y - 1, 0), min(y + 2, h)):
            for u in range(max(x - 1, 0), min(x + 2, w)):
                if mask[v * w + u] and v * w + u not in reached:
                    reached.add(v * w + u)
                    waiting.append(v * w + u)
    return [i in reached for i in range(h * w)]


@pytest.mark.parametrize("share, n", [(0.3, 1), (0.4, 1), (0.4, 3), (0.6, 2), (0.0, 1), (1.0, 1)])
def test_the_clicked_part_is_that_of_a_flood_fill(share, n):
    g = torch.Generator().manual_seed(n)
    masks = torch.rand(20, 9 * 13, generator=g) < share
    points = torch.randint(9 * 13, (20, n), generator=g)
    got = connected(masks, points, (9, 13))
    for mask, clicked, part in zip(masks.tolist(), points.tolist(), got.tolist(), strict=True):
        assert part == flood(mask, clicked, 9, 13)


def test_clicks_on_several_parts_keep_them_all():
    mask = torch.tensor([[1, 1, 0, 1, 0, 1, 1]]).bool()
    assert connected(mask, torch.tensor([[0]]), (1, 7)).tolist()[0] == [True, True] + [False] * 5
    assert connected(mask, torch.tensor([[0, 6]]), (1, 7)).sum() == 4
    assert connected(mask, torch.tensor([[2]]), (1, 7)).sum() == 0  # beside the mask: nothing is meant
    assert connected(mask, torch.tensor([[2, 3]]), (1, 7)).nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize("P, S", [(8, 8), (8, 4), (7, 7), (14, 7)])
def test_middle_pixels_lie_on_their_tokens(P, S):
    grid = (5, 7)
    numbers = torch.arange(35.0)[None]
    pixels = clicks.to_pixels(numbers, grid, P, S, smooth=False).flatten()
    assert pixels[clicks.middle_pixels(torch.arange(35), 7, P, S)].tolist() == list(range(35))


def test_a_mask_of_a_picture():
    alike = torch.tensor([1, 1, 0, 1, 0, 0, 0, 0, 1])
    image = torch.zeros(3, 12, 12, dtype=torch.uint8)
    tokens = clicks.Tokens(image, torch.eye(2)[alike], (3, 3), 4, 4, (24, 24))
    values, t, whole = clicks.select(tokens, [(1, 1)], [], smooth=False)
    assert values.tolist() == alike.tolist() and t == pytest.approx((4 / 9 + 1) / 2)
    assert whole.shape == (12, 12) and whole.sum() == 4 * 16
    _, _, part = clicks.select(tokens, [(1, 1)], [], smooth=False, contiguous=True)
    assert part.sum() == 3 * 16 and part[:4, :8].all() and part[4:8, :4].all()
    _, _, both = clicks.select(tokens, [(1, 1), (23, 23)], [], smooth=False, contiguous=True)
    assert torch.equal(both, whole)
    _, again, _ = clicks.select(tokens, [(1, 1), (2, 2)], [])          # both on one token
    assert again == t


# ------------------------------------------------- pixels and tokens
@pytest.mark.parametrize("P, S", [(8, 8), (8, 4), (14, 7), (7, 7)])
def test_to_pixels(P, S):
    h, w = 5, 7
    maps = unit(2, h * w)
    near, smooth = (clicks.to_pixels(maps, (h, w), P, S, kind) for kind in (False, True))
    assert near.shape == smooth.shape == (2, (h - 1) * S + P, (w - 1) * S + P)
    grid = maps.view(2, h, w)
    if P == S:
        assert torch.equal(near, grid.repeat_interleave(P, 1).repeat_interleave(P, 2))
        plain = F.interpolate(grid[:, None], scale_factor=P, mode="bilinear")[:, 0]
        assert torch.allclose(smooth, plain, atol=1e-5)
    c = P // 2  # the pixels around a token's centre
    centres = near[:, c::S, c::S][:, :h, :w]
    assert torch.equal(centres, grid)
    if P % 2:
        assert torch.allclose(smooth[:, c::S, c::S][:, :h, :w], grid, atol=1e-5)


def test_token_at():
    old, new = (100, 300), (48, 144)
    assert token_at((0, 0), old, new, 8, 8) == 0
    assert token_at((299, 99), old, new, 8, 8) == 6 * 18 - 1
    for x, y in ((120, 88), (7, 50), (299, 3)):
        assert token_at((x, y), old, new, 8, 8) == int(y * 0.48 // 8) * 18 + int((x + 0.5) * 0.48 // 8)
    middle = 5 * 35 + 17, 6 * 35 + 17, 5 * 35 + 18, 6 * 35 + 18
    assert token_at((150, 50), old, new, 8, 4) in middle
