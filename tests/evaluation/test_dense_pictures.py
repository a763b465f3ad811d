"""Pictures of masks, depths and matching patches: colors and places by hand."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from components.core.pictures import GAP, LINE, MARGIN, SHADE
from components.evaluation.dense_pictures import (
    MATCH_SIDE,
    SIDE,
    SWATCH,
    UNMEASURED,
    Predicted,
    Shown,
    class_colors,
    draw_depth,
    draw_matches,
    draw_segmentation,
    patch_matches,
)

TOP = MARGIN + LINE + GAP  # of matches, below the caption


def pixel(sheet, column, x, y):
    """The color at shares x and y of a tile in the first row."""
    return sheet.getpixel((round(MARGIN + column * (SIDE + GAP) + x * SIDE), round(MARGIN + y * SIDE)))


def test_masks_are_over_the_image_with_a_legend_of_what_is_shown():
    images = np.full((1, 40, 40, 3), 100, np.uint8)
    truth = np.repeat([[0, 255]], 20, axis=1).repeat(40, axis=0).astype(np.uint8)[None]  # left 0, right ignored
    coarse = np.full((1, 4, 4), 2, np.uint8)  # of a model with smaller images
    sheet = draw_segmentation(Shown(images, ["a.jpg"], truth), {"ours": Predicted(coarse, ["0.1"])}, ["a", "b", "c"])
    colors = class_colors(3)
    assert pixel(sheet, 0, 0.25, 0.5) == (100, 100, 100)
    np.testing.assert_allclose(pixel(sheet, 1, 0.25, 0.5), 0.35 * 100 + 0.65 * colors[0], atol=1)
    assert pixel(sheet, 1, 0.75, 0.5) == (100, 100, 100)
    np.testing.assert_allclose(pixel(sheet, 2, 0.75, 0.5), 0.35 * 100 + 0.65 * colors[2], atol=1)
    bottom = MARGIN + SIDE + 2 * LINE + GAP
    legend = [sheet.getpixel((MARGIN + n * (SIDE + GAP) + 5, bottom + 5)) for n in range(3)]
    assert legend[:2] == [tuple(colors[0]), tuple(colors[2])]  # no b
    assert "#" + bytes(legend[2]).hex() == SHADE
    assert sheet.height == bottom + SWATCH + LINE + MARGIN


def test_colors_of_many_classes_differ():
    assert len(np.unique(class_colors(150), axis=0)) == 150


def test_depths_share_one_scale_and_errors_another():
    images, truth = np.zeros((2, 8, 8, 3), np.uint8), np.linspace(1, 3, 128).reshape(2, 8, 8)
    truth[0, :4] = np.nan

    def drawn(maps):
        return draw_depth(Shown(images, "ab", truth), {"ours": Predicted(maps, ["", ""], abs(maps - truth))})

    predicted = np.where(np.isnan(truth), 3, truth)
    predicted[0, -2:, -2:] = 1
    sheet = drawn(predicted)
    for column in (1, 3):  # no truth: no error
        assert "#" + bytes(pixel(sheet, column, 0.5, 0.2)).hex() == UNMEASURED
    assert pixel(sheet, 1, 0.4, 0.8) == pixel(sheet, 2, 0.4, 0.8)
    far, black, most = (253, 231, 37), (0, 0, 4), (252, 253, 191)  # the end of viridis, the ends of magma
    assert pixel(sheet, 2, 0.5, 0.2) == far
    np.testing.assert_allclose(pixel(sheet, 3, 0.4, 0.8), black, atol=1)
    np.testing.assert_allclose(pixel(sheet, 3, 0.99, 0.99), most, atol=1)
    wrong = drawn(np.full_like(truth, 9))
    assert pixel(wrong, 2, 0.5, 0.8) == far
    assert pixel(wrong, 1, 0.5, 0.8)[0] < 100  # a prediction out of the range of truth is seen as such
    with pytest.raises(ValueError, match="no depth to draw"):
        draw_depth(Shown(images, "ab", np.full_like(truth, np.nan)), {})


def test_matches_are_mutual_and_in_order():
    first = np.zeros((1, 3, 2))
    first[0] = [[1, 0], [0, 1], [0.6, 0.5]]  # the third prefers the first of the others, which has a better one
    second = np.array([[[0, 2.0]], [[3, 0.1]]])  # a grid of two rows
    found = patch_matches(first, second)
    np.testing.assert_allclose(found.first, [[0.5, 0.5], [1 / 6, 0.5]])
    np.testing.assert_allclose(found.second, [[0.5, 0.25], [0.5, 0.75]])
    np.testing.assert_allclose(found.similarities, [1, 3 / np.hypot(3, 0.1)])


def test_lines_join_the_patches():
    tokens = np.eye(4).reshape(2, 2, 4)
    photo = Image.new("L", (50, 80), 128)
    sheet = draw_matches(photo, photo, patch_matches(tokens, tokens[::-1]))
    left = np.asarray(sheet)[TOP : TOP + MATCH_SIDE, MARGIN : MARGIN + MATCH_SIDE].astype(int)
    quarter = MATCH_SIDE // 4
    assert np.ptp(left[quarter, quarter]) > 100  # a colored dot at the patch's center
    assert np.ptp(left[0, 0]) == np.ptp(left[2 * quarter, 0]) == 0  # the gray photograph
