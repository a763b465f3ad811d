"""A training-free copy-detection descriptor: cosines near 1 for copies, near 0 for different pictures.

It normalizes the local contrast of the brightness, so that one strong edge does not dominate faint texture, and takes
cube roots of the low-frequency DCT, so that many weak coefficients outweigh a few strong ones. Coefficients of
unrelated photographs are nearly independent, so that their cosine is near 0; re-encoding and resizing hardly change low
frequencies, so that copies stay near 1. The parameters are chosen so that the paper's thresholds (0.6 within the pool,
0.45 to evaluation images) separate the two; README.md has the numbers.

A picture without structure is described by its mean color instead, so that it also matches its copies.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter

VERSION = 1  # increment if a change here changes a vector
SIDE = 64  # pixels; the image is resized to this square
CONTRAST_SIGMA = 3.0  # pixels of that square, the neighborhood of the contrast normalization
CONTRAST_FLOOR = 0.01  # smaller local deviations, of 1, are noise and are not amplified
LUMA_BAND = (2, 22)  # radius in DCT index: below is shading, above is lost in copies of half the size
CHROMA_CUTOFF = 4
CHROMA_WEIGHT = 0.25  # small: a gray copy of a color image keeps 0.97 of its cosine
CHROMA_FLOOR = 0.05  # smaller chroma energy is scaled down, so that gray images have no random hue
STRUCTURE_FLOOR = 0.03  # frequency-weighted luma energy of 8-bit and JPEG noise
COLOR_BANDWIDTH = 3 / 255  # distance of mean colors that begin to differ
NUM_COLOR_FEATURES = 64


def describe(images: list[Image.Image]) -> NDArray[np.float32]:
    """Compute descriptors of RGB images.

    Returns:
        [B, D] float32 of unit norm.
    """
    return np.stack([_describe(image) for image in images])


def _describe(image: Image.Image) -> NDArray[np.float32]:
    band = _band()
    pixels = _square(image)  # [SIDE, SIDE, 3], 0..1
    luma = pixels @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    detail = _unit(np.cbrt(_dct(_even_contrast(luma))[band.luma]))
    structure = _unit(np.concatenate([detail, _chroma(pixels, luma)]))
    angles = pixels.mean(axis=(0, 1)) @ _color_projection()
    color = np.concatenate([np.cos(angles), np.sin(angles)]) / np.sqrt(NUM_COLOR_FEATURES)
    energy = float(np.sum((_dct(luma)[band.luma] * band.luma_radius) ** 2))
    share = energy / (energy + STRUCTURE_FLOOR**2)
    return _unit(np.concatenate([share * structure, np.sqrt(1 - share**2) * color])).astype(np.float32)


def _square(image: Image.Image) -> NDArray[np.float64]:
    # BOX is exact area averaging and fast for large images; small ones need interpolation.
    method = Image.Resampling.BOX if min(image.size) >= 2 * SIDE else Image.Resampling.BILINEAR
    return np.asarray(image.resize((SIDE, SIDE), method), np.float64) / 255


def _even_contrast(luma: NDArray[np.float64]) -> NDArray[np.float64]:
    """Subtract the local mean and divide by the local deviation."""
    above = luma - gaussian_filter(luma, CONTRAST_SIGMA, mode="mirror")
    deviation = np.sqrt(gaussian_filter(above * above, CONTRAST_SIGMA, mode="mirror"))
    return above / (deviation + CONTRAST_FLOOR)


def _chroma(pixels: NDArray[np.float64], luma: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the coarse layout of color, of norm at most CHROMA_WEIGHT."""
    band = _band()
    parts = [_dct(pixels[..., channel] - luma)[band.chroma] * band.chroma_radius for channel in (0, 2)]
    hue = np.concatenate(parts)
    amount = min(1.0, float(np.linalg.norm(hue)) / CHROMA_FLOOR)
    return CHROMA_WEIGHT * amount * _unit(np.cbrt(hue))


def _dct(plane: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the orthonormal DCT, scaled so that a plane of ones has a mean coefficient of 1."""
    return np.asarray(dctn(plane, norm="ortho")) / SIDE


def _unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


class _Band:
    """Masks and radii of the used DCT coefficients: amplitudes of photographs fall as 1 / radius (Field 1987)."""

    def __init__(self) -> None:
        index = np.arange(SIDE)
        radius = np.hypot(index[:, None], index[None, :])
        self.luma = (radius > LUMA_BAND[0]) & (radius <= LUMA_BAND[1])
        self.chroma = radius <= CHROMA_CUTOFF
        self.luma_radius = radius[self.luma]
        self.chroma_radius = np.maximum(radius[self.chroma], 1)


@lru_cache(maxsize=1)
def _band() -> _Band:
    return _Band()


@lru_cache(maxsize=1)
def _color_projection() -> NDArray[np.float64]:
    """Return [3, F] random Fourier features (Rahimi and Recht 2007) of the kernel exp(-distance² / 2 bandwidth²)."""
    return np.random.default_rng(0).standard_normal((3, NUM_COLOR_FEATURES)) / COLOR_BANDWIDTH
