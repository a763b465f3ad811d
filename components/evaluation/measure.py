"""Measure models on each evaluation set of a run, as `pedigree evaluate` does on one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from components.core.metric_names import DECIDES, in_set
from components.data.evalset import Evalset
from components.evaluation.baselines import DESCRIPTOR, RANDOM
from components.evaluation.compare import ComparedModel, Comparison, baselines, compare, protocols_for
from components.evaluation.comparison_report import (
    deciding_metric,
    interval_differences,
    notes,
    verdicts,
    write_page,
)
from components.evaluation.config import LONG_PROTOCOLS, EvaluateConfig
from components.evaluation.facts import about, how_scaled
from components.evaluation.settings import Settings, scaled, settings_for

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeasuredSet:
    """What was measured on one set.

    Attributes:
        prefix: the set in the names of its metrics; None: it is the main one.
        found: scores and tokens.
        models: in the order of `found.scores`.
        settings: of the protocols.
        seed: of the choice of pictures and of resamples.
    """

    prefix: str | None
    found: Comparison
    models: Sequence[ComparedModel]
    settings: Settings
    seed: int

    @property
    def evalset(self) -> Evalset:
        """The set."""
        return self.found.evalset

    def verdict(self) -> list[str]:
        """Return a line on the first model against each other one, by the metric that decides on the set."""
        return [f"{self.evalset.name}: {one.line(self.models[0].name)}" for one in verdicts(self.found, self.seed)]

    def page(self, lines: Iterable[str]) -> bytes:
        """Return the page of the set, with further lines on it."""
        networks = [model for model in self.models if model.name not in (RANDOM, DESCRIPTOR)]
        facts = [
            about(self.evalset),
            *map(how_scaled, networks),
            f"{RANDOM}: the same shape, not trained. {DESCRIPTOR}: gradient and color histograms, no network.",
            *self.settings.lines(self.found.protocols),
            *notes(self.found),
            *lines,
        ]
        return write_page(self.found, self.models, facts, self.settings, self.seed)

    def result(self) -> dict[str, Any]:
        """Return the first model's metrics and the set's counts, others' metrics, and differences with intervals."""
        (_, ours), *others = self.found.scores.items()
        result: dict[str, Any] = self._named({**ours.metrics, **_counts(self.evalset)})
        result[in_set(DECIDES, self.prefix)] = in_set(deciding_metric(self.found), self.prefix)
        result |= {name: self._named(scores.metrics) for name, scores in others}
        compared = interval_differences(self.found, self.seed)
        return result | {
            f"minus_{name}": self._named({metric: asdict(one) for metric, one in found.items()})
            for name, found in compared.items()
        }

    def _named(self, values: dict[str, Any]) -> dict[str, Any]:
        return {in_set(metric, self.prefix): value for metric, value in values.items()}


def measure(
    config: EvaluateConfig, sets: Sequence[Evalset], networks: Sequence[ComparedModel], cache: Path, seed: int
) -> list[MeasuredSet]:
    """Measure the networks and the baselines of the first on each set by the protocols of its task.

    Args:
        config: the section `evaluate`.
        sets: the main one first.
        networks: the first is the one that is asked about.
        cache: folder of tokens.
        seed: of all random choices.

    Raises:
        DatasetError: a set that cannot be measured.
    """
    found = []
    for number, evalset in enumerate(sets):
        if number:
            log.info("%s: of task %s, its metrics are named %s/...", evalset.name, evalset.config.task, evalset.name)
        settings, models = settings_for(evalset, config), _on_set(networks, evalset, config, seed)
        left_out = set(LONG_PROTOCOLS) - set(config.long_protocols)
        protocols = [name for name in protocols_for(evalset) if name not in left_out]
        if long := [name for name in protocols_for(evalset) if name in left_out]:
            log.info("%s: not measured by %s; evaluate.long_protocols can name them", evalset.name, ", ".join(long))
        compared = compare(evalset, models, protocols, settings, cache, seed)
        found.append(MeasuredSet(evalset.name if number else None, compared, models, settings, seed))
    return found


def merged(sets: Iterable[MeasuredSet]) -> dict[str, Any]:
    """Return the results of all sets as one."""
    result: dict[str, Any] = {}
    for one in sets:
        for key, value in one.result().items():
            result[key] = {**result.get(key, {}), **value} if isinstance(value, dict) else value
    return result


def _on_set(
    networks: Sequence[ComparedModel], evalset: Evalset, config: EvaluateConfig, seed: int
) -> list[ComparedModel]:
    """Return the networks with the scaling of a set's images, and the baselines of the first."""
    found = [
        replace(model, preprocessing=scaled(config.preprocessing, evalset, model.encoder.patch_size))
        for model in networks
    ]
    return [*found, *baselines(found[0], seed)]


def _counts(evalset: Evalset) -> dict[str, int]:
    labels = evalset.images.labels
    if labels is not None:
        num_classes = len(np.unique(labels.targets[labels.train]))
        return {"num_train": len(labels.train), "num_test": len(labels.test), "num_classes": num_classes}
    if evalset.config.task == "retrieval":
        return {"num_queries": len(evalset.queries), "num_gallery": len(evalset.gallery)}
    if evalset.config.task == "classification":
        return {"num_images": evalset.images.images.num_rows}
    return {"num_train": len(evalset.train), "num_test": len(evalset.test)}
