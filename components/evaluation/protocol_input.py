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
from components.evaluation.tokens import Images, Tokens
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
        features_of: class tokens [M, D] of other images of the same size by this model, such as augmented ones, and
            what tells these images from others of the set.
    """

    name: str
    evalset: Evalset
    tokens: Tokens
    preprocessing: Preprocessing
    settings: Settings
    seed: int
    features_of: Callable[[Images, str], NDArray[np.float32]]

    def dense(self, layers: int) -> DenseFeatures:
        """Return the patch tokens of the last layers, at most those that there are."""
        patches, there = self.tokens.patches, self.tokens.cls.shape[1]
        assert patches is not None, "a dense protocol was given tokens without patches"
        width = min(layers, there) * patches.shape[2] // there
        return DenseFeatures(patches[..., -width:], self.tokens.rows, self.tokens.rows)

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
