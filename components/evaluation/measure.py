"""Measure several models on the evaluation set: by its classes, or by retrieval of augmented views."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from components.core.metrics import effective_rank, feature_std
from components.data.evaluation_set import EvaluationSet
from components.evaluation.config import EvaluateConfig
from components.evaluation.features import Augmentation, EvaluationImages, Extractor, Features, extract_features
from components.evaluation.protocols import knn, linear
from components.evaluation.protocols.instance import retrieval_ranks
from components.evaluation.scores import Scores


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
        scores = {name: knn.evaluate(values, images.labels, config.knn) for name, values in features.items()}
        for name, found in scores.items():
            found.update(linear.evaluate(features[name], images.labels, config.linear, name))
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
