"""Find the previous curated set, for the drift gate."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from components.core.layout import Layout
from components.core.storage import write_json
from components.curation.config import CurateConfig, CurationError
from components.curation.gates import Drift
from components.curation.rejections import value_counts
from components.data.manifest import read_manifest


@dataclass(frozen=True)
class Previous:
    """The previous set, and the path where this one is recorded."""

    drift: Drift | None
    note: str  # for the report
    path: Path


def find_previous(config: CurateConfig, pool: pa.Table, root: Path) -> Previous:
    """Find the set named by `gates.previous`, else the last one of the same parameters and sources.

    Raises:
        CurationError: the named manifest is missing.
    """
    sources = sorted(set(pool["source"].to_pylist()))
    key = json.dumps([config.model_dump(mode="json", exclude={"gates", "workers"}), sources], sort_keys=True)
    path = Layout(root).state / "curation" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if config.gates.previous is not None:
        named = root / config.gates.previous
        if not named.is_file():
            raise CurationError(f"curate.gates.previous: {named} does not exist; give the manifest of a curated set")
        counts, what = value_counts(read_manifest(named)["source"]), str(config.gates.previous)
    elif path.is_file():
        counts, what = json.loads(path.read_text()), "the last set of these parameters and sources"
    else:
        return Previous(None, "There is no earlier set of these parameters and sources to compare this one with.", path)
    drift = Drift(counts, config.gates.max_source_shift, config.gates.size_ratio)
    return Previous(drift, f"Compared with {what}, which has {sum(counts.values()):,} images.", path)


def remember(previous: Previous, kept: pa.Table) -> None:
    """Record this curated set for comparison with the next one.

    Args:
        previous: of this set.
        kept: pool rows in the set.
    """
    write_json(previous.path, value_counts(kept["source"]))
