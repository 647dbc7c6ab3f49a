"""Proves: GMML reaches the area it should, evenly over the image, and never shows an image to itself; each
colour op equals torchvision's with the same factor; crops have torchvision's distribution and depend on
(seed, epoch, index) only."""
import pytest
import torch
import torchvision.transforms.functional as tvf
from torchvision.transforms import RandomResizedCrop

import masking
from data import Views, generator_of, normalize, train_loader
from masking import (
    GMML,
    Augmentation,
    MultiCrop,
    block_mask,
    colour,
    crop_box,
    gmml,
    mask_to_patches,
    random_resized_crop,
)
from toy import ToyImages

SMALL = Augmentation(global_size=32, local_number=2, local_size=16)


def draws(n, corruption, size=64):
    """Masks (2n, S, S) and kinds (2n, 2) of n images."""
    crop = MultiCrop(Augmentation(global_size=size, local_number=0), corruption)
    d = [crop.draw_masks(generator_of(i)) for i in range(n)]
    return torch.cat([x["mask"] for x in d]), torch.cat([x["kind"] for x in d])


@pytest.mark.parametrize("align", [1, 16])
def test_area_is_reached_and_even(align):
    mask, kind = draws(400, GMML(align=align))
    area, noise = mask.float().mean((1, 2)), kind[:, 0] < 0
    most = 0.3 ** 2                                                    # at most one block too many
    assert noise.float().mean().item() == pytest.approx(0.5, abs=0.06)
    assert area[noise].min() >= 0.5 and area[noise].max() <= 0.75 + most
    assert 0.625 <= area[noise].mean() <= 0.625 + most
    assert area[~noise].min() >= 0.30 and area[~noise].max() <= 0.30 + most
    for line in (mask.float().mean((0, 1)), mask.float().mean((0, 2))):
        assert line.min() > 0.85 * line.mean()                         # no row or column is spared
    if align == 16:
        assert (mask.view(-1, 4, 16, 4, 16).float().mean((2, 4)) % 1 == 0).all()       # whole patches


def test_small_blocks_reach_the_area_too():
    masks, _ = draws(4, GMML(1.0, (0.75, 0.75), block=0.05))
    assert (masks.float().mean((1, 2)) >= 0.75).all()


def test_lineage_blocks_are_uneven_on_request():
    rows = draws(400, GMML(even=False))[0].float().mean((0, 2))
    assert rows[0] < 0.5 * rows.mean()


@pytest.mark.parametrize("area", [0.0, 0.3, 0.62, 1.0])                # 1.0: all blocks do not reach it
def test_block_mask_equals_a_plain_loop(area):
    for seed in range(10):
        corner = torch.randint(-18, 64, (40, 2), generator=generator_of(seed))
        size = torch.randint(1, 20, (40, 2), generator=generator_of(seed, 1))
        blocks = torch.cat([corner, corner + size], 1)
        plain = torch.zeros(64, 64, dtype=torch.bool)
        for top, left, bottom, right in blocks.tolist():
            if plain.float().mean() >= area:
                break
            plain[max(top, 0):max(bottom, 0), max(left, 0):max(right, 0)] = True
        assert torch.equal(plain, block_mask(blocks, area, 64))


def test_gmml_replaces_masked_pixels_only():
    x = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 64, 64).clone() * 100 + 50  # image b is all 100b + 50
    mask, kind = draws(3, GMML(noise_p=0.0))
    y = gmml(x, mask, kind)
    same = (y == x).all(1)
    assert torch.equal(same, ~mask)                                   # alien pixels are never the image's own
    assert set(y.unique().tolist()) <= set(x.unique().tolist())
    mask, kind = draws(3, GMML(noise_p=1.0))
    y = gmml(x * 0 + 7, mask, kind)
    assert (y.movedim(1, -1)[~mask] == 7).all()
    noise = y.movedim(1, -1)[mask]
    assert noise.mean().abs() < 0.02 and abs(noise.std() - 1) < 0.02
    with pytest.raises(ValueError, match="batch of 2"):
        gmml(x[:1], mask[:1], kind[:1])


def test_tiny_images_mask_at_least_a_patch():
    assert (draws(50, GMML(align=8), size=16)[0].float().mean((1, 2)) >= 0.25).all()


def test_mask_to_patches_is_by_majority():
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0, :2] = True                                              # half of patch 0
    mask[0, 0, 2] = True                                               # a quarter of patch 1
    assert mask_to_patches(mask, 2).tolist() == [[True, False, False, False]]
    assert mask_to_patches(mask, 2, 0).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("name", ["adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue"])
def test_colour_op_equals_torchvision(name):
    x = torch.rand(5, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    x[0, :, 0, 0] = 0.5  # a grey pixel has no hue
    factors = (torch.tensor([-0.5, -0.2, 0.0, 0.3, 0.5]) if name == "adjust_hue"
               else torch.tensor([0.0, 0.6, 1.0, 1.4, 3.0]))
    expected = torch.stack([getattr(tvf, name)(i, float(f)) for i, f in zip(x, factors, strict=True)])
    assert torch.allclose(getattr(masking, name)(x, factors), expected, atol=2e-6)


def test_blur_solarize_grey_equal_torchvision():
    x, sigma = torch.rand(3, 3, 20, 17), torch.tensor([0.1, 0.9, 2.0])
    blurred = torch.stack([tvf.gaussian_blur(i, [13, 13], float(s)) for i, s in zip(x, sigma, strict=True)])
    assert torch.allclose(masking.gaussian_blur(x, sigma), blurred, atol=1e-6)
    assert torch.equal(masking.solarize(x), tvf.solarize(x, 0.5))
    assert torch.allclose(masking.grayscale(x).expand_as(x), tvf.rgb_to_grayscale(x, 3), atol=1e-6)


def test_colour_applies_the_draw_in_order():
    x = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    order = [1, 0, 3, 2]                                               # contrast, brightness, hue, saturation
    draw = torch.tensor([[1.2, 0.7, 1.5, 0.1, *order, 0, 0.8, 1], [1, 1, 1, 0, 0, 1, 2, 3, 0, 0, 0]])
    y = x[0].float() / 255
    y = tvf.adjust_saturation(
        tvf.adjust_hue(tvf.adjust_brightness(tvf.adjust_contrast(y, 0.7), 1.2), 0.1), 1.5)
    y = tvf.solarize(tvf.gaussian_blur(y, [13, 13], 0.8), 0.5)
    out = colour(x, draw)
    assert torch.allclose(out[0], normalize(y), atol=1e-4)
    assert torch.equal(out[1], normalize(x[1]))                        # the neutral draw does nothing


def test_draws_have_the_probabilities_of_the_recipe():
    crop = MultiCrop(Augmentation(local_number=1), GMML())
    d = torch.stack([crop.draw_colour(generator_of(i)) for i in range(1500)])                # (n, 3, 11)
    assert (d[:, :, 0] != 1).float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert (d[:, :, 8] > 0).float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert (d[:, :, 9] > 0).float().mean(0).tolist() == pytest.approx([1.0, 0.1, 0.5], abs=0.04)
    assert (d[:, :, 10] > 0).float().mean(0).tolist() == pytest.approx([0.0, 0.2, 0.0], abs=0.04)
    assert d[:, :, 0].min() > 0.599 and d[:, :, 0].max() < 1.401


def test_crops_have_torchvisions_distribution():
    torch.manual_seed(0)
    image = torch.zeros(3, 60, 90)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, (0.25, 1.0), (3 / 4, 4 / 3))
                           for _ in range(4000)]).float()
    ours = torch.tensor([crop_box(60, 90, (0.25, 1.0), generator_of(i)) for i in range(4000)]).float()
    for statistic in (lambda x: x.mean(0), lambda x: x.std(0),
                      lambda x: x.quantile(torch.tensor([0.1, 0.5, 0.9]), 0)):
        assert (statistic(ours) - statistic(theirs)).abs().max() < 2.1


def test_flip_and_extreme_shapes():
    image = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    a, b = (random_resized_crop(image, 16, (1, 1), flip, generator_of(1)) for flip in (0.0, 1.0))
    assert torch.equal(a.flip(-1), b)
    for shape in ((3, 1, 1), (3, 1, 300), (3, 500, 2)):
        assert random_resized_crop(torch.zeros(shape, dtype=torch.uint8), 16, (0.05, 0.25), 0.5,
                                   generator_of(2)).shape == (3, 16, 16)


def batches(workers, batch_size=4):
    loader = train_loader(Views(ToyImages("train", 12, 32), MultiCrop(SMALL, GMML()), seed=3),
                          batch_size, workers)
    loader.sampler.set_epoch(2)
    return list(loader)


def test_views_do_not_depend_on_workers_or_batches():
    zero, two, large = batches(0), batches(2), batches(0, 12)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(zero, two, strict=True) for k in a)
    assert all(torch.equal(torch.cat([b[k] for b in zero]), large[0][k]) for k in zero[0])
    assert sorted(torch.cat([b["index"] for b in zero]).tolist()) == list(range(12))


def test_views_change_with_epoch_seed_and_index():
    source = ToyImages("train", 12, 32)
    views = Views(source, MultiCrop(SMALL, GMML()), seed=3)
    others = [views[1, 5], views[0, 6], Views(source, MultiCrop(SMALL, GMML()), seed=4)[0, 5]]
    assert all(not torch.equal(views[0, 5]["colour"], o["colour"]) for o in others)
    assert torch.equal(views[0, 5]["global"], views[0, 5]["global"])
