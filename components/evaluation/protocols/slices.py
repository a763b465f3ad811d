"""Accuracy by group of test images: the worst group and the gap."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from components.core.errors import DatasetError
from components.core.intervals import accuracy_interval, is_accuracy
from components.core.text import one_line
from components.evaluation.config import SlicesConfig
from components.evaluation.scores import Part, Scores

log = logging.getLogger(__name__)


def evaluate(
    correct: NDArray[np.floating], columns: Mapping[str, Sequence[str | None]], config: SlicesConfig
) -> Scores:
    """Compare the groups of each column, such as a region or a light.

    The worst of many groups is also the unluckiest one: read its accuracy with its interval and its number of images.

    Args:
        correct: [T] of 0 and 1, the values by image of an accuracy.
        columns: name -> [T] group of each image; None where it is not known.
        config: the smallest group that can be worst or best.

    Returns:
        `slices.<column>=<group>`, the accuracy of each group of `min_images`; `slices.<column>.worst`, its
        `slices.<column>.worst_images`, and `slices.<column>.gap`, the best group's accuracy less the worst's; the name
        of the worst in `notes`. A column that has fewer than two groups of `min_images` has neither worst nor gap;
        `parts` has all groups of all columns.

    Raises:
        DatasetError: values other than 0 and 1, or a column of another length.
    """
    scores = Scores()
    for column, values in columns.items():
        groups = scores.parts[column] = group_accuracies(correct, values, column)
        enough = _large_groups(groups, column, config)
        scores.metrics |= {f"slices.{column}={group.name}": group.score.mean for group in enough}
        if len(enough) < 2:
            log.warning(
                "slices.%s: %d groups of at least %d images; two are needed to compare (slices.min_images)",
                *(column, len(enough), config.min_images),
            )
            continue
        worst, best = (choose(enough, key=lambda group: group.score.mean) for choose in (min, max))
        scores.metrics[f"slices.{column}.worst"] = worst.score.mean
        scores.metrics[f"slices.{column}.worst_images"] = worst.num_images
        scores.metrics[f"slices.{column}.gap"] = best.score.mean - worst.score.mean
        scores.notes[f"slices.{column}.worst"] = worst.name
    return scores


def group_accuracies(correct: NDArray[np.floating], values: Sequence[str | None], column: str) -> list[Part]:
    """Return the accuracy of every group of a column, by name; images without a group are left out.

    Intervals are Wilson's, as if images were independent.

    Args:
        correct: [T] of 0 and 1.
        values: [T] group of each image.
        column: its name, for messages.

    Raises:
        DatasetError: as for `evaluate`.
    """
    if len(values) != len(correct):
        raise DatasetError(f"slices.{column}: {len(values)} groups for {len(correct)} test images; each needs one")
    if not is_accuracy(correct):
        raise DatasetError(f"slices.{column}: groups are compared by an accuracy, whose values by image are 0 and 1")
    names = np.array([value or "" for value in values], dtype=str)
    if missing := int((names == "").sum()):
        log.warning("slices.%s: %d of %d test images have no group and are left out", column, missing, len(names))
    groups = [(str(name), correct[names == name]) for name in np.unique(names[names != ""])]
    return [Part(name, len(own), accuracy_interval(own)) for name, own in groups]


def _large_groups(groups: Sequence[Part], column: str, config: SlicesConfig) -> list[Part]:
    small = [group for group in groups if group.num_images < config.min_images]
    if small:
        log.warning(
            "slices.%s: %d of %d groups have fewer than %d images and are neither worst nor best (%s: %d)",
            *(column, len(small), len(groups), config.min_images, one_line(small[0].name), small[0].num_images),
        )
    return [group for group in groups if group.num_images >= config.min_images]
