"""Test images under the corruptions of ImageNet-C, classified by their nearest clean train images."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from components.core.knn import knn_predictions, nearest
from components.core.progress import track
from components.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from components.evaluation.features import EvaluationImages
from components.evaluation.protocol_input import ProtocolInput
from components.evaluation.protocols.robustness import CorruptedResults


class CorruptedImages(Dataset[Tensor]):
    """Some images of a set as [S, S, 3] uint8, each cropped and then corrupted with noise of its own.

    Args:
        images: cropped.
        rows: of the images.
        corruption: name and severity.
        seed: of the noise.
    """

    def __init__(
        self, images: EvaluationImages, rows: NDArray[np.int64], corruption: tuple[str, int], seed: int
    ) -> None:
        self._images, self._rows, (self._name, self._severity), self._seed = images, rows, corruption, seed

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tensor:
        row = int(self._rows[index])
        generator = np.random.default_rng([self._seed, row, self._severity, zlib.crc32(self._name.encode())])
        return torch.from_numpy(corrupt(self._images[row].numpy(), self._name, self._severity, generator))


def corrupted_results(given: ProtocolInput, features: Callable[[str, int], NDArray[np.float32]]) -> CorruptedResults:
    """Classify the test images, clean and corrupted, by the nearest clean train images.

    Args:
        given: the model on a classification set.
        features: of the test images under a corruption (name, severity), [T, D].
    """
    labels, knn = given.labels, given.settings.knn
    train, targets = given.tokens.features[labels.gallery], labels.targets[labels.gallery]
    count = min(knn.reported, len(train))

    def correct(test: NDArray[np.float32]) -> NDArray[np.float64]:
        near = nearest(test, train, count)
        predicted = knn_predictions(near.similarities, targets[near.indices], {count}, knn.temperature)[count]
        return (predicted == labels.targets[labels.test]).astype(np.float64)

    found = {
        name: np.stack([correct(features(name, severity)) for severity in SEVERITIES])
        for name in track(CORRUPTIONS, f"corruptions of {given.name}", len(CORRUPTIONS), "corruptions")
    }
    return CorruptedResults(given.name, correct(given.tokens.features[labels.test]), found)
