"""Metrics of features and predictions in numpy, shared by training monitors and evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MAX_DRAWN = 4_000_000  # indices held at once while resampling


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


def top1_accuracy(predictions: NDArray[np.integer], labels: NDArray[np.integer]) -> float:
    """Return the share of predictions equal to the label, in [0, 1] (micro average)."""
    if len(labels) == 0:
        raise ValueError("accuracy of no images is not defined")
    return np.count_nonzero(predictions == labels) / len(labels)


def effective_rank(features: NDArray[np.floating]) -> float:
    """Number of directions that features use: exp of the entropy of their normalized singular values.

    Roy and Vetterli (2007); on frozen features as RankMe (arXiv:2210.02885), but of centered features, so that a mean
    shared by all images does not count as a direction.

    Args:
        features: [N, D].

    Returns:
        Between 1 and min(N - 1, D); 0 if all rows are equal.
    """
    values = np.asarray(features, dtype=np.float64)
    centered = values - values.mean(axis=0)  # [N, D]
    singular = np.linalg.svd(centered, compute_uv=False)
    # Equal rows leave singular values of this size by rounding alone.
    floor = np.finfo(np.float64).eps * max(values.shape) * np.linalg.norm(values)
    singular = singular[singular > floor]
    if len(singular) == 0:
        return 0.0
    shares = singular / singular.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def feature_std(features: NDArray[np.floating]) -> float:
    """Mean over dimensions of the standard deviation of L2-normalized features, times sqrt(D).

    The collapse monitor of SimSiam (arXiv:2011.10566, sec. 4.1): about 1 for features spread over the sphere, 0 for
    identical features.

    Args:
        features: [N, D], no zero rows.
    """
    values = np.asarray(features, dtype=np.float64)
    normalized = values / np.linalg.norm(values, axis=1, keepdims=True)
    return float(normalized.std(axis=0).mean() * np.sqrt(values.shape[1]))


def bootstrap_interval(
    values: NDArray[np.floating],
    generator: np.random.Generator,
    num_resamples: int = 1000,
    confidence: float = 0.95,
) -> Interval:
    """Mean of `values` with its percentile bootstrap interval (Efron 1979).

    Args:
        values: [N], one for each image: for two models on the same images, the differences of their scores.
        generator: draws the resamples.
        num_resamples: how many samples of N images, with replacement.
        confidence: share of the resampled means inside the interval.
    """
    if len(values) == 0:
        raise ValueError("an interval of no images is not defined")
    count = len(values)
    rows = max(1, _MAX_DRAWN // count)
    means = [
        values[generator.integers(0, count, size=(min(rows, num_resamples - start), count))].mean(axis=1)
        for start in range(0, num_resamples, rows)
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))
