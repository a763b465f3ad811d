"""Page of a comparison: the verdict, scores with intervals and differences, classes, and pictures of each model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from components.core.intervals import accuracy_interval
from components.core.knn import knn_predictions, nearest
from components.core.metric_names import lower_is_better
from components.core.metrics import Interval
from components.core.page import Cell, Picture, render
from components.core.pictures import draw_pca, jpeg, pca_colors
from components.data.evaluation_set import EvaluationSet
from components.evaluation.compare import ComparedModel, Comparison
from components.evaluation.dense_pictures import draw_matches, patch_matches
from components.evaluation.features import EvaluationImages
from components.evaluation.pictures import choose_queries, draw_neighbors, neighbor_rows
from components.evaluation.report import difference_rows, key_figures, score_rows
from components.evaluation.scores import Scores, differences
from components.evaluation.settings import Settings

SHOWN = 8  # images in each picture
CONFUSIONS = 10
RESAMPLES = 1000  # of each bootstrap
# What has an interval beside a metric of all pixels together.
PAIRED = {f"{name}_miou": f"{name}_image_miou" for name in ("segmentation", "segmentation_lin4")}


@dataclass(frozen=True)
class Verdict:
    """The deciding metric of one model against another.

    Attributes:
        metric: that decides on the set.
        other: the model that it is held against.
        difference: the model minus the other, of the metric or, where it is no mean over images, without interval.
        better: True or False where the interval excludes no difference; None where it does not, or there is none.
    """

    metric: str
    other: str
    difference: Interval
    better: bool | None

    def line(self, model: str) -> str:
        """Return the verdict as a sentence."""
        told = {True: "better than", False: "worse than", None: "no better and no worse than"}[self.better]
        found = self.difference
        bounds = "" if np.isnan(found.low) else f" ({found.low:+.3f} to {found.high:+.3f})"
        if not bounds:
            return f"{model} minus {self.other}, without an interval: {self.metric} {found.mean:+.3f}"
        return f"{model} is {told} {self.other}: {self.metric} {found.mean:+.3f}{bounds}"


def deciding_metric(found: Comparison) -> str:
    """Return the set's metric, or the first that was measured if it was not; its mean over images if it is none."""
    first, asked = next(iter(found.scores.values())), found.evalset.config.metric
    measured = asked if asked in first.metrics else next(iter(first.metrics))
    return PAIRED.get(measured, measured)


def verdicts(found: Comparison, seed: int) -> list[Verdict]:
    """Return the first model's verdict against each other one."""
    model, metric = next(iter(found.scores)), deciding_metric(found)
    compared = interval_differences(found, seed)
    told = []
    for other, scores in found.scores.items():
        if other == model or metric not in scores.metrics:
            continue
        difference = compared[other].get(metric)
        better = None
        if difference is None:
            change = found.scores[model].metrics[metric] - scores.metrics[metric]
            difference = Interval(change, float("nan"), float("nan"))
        elif difference.low > 0 or difference.high < 0:
            better = (difference.low > 0) != lower_is_better(metric)
        told.append(Verdict(metric, other, difference, better))
    return told


def interval_differences(found: Comparison, seed: int) -> dict[str, dict[str, Interval]]:
    """Return the first model minus each other one, by metric."""
    return differences(found.scores, next(iter(found.scores)), RESAMPLES, seed, found.evalset.clusters)


def notes(found: Comparison) -> list[str]:
    """Return what the scores do not show: the metric that decides, clusters, and choices such as the worst group."""
    config, clusters, metric = found.evalset.config, found.evalset.clusters, deciding_metric(found)
    lines = []
    if metric != PAIRED.get(config.metric, config.metric):
        lines.append(f"the set's metric, {config.metric}, was not measured; {metric} decides here")
    if clusters is not None:
        count = len(np.unique(clusters))
        lines.append(f"intervals take the {count} values of {config.clusters} as independent, not the images")
    return lines + [f"{name}, {key}: {text}" for name, one in found.scores.items() for key, text in one.notes.items()]


def write_page(
    found: Comparison, models: Sequence[ComparedModel], facts: Sequence[str], settings: Settings, seed: int
) -> bytes:
    """Return the page.

    Args:
        found: scores and tokens.
        models: in the order of the comparison.
        facts: lines on the set and on contamination.
        settings: of the protocols.
        seed: of resamples and of the choice of pictures.
    """
    metrics = {name: scores.metrics for name, scores in found.scores.items()}
    certain = {name: scores.intervals(found.evalset.clusters) for name, scores in found.scores.items()}
    compared = interval_differences(found, seed)
    told = verdicts(found, seed)
    labels, (classes, confusions) = found.evalset.images.labels, ([], [])
    if labels is not None:
        classes, confusions = _by_class(found, settings)
    return render(
        "components/evaluation/comparison.html",
        title=f"{models[0].name} on {found.evalset.name}",
        verdict=". ".join(one.line(models[0].name) for one in told),
        facts=facts,
        key=key_figures(metrics, [deciding_metric(found), *metrics[models[0].name]]),
        models=list(metrics),
        scores=score_rows(metrics, certain),
        differences={other: difference_rows(rows) for other, rows in compared.items() if rows},
        classes=classes,
        confusions=confusions,
        figures=_figures(found, models, seed),
    )


def _by_class(found: Comparison, settings: Settings) -> tuple[list[tuple[object, ...]], list[tuple[str, str, int]]]:
    """Return the kNN accuracy of each class with its interval, the worst first, and the most frequent confusions."""
    labels, tokens = found.evalset.images.labels, next(iter(found.tokens.values()))
    assert labels is not None
    count = min(settings.knn.reported, len(labels.train))
    near = nearest(tokens.features[labels.test], tokens.features[labels.train], count)
    votes = labels.targets[labels.train][near.indices]
    predicted = knn_predictions(near.similarities, votes, {count}, settings.knn.temperature)[count]
    targets = labels.targets[labels.test]
    rows: list[tuple[float, tuple[object, ...]]] = []
    for number, name in enumerate(labels.classes):
        correct = (predicted == number)[targets == number].astype(np.float64)
        if len(correct):
            interval = accuracy_interval(correct)
            cell = Cell(f"{interval.mean:.3f}", f"({interval.low:.3f} to {interval.high:.3f})")
            rows.append((interval.mean, (name, len(correct), cell)))
    pairs = Counter(zip(targets[predicted != targets].tolist(), predicted[predicted != targets].tolist(), strict=True))
    confusions = [(labels.classes[a], labels.classes[b], n) for (a, b), n in pairs.most_common(CONFUSIONS)]
    return [row for _, row in sorted(rows, key=lambda one: one[0])], confusions


def _figures(found: Comparison, models: Sequence[ComparedModel], seed: int) -> list[tuple[str, Picture, str]]:
    """Return pictures of a few test images: patch features of all networks, neighbors, matching patches, failures."""
    first, images = models[0], found.evalset.images
    pixels = EvaluationImages(images, first.preprocessing)
    queries = choose_queries(images, SHOWN, seed)
    shown = torch.stack([pixels[index] for index in queries])
    figures = []
    patches = {m.name: m.encoder.last_patches(shown) for m in models if m.preprocessing == first.preprocessing}
    if colors := {name: pca_colors(tokens) for name, tokens in patches.items() if tokens is not None}:
        caption = "First three principal components of the patch tokens, as colors, in each row."
        figures.append(("Patch features", _picture(draw_pca(shown.numpy(), colors), "Patch features"), caption))
    features = found.tokens[first.name].features
    rows = neighbor_rows(images, pixels, features, queries)
    caption = "By cosine of the class tokens. Frame: green same class, red other."
    figures.append(("Nearest neighbors", _picture(draw_neighbors(rows), "Nearest neighbors"), caption))
    if failures := _failures(images, found.scores[first.name], seed):
        sheet = draw_neighbors(neighbor_rows(images, pixels, features, failures))
        figures.append(("Failures", _picture(sheet, "Failures"), "Test images of a wrong class, with their neighbors."))
    if (tokens := patches[first.name]) is not None and len(queries) > 1:
        figures.append(_matches(tokens[:2], shown[:2]))
    return figures


def _failures(images: EvaluationSet, scores: Scores, seed: int) -> list[int]:
    """Return some test images that the nearest neighbors take for another class."""
    if images.labels is None or "knn_top1" not in scores.by_image:
        return []
    wrong: NDArray[np.int64] = images.labels.test[scores.by_image["knn_top1"] == 0]
    return [int(row) for row in np.random.default_rng(seed).permutation(wrong)[:SHOWN]]


def _matches(tokens: NDArray[np.float32], pair: torch.Tensor) -> tuple[str, Picture, str]:
    side = isqrt(tokens.shape[1])
    a, b = tokens.reshape(2, side, side, -1)
    first, second = (Image.fromarray(one.numpy()) for one in pair)
    drawn = draw_matches(first, second, patch_matches(a, b))
    return ("Matching patches", _picture(drawn, "Matching patches"), "Patches that are each other's nearest neighbor.")


def _picture(image: Image.Image, alt: str) -> Picture:
    return Picture(jpeg(image), alt, "jpeg")
