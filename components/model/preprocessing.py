"""Preprocess a decoded image for a network: resize, crop, mean and standard deviation.

Evaluation, kNN probe, training, embedders, classifiers and the registered model share it, so that a served model gives
the evaluated features. It imports no torch: embedders and classifiers of other frameworks run without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from components.model.config import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def center_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Resize the shorter side (bicubic, antialiased) and cut the square in the middle."""
    resized = resize_short_side(image, preprocessing.resize_size, Image.Resampling.BICUBIC)
    crop_size = preprocessing.crop_size
    left, top = (resized.width - crop_size) // 2, (resized.height - crop_size) // 2
    return resized.crop((left, top, left + crop_size, top + crop_size))


def center_crops(images: Iterable[Image.Image], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Return the `center_crop` of each image, [B, S, S, 3]; an iterator is consumed one image at a time."""
    return np.stack([np.asarray(center_crop(image, preprocessing)) for image in images])


def to_input(crops: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """Normalize [N, 3, H, W] uint8 images by the mean and standard deviation of each channel; float32."""
    pixels = crops.float() / 255
    means, deviations = (pixels.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    return (pixels - means) / deviations


def resize_short_side(image: Image.Image, size: int, resampling: Image.Resampling) -> Image.Image:
    """Resize to a shorter side of `size` pixels, preserving the aspect ratio to whole pixels."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    return image.resize((width, height), resampling)


def squeeze(image: Image.Image, size: int) -> Image.Image:
    """Resize to a square (bilinear), ignoring the aspect ratio."""
    return image.resize((size, size), Image.Resampling.BILINEAR)


def normalize(
    pixels: NDArray[np.floating], mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> NDArray[np.floating]:
    """Scale RGB to [0, 1], subtract each channel's mean and divide by its standard deviation, in the pixels' dtype.

    Args:
        pixels: [H, W, 3], 0 to 255.
        mean: of the channels.
        std: of the channels.
    """
    return (pixels / 255 - np.asarray(mean, pixels.dtype)) / np.asarray(std, pixels.dtype)
