"""Logistic regression on frozen features (dinov2/eval/log_regression.py)."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from components.core.metrics import top1_accuracy
from components.core.progress import track
from components.data.evaluation_set import Labels
from components.evaluation.config import LinearConfig
from components.evaluation.protocol_input import ProtocolInput
from components.evaluation.scores import Scores

log = logging.getLogger(__name__)

# Multiply-adds of one pass over the features below which BLAS gets one thread: more wait for each other longer
# than they work (0.3 s for 0.04 s beside another stage on 2 cores).
SMALL_PASS = 100_000_000
SPLIT_SEED = 0  # dinov2/eval/log_regression.py always draws the validation split with this seed


@dataclass(frozen=True)
class LinearResult:
    """Class of each test image [T], and the chosen C."""

    predictions: NDArray[np.int64]
    c: float


def run(given: ProtocolInput) -> Scores:
    """Measure a model on a classification set; see `evaluate`."""
    return evaluate(given.tokens.features, given.labels, given.settings.linear, given.name)


def evaluate(features: NDArray[np.floating], labels: Labels, config: LinearConfig, name: str) -> Scores:
    """Compute the accuracy of logistic regression, and the chosen C.

    Args:
        features: [N, D] of all images of the set.
        labels: of these images.
        config: grid and solver.
        name: of the features, for the progress display.
    """
    train, test = features[labels.train], features[labels.test]
    found = linear_predictions(train, labels.targets[labels.train], test, config, name, labels.predictable)
    scores = Scores()
    scores.add("linear_top1", (found.predictions == labels.targets[labels.test]).astype(np.float64))
    scores.metrics["linear_c"] = found.c
    return scores


def linear_predictions(
    train: NDArray[np.floating],
    targets: NDArray[np.int64],
    test: NDArray[np.floating],
    config: LinearConfig,
    name: str,
    predictable: NDArray[np.int64] | None = None,
) -> LinearResult:
    """Fit by L-BFGS with an L2 penalty; choose C on a random part of train, then refit on all of train.

    dinov2/eval/log_regression.py (the protocol of the 12 fine-grained sets, arXiv:2304.07193, Table 8), float64.

    Args:
        train: [N, D] features.
        targets: [N] classes, two or more.
        test: [T, D] features.
        config: grid and solver.
        name: of the features, for the progress display.
        predictable: classes of which the most probable is taken; None: all.
    """
    train, test = train.astype(np.float64), test.astype(np.float64)
    small = train.size * len(np.unique(targets)) < SMALL_PASS
    with warnings.catch_warnings(), threadpool_limits(1 if small else None, user_api="blas"):
        # With a tolerance of 1e-12 the solver always stops at its iteration limit or at machine precision.
        warnings.simplefilter("ignore", ConvergenceWarning)
        c = _choose_c(train, targets, config, name)
        model = _solver(config, c).fit(train, targets)
        predictions = model.predict(test) if predictable is None else _among(model, test, predictable)
    return LinearResult(predictions, c)


def _among(model: LogisticRegression, test: NDArray[np.float64], predictable: NDArray[np.int64]) -> NDArray[np.int64]:
    logits = model.decision_function(test)
    logits = np.stack([-logits, logits], axis=1) if logits.ndim == 1 else logits  # of two classes there is one column
    columns = np.flatnonzero(np.isin(model.classes_, predictable))
    return model.classes_[columns[logits[:, columns].argmax(axis=1)]]


def _choose_c(train: NDArray[np.float64], targets: NDArray[np.int64], config: LinearConfig, name: str) -> float:
    grid = sorted(config.c_grid)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(targets))
    validation, fitted = np.split(order, [max(1, round(len(targets) * config.validation_fraction))])
    if len(np.unique(targets[fitted])) < 2:
        log.warning("too few train images to hold some out: C is the middle of its grid")
        return grid[len(grid) // 2]
    model = _solver(config, grid[0]).set_params(warm_start=True)  # the optimum does not depend on the start
    scores = []
    for c in track(grid, f"logistic regression of {name}", len(grid), "values of C"):
        model.set_params(C=c).fit(train[fitted], targets[fitted])
        scores.append(top1_accuracy(np.asarray(model.predict(train[validation])), targets[validation]))
    return grid[int(np.argmax(scores))]  # the strongest penalty among equals


def _solver(config: LinearConfig, c: float) -> LogisticRegression:
    return LogisticRegression(C=c, solver="lbfgs", tol=config.tolerance, max_iter=config.max_iterations)
