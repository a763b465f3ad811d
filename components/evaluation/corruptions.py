"""The 15 corruptions of ImageNet-C at 5 severities (Hendrycks and Dietterich 2019, arXiv:1903.12261).

Severities are those of the released code (hendrycks/robustness, `make_imagenet_c.py`), made for images of 224 pixels.
Lengths, such as the radius of a blur, are multiplied by the shorter side over 224, and textures such as snow are drawn
at 224 pixels and resized, so that a severity looks the same at any size. Noise, JPEG blocks and the share of pixels
that `pixelate` keeps do not depend on the size.

What differs from the released code, which needs OpenCV and ImageMagick: frost is drawn instead of cut out of their
photographs; frosted glass moves all pixels at once instead of one after another; blur kernels and fog are drawn
anew by the same formulas; results are rounded and not compressed to JPEG. Scores are comparable between models
measured here, not with published values on ImageNet-C.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage, signal
from skimage import color

Pixels = NDArray[np.uint8]  # [H, W, 3] RGB
Corruption = Callable[[Pixels, int, np.random.Generator], Pixels]
LevelT = TypeVar("LevelT")

SEVERITIES = (1, 2, 3, 4, 5)
_SIDE = 224  # of the images that the severities are made for


def corrupt(image: Pixels, name: str, severity: int, generator: np.random.Generator) -> Pixels:
    """Return the image with a corruption of `CORRUPTIONS`.

    Args:
        image: [H, W, 3] RGB, 8 bits.
        name: of the corruption.
        severity: 1 to 5.
        generator: draws noise, angles and textures; seed it by image, corruption and severity to repeat them.

    Returns:
        [H, W, 3], a new array.

    Raises:
        ValueError: an unknown name or severity, or an image of another type.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"corruption {name!r}; allowed: {', '.join(CORRUPTIONS)}")
    return CORRUPTIONS[name](image, severity, generator)


def gaussian_noise(image: Pixels, severity: int, generator: np.random.Generator) -> Pixels:
    """Add normal noise."""
    values, scale = _unit(image), _level(severity, (0.08, 0.12, 0.18, 0.26, 0.38))
    return _pixels(values + scale * generator.standard_normal(values.shape, np.float32))


def shot_noise(image: Pixels, severity: int, generator: np.random.Generator) -> Pixels:
    """Count photons: Poisson noise."""
    values, photons = _unit(image), _level(severity, (60, 25, 12, 5, 3))
    return _pixels(generator.poisson(values * photons) / photons)


def impulse_noise(image: Pixels, severity: int, generator: np.random.Generator) -> Pixels:
    """Set a share of the values to black or white (salt and pepper)."""
    values, share = _unit(image), _level(severity, (0.03, 0.06, 0.09, 0.17, 0.27))
    drawn = generator.random(values.shape)
    return _pixels(np.select([drawn < share / 2, drawn < share], [0.0, 1.0], values))


def defocus_blur(image: Pixels, severity: int, generator: np.random.Generator) -> Pixels:
    """Blur by a disk."""
    radius = _level(severity, (3, 4, 6, 8, 10)) * _scale(image)
    # A disk of many points, each shared among its four nearest pixels, so that a radius below one pixel blurs too.
    ticks = (np.arange(128) + 0.5) / 64 - 1
    x, y = np.meshgrid(ticks, ticks)
    inside = x**2 + y**2 <= 1
    return _pixels(_convolve(_unit(image), radius * np.stack([x[inside], y[inside]], axis=1), None))


def glass_blur(image: Pixels, severity: int, generator: np.random.Generator) -> Pixels:
    """Take each pixel from a random place nearby, some times, between two Gaussian blurs (frosted glass)."""
    sigma, delta, times = _level(severity, ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2)))
    scale = _scale(image)
    sigma, delta = sigma * scale, max(1, round(delta * scale))
    values = ndimage.gaussian_filter(_unit(image), (sigma, sigma, 0), mode="nearest")
    height, width = image.shape[:2]
    rows, columns = np.indices((height, width))
    for _ in range(times):
        moves = generator.integers(-delta, delta, size=(2, height, width))
        values = values[np.clip(rows + moves[0], 0, height - 1), np.clip(columns + moves[1], 0, width - 1)]
    return _pixels(ndimage.gaussian_filter(values, (sigma, sigma, 0), mode="nearest"))


def motion_blur(image: Pixels, severity: int, generator: np.random.Generator) -> Pixels:
    """Blur along a line at a random angle of up to 45 degrees."""
    radius, sigma = _level(severity, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)))
    return _pixels(_motion(_unit(image), radius, sigma, generator.uniform(-45, 45)))


def zoom_blur(image: Pixels, severity: int, generator: np.random.Generator) -> Pixels:
    """Average the image and its enlargements (a camera that moves towards the scene)."""
    most, step = _level(severity, ((0.10, 0.01), (0.15, 0.01), (0.20, 0.02), (0.24, 0.02), (0.30, 0.03)))
    values, picture = _unit(image), Image.fromarray(image)
    width, height = picture.size
    factors = 1 + np.arange(round(most / step) + 1) * step
    total = values.copy()
    for factor in factors:
        left, top = (width - width / factor) / 2, (height - height / factor) / 2
        box = (left, top, width - left, height - top)
        total += _unit(np.asarray(picture.resize(picture.size, Image.Resampling.BILINEAR, box)))
    return _pixels(total / (len(factors) + 1))


def snow(image: Pixels, severity: int, generator: np.random.Generator) -> Pixels:
    """Whiten the image and add falling flakes."""
    mean, std, size, threshold, radius, sigma, kept = _level(
        severity,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    )
    values = _unit(image)
    drawn = _drawn_shape(image)
    cells = [int(np.ceil(side / size)) for side in drawn]
    flakes = _resize(generator.normal(mean, std, cells), drawn)
    flakes[flakes < threshold] = 0
    flakes = _motion(np.clip(flakes, 0, 1)[..., None], radius, sigma, generator.uniform(-135, -45))
    flakes = _resize(flakes[..., 0], values.shape)[..., None]
    gray = color.rgb2gray(values)[..., None]
    whitened = kept * values + (1 - kept) * np.maximum(values, gray * 1.5 + 0.5)
    return _pixels(whitened + flakes + flakes[::-1, ::-1])


def frost(image: Pixels, severity: int, generator: np.random.Generator) -> Pixels:
    """Mix the image with crystals of ice, which are drawn; the released code cuts them out of photographs of frost.

    The weights are those of the released code.
    """
    weight, ice = _level(severity, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)))
    values = _unit(image)
    crystals = _resize(_crystals(generator), values.shape)[..., None]
    return _pixels(weight * values + ice * crystals * np.array([0.86, 0.94, 1.0]))  # bluish


def fog(image: Pixels, severity: int, generator: np.random.Generator) -> Pixels:
    """Add a cloud of fractal noise, then scale back to the brightest value of the image."""
    amount, decay = _level(severity, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)))
    values = _unit(image)
    # The released code multiplies its amplitude twice, so that octaves fall by the square of the stated decay.
    cloud = _resize(_fractal(decay**2, generator), values.shape)[..., None]
    brightest = values.max()
    return _pixels((values + amount * cloud) * brightest / (brightest + amount))


def brightness(image: Pixels, severity: int, generator: np.random.Generator) -> Pixels:
    """Raise the value in HSV."""
    hsv = color.rgb2hsv(_unit(image))
    hsv[..., 2] = np.clip(hsv[..., 2] + _level(severity, (0.1, 0.2, 0.3, 0.4, 0.5)), 0, 1)
    return _pixels(color.hsv2rgb(hsv))


def contrast(image: Pixels, severity: int, generator: np.random.Generator) -> Pixels:
    """Move all values towards the mean color."""
    values, kept = _unit(image), _level(severity, (0.4, 0.3, 0.2, 0.1, 0.05))
    means = values.mean(axis=(0, 1), keepdims=True)
    return _pixels((values - means) * kept + means)


def elastic_transform(image: Pixels, severity: int, generator: np.random.Generator) -> Pixels:
    """Stretch by a random affine map and a smooth random field; severities 1 and 2 move far, 3 to 5 locally."""
    levels = ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
    # 244 is the released code's slip for 224, kept because its severities contain it.
    strength, sigma, affine = (244 * value for value in _level(severity, levels))
    values, scale = _unit(image), _scale(image)
    shape, drawn = image.shape[:2], _drawn_shape(image)
    corner = min(shape) // 3
    corners = np.array(shape) // 2 + corner * np.array([[1, 1], [1, -1], [-1, -1]])  # [3, 2] row, column
    moved = corners + scale * generator.uniform(-affine, affine, size=(3, 2))
    back = np.linalg.solve(np.hstack([moved, np.ones((3, 1))]), corners)  # [3, 2]: places after -> before
    fields = [
        strength * ndimage.gaussian_filter(generator.uniform(-1, 1, drawn), sigma, mode="reflect", truncate=3)
        for _ in range(2)
    ]
    places = np.indices(shape) + scale * np.stack([_resize(field, shape) for field in fields])  # [2, H, W]
    places = np.tensordot(back[:2].T, places, axes=1) + back[2][:, None, None]
    channels = [ndimage.map_coordinates(values[..., c], places, order=1, mode="mirror") for c in range(3)]
    return _pixels(np.stack(channels, axis=2))


def pixelate(image: Pixels, severity: int, generator: np.random.Generator) -> Pixels:
    """Keep a share of the rows and columns."""
    share = _level(severity, (0.6, 0.5, 0.4, 0.3, 0.25))
    picture = Image.fromarray(_checked(image))
    small = picture.resize([max(1, int(side * share)) for side in picture.size], Image.Resampling.BOX)
    return np.array(small.resize(picture.size, Image.Resampling.BOX))


def jpeg_compression(image: Pixels, severity: int, generator: np.random.Generator) -> Pixels:
    """Compress to JPEG of low quality."""
    file = io.BytesIO()
    Image.fromarray(_checked(image)).save(file, "JPEG", quality=_level(severity, (25, 18, 15, 10, 7)))
    return np.array(Image.open(file).convert("RGB"))


CORRUPTIONS: dict[str, Corruption] = {
    one.__name__: one
    for one in (
        *(gaussian_noise, shot_noise, impulse_noise),
        *(defocus_blur, glass_blur, motion_blur, zoom_blur),
        *(snow, frost, fog, brightness),
        *(contrast, elastic_transform, pixelate, jpeg_compression),
    )
}


def _level(severity: int, levels: Sequence[LevelT]) -> LevelT:
    if severity not in SEVERITIES:
        raise ValueError(f"severity {severity}; allowed: {SEVERITIES[0]} to {SEVERITIES[-1]}")
    return levels[severity - 1]


def _checked(image: Pixels) -> Pixels:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image of {image.dtype} {list(image.shape)}; allowed: uint8 [H, W, 3], RGB")
    return image


def _unit(image: Pixels) -> NDArray[np.float32]:
    return np.divide(_checked(image), 255, dtype=np.float32)


def _pixels(values: NDArray[np.floating]) -> Pixels:
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def _scale(image: NDArray[np.generic]) -> float:
    return min(image.shape[:2]) / _SIDE


def _drawn_shape(image: NDArray[np.generic]) -> tuple[int, int]:
    """Return the shape of a texture at the scale of the severities, to be resized to the image."""
    return round(image.shape[0] / _scale(image)), round(image.shape[1] / _scale(image))


def _motion(values: NDArray[np.floating], radius: float, sigma: float, degrees: float) -> NDArray[np.floating]:
    """Blur along a line from each pixel: ImageMagick's kernel, half a Gaussian of 2 radius + 1 steps of a pixel."""
    steps = np.arange(2 * radius + 1)
    direction = np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])
    return _convolve(values, steps[:, None] * _scale(values) * direction, np.exp(-(steps**2) / (2 * sigma**2)))


def _convolve(
    values: NDArray[np.floating], offsets: NDArray[np.floating], weights: NDArray[np.floating] | None
) -> NDArray[np.floating]:
    """Average the image over offsets, with a mirrored border.

    Args:
        values: [H, W, channels].
        offsets: [K, 2] x and y in pixels; each is shared among its four nearest pixels.
        weights: [K]; None: equal.
    """
    reach = int(np.ceil(np.abs(offsets).max())) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    low = np.floor(offsets).astype(int)
    part = offsets - low
    for dx in (0, 1):
        for dy in (0, 1):
            share = np.abs(1 - dx - part[:, 0]) * np.abs(1 - dy - part[:, 1])
            places = low[:, 1] + dy + reach, low[:, 0] + dx + reach
            np.add.at(kernel, places, share if weights is None else share * weights)
    kernel /= kernel.sum()
    padded = np.pad(values, ((reach, reach), (reach, reach), (0, 0)), mode="symmetric")
    return signal.fftconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1))


def _fractal(decay: float, generator: np.random.Generator) -> NDArray[np.float64]:
    """Draw fractal noise in [0, 1], [224, 224]: midpoint displacement, written as a sum of interpolated octaves.

    Args:
        decay: how much less each octave, of half the length, adds.
        generator: draws the octaves.
    """
    total = np.zeros((256, 256))
    for octave in range(1, 9):
        total += _resize(generator.uniform(-1, 1, (2**octave, 2**octave)), total.shape) / decay**octave
    total = total[:_SIDE, :_SIDE]
    return (total - total.min()) / np.ptp(total)


def _crystals(generator: np.random.Generator) -> NDArray[np.float64]:
    """Draw needles of ice that branch by 60 degrees and lie denser in some places, [224, 224] in [0, 1]."""
    count = 2000
    directions, density = 2 * np.pi * _fractal(3.0, generator), _fractal(1.5, generator)
    starts = generator.integers(0, _SIDE, size=(count, 2))  # x and y
    x, y = starts.T
    angles = directions[y, x] + np.pi / 3 * generator.integers(-1, 2, count)
    lengths = generator.exponential(14, count) * (0.3 + density[y, x])
    ends = starts + lengths[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    canvas = Image.new("L", (_SIDE, _SIDE))
    pen = ImageDraw.Draw(canvas)
    lines, shades = np.hstack([starts, ends]).tolist(), generator.integers(60, 256, count).tolist()
    for line, shade in zip(lines, shades, strict=True):
        pen.line(line, fill=shade)
    needles = ndimage.gaussian_filter(np.asarray(canvas) / 255, 0.6) * (0.3 + 0.7 * density)
    return np.clip(needles * (0.4 / needles.mean()), 0, 1)  # about as bright as the photographs


def _resize(values: NDArray[np.floating], shape: tuple[int, ...]) -> NDArray[np.floating]:
    """Resize [h, w] to the first two sides of `shape`, bilinearly."""
    picture = Image.fromarray(values.astype(np.float32))
    return np.array(picture.resize((shape[1], shape[0]), Image.Resampling.BILINEAR))
