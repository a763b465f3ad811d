"""Training-free baseline descriptor from colors and edges."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from skimage.color import rgb2hsv
from skimage.feature import hog

CELLS = 4  # a side; blocks of 2 x 2 cells, 9 orientations (Dalal and Triggs 2005)
COLOR_BINS = (8, 4, 4)  # hue, saturation, value


def describe(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Concatenate a histogram of oriented gradients and a joint color histogram, each of unit norm.

    Args:
        image: [S, S, 3] RGB, 8 bits.

    Returns:
        [452]: 324 of gradients, 128 of colors (square roots of shares, so that cosine is the Bhattacharyya overlap).
    """
    cell = (image.shape[0] // CELLS, image.shape[1] // CELLS)
    gradients = hog(image.mean(axis=2), orientations=9, pixels_per_cell=cell, cells_per_block=(2, 2))
    colors, _ = np.histogramdd(rgb2hsv(image).reshape(-1, 3), bins=COLOR_BINS, range=[(0, 1)] * 3)
    shares = np.sqrt(colors.ravel() / colors.sum())
    return np.concatenate([gradients / max(np.linalg.norm(gradients), 1e-12), shares]).astype(np.float32)
