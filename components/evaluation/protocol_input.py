"""What a protocol measures: one model's tokens of one evaluation set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Subset

from components.core.errors import DatasetError
from components.data.evalset import Evalset
from components.data.evaluation_set import Labels
from components.evaluation.dense import DenseFeatures
from components.evaluation.features import EvaluationImages
from components.evaluation.settings import Settings
from components.evaluation.tokens import Images, TokenRequest, Tokens
from components.model.config import Preprocessing

NumberT = TypeVar("NumberT", np.uint8, np.float32)
Find = Callable[[TokenRequest], Tokens]

KEPT_BYTES = 2**28  # of decoded masks or depth maps


def crop_target(target: NDArray[NumberT], preprocessing: Preprocessing) -> NDArray[NumberT]:
    """Return the values of a mask or depth map at the pixels of `center_crop`, by nearest neighbor.

    Args:
        target: [H, W], of the size of its image.
        preprocessing: of the image.

    Returns:
        [S, S].
    """
    height, width = target.shape
    scale = preprocessing.resize_size / min(height, width)
    places = []
    for side in (height, width):
        resized = max(preprocessing.resize_size, round(side * scale))
        offset = (resized - preprocessing.crop_size) // 2
        pixels = (offset + np.arange(preprocessing.crop_size) + 0.5) * side / resized
        places.append(np.clip(pixels.astype(np.int64), 0, side - 1))
    return target[np.ix_(*places)]


def keep_targets(read: Callable[[int], NDArray[NumberT]], side: int) -> Callable[[int], NDArray[NumberT]]:
    """Keep the latest masks or depth maps that were read, so that a training decodes each once where memory allows.

    Args:
        read: returns the map of an image.
        side: of the maps, in pixels.
    """
    most_bytes = side**2 * np.dtype(np.float32).itemsize
    return lru_cache(maxsize=max(1, KEPT_BYTES // most_bytes))(read)


@dataclass(frozen=True)
class ProtocolInput:
    """One model on one set.

    Attributes:
        name: of the model.
        evalset: the images, and what their task needs.
        tokens: of all images of the set, in its order.
        preprocessing: of these images.
        patch_size: of the model, of which sides of images are multiples; None: it takes images of its own size only.
        settings: of the protocols.
        seed: of their random choices.
        find: returns the tokens of images by this model, from the cache or computed.
    """

    name: str
    evalset: Evalset
    tokens: Tokens
    preprocessing: Preprocessing
    patch_size: int | None
    settings: Settings
    seed: int
    find: Find

    def features_of(self, images: Images, what: str) -> NDArray[np.float32]:
        """Return the features [M, F] of other images of the same size, such as augmented ones.

        Args:
            images: that are encoded.
            what: tells them from others of the set.
        """
        version = f"{self.evalset.version} {what}"
        return self.find(TokenRequest(images, version, self.preprocessing, self.settings.loading)).features

    def scaled(self, scale: float) -> Preprocessing:
        """Return the preprocessing of the same part of an image at a multiple of its size, in whole patches."""
        patch = self.patch_size or 1
        return self.preprocessing.at(max(patch, round(self.preprocessing.crop_size * scale / patch) * patch))

    def tokens_at(self, scale: float, rows: NDArray[np.int64]) -> Tokens:
        """Return the tokens of some images at a multiple of their size; with patch tokens if `tokens` has them."""
        scaled, dense = self.scaled(scale), self.tokens.patches is not None
        images = Subset(EvaluationImages(self.evalset.images, scaled), rows.tolist())
        version = f"{self.evalset.version} {hashlib.sha256(rows.tobytes()).hexdigest()}"
        return self.find(TokenRequest(images, version, scaled, self.settings.loading, dense))

    def dense(self, layers: int, scale: float = 1.0) -> DenseFeatures:
        """Return the patch tokens of the last layers, at most those that there are.

        Args:
            layers: number of them.
            scale: multiple of the images' size; tokens of other sizes than 1 are those of the test images.
        """
        images = None if scale == 1 else self.evalset.test
        tokens = self.tokens if images is None else self.tokens_at(scale, images)
        patches, there = tokens.patches, tokens.cls.shape[1]
        assert patches is not None, "a dense protocol was given tokens without patches"
        width = min(layers, there) * patches.shape[2] // there
        return DenseFeatures(patches[..., -width:], tokens.rows, tokens.rows, images)

    @property
    def labels(self) -> Labels:
        """Classes and splits of a classification set.

        Raises:
            DatasetError: they cannot be measured.
        """
        labels = self.evalset.images.labels
        if labels is None:
            raise DatasetError(f"{self.evalset.folder}: no classes to measure; see `pedigree evalset check`")
        return labels
