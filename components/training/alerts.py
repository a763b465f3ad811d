"""Alerts on training problems, each raised once with step, rank, term and likely cause. Imports no torch."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from components.core.storage import write_json
from components.core.tracking import log_metrics, tag_run
from components.training.config import AlertConfig

logger = logging.getLogger(__name__)

FILE = "alerts.json"
Kind = Literal["collapse", "starvation", "not_finite"]


@dataclass(frozen=True)
class Alert:
    """One training problem."""

    step: int
    kind: Kind
    message: str


@dataclass(frozen=True)
class _Limit:
    kind: Kind
    term: str
    value: float
    is_floor: bool
    cause: str

    def broken_by(self, value: float) -> bool:
        return value < self.value if self.is_floor else value > self.value


def read_alerts(folder: Path) -> list[Alert]:
    """Read the alerts of a run's folder."""
    path = folder / FILE
    return [Alert(**alert) for alert in json.loads(path.read_text())] if path.exists() else []


def report_alerts(alerts: Sequence[Alert]) -> None:
    """Log a run's alerts to the tracker: the newest of each kind, and the counts."""
    for kind, count in Counter(alert.kind for alert in alerts).items():
        newest = [alert for alert in alerts if alert.kind == kind][-1]
        log_metrics({f"alerts_{kind}": float(count)}, newest.step)
        tag_run({f"pedigree.alert.{kind}": newest.message})


class Alerts:
    """Raise alerts: a log line, an entry of `alerts.json`, metric and tag of the tracker's run. Rank 0 only.

    Alerts after `steps_done` are dropped at the start, because a resumed run repeats these steps.
    """

    def __init__(self, folder: Path, steps_done: int, name: str = "training") -> None:
        self._path, self._name = folder / FILE, name
        before = read_alerts(folder)
        self._all = [alert for alert in before if alert.step <= steps_done]
        if self._all != before:
            self._write()
        report_alerts(self._all)  # the tracker's run is new in this process

    def add(self, alert: Alert) -> None:
        """Raise an alert."""
        self._all.append(alert)
        logger.warning("%s: alert: %s", self._name, alert.message)
        self._write()
        report_alerts([other for other in self._all if other.kind == alert.kind])

    def _write(self) -> None:
        write_json(self._path, [asdict(alert) for alert in self._all])


class Watch:
    """Compare monitored values with their limits; raise one alert per excursion."""

    def __init__(self, alerts: Alerts, config: AlertConfig, after_steps: int, max_entropy: float) -> None:
        self._alerts, self._after_steps = alerts, after_steps
        collapse = "all images look alike to the student: lower optimizer.base_lr or lengthen its warm-up, raise "
        collapse += "objective.koleo_weight, and look for duplicate images"
        targets = "teacher targets are nearly uniform: lower teacher.temp_end and check objective.centering"
        loading = "images come too slowly: raise stream.num_workers or stream.cache_gib, or store smaller images"
        self._limits = (
            _Limit("collapse", "feature_std", config.min_feature_std, is_floor=True, cause=collapse),
            _Limit("collapse", "effective_rank", config.min_effective_rank, is_floor=True, cause=collapse),
            _Limit("collapse", "target_entropy", config.max_entropy_share * max_entropy, is_floor=False, cause=targets),
            _Limit("starvation", "data_wait_share", config.max_wait_share, is_floor=False, cause=loading),
        )
        self._beyond: Counter[str] = Counter()  # consecutive rows beyond the limit

    def check(self, step: int, by_rank: Mapping[str, Sequence[float]]) -> None:
        """Check the values of one row, for each term one per rank."""
        for limit in self._limits:
            if limit.kind == "collapse" and step <= self._after_steps:
                continue  # initially, small LayerScale makes all features equal
            values = by_rank[limit.term]
            ranks = [number for number, value in enumerate(values) if limit.broken_by(value)]
            self._beyond[limit.term] = self._beyond[limit.term] + 1 if ranks else 0
            # The first row includes the start of the workers, so starvation takes two consecutive rows.
            if self._beyond[limit.term] == (2 if limit.kind == "starvation" else 1):
                worst = (min if limit.is_floor else max)(values)
                message = (
                    f"step {step}: {limit.kind}: {limit.term} is {worst:.3g}, "
                    f"{'below' if limit.is_floor else 'above'} {limit.value:.3g} (ranks: {ranks}); {limit.cause}"
                )
                self._alerts.add(Alert(step, limit.kind, message))
