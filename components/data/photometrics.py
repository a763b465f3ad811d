"""Color augmentation and blur of a stack of training crops, in float32.

The operations and their order are torchvision's (`ColorJitter`, `RandomGrayscale`, `GaussianBlur`, `RandomSolarize`),
as used by dinov2/data/augmentations.py. Only NumPy's elementwise operations and row sums are used, whose rounding does
not depend on the position: the result for a crop is equal in any stack and with any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Levels = NDArray[np.uint8]

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as PIL and torchvision
BLUR_RADIUS = 4  # pixels; dinov2's kernel of 9
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_BLOCK = 65_536  # pixels per hue shift, so that temporaries fit the cache


@dataclass(frozen=True)
class Jitter:
    """One draw of torchvision's ColorJitter: the order of the four changes, and the strength of each."""

    order: tuple[int, ...]  # a permutation of BRIGHTNESS, CONTRAST, SATURATION, HUE
    factors: tuple[float, float, float]  # of brightness, contrast and saturation; 1 changes nothing
    turns: float  # of the hue, in color circles


@dataclass(frozen=True)
class Photometrics:
    """Color changes of one crop, in this order; None or False: skipped."""

    jitter: Jitter | None = None
    gray: bool = False
    blur_sigma: float | None = None  # pixels
    solarize: bool = False


def change_colors(crops: Levels, draws: Sequence[Photometrics]) -> Levels:
    """Apply the drawn color changes to each crop.

    Args:
        crops: [N, 3, H, W] RGB.
        draws: N draws.

    Returns:
        [N, 3, H, W].
    """
    changed = crops.copy()
    jittered = [(number, draw.jitter) for number, draw in enumerate(draws) if draw.jitter is not None]
    if jittered:
        numbers, jitters = zip(*jittered, strict=True)
        changed[list(numbers)] = _jitter(crops[list(numbers)], jitters)
    for crop, draw in zip(changed, draws, strict=True):
        if draw.gray:
            crop[:] = luma(crop.astype(np.float32)) + np.float32(0.5)
        if draw.blur_sigma is not None:
            blur(crop, draw.blur_sigma)
        if draw.solarize:
            np.minimum(crop, 255 - crop, out=crop)  # min(x, 255 - x) inverts values from 128 on
    return changed


def _jitter(crops: Levels, jitters: Sequence[Jitter]) -> Levels:
    """ColorJitter of each crop, in float32 from the first change to the last.

    Args:
        crops: [N, 3, H, W].
        jitters: N draws.

    Returns:
        [N, 3, H, W].
    """
    count, _, height, width = crops.shape
    planes = np.empty((3, count, height * width), np.float32)
    planes[:] = crops.reshape(count, 3, -1).transpose(1, 0, 2)
    together = max(_BLOCK // planes.shape[2], 1)  # crops per hue shift
    work = np.empty((6, together, planes.shape[2]), np.float32)  # allocated once, because fresh memory is slow
    hue_at = [jitter.order.index(HUE) for jitter in jitters]
    for number, (jitter, at) in enumerate(zip(jitters, hue_at, strict=True)):
        for kind in jitter.order[:at]:
            _enhance(planes[:, number], kind, jitter.factors[kind], work[:2, 0])
    turns = np.array([jitter.turns for jitter in jitters], np.float32)
    for start in range(0, count, together):
        shift_hue(planes[:, start : start + together], turns[start : start + together], work)
    for number, (jitter, at) in enumerate(zip(jitters, hue_at, strict=True)):
        for kind in jitter.order[at + 1 :]:
            _enhance(planes[:, number], kind, jitter.factors[kind], work[:2, 0])
    planes += np.float32(0.5)
    return planes.astype(np.uint8).transpose(1, 0, 2).reshape(crops.shape)


def _enhance(crop: Floats, kind: int, factor: float, work: Floats) -> None:
    """Blend [3, P] in place with black (brightness), its mean gray (contrast) or its own gray (saturation)."""
    if kind == CONTRAST:
        mean = float(np.dot(LUMA, crop.sum(axis=1) / crop.shape[1]))
    gray = luma(crop, work) if kind == SATURATION else None
    crop *= np.float32(factor)
    if kind == CONTRAST:
        crop += np.float32((1 - factor) * mean)
    elif gray is not None:
        gray *= np.float32(1 - factor)
        crop += gray
    if factor > 1:  # otherwise the blend stays in range
        np.clip(crop, 0, 255, out=crop)


def shift_hue(planes: Floats, turns: Floats, work: Floats) -> None:
    """Shift the hue in place by a share of the color circle, preserving the largest and smallest channel values.

    HSV by sorting the channels, without a case for each of the six sectors of the hue.

    Args:
        planes: [3, N, P] in 0 to 255.
        turns: [N] in -1 to 1.
        work: [6, N or more, P], overwritten.
    """
    red, green, blue = planes
    low, high, middle, sector, below, spare = work[:, : len(turns)]
    np.less(green, blue, out=below)
    np.minimum(green, blue, out=low)
    np.maximum(green, blue, out=high)
    np.less(red, high, out=spare)
    np.minimum(red, high, out=middle)
    np.maximum(red, high, out=high)
    # The hue in sixths of the circle is |sector|: 0, or -6 where blue is above green; where red is not the largest,
    # -2, or 4 where blue is above green; plus the middle channel's height over the lowest of the three in that order.
    np.multiply(below, 12, out=sector)
    sector -= 2
    sector *= spare
    below *= 6
    sector -= below
    middle -= low
    np.minimum(low, red, out=low)
    chroma = np.subtract(high, low, out=high)
    middle /= np.maximum(chroma, np.float32(1e-6), out=spare)
    sector += middle
    np.abs(sector, out=sector)
    sector += (6 * turns).astype(np.float32)[:, None]
    np.floor(np.multiply(sector, np.float32(1 / 6), out=middle), out=middle)
    middle *= 6
    sector -= middle  # in 0 to 6 again
    for plane, center in zip(planes, (3, 2, 4), strict=True):
        np.subtract(sector, np.float32(center), out=middle)
        np.abs(middle, out=middle)
        np.subtract(*((middle, np.float32(1)) if center == 3 else (np.float32(2), middle)), out=middle)
        np.clip(middle, 0, 1, out=middle)
        middle *= chroma
        np.add(middle, low, out=plane)


def luma(planes: Floats, work: Floats | None = None) -> Floats:
    """Return the gray of [3, ...] planes as PIL's mode L, without rounding; in `work[0]` if given."""
    if work is None:
        work = np.empty((2, *planes.shape[1:]), np.float32)
    gray, part = work[0], work[1]
    np.multiply(planes[0], np.float32(LUMA[0]), out=gray)
    for plane, weight in zip(planes[1:], LUMA[1:], strict=True):
        gray += np.multiply(plane, np.float32(weight), out=part)
    return gray


def blur(crop: Levels, sigma: float) -> None:
    """Gaussian blur of [3, H, W] in place: a kernel of 9 pixels and mirrored edges (torchvision's GaussianBlur).

    Integer arithmetic: weights are in 256ths, and each of the two passes rounds to whole levels.
    """
    weights = _kernel(sigma)
    height, width = crop.shape[1:]
    radius = min(len(weights) - 1, height - 1, width - 1)
    if radius < 1:
        return
    weights[radius] += weights[radius + 1 :].sum()  # only crops smaller than the kernel
    row = width + 2 * radius
    padded = np.empty((height + 2 * radius, row), np.uint16)
    once, twice, pair = np.empty((3, height * row), np.uint16)
    blurred = as_strided(twice, (height, width), (row * twice.itemsize, twice.itemsize))
    for plane in crop:
        # Both passes run over flat arrays: a row's neighbors beyond its ends are its own mirrored margin.
        _mirror(plane, padded, radius)
        _weigh(padded.ravel(), weights[: radius + 1], row, once, pair)
        _weigh(once, weights[: radius + 1], 1, twice[: once.size - 2 * radius], pair)
        np.copyto(plane, blurred, casting="unsafe")


def _kernel(sigma: float) -> NDArray[np.uint16]:
    """Return the kernel's weights in 256ths, from the center outward, without those that round to zero."""
    weights = np.exp(-0.5 * (np.arange(BLUR_RADIUS + 1) / sigma) ** 2)
    rounded = np.rint(256 * weights / (weights[0] + 2 * weights[1:].sum())).astype(np.uint16)
    rounded[0] = 256 - 2 * rounded[1:].sum()
    return rounded[: np.count_nonzero(rounded)]


def _mirror(plane: Levels, padded: NDArray[np.uint16], radius: int) -> None:
    """Copy [H, W] into [H + 2 radius, W + 2 radius], mirrored at the edges without repeating them."""
    height, width = plane.shape
    padded[radius : radius + height, radius : radius + width] = plane
    for lines, size in ((padded.T, width), (padded, height)):
        lines[:radius] = lines[2 * radius : radius : -1]
        lines[radius + size :] = lines[radius + size - 2 : size - 2 : -1]


def _weigh(
    values: NDArray[np.uint16],
    weights: NDArray[np.uint16],
    stride: int,
    total: NDArray[np.uint16],
    work: NDArray[np.uint16],
) -> None:
    """Apply a symmetric kernel to neighbors `stride` apart, rounded to whole levels.

    Args:
        values: [n + 2 * radius * stride] in 0 to 255.
        weights: [radius + 1] in 256ths, from the center outward.
        stride: distance of neighbors in `values`.
        total: [n], written.
        work: [n or more], overwritten.
    """
    size, middle = len(total), (len(weights) - 1) * stride
    np.multiply(values[middle : middle + size], weights[0], out=total)
    pair = work[:size]
    for distance in range(1, len(weights)):
        before, after = middle - distance * stride, middle + distance * stride
        np.add(values[before : before + size], values[after : after + size], out=pair)
        pair *= weights[distance]
        total += pair  # at most 255 * 256
    total += np.uint16(128)
    total >>= np.uint16(8)
