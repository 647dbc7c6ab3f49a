"""Proves: GMML reaches the area it should, evenly over the image and with blocks of any size, and never shows
an image to itself; each colour op equals torchvision's with the same factor, and the blur at any sigma; crops
have torchvision's distribution and depend on (seed, epoch, index) only."""
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tvf
from torch.utils.data import default_collate
from torchvision.transforms import RandomResizedCrop

import masking
from data import Batches, ToyImages, Views, generator_of
from images import normalize
from masking import (
    GMML,
    Augmentation,
    Colours,
    Corruption,
    MultiCrop,
    add_blocks,
    colour,
    corrupted_share,
    crop_box,
    gmml,
    random_resized_crop,
)

SMALL = Augmentation(global_size=32, local_number=2, local_size=16)


# ---- corruption
def draws(n, corruption, size=64):
    """The corruption of n images, view by view: mask (2n, S, S), alien (2n,), noise_seed (2n,)."""
    crop = MultiCrop(Augmentation(global_size=size, local_number=0), corruption)
    drawn = [crop.draw_corruption(generator_of(i)) for i in range(n)]
    return Corruption(*[torch.cat(field) for field in zip(*drawn, strict=True)])


@pytest.mark.parametrize("align", [1, 16])
def test_area_is_reached_and_even(align):
    mask, alien, _ = draws(400, GMML(align=align))
    area = mask.float().mean((1, 2))
    noise = alien < 0
    most = 0.3 ** 2                                                    # at most one block too many
    assert noise.float().mean().item() == pytest.approx(0.5, abs=0.06)
    assert area[noise].min() >= 0.5 and area[noise].max() <= 0.75 + most
    assert 0.625 <= area[noise].mean() <= 0.625 + most
    assert area[~noise].min() >= 0.30 and area[~noise].max() <= 0.30 + most
    for line in (mask.float().mean((0, 1)), mask.float().mean((0, 2))):
        assert line.min() > 0.85 * line.mean()                         # no row or column is spared
    if align == 16:
        whole = mask.view(-1, 4, 16, 4, 16).float().mean((2, 4))
        assert (whole % 1 == 0).all()                                  # whole patches


def test_small_blocks_reach_the_area_too():
    masks = draws(4, GMML(1.0, (0.75, 0.75), block=0.05)).mask
    assert (masks.float().mean((1, 2)) >= 0.75).all()


def test_tiny_blocks_are_drawn_in_bounded_numbers_and_reach_the_area_exactly():
    corruption = GMML(1.0, (0.75, 0.75), block=0.001)
    crop = MultiCrop(Augmentation(224), corruption)
    assert crop.largest_block == 1
    assert crop.draw_blocks(2, generator_of(0)).shape == (2, 16384, 4)
    mask, alien, _ = crop.draw_corruption(generator_of(0))
    assert mask.sum((1, 2)).tolist() == [0.75 * 224 ** 2] * 2
    assert (alien == -1).all()


def test_the_whole_image_can_be_reached():
    assert draws(2, GMML(1.0, (1.0, 1.0)), size=32).mask.all()


def test_default_draws_256_blocks_of_at_most_the_largest():
    crop = MultiCrop(Augmentation(224), GMML())
    blocks = crop.draw_blocks(2, generator_of(0))                      # (2, K, 4)
    sides = blocks[..., 2:] - blocks[..., :2]
    assert blocks.shape[1] == 256
    assert sides.min() == 1 and sides.max() == crop.largest_block == 67
    for size, align, largest in ((224, 16, 64), (48, 8, 8), (48, 1, 14), (16, 8, 8)):
        crop = MultiCrop(Augmentation(size), GMML(align=align))
        assert crop.largest_block == largest


def test_wrong_constants_are_refused():
    for wrong in (GMML(align=5), GMML(block=0.0), GMML(drop_perc=(0.5, 1.5)), GMML(drop_replace=2.0)):
        with pytest.raises(ValueError, match="align 5 does not divide the 32|expected a block above 0"):
            MultiCrop(SMALL, wrong)


def test_lineage_blocks_are_uneven_on_request():
    rows = draws(400, GMML(even=False)).mask.float().mean((0, 2))
    assert rows[0] < 0.5 * rows.mean()


@pytest.mark.parametrize("area", [0.0, 0.3, 0.62, 1.0])                # 1.0: all blocks do not reach it
def test_add_blocks_equals_a_plain_loop(area):
    for seed in range(10):
        corner = torch.randint(-18, 64, (40, 2), generator=generator_of(seed))
        size = torch.randint(1, 20, (40, 2), generator=generator_of(seed, 1))
        blocks = torch.cat([corner, corner + size], 1)
        plain = torch.zeros(64, 64, dtype=torch.bool)
        for top, left, bottom, right in blocks.tolist():
            if plain.float().mean() >= area:
                break
            plain[max(top, 0):max(bottom, 0), max(left, 0):max(right, 0)] = True
        mask = np.zeros((64, 64), bool)
        reached = add_blocks(mask, blocks, area)
        assert reached == (mask.mean() >= area)
        assert torch.equal(plain, torch.from_numpy(mask))
        half = np.zeros((64, 64), bool)                                # it goes on from where it was
        add_blocks(half, blocks[:20], area)
        add_blocks(half, blocks[20:], area)
        assert np.array_equal(half, mask)


def test_gmml_replaces_masked_pixels_only():
    images = torch.arange(6.0).view(6, 1, 1, 1) * 100 + 50             # image b is all 100b + 50
    x = images.expand(6, 3, 64, 64).clone()
    mask, alien, noise_seed = draws(3, GMML(noise_p=0.0))
    y = gmml(x, mask, alien, noise_seed)
    same = (y == x).all(1)
    assert torch.equal(same, ~mask)                                    # alien pixels are never its own
    assert set(y.unique().tolist()) <= set(x.unique().tolist())

    mask, alien, noise_seed = draws(3, GMML(noise_p=1.0))
    y = gmml(x * 0 + 7, mask, alien, noise_seed)
    assert (y.movedim(1, -1)[~mask] == 7).all()
    noise = y.movedim(1, -1)[mask]
    assert noise.mean().abs() < 0.02 and abs(noise.std() - 1) < 0.02
    assert torch.equal(y, gmml(x * 0 + 7, mask, alien, noise_seed))
    assert not torch.equal(y, gmml(x * 0 + 7, mask, alien, noise_seed + 1))
    with pytest.raises(ValueError, match="batch of 2"):
        gmml(x[:1], mask[:1], alien[:1], noise_seed[:1])


def test_tiny_images_mask_at_least_a_patch():
    mask = draws(50, GMML(align=8), size=16).mask
    assert (mask.float().mean((1, 2)) >= 0.25).all()


def test_a_patch_is_masked_by_majority():
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0, :2] = True                                              # half of patch 0
    mask[0, 0, 2] = True                                               # a quarter of patch 1
    assert (corrupted_share(mask, 2) >= 0.5).tolist() == [[True, False, False, False]]
    assert (corrupted_share(mask, 2) > 0).tolist() == [[True, True, False, False]]


def test_the_worker_says_which_patches_are_corrupted():
    image = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    plain = MultiCrop(SMALL, GMML())(image, generator_of(1))
    views = MultiCrop(SMALL, GMML(), patch_size=8)(image, generator_of(1))
    mask = views["corruption"].mask
    assert "masked_patches" not in plain and torch.equal(plain["corruption"].mask, mask)
    assert torch.equal(views["corrupted_patches"], corrupted_share(mask, 8) > 0)
    assert torch.equal(views["masked_patches"], corrupted_share(mask, 8) >= 0.5)
    assert views["masked_patches"].shape == (2, 16)
    assert views["corrupted_patches"].sum() > views["masked_patches"].sum()
    for seed in range(10):                                             # blocks of 4 pixels: many half patches
        views = MultiCrop(SMALL, GMML(align=4), patch_size=8)(image, generator_of(seed))
        assert torch.equal(views["masked_patches"], corrupted_share(views["corruption"].mask, 8) >= 0.5)


# ---- colour
@pytest.mark.parametrize("name", ["adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue"])
def test_colour_op_equals_torchvision(name):
    x = torch.rand(5, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    x[0, :, 0, 0] = 0.5                                                # a grey pixel has no hue
    factors = torch.tensor([0.0, 0.6, 1.0, 1.4, 3.0])
    if name == "adjust_hue":
        factors = torch.tensor([-0.5, -0.2, 0.0, 0.3, 0.5])
    theirs = getattr(tvf, name)
    expected = torch.stack([theirs(i, float(f)) for i, f in zip(x, factors, strict=True)])
    assert torch.allclose(getattr(masking, name)(x, factors), expected, atol=2e-6)


def test_blur_solarize_grey_equal_torchvision():
    x = torch.rand(3, 3, 20, 17)
    sigma = torch.tensor([0.1, 0.9, 2.0])
    blurred = torch.stack([tvf.gaussian_blur(i, [13, 13], float(s)) for i, s in zip(x, sigma, strict=True)])
    assert torch.allclose(masking.gaussian_blur(x, sigma, 6), blurred, atol=1e-6)
    assert torch.equal(masking.solarize(x), tvf.solarize(x, 0.5))
    assert torch.allclose(masking.luma(x), tvf.rgb_to_grayscale(x), atol=1e-6)


def neutral(crops):
    """Colours that do nothing."""
    return Colours(
        factors=torch.tensor([[1.0, 1.0, 1.0, 0.0]] * crops),
        order=torch.tensor([[0, 1, 2, 3]] * crops),
        grey=torch.zeros(crops, dtype=torch.bool),
        sigma=torch.zeros(crops),
        solarize=torch.zeros(crops, dtype=torch.bool),
    )


def test_blur_reaches_three_sigma_whatever_its_neighbours_need():
    x = torch.randint(0, 256, (4, 3, 48, 40), dtype=torch.uint8)
    sigma = [5.0, 0.7, 2.0, 3.1]
    taps = [31, 13, 13, 21]                                            # 2 * max(6, ceil(3 sigma)) + 1
    together = colour(x, neutral(4)._replace(sigma=torch.tensor(sigma)))
    for i in range(4):
        expected = tvf.gaussian_blur(x[i].float() / 255, [taps[i], taps[i]], sigma[i])
        assert torch.allclose(together[i], normalize(expected), atol=1e-5), sigma[i]
    tiny = torch.rand(1, 3, 4, 4)                                      # a reflection needs radius < side
    expected = tvf.gaussian_blur(tiny, [7, 7], 5.0)
    assert torch.allclose(masking.gaussian_blur(tiny, torch.tensor([5.0]), 15), expected, atol=1e-6)


def test_colour_applies_the_draw_in_order():
    x = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    colours = neutral(2)
    colours.factors[0] = torch.tensor([1.2, 0.7, 1.5, 0.1])
    colours.order[0] = torch.tensor([1, 0, 3, 2])                      # contrast, brightness, hue, saturation
    colours.sigma[0] = 0.8
    colours.solarize[0] = True
    y = x[0].float() / 255
    y = tvf.adjust_brightness(tvf.adjust_contrast(y, 0.7), 1.2)
    y = tvf.adjust_saturation(tvf.adjust_hue(y, 0.1), 1.5)
    y = tvf.solarize(tvf.gaussian_blur(y, [13, 13], 0.8), 0.5)
    out = colour(x, colours)
    assert torch.allclose(out[0], normalize(y), atol=1e-4)
    assert torch.equal(out[1], normalize(x[1]))                        # the neutral draw does nothing


def test_grey_crops_are_grey():
    x = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    out = colour(x, neutral(2)._replace(grey=torch.tensor([True, False])))
    grey = tvf.rgb_to_grayscale(x[0].float() / 255, 3)
    assert torch.allclose(out[0], normalize(grey), atol=1e-5)
    assert torch.equal(out[1], normalize(x[1]))


def test_draws_have_the_probabilities_of_the_recipe():
    crop = MultiCrop(Augmentation(local_number=1), GMML())
    drawn = [crop.draw_colours(generator_of(i)) for i in range(1500)]
    d = Colours(*[torch.stack(field) for field in zip(*drawn, strict=True)])      # fields of (n, 3, ...)
    assert (d.factors[..., 0] != 1).float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert d.grey.float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert (d.sigma > 0).float().mean(0).tolist() == pytest.approx([1.0, 0.1, 0.5], abs=0.04)
    assert d.solarize.float().mean(0).tolist() == pytest.approx([0.0, 0.2, 0.0], abs=0.03)
    changed = d.factors[d.factors[..., 0] != 1]
    assert changed[:, :3].min() >= 0.6 and changed[:, :3].max() <= 1.4 and (changed[:, 3] == 0).all()
    assert d.sigma[:, 0].min() >= 0.1 and d.sigma.max() <= 2.0
    assert (d.order.sort(-1).values == torch.arange(4)).all()
    first = d.order[..., 0].flatten().bincount() / d.order[..., 0].numel()
    assert first.tolist() == pytest.approx([0.25] * 4, abs=0.03)       # any order of the four


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_host_never_waits_for_cuda():
    crop = MultiCrop(Augmentation(64, local_number=0, jitter=(0.4, 0.4, 0.4, 0.1)), GMML())
    image = torch.randint(0, 256, (3, 80, 80), dtype=torch.uint8)
    batch = default_collate([crop(image, generator_of(i)) for i in range(16)])
    colours = Colours(*[field[:, 0] for field in batch["colours"]])
    views = batch["views"][:, 0].cuda()
    mask = batch["corruption"].mask[:, 0].cuda()
    normalize(views)                                                   # its constants are copied once
    try:
        torch.cuda.set_sync_debug_mode("error")
        x = colour(views, colours)
        gmml(x, mask, batch["corruption"].alien[:, 0], batch["corruption"].noise_seed[:, 0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(x.cpu(), colour(views.cpu(), colours), atol=1e-3)


# ---- crops
def test_crops_have_torchvisions_distribution():
    torch.manual_seed(0)
    image = torch.zeros(3, 60, 90)
    theirs = [RandomResizedCrop.get_params(image, (0.25, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    ours = [crop_box(60, 90, (0.25, 1.0), generator_of(i)) for i in range(4000)]
    theirs = torch.tensor(theirs).float()
    ours = torch.tensor(ours).float()
    assert (ours.mean(0) - theirs.mean(0)).abs().max() < 2.1
    assert (ours.std(0) - theirs.std(0)).abs().max() < 2.1
    q = torch.tensor([0.1, 0.5, 0.9])
    assert (ours.quantile(q, 0) - theirs.quantile(q, 0)).abs().max() < 2.1


def test_flip_and_extreme_shapes():
    image = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    plain = random_resized_crop(image, 16, (1, 1), 0.0, generator_of(1))
    mirrored = random_resized_crop(image, 16, (1, 1), 1.0, generator_of(1))
    assert torch.equal(plain.flip(-1), mirrored)
    for shape in ((3, 1, 1), (3, 1, 300), (3, 500, 2)):
        image = torch.zeros(shape, dtype=torch.uint8)
        assert random_resized_crop(image, 16, (0.05, 0.25), 0.5, generator_of(2)).shape == (3, 16, 16)


def one_epoch(workers, batch_size=4):
    views = Views(ToyImages("train", 12, 32), MultiCrop(SMALL, GMML(), 8), seed=3)
    loader = Batches(views, batch_size, workers=workers)
    first = 2 * loader.per_epoch
    return [batch for _, (batch,) in loader.steps(first, first + loader.per_epoch)]


def flat(batch):
    """The tensors of a batch by name, those of Colours and Corruption too."""
    tensors = {}
    for name, value in batch.items():
        if isinstance(value, tuple):
            for field, tensor in value._asdict().items():
                tensors[f"{name}.{field}"] = tensor
        else:
            tensors[name] = value
    return tensors


def test_views_do_not_depend_on_workers_or_batches():
    zero = one_epoch(0)
    two = one_epoch(2)
    large = one_epoch(0, 12)
    assert isinstance(two[0]["colours"], Colours) and isinstance(two[0]["corruption"], Corruption)
    for a, b in zip(zero, two, strict=True):
        assert all(torch.equal(flat(b)[name], tensor) for name, tensor in flat(a).items())
    for name, tensor in flat(large[0]).items():
        assert torch.equal(torch.cat([flat(batch)[name] for batch in zero]), tensor), name
    assert sorted(torch.cat([batch["index"] for batch in zero]).tolist()) == list(range(12))


def test_views_change_with_epoch_seed_and_index():
    source = ToyImages("train", 12, 32)
    views = Views(source, MultiCrop(SMALL, GMML()), seed=3)
    other_seed = Views(source, MultiCrop(SMALL, GMML()), seed=4)
    first = views[0, 5]
    for other in (views[1, 5], views[0, 6], other_seed[0, 5]):
        assert not torch.equal(first["colours"].factors, other["colours"].factors)
    assert torch.equal(first["views"], views[0, 5]["views"])
