"""Weighted k-nearest-neighbor classification of class tokens (dinov2/eval/knn.py)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from components.core.knn import knn_predictions, nearest
from components.core.metrics import top1_accuracy
from components.data.evaluation_set import Labels
from components.evaluation.config import KnnConfig
from components.evaluation.scores import Scores
from components.evaluation.subject import Subject


def run(subject: Subject) -> Scores:
    """Measure a model on a classification set; see `evaluate`."""
    return evaluate(subject.tokens.features, subject.labels, subject.settings.knn)


def evaluate(features: NDArray[np.float32], labels: Labels, config: KnnConfig) -> Scores:
    """Compute the kNN accuracy for every k, which is limited to the number of train images.

    Args:
        features: [N, D] of all images of the set.
        labels: of these images.
        config: values of k, and the temperature.
    """
    counts = {k: min(k, len(labels.train)) for k in config.num_neighbors}
    found = nearest(features[labels.test], features[labels.train], max(counts.values()))
    votes = labels.targets[labels.train][found.indices]  # [T, K]
    predictions = knn_predictions(found.similarities, votes, set(counts.values()), config.temperature)
    targets = labels.targets[labels.test]
    scores = Scores()
    scores.add("knn_top1", (predictions[counts[config.reported]] == targets).astype(np.float64))
    for k, count in counts.items():
        scores.metrics[f"knn_top1_k{k}"] = top1_accuracy(predictions[count], targets)
    return scores
