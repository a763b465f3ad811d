"""Multi-crop augmentation: two global and several local crops of an image (dinov2/data/augmentations.py).

Blur: dinov2's `GaussianBlur(p)` blurs with probability 1 - p, so that its p = 1.0, 0.1 and 0.5 blur the global crops
never and in 90 % of cases, and local ones in 50 %, while DINO intended always, 10 % and 50 % (dinov3 issue 286). All
released weights were trained this way, and so are ours by default; `crops.blur_probability` holds the effective values
({global1: 1.0, global2: 0.1, local: 0.5} is DINO's intent).

Speed: a JPEG is decoded at 1/2, 1/4 or 1/8 if no crop needs more; crop and resize are one call on uint8; colors are
changed for all crops of one size at once (`photometrics.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from components.data.config import NUM_GLOBAL, CropConfig
from components.data.photometrics import Jitter, Photometrics, change_colors
from components.data.shards import load_image, open_image, upright_size

LOG_ASPECT = (math.log(3 / 4), math.log(4 / 3))
CROP_TRIES = 10  # then a central crop, as in torchvision's RandomResizedCrop
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Crops:
    """Crops of one image as uint8 RGB."""

    global_crops: NDArray[np.uint8]  # [G, 3, H, W]
    local_crops: NDArray[np.uint8]  # [L, 3, h, w]
    gram_crops: NDArray[np.uint8] | None = None  # [G, 3, sH, sW], global crops without color changes


@dataclass(frozen=True)
class _Kind:
    size: int
    scale: tuple[float, float]
    blur: float
    solarize: float


@dataclass(frozen=True)
class Draw:
    """All random parameters of one crop."""

    box: Box
    size: int
    flip: bool
    photometrics: Photometrics


def sample_crops(data: bytes, config: CropConfig, seed: int, position: int, gram_scale: int = 1) -> Crops:
    """Crop the encoded image at `position` of the stream; crop i draws from its own generator (seed, position, i).

    With `gram_scale` s above 1, also return the global crops s times as large without color changes, for DINOv3's Gram
    teacher (`crops.gram_teacher_no_distortions` of its released configurations).

    Raises:
        ImageError: the bytes cannot be decoded.
    """
    opened = open_image(data)
    width, height = upright_size(opened)
    draws = draw_crops(width, height, config, seed, position)
    gram = [Draw(d.box, d.size * gram_scale, d.flip, Photometrics()) for d in draws[:NUM_GLOBAL]]
    image = load_image(opened, shrink=shrinking([*draws, *gram]))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # [1, 3, H, W], channels last
    scale = (image.width / width, image.height / height)
    global_crops = _make(pixels, scale, draws[:NUM_GLOBAL])
    local_crops = np.empty((0, 3, config.local_size, config.local_size), np.uint8)
    if config.num_local:
        local_crops = _make(pixels, scale, draws[NUM_GLOBAL:])
    return Crops(global_crops, local_crops, _make(pixels, scale, gram) if gram_scale > 1 else None)


def crop_box(width: int, height: int, scale: tuple[float, float], generator: np.random.Generator) -> Box:
    """Draw a random crop box: share of the area from `scale`, aspect ratio 3/4 to 4/3.

    torchvision's RandomResizedCrop.get_params.
    """
    for _ in range(CROP_TRIES):
        area = width * height * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(*LOG_ASPECT))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, 3 / 4), 4 / 3)
    w, h = min(width, max(round(height * aspect), 1)), min(height, max(round(width / aspect), 1))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def draw_crops(width: int, height: int, config: CropConfig, seed: int, position: int) -> list[Draw]:
    """Draw the random parameters of an image's crops, global ones first."""
    blur = config.blur_probability
    first = _Kind(config.global_size, config.global_scale, blur.global1, 0.0)
    second = _Kind(config.global_size, config.global_scale, blur.global2, config.solarize_probability)
    local = _Kind(config.local_size, config.local_scale, blur.local, 0.0)
    return [
        _draw_crop(width, height, kind, config, np.random.default_rng([seed, position, number]))
        for number, kind in enumerate([first, second, *[local] * config.num_local])
    ]


def _draw_crop(width: int, height: int, kind: _Kind, config: CropConfig, generator: np.random.Generator) -> Draw:
    box = crop_box(width, height, kind.scale, generator)
    flip = generator.random() < config.flip_probability
    jittered = generator.random() < config.color_jitter_probability
    photometrics = Photometrics(
        _draw_jitter(config, generator) if jittered else None,
        gray=generator.random() < config.grayscale_probability,
        blur_sigma=generator.uniform(*config.blur_sigma) if generator.random() < kind.blur else None,
        solarize=generator.random() < kind.solarize,
    )
    return Draw(box, kind.size, flip, photometrics)


def _draw_jitter(config: CropConfig, generator: np.random.Generator) -> Jitter:
    """Draw jitter strengths as torchvision's ColorJitter does."""
    strengths = (config.brightness, config.contrast, config.saturation)
    brightness, contrast, saturation = (float(generator.uniform(1 - s, 1 + s)) for s in strengths)
    turns = float(generator.uniform(-config.hue, config.hue))
    return Jitter(tuple(generator.permutation(4).tolist()), (brightness, contrast, saturation), turns)


def shrinking(draws: Sequence[Draw]) -> float:
    """Return how many times smaller an image may be decoded without upsampling any crop."""
    return min(min(d.box[2] - d.box[0], d.box[3] - d.box[1]) / d.size for d in draws)


def _make(pixels: torch.Tensor, scale: tuple[float, float], draws: Sequence[Draw]) -> NDArray[np.uint8]:
    """Crop and resize an image, then change the colors of the crops.

    Args:
        pixels: [1, 3, H, W] uint8.
        scale: width and height of `pixels` relative to the image in which the boxes were drawn.
        draws: of crops of one size.

    Returns:
        [N, 3, size, size] uint8.
    """
    size = draws[0].size
    cut = np.empty((len(draws), 3, size, size), np.uint8)
    for crop, draw in zip(cut, draws, strict=True):
        left, right = (round(x * scale[0]) for x in (draw.box[0], draw.box[2]))
        top, bottom = (round(y * scale[1]) for y in (draw.box[1], draw.box[3]))
        box = pixels[:, :, top : max(bottom, top + 1), left : max(right, left + 1)]
        torch.from_numpy(crop).copy_(F.interpolate(box, (size, size), mode="bicubic", antialias=True)[0])
        if draw.flip:
            crop[:] = crop[:, :, ::-1].copy()
    return change_colors(cut, [draw.photometrics for draw in draws])
