"""Pictures: components with one sign rule, and sheets whose tiles and captions stay where they belong."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from sklearn.decomposition import PCA

from components.core.pictures import (
    GAP,
    LINE,
    MARGIN,
    TILE,
    Tile,
    draw_pca,
    draw_sheet,
    fit,
    in_columns,
    jpeg,
    pca_colors,
    principal_components,
)


def test_components_and_their_signs_are_scikit_learns():
    values = np.random.default_rng(0).standard_normal((60, 7)) * [5, 1, 3, 1, 9, 1, 1] + 4
    reference = PCA(3, svd_solver="full").fit(values)
    for given in (values, 2 * values[::-1].copy()):  # neither the order nor the scale turns a component around
        found = principal_components(given, 3)
        expected = reference.transform(values) if given is values else 2 * reference.transform(values)[::-1]
        np.testing.assert_allclose(found.scores, expected, atol=1e-9)
        np.testing.assert_allclose(found.shares, reference.explained_variance_ratio_, atol=1e-12)


def test_colors_follow_the_components():
    patches = np.zeros((1, 100, 5))
    patches[0, :, 3] = np.linspace(-1, 1, 100)  # the only direction
    colors = pca_colors(patches)
    assert colors.shape == (1, 10, 10, 3)
    flat = colors.reshape(100, 3)
    assert (flat[0, 0], flat[99, 0]) == (0, 255)
    assert (np.diff(flat[:, 0].astype(int)) >= 0).all()
    assert (flat[:, 1:] == 128).all()


def test_colors_are_of_all_images_together():
    patches = np.random.default_rng(1).standard_normal((3, 16, 8)).astype(np.float32)
    together = pca_colors(patches)
    assert together.shape == (3, 4, 4, 3)
    np.testing.assert_array_equal(pca_colors(patches[::-1].copy())[::-1], together)
    assert (pca_colors(patches[:1])[0] != together[0]).any()


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (7, 7), (5000, 1), (1, 5000)])
def test_a_tile_shows_the_whole_image(size):
    tile = np.asarray(fit(Image.new("RGB", size, "red")))
    assert tile.shape == (TILE, TILE, 3)
    red = (tile == [255, 0, 0]).all(axis=2)
    assert red.sum() == TILE * round(TILE * min(size) / max(size))  # thinner than a pixel: nothing


def test_enlarged_patches_stay_blocks():
    colors = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    tile = np.asarray(fit(Image.fromarray(colors), 16, smooth=False))
    np.testing.assert_array_equal(tile, colors.repeat(4, 0).repeat(4, 1))


def test_tiles_and_captions_of_a_sheet():
    red, blue = (Image.new("RGB", size, color) for size, color in (((40, 30), "red"), ((20, 30), "blue")))
    rows = in_columns([Tile(red, ("a caption that is much longer than its tile", "b")), Tile(blue), Tile(blue)], 2)
    sheet = np.asarray(draw_sheet(rows))
    assert sheet.shape == (2 * MARGIN + 30 + 2 * LINE + GAP + 30, 2 * MARGIN + 40 + GAP + 20, 3)
    assert (sheet[MARGIN : MARGIN + 30, MARGIN : MARGIN + 40] == [255, 0, 0]).all()
    assert (sheet[MARGIN : MARGIN + 30, MARGIN + 40 + GAP :][:, :20] == [0, 0, 255]).all()
    below = sheet[MARGIN + 30 : MARGIN + 30 + 2 * LINE]
    assert (below[:, MARGIN : MARGIN + 40] < 128).any()  # the caption is there
    assert (below[:, MARGIN + 40 + GAP :] == 255).all()  # and cut to its tile


def test_a_sheet_is_as_wide_as_its_caption():
    caption = "no image was removed, as far as anyone can tell"
    empty = draw_sheet([], caption)
    assert empty.width > 250
    assert (np.asarray(empty) < 128).any()
    assert draw_sheet([[Tile(Image.new("RGB", (8, 8)))]], caption).width == empty.width


def test_rows_of_colors_have_their_names():
    images = np.zeros((2, 8, 8, 3), np.uint8)
    colors = np.full((2, 2, 2, 3), 200, np.uint8)
    sheet = draw_pca(images, {"before": colors, "a much longer name": colors})
    assert sheet.height == 2 * MARGIN + 3 * TILE + 2 * GAP
    assert sheet.width > 2 * MARGIN + 2 * TILE + GAP + 100
    assert jpeg(sheet) == jpeg(draw_pca(images, {"before": colors, "a much longer name": colors}))
