"""The descriptor of patches: the histograms of the whole image's, of each patch."""

from __future__ import annotations

import numpy as np
from skimage import data
from skimage.color import rgb2hsv
from skimage.feature import hog

from components.evaluation.descriptor import COLOR_BINS, describe_patches


def test_gradients_are_of_the_neighbors_and_colors_of_the_patch():
    image, patch, rows = np.asarray(data.astronaut())[:72, :72], 10, 7  # 2 pixels are beyond the last patch
    found = describe_patches(image, rows).reshape(rows, rows, 209)
    np.testing.assert_allclose(np.linalg.norm(found[..., :81], axis=2), 1, rtol=1e-5)
    np.testing.assert_allclose((found[..., 81:] ** 2).sum(axis=2), 1, rtol=1e-5)
    for row, column in ((2, 3), (4, 2)):
        top, left = row * patch, column * patch
        own = rgb2hsv(image[top : top + patch, left : left + patch]).reshape(-1, 3)
        counts, _ = np.histogramdd(own, bins=COLOR_BINS, range=[(0, 1)] * 3)
        np.testing.assert_allclose(found[row, column, 81:] ** 2, counts.ravel() / patch**2, atol=1e-6)
        # A crop of 5 x 5 patches, so that the gradients at its border do not matter in the middle.
        around = image[top - 2 * patch : top + 3 * patch, left - 2 * patch : left + 3 * patch].mean(axis=2)
        blocks = hog(around, 9, (patch, patch), (3, 3), feature_vector=False)
        gradients = blocks[1, 1].ravel()
        np.testing.assert_allclose(found[row, column, :81], gradients / np.linalg.norm(gradients), atol=1e-6)
