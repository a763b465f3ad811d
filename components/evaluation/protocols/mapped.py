"""Accuracy of a trained head on another set, by the names of its classes: ImageNet-A, -R, -Sketch or V2 style.

arXiv:2304.07193, App. B.3: the head that won on validation is applied without further training. Logits are limited to
the classes that both sets have, which is common practice for the 200 classes of ImageNet-A and -R.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from components.core.errors import DatasetError
from components.core.text import one_line, some_of
from components.evaluation.scores import Scores

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MappedSet:
    """Another set's test images: a short name, the label of each image, and names of its labels in the head's set.

    Attributes:
        name: of the set, in metric names.
        labels: [T] label of each image.
        mapping: label -> class of the head; labels that it does not name are looked up as they are.
    """

    name: str
    labels: Sequence[str]
    mapping: Mapping[str, str]


def evaluate(logits: NDArray[np.floating], classes: Sequence[str], other: MappedSet) -> Scores:
    """Compute the accuracy among the classes that both sets have.

    Args:
        logits: [T, C] of the other set's images.
        classes: [C] names of the head's classes.
        other: these images' labels.

    Returns:
        `mapped.<name>.top1`, with values of the images that are kept, in their order.

    Raises:
        DatasetError: a mapping to an unknown class, or fewer than two classes in common.
    """
    if unknown := sorted(set(other.mapping.values()) - set(classes)):
        raise DatasetError(
            f"{other.name}: its mapping names {one_line(unknown[0])!r}, which is no class of the head; "
            f"classes: {some_of(sorted(classes))}"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    targets = np.array([numbers.get(other.mapping.get(label, label), -1) for label in other.labels])
    known = targets >= 0
    shared = np.unique(targets[known])
    if len(shared) < 2:
        raise DatasetError(
            f"{other.name}: {len(shared)} of its labels are classes of the head; two or more are needed "
            f"(labels: {some_of(sorted(set(other.labels)))}; classes: {some_of(sorted(classes))}); map them by name"
        )
    _warn_of_others(other, classes, known, shared)
    predictions = shared[logits[known][:, shared].argmax(axis=1)]
    scores = Scores()
    scores.add(f"mapped.{other.name}.top1", (predictions == targets[known]).astype(np.float64))
    return scores


def _warn_of_others(
    other: MappedSet, classes: Sequence[str], known: NDArray[np.bool_], shared: NDArray[np.int64]
) -> None:
    if not known.all():
        labels = sorted({label for label, kept in zip(other.labels, known, strict=True) if not kept})
        log.warning(
            "%s: %d of %d images left out: %d labels are no class of the head (%s)",
            *(other.name, int((~known).sum()), len(known), len(labels), some_of(labels)),
        )
    if len(shared) < len(classes):
        absent = [name for number, name in enumerate(classes) if number not in set(shared.tolist())]
        log.warning(
            "%s: %d of %d classes of the head are not in this set and cannot be predicted (%s)",
            *(other.name, len(absent), len(classes), some_of(absent)),
        )
