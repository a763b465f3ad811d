"""Networks as the evaluation reads them: a batch of images in, features and patch tokens out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from math import isqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from components.evaluation.baselines import random_network
from components.evaluation.descriptor import VERSION, describe, describe_patches
from components.model.config import LAST_LAYERS, Pooling
from components.model.pooling import pooled
from components.model.preprocessing import to_input
from components.model.vit import VisionTransformer

USUAL_PATCH = 14  # pixels; gives a grid where a model has none


@dataclass(frozen=True)
class Encoded:
    """What a network gives for B images, after its last norm.

    Attributes:
        cls: [B, L, D] class tokens of the last L layers, deepest last; L = 1 where a model gives one feature only.
        patches: patch tokens of these layers, [B, P, D] each, row by row of a square grid; empty if it gives none.
    """

    cls: Tensor
    patches: tuple[Tensor, ...] = ()

    @property
    def mean_patch(self) -> Tensor:
        """Mean patch token of the last layer, [B, D] float32; the feature itself without patch tokens of its width."""
        feature = self.cls[:, -1].float()
        fits = self.patches and self.patches[-1].shape[2] == feature.shape[1]
        return self.patches[-1].float().mean(dim=1) if fits else feature

    def feature(self, pooling: Pooling) -> Tensor:
        """Return the features of the images, [B, F] float32; the class tokens of a model without patch tokens."""
        return pooled(self.cls[:, -1], self.patches, pooling if self.patches else "cls")

    def rows(self, side: int) -> int:
        """Return the rows of the patch grid of images of `side` pixels, or of usual patches where there are none."""
        return isqrt(self.patches[-1].shape[1]) if self.patches else max(1, side // USUAL_PATCH)


class Encoder(ABC):
    """A network in evaluation mode on its device.

    Args:
        device: of the network.
        shape: its architecture as text, equal for networks that differ in their weights only.
        patch_size: pixels, of which the sides of images are multiples; None: it takes images of its own size only.
    """

    def __init__(self, device: torch.device, shape: str, patch_size: int | None = 1) -> None:
        self.device, self.shape, self.patch_size = device, shape, patch_size

    @property
    def precision(self) -> torch.dtype:
        """bfloat16 on a GPU that has it, else float32."""
        fast = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Encoded:
        """Encode images [B, S, S, 3] uint8."""
        cast = nullcontext() if self.precision == torch.float32 else torch.autocast("cuda", self.precision)
        with cast:
            return self._encode(images.to(self.device))

    def encode_black(self, side: int) -> Encoded:
        """Encode one black image, for the shapes of what comes."""
        return self.encode(torch.zeros(1, side, side, 3, dtype=torch.uint8))

    def last_patches(self, images: Tensor) -> NDArray[np.float32] | None:
        """Return the patch tokens of the last layer for images [B, S, S, 3], [B, P, D]; None if it gives none."""
        found = self.encode(images).patches
        return found[-1].float().cpu().numpy() if found else None

    def without_patches(self) -> Encoder:
        """Return an encoder of the same class tokens without patch tokens, where these cost more time."""
        return self

    @abstractmethod
    def _encode(self, images: Tensor) -> Encoded:
        """Encode images [B, S, S, 3] uint8, on the device."""

    def untrained(self, seed: int) -> Encoder | None:
        """Return a network of this shape with random weights; None where a file has no shape apart from its weights."""
        del seed
        return None


class BackboneEncoder(Encoder):
    """A vision transformer of Pedigree."""

    def __init__(self, backbone: VisionTransformer) -> None:
        shape = backbone.config
        super().__init__(next(backbone.parameters()).device, shape.model_dump_json(), shape.patch_size)
        self._backbone, self._layers = backbone, min(LAST_LAYERS, shape.depth)

    def _encode(self, images: Tensor) -> Encoded:
        outputs = self._backbone.last_layers(to_input(images.permute(0, 3, 1, 2)), self._layers)
        return Encoded(torch.stack([one.cls_token for one in outputs], 1), tuple(one.patch_tokens for one in outputs))

    def untrained(self, seed: int) -> Encoder:
        """Return `random_network` of this shape."""
        return BackboneEncoder(random_network(self._backbone.config, seed).to(self.device))


class DescriptorEncoder(Encoder):
    """Colors and edges, without a network: of the whole image, and of each patch of a grid.

    Args:
        rows: of the grid; None: no patches.
    """

    def __init__(self, rows: int | None) -> None:
        super().__init__(torch.device("cpu"), f"descriptor {VERSION} of {rows} rows")
        self._rows = rows

    def _encode(self, images: Tensor) -> Encoded:
        pixels = images.numpy()
        whole = torch.from_numpy(np.stack([describe(image) for image in pixels]))  # [B, 452]
        if self._rows is None:
            return Encoded(whole[:, None])
        patches = torch.from_numpy(np.stack([describe_patches(image, self._rows) for image in pixels]))  # [B, P, 209]
        return Encoded(whole[:, None], (patches,))

    def without_patches(self) -> Encoder:
        """Return the descriptor of whole images."""
        return DescriptorEncoder(None)
