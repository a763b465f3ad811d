"""Images of a set as a model sees them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import Dataset

from components.data.crops import crop_box
from components.data.evaluation_set import EvaluationSet
from components.data.shards import ShardReader, decode_image
from components.evaluation.config import InstanceConfig
from components.model.config import Preprocessing
from components.model.preprocessing import center_crop


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation, which depends on the seed and the image's index only."""

    config: InstanceConfig
    seed: int


class EvaluationImages(Dataset[Tensor]):
    """Images as [S, S, 3] uint8, preprocessed or as an augmented view."""

    def __init__(
        self, images: EvaluationSet, preprocessing: Preprocessing, augmentation: Augmentation | None = None
    ) -> None:
        self._reader = ShardReader(images.root)
        columns = (images.images[name].to_pylist() for name in ("shard", "offset", "length"))
        self._places = list(zip(*columns, strict=True))
        self._preprocessing, self._augmentation = preprocessing, augmentation

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Tensor:
        image = decode_image(self._reader.read(*self._places[index]))
        if self._augmentation is None:
            image = center_crop(image, self._preprocessing)
        else:
            generator = np.random.default_rng([self._augmentation.seed, index])
            image = augmented_view(image, self._preprocessing.crop_size, self._augmentation.config, generator)
        return torch.from_numpy(np.array(image))


def augmented_view(
    image: Image.Image, size: int, config: InstanceConfig, generator: np.random.Generator
) -> Image.Image:
    """Return a random crop with random flip, brightness, contrast and saturation."""
    box = crop_box(image.width, image.height, config.crop_scale, generator)
    view = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if generator.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        view = enhance(view).enhance(1 + generator.uniform(-config.jitter, config.jitter))
    return view
