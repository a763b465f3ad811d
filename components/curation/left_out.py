"""Console lines on rejected images: counts, reasons, two examples, and the deciding setting."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import pyarrow as pa
import pyarrow.compute

from components.core.text import one_line
from components.curation.config import CurateConfig
from components.curation.inputs import Inputs
from components.curation.rejections import MEANING, SETTING, value_counts

EXAMPLES = 2
pc: Any = pyarrow.compute  # created at import, invisible to pyright


def left_out_lines(config: CurateConfig, inputs: Inputs, rejected: pa.Table) -> Iterator[str]:
    """Yield a line with the total, then one for each reason, in the order of the steps.

    Args:
        config: section `curate`.
        inputs: the pool and the evaluation sets.
        rejected: the table of `rejections` over the rows of the pool.
    """
    total, counts = max(len(inputs.pool), 1), value_counts(rejected["reason"])
    yield f"left out: {len(rejected):,} of {len(inputs.pool):,} images, {100 * len(rejected) / total:.1f} %"
    for reason in (reason for reason in MEANING if reason in counts):
        rows = rejected.filter(pc.equal(rejected["reason"], reason)).sort_by("row").slice(0, EXAMPLES).to_pylist()
        examples = "; ".join(_example(row, inputs) for row in rows)
        summary = f"{reason} {counts[reason]:,}, {100 * counts[reason] / total:.1f} %, {MEANING[reason]}"
        yield f"left out, {summary}: {examples}{_decided_by(config, reason)}"


def _example(row: dict[str, Any], inputs: Inputs) -> str:
    name = one_line(inputs.pool["source_uri"][row["row"]].as_py())
    like = f"{row['similarity']:.2f} like {_name_of(row['duplicate_of'], inputs)}, " if row["duplicate_of"] else ""
    return f"{name} ({like}{row['detail']})"


def _name_of(image_id: str, inputs: Inputs) -> str:
    """Return the source URI of an image of the pool or of an evaluation set."""
    for table in (inputs.pool, inputs.evaluation):
        if (row := pc.index(table["image_id"], image_id).as_py()) >= 0:
            return one_line(table["source_uri"][row].as_py())
    return image_id[:12]


def _decided_by(config: CurateConfig, reason: str) -> str:
    if (setting := SETTING.get(reason)) is None:
        return ""
    value = attrgetter(setting)(config)
    return f"; curate.{setting} decides, now {'null' if value is None else value}"
