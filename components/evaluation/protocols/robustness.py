"""Accuracy under the corruptions of ImageNet-C, and the corruption error against a reference model.

Hendrycks and Dietterich 2019 (arXiv:1903.12261, sec. 4.2). Their reference is AlexNet on ImageNet; here it is another
model on the same images, so a value is comparable only between models with the same reference.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from components.core.errors import DatasetError
from components.core.text import some_of
from components.evaluation.scores import Scores

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CorruptedResults:
    """What one model classified correctly, clean and corrupted.

    Attributes:
        model: its name.
        clean: [T] of 0 and 1.
        corrupted: corruption -> [S, T] of 0 and 1, one row for each severity.
    """

    model: str
    clean: NDArray[np.floating]
    corrupted: Mapping[str, NDArray[np.floating]]


def evaluate(ours: CorruptedResults, reference: CorruptedResults) -> Scores:
    """Compute the accuracy under each corruption and the mean corruption error (mCE), where 1 is the reference's.

    mCE is the mean over corruptions of (sum of our errors over severities / that of the reference). The relative mCE
    compares what corruption adds to the clean error instead: it is useless with a reference that is near chance, whose
    errors corruption hardly raises. A corruption by which the reference's sum is not positive is left out of the mean.

    Args:
        ours: of the model that is scored.
        reference: of another model, on the same images, corruptions and severities.

    Returns:
        corruption_accuracy and corruption_accuracy.<name>, means over images and severities; mce; relative_mce; the
        accuracy by severity in `curves`. The reference's name is in `notes`. An mCE that no corruption is left for is
        left out.

    Raises:
        DatasetError: no corruptions, or other images, corruptions or severities for the reference.
    """
    _check_alike(ours, reference)
    scores = Scores()
    by_corruption = {name: correct.mean(axis=0) for name, correct in ours.corrupted.items()}  # [T] each
    scores.add("corruption_accuracy", np.mean(list(by_corruption.values()), axis=0))
    for name, values in by_corruption.items():
        scores.add(f"corruption_accuracy.{name}", values)
        scores.curves[name] = np.array([ours.clean.mean(), *ours.corrupted[name].mean(axis=1)])
    errors, others = _added_errors(ours, 0.0), _added_errors(reference, 0.0)
    _add_ratio(scores, "mce", errors, others, reference.model)
    errors, others = (_added_errors(results, float(1 - results.clean.mean())) for results in (ours, reference))
    _add_ratio(scores, "relative_mce", errors, others, reference.model)
    scores.notes["mce_reference"] = reference.model
    return scores


def _added_errors(results: CorruptedResults, clean_error: float) -> dict[str, float]:
    """Return, for each corruption, the sum over severities of the error less `clean_error`."""
    return {name: float((1 - correct.mean(axis=1) - clean_error).sum()) for name, correct in results.corrupted.items()}


def _add_ratio(
    scores: Scores, metric: str, ours: Mapping[str, float], reference: Mapping[str, float], model: str
) -> None:
    kept = [name for name in ours if reference[name] > 1e-9]  # more than rounding
    if missing := [name for name in ours if name not in kept]:
        log.warning(
            "%s: %d of %d corruptions left out, by which the errors of the reference %s do not grow (%s)",
            *(metric, len(missing), len(ours), model, some_of(missing)),
        )
    if kept:
        scores.metrics[metric] = float(np.mean([ours[name] / reference[name] for name in kept]))


def _check_alike(ours: CorruptedResults, reference: CorruptedResults) -> None:
    if not ours.corrupted:
        raise DatasetError("robustness: no corruptions; give at least one of components.evaluation.corruptions")
    if set(ours.corrupted) != set(reference.corrupted):
        differ = sorted(set(ours.corrupted) ^ set(reference.corrupted))
        raise DatasetError(
            f"robustness: {some_of(differ)} of only one of {ours.model} and {reference.model}; measure both alike"
        )
    shapes = {
        (results.model, name): correct.shape
        for results in (ours, reference)
        for name, correct in (("clean", results.clean[None]), *results.corrupted.items())
    }
    severities, images = ours.corrupted[next(iter(ours.corrupted))].shape
    for (model, name), shape in shapes.items():
        expected = (1 if name == "clean" else severities, images)
        if shape != expected:
            raise DatasetError(
                f"robustness: {name} of {model} has {shape[0]} severities of {shape[1]} images instead of "
                f"{expected[0]} of {expected[1]}; measure both models on the same images and severities"
            )
