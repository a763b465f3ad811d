"""Page of a comparison: the verdict, scores with intervals and differences, classes, and pictures of each model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from components.core.knn import knn_predictions, nearest
from components.core.metric_names import first_asked, lower_is_better
from components.core.metrics import Interval
from components.core.page import render
from components.data.evaluation_set import Labels
from components.evaluation.compare import ComparedModel, Comparison
from components.evaluation.comparison_pictures import figures
from components.evaluation.report import difference_rows, key_figures, score_rows
from components.evaluation.scores import Part, differences
from components.evaluation.settings import Settings

CONFUSIONS = 10
BARS = 40  # in a chart; more classes are told by their number
RESAMPLES = 1000  # of each bootstrap
# What has an interval beside a metric of all pixels together.
PAIRED = {f"{name}_miou": f"{name}_image_miou" for name in ("segmentation", "segmentation_lin4", "segmentation_ms")}


@dataclass(frozen=True)
class Bars:
    """Scores of the parts of the test images, for a chart; `left_out` higher ones are not in it."""

    what: str
    parts: list[Part]
    left_out: int


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
    labels = found.evalset.images.labels
    return render(
        "components/evaluation/comparison.html",
        title=f"{models[0].name} on {found.evalset.name}",
        verdict=". ".join(one.line(models[0].name) for one in told),
        facts=facts,
        key=key_figures(metrics, [deciding_metric(found), *first_asked(metrics[models[0].name])]),
        models=list(metrics),
        scores=score_rows(metrics, certain),
        differences={other: difference_rows(rows) for other, rows in compared.items() if rows},
        parts=_bars(parts_by_model(found, seed)[models[0].name]),
        confusions=_confusions(found, labels, settings) if labels else [],
        figures=figures(found, models, seed),
    )


def parts_by_model(found: Comparison, seed: int) -> dict[str, dict[str, list[Part]]]:
    """Return the scores of classes and groups of each model, such as those of "knn_top1 by light"."""
    clusters = found.evalset.clusters
    return {
        name: scores.all_parts(np.random.default_rng(seed), RESAMPLES, clusters)
        for name, scores in found.scores.items()
    }


def _bars(parts: Mapping[str, list[Part]]) -> list[Bars]:
    """Return the lowest scores first."""
    return [
        Bars(what, sorted(each, key=lambda part: part.score.mean)[:BARS], max(len(each) - BARS, 0))
        for what, each in parts.items()
    ]


def _confusions(found: Comparison, labels: Labels, settings: Settings) -> list[tuple[str, str, int]]:
    """Return the most frequent confusions of the first model by its nearest neighbors."""
    tokens = next(iter(found.tokens.values()))
    count = min(settings.knn.reported, len(labels.gallery))
    near = nearest(tokens.features[labels.test], tokens.features[labels.gallery], count)
    votes = labels.targets[labels.gallery][near.indices]
    predicted = knn_predictions(near.similarities, votes, {count}, settings.knn.temperature)[count]
    targets = labels.targets[labels.test]
    pairs = Counter(zip(targets[predicted != targets].tolist(), predicted[predicted != targets].tolist(), strict=True))
    return [(labels.classes[a], labels.classes[b], n) for (a, b), n in pairs.most_common(CONFUSIONS)]
