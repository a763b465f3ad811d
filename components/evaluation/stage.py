"""Evaluate the frozen features of one model beside untrained baselines and the champion, on the same images."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from components.core.errors import DatasetError
from components.core.layout import Layout
from components.core.pictures import draw_pca, jpeg, pca_colors
from components.core.registered_weights import download_weights
from components.core.storage import atomic_dir, write_bytes
from components.data.evaluation_set import EvaluationSet, read_evaluation_set
from components.evaluation.baselines import DESCRIPTOR, RANDOM, random_network
from components.evaluation.config import EvaluateConfig
from components.evaluation.features import EvaluationImages, backbone_extractor, descriptor_extractor, patch_features
from components.evaluation.measure import measure, values_by_image
from components.evaluation.pictures import choose_queries, draw_neighbors, neighbor_rows
from components.evaluation.report import write_comparison, write_report
from components.evaluation.scores import differences
from components.model.export import load_backbone
from components.model.vit import VisionTransformer

log = logging.getLogger(__name__)

CHAMPION = "champion"


def run(config: EvaluateConfig, root: Path, seed: int, model: str) -> dict[str, Any]:
    """Measure a model on data/evaluation and write reports/evaluate/<model>.

    Args:
        config: the section `evaluate`.
        root: the workspace.
        seed: of the random-weights model, the augmented views, the resampling and the choice of pictures.
        model: a name among `config.models`.

    Returns:
        The model's metrics; those of `random`, `descriptor` and `champion` under these names; differences with
        intervals under `minus_<name>`; and counts.

    Raises:
        DatasetError: no evaluation images, no test images, or a crop size that does not fit a model.
    """
    layout = Layout(root)
    images = read_evaluation_set(layout.evaluation)
    backbones = _backbones(config, root, seed, model)
    extractors = {name: backbone_extractor(backbone) for name, backbone in backbones.items()}
    measured = measure(config, images, {**extractors, DESCRIPTOR: descriptor_extractor}, seed)
    metrics = {name: scores.metrics for name, scores in measured.scores.items()}
    compared = differences(measured.scores, model, config.bootstrap_resamples, seed)
    counts = _counts(images)

    with atomic_dir(layout.report("evaluate", model)) as folder:
        pixels = EvaluationImages(images, config.preprocessing)
        queries = choose_queries(images, config.num_pictures, seed)
        shown = torch.stack([pixels[index] for index in queries])
        colors = {name: pca_colors(patch_features(backbone, shown)) for name, backbone in backbones.items()}
        write_bytes(folder / "pca.jpg", jpeg(draw_pca(shown.numpy(), colors)))
        rows = neighbor_rows(images, pixels, measured.features[model], queries)
        write_bytes(folder / "neighbors.jpg", jpeg(draw_neighbors(rows)))
        write_comparison(folder / "comparison.csv", metrics)
        pq.write_table(values_by_image(measured, images), folder / layout.by_image(model).name, compression="zstd")
        title, certain = f"Evaluation of {model}", {name: s.intervals() for name, s in measured.scores.items()}
        write_report(folder / "report.html", title, _facts(config, counts), metrics, compared, certain)

    others = {name: values for name, values in metrics.items() if name != model}
    intervals = {f"minus_{name}": {k: asdict(v) for k, v in values.items()} for name, values in compared.items()}
    log.info("%s: %s", model, ", ".join(f"{name} {value:.4g}" for name, value in metrics[model].items()))
    return {**metrics[model], **others, **intervals, **counts}


def _backbones(config: EvaluateConfig, root: Path, seed: int, model: str) -> dict[str, VisionTransformer]:
    """Load the candidate (first), the champion if configured, and an untrained network of the candidate's shape."""
    candidate = load_backbone(root / config.models[model])
    found = {model: candidate}
    if model in config.champions:
        found[CHAMPION] = load_backbone(download_weights(config.champions[model], root))
    found[RANDOM] = random_network(candidate.config, seed)
    device, size = "cuda" if torch.cuda.is_available() else "cpu", config.preprocessing.crop_size
    for name, backbone in found.items():
        patch = backbone.config.patch_size
        if size % patch:
            raise DatasetError(
                f"evaluate.preprocessing.crop_size {size} is not a multiple of {patch}, the patch size of {name}"
            )
        backbone.eval().to(device)
    return found


def _counts(images: EvaluationSet) -> dict[str, int]:
    if images.labels is None:
        return {"num_images": images.images.num_rows}
    labels = images.labels
    num_classes = len(np.unique(labels.targets[labels.train]))
    return {"num_train": len(labels.train), "num_test": len(labels.test), "num_classes": num_classes}


def _facts(config: EvaluateConfig, counts: Mapping[str, int]) -> list[str]:
    facts = [
        ", ".join(f"{value} {name.removeprefix('num_')}" for name, value in counts.items()),
        f"Frozen class tokens after the last norm, {config.preprocessing.crop_size} pixel center crops.",
        f"{RANDOM}: the same shape, not trained. {DESCRIPTOR}: gradient and color histograms, no network.",
    ]
    return facts + [f"{CHAMPION} of {name}: {version}." for name, version in config.champions.items()]
