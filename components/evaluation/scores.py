"""Metrics of several models on one evaluation set, with values per test image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from components.core.intervals import accuracy_interval, difference_interval, is_accuracy
from components.core.knn import knn_predictions, nearest
from components.core.metrics import Interval, effective_rank, feature_std, top1_accuracy
from components.data.evaluation_set import EvaluationSet, Labels
from components.evaluation.config import EvaluateConfig, KnnConfig
from components.evaluation.features import Augmentation, EvaluationImages, Extractor, Features, extract_features
from components.evaluation.instance import retrieval_ranks
from components.evaluation.linear import linear_predictions


@dataclass
class Scores:
    """Metrics of one model; for metrics that are means over images, `by_image` holds the values, for intervals."""

    metrics: dict[str, float] = field(default_factory=dict)
    by_image: dict[str, NDArray[np.floating]] = field(default_factory=dict)  # [T] each

    def add(self, metric: str, by_image: NDArray[np.floating]) -> None:
        """Add a metric that is the mean over images."""
        self.by_image[metric] = by_image
        self.metrics[metric] = float(by_image.mean())

    def intervals(self) -> dict[str, Interval]:
        """Return the 95 % intervals of the accuracies."""
        return {metric: accuracy_interval(values) for metric, values in self.by_image.items() if is_accuracy(values)}


@dataclass(frozen=True)
class Measured:
    """Scores of each model, and what was measured."""

    scores: dict[str, Scores]
    features: Features  # [N, D]
    rows: NDArray[np.int64]  # [T] the images of the set that `by_image` has values of


def measure(config: EvaluateConfig, images: EvaluationSet, extractors: Mapping[str, Extractor], seed: int) -> Measured:
    """Score every model: by classification if the set has labels, else by retrieval of augmented views."""
    crops = EvaluationImages(images, config.preprocessing)
    features = extract_features(extractors, crops, config, "features")
    if images.labels is None:
        order = np.random.default_rng(seed).permutation(images.images.num_rows)
        rows = np.sort(order[: config.instance.num_queries])
        scores = _instance_scores(config, images.take(rows), rows, extractors, features, seed)
    else:
        rows = images.labels.test
        scores = {name: knn_scores(config.knn, features[name], images.labels) for name in features}
        for name, values in scores.items():
            _add_linear(values, config, features[name], images.labels, name)
    for name, values in scores.items():
        values.metrics |= {"effective_rank": effective_rank(features[name]), "feature_std": feature_std(features[name])}
    return Measured(scores, features, rows)


def values_by_image(measured: Measured, images: EvaluationSet) -> pa.Table:
    """Return a row for each model, metric and test image, for paired comparisons of models of different runs."""
    ids = images.images["image_id"].take(pa.array(measured.rows))
    parts = [
        pa.table({"image_id": ids, "model": [model] * len(ids), "metric": [metric] * len(ids), "value": values})
        for model, scores in measured.scores.items()
        for metric, values in scores.by_image.items()
    ]
    return pa.concat_tables(parts).combine_chunks()


def knn_scores(config: KnnConfig, features: NDArray[np.float32], labels: Labels) -> Scores:
    """Compute the kNN accuracy for every k, which is limited to the number of train images."""
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


def differences(
    scores: Mapping[str, Scores], model: str, num_resamples: int, seed: int
) -> dict[str, dict[str, Interval]]:
    """Compute `model` minus each other model by metric: the mean over the same images with its 95 % interval."""
    generator = np.random.default_rng(seed)
    return {
        other: {
            metric: difference_interval(values, scores[other].by_image[metric], generator, num_resamples)
            for metric, values in scores[model].by_image.items()
        }
        for other in scores
        if other != model
    }


def _add_linear(
    scores: Scores, config: EvaluateConfig, features: NDArray[np.float32], labels: Labels, name: str
) -> None:
    train, test = features[labels.train], features[labels.test]
    linear = linear_predictions(train, labels.targets[labels.train], test, config.linear, name)
    scores.add("linear_top1", (linear.predictions == labels.targets[labels.test]).astype(np.float64))
    scores.metrics["linear_c"] = linear.c


def _instance_scores(
    config: EvaluateConfig,
    chosen: EvaluationSet,
    rows: NDArray[np.int64],
    extractors: Mapping[str, Extractor],
    gallery: Features,
    seed: int,
) -> dict[str, Scores]:
    views = EvaluationImages(chosen, config.preprocessing, Augmentation(config.instance, seed))
    queries = extract_features(extractors, views, config, "features of augmented views")
    scores = {name: Scores() for name in gallery}
    for name, values in scores.items():
        ranks = retrieval_ranks(queries[name], gallery[name], rows)
        values.add("instance_recall_at_1", (ranks == 1).astype(np.float64))
        values.add("instance_map", 1 / ranks)
    return scores
