"""Metrics of one model on one evaluation set, with values per test image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from components.core.intervals import accuracy_interval, difference_interval, is_accuracy
from components.core.metrics import Interval


@dataclass
class Scores:
    """Metrics of one model; for metrics that are means over images, `by_image` holds the values, for intervals."""

    metrics: dict[str, float] = field(default_factory=dict)
    by_image: dict[str, NDArray[np.floating]] = field(default_factory=dict)  # [T] each
    notes: dict[str, str] = field(default_factory=dict)  # choices that are no number, such as the chosen head
    rows: dict[str, NDArray[np.int64]] = field(default_factory=dict)  # [T] images of a metric that are not all of test

    def add(self, metric: str, by_image: NDArray[np.floating], rows: NDArray[np.int64] | None = None) -> None:
        """Add a metric that is the mean over images.

        Args:
            metric: its name.
            by_image: [T].
            rows: [T] the images, as indices into the set's; None: all test images.
        """
        self.by_image[metric] = by_image
        self.metrics[metric] = float(by_image.mean())
        if rows is not None:
            self.rows[metric] = rows

    def update(self, other: Scores) -> None:
        """Add the metrics of another protocol on the same test images."""
        self.metrics |= other.metrics
        self.by_image |= other.by_image
        self.notes |= other.notes
        self.rows |= other.rows

    def intervals(self, clusters: NDArray[np.integer | np.str_] | None = None) -> dict[str, Interval]:
        """Return the 95 % intervals of the accuracies.

        Args:
            clusters: [T] source of each image, where several images are parts of one photograph; None: all independent.
        """
        accuracies = {metric: values for metric, values in self.by_image.items() if is_accuracy(values)}
        return {metric: accuracy_interval(values, clusters) for metric, values in accuracies.items()}


def differences(
    scores: Mapping[str, Scores],
    model: str,
    num_resamples: int,
    seed: int,
    clusters: NDArray[np.integer | np.str_] | None = None,
) -> dict[str, dict[str, Interval]]:
    """Compute `model` minus each other model by metric: the mean over the same images with its 95 % interval.

    A metric that the other model lacks is left out.

    Args:
        scores: by model.
        model: the one that others are subtracted from.
        num_resamples: of each bootstrap.
        seed: of the resamples.
        clusters: [T] source of each image, where several images are parts of one photograph; None: all independent.
    """
    generator = np.random.default_rng(seed)
    return {
        other: {
            metric: difference_interval(values, scores[other].by_image[metric], generator, num_resamples, clusters)
            for metric, values in scores[model].by_image.items()
            if metric in scores[other].by_image
        }
        for other in scores
        if other != model
    }
