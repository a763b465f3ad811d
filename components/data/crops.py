"""Multi-crop augmentation: two global and several local crops of an image (dinov2/data/augmentations.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from components.data.config import CropConfig

NUM_GLOBAL = 2  # the objective pairs the crops of an image: the teacher's view of one is the other's target
SOLARIZE_THRESHOLD = 128
LOG_ASPECT = (math.log(3 / 4), math.log(4 / 3))
CROP_TRIES = 10  # then the largest centred crop, as torchvision's RandomResizedCrop does
REDUCING_GAP = 2.0  # shrink by whole factors first while twice the target size remains; hardly visible, much faster


@dataclass(frozen=True)
class Crops:
    """Crops of one image as uint8 RGB."""

    global_crops: np.ndarray  # [G, H, W, 3]
    local_crops: np.ndarray  # [L, h, w, 3]


@dataclass(frozen=True)
class _Recipe:
    size: int
    scale: tuple[float, float]
    blur: float
    solarize: float


def sample_crops(image: Image.Image, config: CropConfig, seed: int, position: int) -> Crops:
    """Crops of the image at `position` of the stream; crop i draws from its own generator (seed, position, i)."""
    blur = config.blur_probability
    first = _Recipe(config.global_size, config.global_scale, blur.global1, 0.0)
    second = _Recipe(config.global_size, config.global_scale, blur.global2, config.solarize_probability)
    local = _Recipe(config.local_size, config.local_scale, blur.local, 0.0)
    crops = [
        np.asarray(_augment(image, recipe, config, np.random.default_rng([seed, position, number])))
        for number, recipe in enumerate([first, second, *[local] * config.num_local])
    ]
    empty = np.empty((0, config.local_size, config.local_size, 3), np.uint8)
    return Crops(np.stack(crops[:NUM_GLOBAL]), np.stack(crops[NUM_GLOBAL:]) if config.num_local else empty)


def crop_box(
    width: int, height: int, scale: tuple[float, float], generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random crop: area share from `scale`, aspect ratio 3/4 to 4/3.

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


def jitter_colors(image: Image.Image, config: CropConfig, generator: np.random.Generator) -> Image.Image:
    """Change brightness, contrast, saturation and hue in random order (torchvision's ColorJitter on PIL images)."""

    def enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance], strength: float) -> None:
        nonlocal image
        factor = generator.uniform(1 - strength, 1 + strength)
        image = kind(image).enhance(factor)

    for change in generator.permutation(4):
        if change == 0:
            enhance(ImageEnhance.Brightness, config.brightness)
        elif change == 1:
            enhance(ImageEnhance.Contrast, config.contrast)
        elif change == 2:
            enhance(ImageEnhance.Color, config.saturation)
        else:
            image = shift_hue(image, generator.uniform(-config.hue, config.hue))
    return image


def shift_hue(image: Image.Image, turns: float) -> Image.Image:
    """Turn the hue by a share of the colour circle; the 256 hues of PIL's HSV wrap around."""
    shift = int(turns * 255)
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _augment(image: Image.Image, recipe: _Recipe, config: CropConfig, generator: np.random.Generator) -> Image.Image:
    box = crop_box(image.width, image.height, recipe.scale, generator)
    size = (recipe.size, recipe.size)
    crop = image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=REDUCING_GAP)
    if generator.random() < config.flip_probability:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if generator.random() < config.color_jitter_probability:
        crop = jitter_colors(crop, config, generator)
    if generator.random() < config.grayscale_probability:
        crop = crop.convert("L").convert("RGB")
    if generator.random() < recipe.blur:
        crop = crop.filter(ImageFilter.GaussianBlur(generator.uniform(*config.blur_sigma)))
    if generator.random() < recipe.solarize:
        crop = ImageOps.solarize(crop, SOLARIZE_THRESHOLD)
    return crop
