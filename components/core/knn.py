"""Weighted k-nearest-neighbor classification."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

_CHUNK = 1024  # test images compared at once


@dataclass(frozen=True)
class Nearest:
    """Neighbors of each query, nearest first: cosine similarities and gallery rows, [Q, count] each."""

    similarities: NDArray[np.float64]
    indices: NDArray[np.int64]


def nearest(queries: NDArray[np.floating], gallery: NDArray[np.floating], count: int) -> Nearest:
    """Cosine similarities and indices of the `count` nearest gallery rows of each query, nearest first.

    In float64: tokens of an untrained network differ by less than the precision of float32 cosines.

    Args:
        queries: [Q, D].
        gallery: [N, D], N >= count.
        count: neighbors of each query.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = _normalized(gallery).to(device)  # [N, D]
    split = _normalized(queries).split(_CHUNK)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    chunks = cast("tuple[torch.Tensor, ...]", split)
    parts = [torch.topk(chunk.to(device) @ base.T, count, dim=1) for chunk in chunks]
    similarities = torch.cat([part.values.cpu() for part in parts])
    return Nearest(similarities.numpy(), torch.cat([part.indices.cpu() for part in parts]).numpy())


def knn_predictions(
    nearest_similarities: NDArray[np.float64],
    nearest_targets: NDArray[np.int64],
    neighbors: Collection[int],
    temperature: float,
) -> dict[int, NDArray[np.int64]]:
    """Predict the class of each test image by the vote of its k nearest train images, for several k.

    dinov2/eval/knn.py: vote weights are softmax(similarity / temperature) over the K neighbors; the first k votes are
    summed for each class. For k < K the weights sum to less than 1, which does not change the argmax.

    Args:
        nearest_similarities: [T, K] cosines, nearest first.
        nearest_targets: [T, K] classes of these train images.
        neighbors: values of k, each at most K.
        temperature: of the softmax.

    Returns:
        For each k, [T] classes; ties go to the lowest class.
    """
    logits = nearest_similarities / temperature
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))  # [T, K]
    weights /= weights.sum(axis=1, keepdims=True)
    votes = np.zeros((len(weights), int(nearest_targets.max()) + 1))
    rows = np.arange(len(weights))
    predictions: dict[int, NDArray[np.int64]] = {}
    for rank in range(max(neighbors)):
        votes[rows, nearest_targets[:, rank]] += weights[:, rank]
        if rank + 1 in neighbors:
            predictions[rank + 1] = votes.argmax(axis=1)
    return predictions


def _normalized(features: NDArray[np.floating]) -> torch.Tensor:
    values = torch.from_numpy(np.asarray(features, np.float64))  # pyright: ignore[reportUnknownMemberType]
    return torch.nn.functional.normalize(values, dim=1)
