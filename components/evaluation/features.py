"""Extract frozen features; each image is decoded once for all models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from components.core.progress import progress
from components.data.crops import crop_box
from components.data.evaluation_set import EvaluationSet
from components.data.shards import ShardReader, decode_image
from components.data.shared_memory import check_shared_memory
from components.evaluation.config import EvaluateConfig, InstanceConfig
from components.evaluation.descriptor import describe
from components.model.config import Preprocessing
from components.model.preprocessing import center_crop, to_input
from components.model.vit import VisionTransformer

Extractor = Callable[[Tensor], NDArray[np.float32]]  # [B, S, S, 3] uint8 -> [B, D]
Features = dict[str, NDArray[np.float32]]  # by model, [N, D]


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


def backbone_extractor(backbone: VisionTransformer) -> Extractor:
    """Return an extractor of class tokens after the last norm, float32."""
    device = next(backbone.parameters()).device

    @torch.inference_mode()
    def extract(images: Tensor) -> NDArray[np.float32]:
        return backbone(to_input(images.to(device).permute(0, 3, 1, 2))).cls_token.float().cpu().numpy()  # [B, D]

    return extract


def descriptor_extractor(images: Tensor) -> NDArray[np.float32]:
    """Return the training-free descriptor of each image, [B, 452]."""
    return np.stack([describe(image) for image in images.numpy()])


@torch.inference_mode()
def patch_features(backbone: VisionTransformer, images: Tensor) -> NDArray[np.float32]:
    """Return patch tokens after the last norm, [B, P, D], for pictures."""
    device = next(backbone.parameters()).device
    return backbone(to_input(images.to(device).permute(0, 3, 1, 2))).patch_tokens.float().cpu().numpy()


def extract_features(
    extractors: Mapping[str, Extractor], images: EvaluationImages, config: EvaluateConfig, what: str
) -> Features:
    """Extract the features of all images by each extractor, in image order."""
    parts: dict[str, list[NDArray[np.float32]]] = {name: [] for name in extractors}
    check_shared_memory("evaluate.num_workers", config.num_workers, config.batch_bytes)
    # With its own generator the loader does not use the global one.
    loader = DataLoader(images, config.batch_size, num_workers=config.num_workers, generator=torch.Generator())
    with progress(what, len(images)) as advance:
        for batch in loader:  # [B, S, S, 3]
            for name, extract in extractors.items():
                parts[name].append(extract(batch))
            advance(len(batch))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}
