"""What a protocol measures: one model's tokens of one evaluation set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from components.core.errors import DatasetError
from components.data.evalset import Evalset
from components.data.evaluation_set import Labels
from components.evaluation.dense import DenseFeatures
from components.evaluation.settings import Settings
from components.evaluation.tokens import Tokens
from components.model.config import Preprocessing

NumberT = TypeVar("NumberT", np.uint8, np.float32)


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


@dataclass(frozen=True)
class ProtocolInput:
    """One model on one set.

    Attributes:
        name: of the model.
        evalset: the images, and what their task needs.
        tokens: of all images of the set, in its order.
        preprocessing: of these images.
        settings: of the protocols.
        seed: of their random choices.
        find: returns the tokens of some images of the set under another preprocessing.
    """

    name: str
    evalset: Evalset
    tokens: Tokens
    preprocessing: Preprocessing
    settings: Settings
    seed: int
    find: Callable[[Preprocessing, NDArray[np.int64]], Tokens]

    def dense(self, layers: int, scale: float = 1.0) -> DenseFeatures:
        """Return the patch tokens of the last layers, at most those that there are.

        Args:
            layers: number of them.
            scale: multiple of the images' size; tokens of other sizes than 1 are those of the test images.
        """
        images = None if scale == 1 else self.evalset.test
        tokens = self.tokens if images is None else self.find(self.scaled(scale), images)
        patches, shape = tokens.patches, tokens.cls.shape
        assert patches is not None, "a dense protocol was given tokens without patches"
        return DenseFeatures(patches[..., -min(layers, shape[1]) * shape[2] :], tokens.rows, tokens.rows, images)

    def scaled(self, scale: float) -> Preprocessing:
        """Return the preprocessing of the same part of an image at a multiple of its size, in whole patches."""
        size = self.preprocessing.crop_size
        patch = size // self.tokens.rows if self.tokens.rows else 1  # a descriptor has no patches
        return self.preprocessing.at(max(patch, round(size * scale / patch) * patch))

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
