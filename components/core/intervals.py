"""95 % intervals of accuracies and of what one model is above another on the same images."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from components.core.metrics import Interval, bootstrap_interval

CONFIDENCE = 0.95


def is_accuracy(by_image: NDArray[np.floating]) -> bool:
    """Whether every image has 0 or 1."""
    return bool(np.isin(by_image, (0, 1)).all())


def accuracy_interval(correct: NDArray[np.floating]) -> Interval:
    """Accuracy with its Wilson score interval, which holds near 0 and 1 and on few images, where a bootstrap does not.

    Args:
        correct: [T] of 0 and 1.
    """
    from scipy.stats import binomtest  # a second of importing

    found = binomtest(int(correct.sum()), len(correct)).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(correct.mean()), float(found.low), float(found.high))


def difference_interval(
    ours: NDArray[np.floating], theirs: NDArray[np.floating], generator: np.random.Generator, num_resamples: int
) -> Interval:
    """Mean difference of two models on the same images, with an interval for paired samples.

    Of accuracies the adjusted Wald interval (Bonett and Price 2012), which keeps its width where all images agree. Of
    other measures, such as average precision, the percentile bootstrap: near 0 and 1 on few images it is too narrow.

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
