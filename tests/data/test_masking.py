"""Block masks: exact counts, spread of ratios, block shape, determinism."""

import numpy as np
import pytest
from pydantic import ValidationError

from components.data import masking
from components.data.config import MaskingConfig
from components.data.masking import sample_masks


def masks_of(num_images, grid, seed=0, **values):
    return sample_masks(num_images, grid, MaskingConfig(**values), np.random.default_rng(seed))


def test_half_of_the_images_each_from_its_own_slice_of_ratios():
    masks = masks_of(64, (16, 16))
    assert masks.shape == (64, 256)
    assert masks.dtype == bool
    counts = np.sort(masks.sum(axis=1))
    assert (counts[:32] == 0).all()
    edges = np.linspace(0.1, 0.5, 33)
    assert (counts[32:] >= np.floor(256 * edges[:-1])).all()
    assert (counts[32:] <= np.floor(256 * edges[1:])).all()


@pytest.mark.parametrize(
    ("ratio", "grid"), [(0.5, (16, 16)), (0.25, (4, 8)), (0.1, (3, 3)), (1.0, (5, 7)), (0.3, (1, 9))]
)
def test_count_is_exact(ratio, grid):
    masks = masks_of(20, grid, mask_probability=1.0, mask_ratio_min=ratio, mask_ratio_max=ratio)
    assert (masks.sum(axis=1) == int(grid[0] * grid[1] * ratio)).all()


def test_masks_are_blocks_not_scattered_patches():
    masks = masks_of(50, (16, 16), mask_probability=1.0, mask_ratio_min=0.3, mask_ratio_max=0.3).reshape(50, 16, 16)
    with_right_neighbor = (masks[:, :, :-1] & masks[:, :, 1:]).sum() / masks[:, :, :-1].sum()
    assert with_right_neighbor > 0.6  # scattered patches would have 0.3


def test_every_patch_is_masked_about_equally_often_in_the_middle():
    frequency = masks_of(2000, (8, 8), mask_probability=1.0).mean(axis=0).reshape(8, 8)
    assert frequency.mean() == pytest.approx(0.3, abs=0.015)
    # Blocks reach the middle more often than the corners, but every patch is reached.
    assert frequency.min() > 0.05
    np.testing.assert_allclose(frequency, frequency[::-1, ::-1], atol=0.06)


def test_masked_images_are_shuffled_and_the_generator_decides():
    first, again, other = masks_of(40, (8, 8)), masks_of(40, (8, 8)), masks_of(40, (8, 8), seed=1)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    masked = first.any(axis=1)
    assert 0 < masked[:20].sum() < 20


def test_none_masked():
    assert not masks_of(7, (4, 4), mask_probability=0.0).any()
    assert not masks_of(1, (4, 4)).any()  # floor(0.5 * 1)
    assert masks_of(0, (4, 4)).shape == (0, 16)


def test_ratios_out_of_order():
    with pytest.raises(ValidationError, match="mask_ratio_min must not exceed"):
        MaskingConfig(mask_ratio_min=0.6)


def test_blocks_have_the_released_areas_and_aspects(monkeypatch):
    """Area uniform from 4 to the limit, log aspect uniform up to 1/0.3 either way; smaller than the grid both ways."""
    generator, sides = np.random.default_rng(0), []
    for _ in range(1_000):
        mask = np.zeros((64, 64), bool)
        assert masking._add_block(mask, 400, generator) == mask.sum() <= 400
        sides.append((mask.any(axis=1).sum(), mask.any(axis=0).sum()))
    heights, widths = np.array(sides).T
    assert (heights * widths).mean() == pytest.approx(202, abs=15)
    aspects = np.log(heights / widths)
    assert aspects.mean() == pytest.approx(0, abs=0.1)
    assert aspects.std() == pytest.approx(np.log(1 / 0.3) / 3**0.5, rel=0.1)
    for _ in range(300):
        mask = np.zeros((6, 6), bool)
        masking._add_block(mask, 36, generator)
        assert mask.any(axis=1).sum() < 6 > mask.any(axis=0).sum()
    limits = []
    monkeypatch.setattr(masking, "_add_block", lambda mask, limit, _: limits.append(limit) or 0)
    assert masking._sample_mask((16, 16), 230, generator).sum() == 230
    assert limits == [128]  # of more than half of the patches, a block takes half at most
