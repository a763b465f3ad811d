"""What a protocol measures: one model's tokens of one evaluation set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
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


def scaled(at: Callable[[int | None], Preprocessing], patch: int | None, evalset: Evalset) -> Preprocessing:
    """Return how a model's images are scaled: as it states, but the whole middle square where places are compared.

    Args:
        at: of a side in pixels, or None for the model's own.
        patch: pixels, of which the side that the set asks for is rounded down to a multiple; None: the model takes its
            own size only.
        evalset: may ask for a resolution.
    """
    wanted = evalset.config.resolution
    found = at(None if wanted is None or patch is None else max(patch, wanted // patch * patch))
    whole = evalset.config.task != "classification"
    return found.model_copy(update={"resize_size": found.crop_size}) if whole else found


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
    """

    name: str
    evalset: Evalset
    tokens: Tokens
    preprocessing: Preprocessing
    settings: Settings
    seed: int

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
