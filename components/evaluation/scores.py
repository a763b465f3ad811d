"""Metrics of one model on one evaluation set, with values per test image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.core.intervals import accuracy_interval, difference_interval, is_accuracy, ratio_intervals
from components.core.metrics import Interval


@dataclass(frozen=True)
class Part:
    """Score of a part of the test images, such as those of one class, with its 95 % interval."""

    name: str
    num_images: int
    score: Interval


@dataclass(frozen=True)
class Ratios:
    """A score of each of C classes that is a ratio of sums over test images, such as the intersection over union.

    Attributes:
        names: of the classes.
        num_images: [C] test images that have the class.
        parts: [T, C].
        wholes: [T, C]; no column is all 0.
    """

    names: Sequence[str]
    num_images: NDArray[np.int64]
    parts: NDArray[np.int64]
    wholes: NDArray[np.int64]


@dataclass
class Scores:
    """What was measured of one model.

    Attributes:
        metrics: by name.
        by_image: [T] values of the metrics that are means over test images, for intervals.
        rows: [T] images of a metric, as indices into the set's, that are not all test images.
        notes: choices that are no number, such as the chosen head.
        parts: what is compared, such as "knn_top1 by light" -> its parts.
        ratios: the same of scores by class that are ratios of sums.
        curves: corruption -> [1 + S] accuracy by severity, first without corruption.
        predict: metrics' prefix of a dense protocol -> function that returns the predicted maps [B, H, W] of some
            images, for pictures.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    by_image: dict[str, NDArray[np.floating]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    rows: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    parts: dict[str, list[Part]] = field(default_factory=dict)
    ratios: dict[str, Ratios] = field(default_factory=dict)
    curves: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    predict: dict[str, Callable[[NDArray[np.int64]], NDArray[Any]]] = field(default_factory=dict)

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
        for name in (one.name for one in fields(self)):
            getattr(self, name).update(getattr(other, name))

    def intervals(self, clusters: NDArray[np.integer | np.str_] | None = None) -> dict[str, Interval]:
        """Return the 95 % intervals of the accuracies.

        Args:
            clusters: [T] source of each image, where several images are parts of one photograph; None: all independent.
        """
        accuracies = {metric: values for metric, values in self.by_image.items() if is_accuracy(values)}
        return {metric: accuracy_interval(values, clusters) for metric, values in accuracies.items()}

    def all_parts(
        self, generator: np.random.Generator, num_resamples: int, clusters: NDArray[np.integer | np.str_] | None = None
    ) -> dict[str, list[Part]]:
        """Return `parts`, and those of `ratios`, whose intervals are a bootstrap's.

        Args:
            generator: draws the resamples.
            num_resamples: of each bootstrap.
            clusters: [T] source of each image, as for `intervals`.
        """
        found = dict(self.parts)
        for what, ratios in self.ratios.items():
            intervals = ratio_intervals(ratios.parts, ratios.wholes, generator, num_resamples, clusters)
            found[what] = list(map(Part, ratios.names, ratios.num_images.tolist(), intervals))
        return found


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
