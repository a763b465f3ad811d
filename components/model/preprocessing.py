"""From a decoded image to what a backbone takes: the same for evaluation, probe, embedder and registered model."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from components.model.config import Preprocessing

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def center_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Resize the shorter side (bicubic, antialiased) and cut the square in the middle."""
    resize_size, crop_size = preprocessing.resize_size, preprocessing.crop_size
    scale = resize_size / min(image.size)
    width, height = (max(resize_size, round(side * scale)) for side in image.size)
    left, top = (width - crop_size) // 2, (height - crop_size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + crop_size, top + crop_size))


def to_input(crops: Tensor) -> Tensor:
    """Normalise [N, 3, H, W] uint8 images by ImageNet's mean and standard deviation; float32."""
    mean = torch.tensor(IMAGENET_MEAN, device=crops.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=crops.device).view(3, 1, 1)
    return (crops.float() / 255 - mean) / std
