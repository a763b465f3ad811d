"""Training-free baseline descriptor from colors and edges, of a whole image and of each of its patches."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from skimage.color import rgb2hsv
from skimage.feature import hog

CELLS = 4  # a side; blocks of 2 x 2 cells, 9 orientations (Dalal and Triggs 2005)
SURROUNDINGS = 3  # patches a side whose gradients describe the one in the middle
COLOR_BINS = (8, 4, 4)  # hue, saturation, value
VERSION = 1  # raise it whenever a change here changes a descriptor


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


def describe_patches(image: NDArray[np.uint8], rows: int) -> NDArray[np.float32]:
    """Describe each patch by the same two histograms: gradients of it and its 8 neighbors, and its own colors.

    Args:
        image: [S, S, 3] RGB, 8 bits; beyond its border it is taken as mirrored.
        rows: of the square grid of patches, row by row; pixels right of and below the last whole patch do not count.

    Returns:
        [rows * rows, 209]: 81 of gradients, of unit norm by patch, and 128 of colors, as `describe` has them.
    """
    patch = min(image.shape[:2]) // rows
    inside = image[: rows * patch, : rows * patch]
    margin = SURROUNDINGS // 2 * patch
    padded = np.pad(inside.mean(axis=2), margin, mode="symmetric")
    blocks = hog(
        padded,
        orientations=9,
        pixels_per_cell=(patch, patch),
        cells_per_block=(SURROUNDINGS, SURROUNDINGS),
        feature_vector=False,
    )  # [rows, rows, 3, 3, 9]
    gradients = blocks.reshape(rows * rows, -1)
    norms = np.maximum(np.linalg.norm(gradients, axis=1, keepdims=True), 1e-12)
    shares = np.sqrt(_colors(inside, rows, patch) / patch**2)
    return np.concatenate([gradients / norms, shares], axis=1).astype(np.float32)


def _colors(image: NDArray[np.uint8], rows: int, patch: int) -> NDArray[np.int64]:
    """Return the joint color histogram of each patch, [rows * rows, 128] pixels."""
    sizes = np.array(COLOR_BINS)
    bins = np.minimum((rgb2hsv(image) * sizes).astype(np.int64), sizes - 1)  # [S, S, 3]; 1.0 is in the last
    color = np.ravel_multi_index(tuple(np.moveaxis(bins, 2, 0)), COLOR_BINS)
    row = np.arange(rows * patch) // patch
    place = row[:, None] * rows + row
    count = int(sizes.prod())
    return np.bincount((place * count + color).ravel(), minlength=rows**2 * count).reshape(rows**2, count)
