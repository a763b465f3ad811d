"""The crops of dinov2/data/augmentations.py as torchvision makes them of PIL images, one crop and change at a time.

What torchvision 0.28 calls for each change, restated from its documentation, so that it need not be installed.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.nn import functional as F

from components.data.config import CropConfig
from components.data.crops import Draw, draw_crops
from components.data.photometrics import BRIGHTNESS, CONTRAST, SATURATION, Jitter

ENHANCE = {BRIGHTNESS: ImageEnhance.Brightness, CONTRAST: ImageEnhance.Contrast, SATURATION: ImageEnhance.Color}


def sample_crops_plainly(data: bytes, config: CropConfig, seed: int, position: int) -> list[np.ndarray]:
    """Crops [3, H, W] uint8 of an upright image: with the draws of `components.data.crops.sample_crops`."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    draws = draw_crops(image.width, image.height, config, seed, position)
    return [np.asarray(_crop(image, draw)).transpose(2, 0, 1) for draw in draws]


def _crop(image: Image.Image, draw: Draw) -> Image.Image:
    change = draw.photometrics
    crop = image.crop(draw.box).resize((draw.size, draw.size), Image.Resampling.BICUBIC)
    if draw.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if change.jitter is not None:
        crop = _jitter(crop, change.jitter)
    if change.gray:
        crop = crop.convert("L").convert("RGB")
    if change.blur_sigma is not None:
        crop = _blur(crop, change.blur_sigma)
    if change.solarize:
        crop = ImageOps.solarize(crop, 128)
    return crop


def _jitter(crop: Image.Image, jitter: Jitter) -> Image.Image:
    for kind in jitter.order:
        if kind in ENHANCE:
            crop = ENHANCE[kind](crop).enhance(jitter.factors[kind])
        else:
            hue, saturation, value = crop.convert("HSV").split()
            turned = np.asarray(hue) + np.int32(jitter.turns * 255).astype(np.uint8)
            crop = Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
    return crop


def _blur(crop: Image.Image, sigma: float) -> Image.Image:
    """A kernel of 9 x 9 over each channel of the tensor, and back."""
    line = torch.exp(-0.5 * (torch.linspace(-4, 4, 9) / sigma) ** 2)
    line /= line.sum()
    kernel = (line[:, None] * line).expand(3, 1, 9, 9)
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None].float()
    blurred = F.conv2d(F.pad(pixels, (4, 4, 4, 4), mode="reflect"), kernel, groups=3)
    return Image.fromarray(blurred[0].round().byte().permute(1, 2, 0).contiguous().numpy())
