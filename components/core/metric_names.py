"""Names of the metrics of an evaluation: those of its main set are bare, those of another are `<set>/<metric>`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

_OF_SET = re.compile(r"([a-z0-9][a-z0-9-]*)/(.+)", re.DOTALL)  # no bare metric has only such characters before a slash
_GAP = re.compile(r"slices\.[^=]+\.gap", re.DOTALL)  # `slices.light=west.gap` is the accuracy of a group

# Asked for first; of a set other than the main one, only the first of them that was measured.
MEASURES = (
    "knn_top1",
    "linear_top1",
    "instance_map",
    "instance_recall_at_1",
    "retrieval_map_medium",
    "segmentation_miou",
    "depth_rmse",
    "effective_rank",
)
DECIDES = "decides"  # in a result, by set: the name of the metric that decides
FORMERLY_DECIDING = ("knn_top1", "instance_map")
SETTINGS = ("linear_c",)
BASELINES = ("random", "descriptor")
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


def sets_in(names: Iterable[str]) -> list[str | None]:
    """Return the sets of some metrics: the main one (None) first, the others by name."""
    return sorted({split_name(name)[0] for name in names}, key=lambda evalset: evalset or "")


def first_asked(names: Collection[str]) -> list[str]:
    """Return the metrics that people ask for first: those of the main set, then the first of each other set."""
    found = [metric for metric in MEASURES if metric in names]
    for evalset in sets_in(names):
        if evalset is not None:
            found += [name for metric in MEASURES if (name := in_set(metric, evalset)) in names][:1]
    return found


def compared(result: Iterable[str]) -> list[str]:
    """Return the models that an evaluation's result has differences to: the champion, parents by name, baselines."""
    names = [key.removeprefix("minus_") for key in result if key.startswith("minus_")]
    return sorted(names, key=lambda name: (name != "champion", name in BASELINES, name == "descriptor", name))


def deciding(result: Mapping[str, Any], evalset: str | None = None) -> str:
    """Return the name of the metric that decides on a set (None: the main one), as an evaluation's result says.

    Results of earlier versions do not say it; they have one set, of classes or of images without.
    """
    measured = next((metric for metric in FORMERLY_DECIDING if metric in result), FORMERLY_DECIDING[0])
    return str(result.get(in_set(DECIDES, evalset), measured))


def is_count(name: str) -> bool:
    """Return whether a name is that of a number of images or classes."""
    return split_name(name)[1].startswith("num_")


def is_setting(name: str) -> bool:
    """Return whether a name is that of a setting that was chosen, which is no score."""
    return split_name(name)[1] in SETTINGS


def lower_is_better(name: str) -> bool:
    """Return whether the lower value of a metric is the better one."""
    metric = split_name(name)[1]
    return metric in LOWER_IS_BETTER or bool(_GAP.fullmatch(metric))
