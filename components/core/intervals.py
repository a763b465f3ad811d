"""95 % intervals of accuracies, and of differences between two models on the same images."""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.core.metrics import Interval, bootstrap_interval

CONFIDENCE = 0.95


def is_accuracy(by_image: NDArray[np.floating]) -> bool:
    """Return whether all values are 0 or 1."""
    return bool(np.isin(by_image, (0, 1)).all())


def accuracy_interval(correct: NDArray[np.floating]) -> Interval:
    """Return the accuracy with its Wilson score interval, valid near 0 and 1 and for few images, unlike a bootstrap.

    Args:
        correct: [T] of 0 and 1.
    """
    from scipy.stats import binomtest  # pyright: ignore[reportUnknownVariableType]  # a second of importing

    found: Any = binomtest(int(correct.sum()), len(correct)).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(correct.mean()), float(found.low), float(found.high))


def difference_interval(
    ours: NDArray[np.floating], theirs: NDArray[np.floating], generator: np.random.Generator, num_resamples: int
) -> Interval:
    """Return the mean difference of two models on the same images, with an interval for paired samples.

    For accuracies, the adjusted Wald interval (Bonett and Price 2012), whose width stays positive if all images agree.
    For other measures, such as average precision, the percentile bootstrap, which is too narrow near 0 and 1 for few
    images.

    Args:
        ours: [T].
        theirs: [T], of the same images.
        generator: draws the resamples of a bootstrap.
        num_resamples: of a bootstrap.
    """
    difference = ours - theirs
    if not (is_accuracy(ours) and is_accuracy(theirs)):
        return bootstrap_interval(difference, generator, num_resamples, CONFIDENCE)
    count = len(difference) + 2
    better, worse = ((difference == sign).sum() + 1 for sign in (1, -1))
    middle = (better - worse) / count
    half = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * np.sqrt(((better + worse) / count - middle**2) / count)
    low, high = np.clip((middle - half, middle + half), -1, 1)
    return Interval(float(difference.mean()), float(low), float(high))
