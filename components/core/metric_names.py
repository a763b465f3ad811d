"""Names of the metrics of an evaluation: those of its main set are bare, those of another are `<set>/<metric>`."""

from __future__ import annotations

import re

_OF_SET = re.compile(r"([a-z0-9][a-z0-9-]*)/(.+)", re.DOTALL)  # no bare metric has only such characters before a slash
LOWER_IS_BETTER = frozenset(
    {"depth_rmse", "depth_abs_rel", "depth_lin4_rmse", "depth_lin4_abs_rel", "mce", "relative_mce"}
)


def in_set(metric: str, evalset: str | None) -> str:
    """Return the name of a metric of one set; None: of the main one."""
    return metric if evalset is None else f"{evalset}/{metric}"


def split_name(name: str) -> tuple[str | None, str]:
    """Return the set of a metric and its bare name; None: of the main set."""
    found = _OF_SET.fullmatch(name)
    return (found[1], found[2]) if found else (None, name)


def lower_is_better(name: str) -> bool:
    """Return whether the lower value of a metric is the better one."""
    metric = split_name(name)[1]
    return metric in LOWER_IS_BETTER or (metric.startswith("slices.") and metric.endswith(".gap"))
