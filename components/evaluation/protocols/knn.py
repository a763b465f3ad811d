"""Weighted k-nearest-neighbor classification of features (dinov2/eval/knn.py)."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from components.core.knn import knn_predictions, nearest
from components.core.metrics import top1_accuracy
from components.core.text import one_line
from components.data.evaluation_set import Labels
from components.evaluation.config import KnnConfig
from components.evaluation.protocol_input import ProtocolInput
from components.evaluation.scores import Scores


def run(given: ProtocolInput) -> Scores:
    """Measure a model on a classification set; see `evaluate`."""
    return evaluate(given.tokens.features, given.labels, given.settings.knn)


log = logging.getLogger(__name__)


def evaluate(features: NDArray[np.floating], labels: Labels, config: KnnConfig) -> Scores:
    """Compute the kNN accuracy for every k, which is limited to the number of train images, and of few shots.

    Args:
        features: [N, D] of all images of the set.
        labels: of these images.
        config: values of k, the temperature, and the few shots.
    """
    gallery = labels.gallery
    counts = {k: min(k, len(gallery)) for k in config.num_neighbors}
    found = nearest(features[labels.test], features[gallery], max(counts.values()))
    votes = labels.targets[gallery][found.indices]  # [T, K]
    predictions = knn_predictions(found.similarities, votes, set(counts.values()), config.temperature)
    targets = labels.targets[labels.test]
    scores = Scores()
    scores.add("knn_top1", (predictions[counts[config.reported]] == targets).astype(np.float64))
    for k, count in counts.items():
        scores.metrics[f"knn_top1_k{k}"] = top1_accuracy(predictions[count], targets)
    if config.few_shot:
        _warn_of_small_classes(labels, max(config.few_shot))
    for shots in config.few_shot:
        scores.update(_few_shot(features, labels, config, shots))
    return scores


def draw_shots(labels: Labels, shots: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Draw `shots` train images of each class, all of a smaller class; return their indices in the set, sorted."""
    order = generator.permutation(labels.gallery)
    order = order[np.argsort(labels.targets[order], kind="stable")]
    classes = labels.targets[order]
    place = np.arange(len(order)) - np.searchsorted(classes, classes)  # of an image within its class
    return np.sort(order[place < shots])


def _few_shot(features: NDArray[np.floating], labels: Labels, config: KnnConfig, shots: int) -> Scores:
    """Average k = `shots` neighbors over seeded draws, as dinov2/eval/knn.py does for k up to the shots.

    Draws are seeded by their number, so that two models see the same train images and their difference is paired.
    """
    targets = labels.targets[labels.test]
    correct = np.empty((config.tries, len(targets)))
    for number in range(config.tries):
        rows = draw_shots(labels, shots, np.random.default_rng(number))
        k = min(shots, len(rows))
        found = nearest(features[labels.test], features[rows], k)
        votes = labels.targets[rows][found.indices]  # [T, k]
        correct[number] = knn_predictions(found.similarities, votes, {k}, config.temperature)[k] == targets
    scores = Scores()
    scores.add(f"knn_top1_{shots}shot", correct.mean(axis=0))
    scores.metrics[f"knn_top1_{shots}shot_std"] = float(correct.mean(axis=1).std(ddof=1))
    return scores


def _warn_of_small_classes(labels: Labels, shots: int) -> None:
    present, counts = np.unique(labels.targets[labels.gallery], return_counts=True)
    small = np.flatnonzero(counts < shots)
    if len(small):
        log.warning(
            "few-shot kNN: %d of %d classes have fewer than %d train images and use all of them (%s: %d)",
            *(len(small), len(present), shots, one_line(labels.classes[present[small[0]]]), counts[small[0]]),
        )
