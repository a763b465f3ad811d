"""Summary of a snapshot: a self-contained HTML file beside the manifest; equal snapshots give equal bytes."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np

from components.core.page import Cell, render
from components.core.storage import write_bytes
from components.data.expectations import VALIDATION, SnapshotFacts, ValidationReport, write_checks
from components.data.manifest import MANIFEST, QUARANTINE_SCHEMA, REJECTED, read_manifest, read_table

SUMMARY = "summary.html"
SIZE_EDGES = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # pixels, of the shorter side


def write_summary(folder: Path, title: str, facts: SnapshotFacts, validation: ValidationReport) -> None:
    """Write `summary.html` and `validation.json` into a snapshot folder."""
    table = read_manifest(folder / MANIFEST)
    reasons = Counter(read_table(folder / REJECTED, QUARANTINE_SCHEMA)["reason"].to_pylist())
    labels = Counter(label or "(none)" for label in table["label"].to_pylist())
    page = render(
        "components/data/summary.html",
        title=title,
        key=[
            ("images here", table.num_rows, ""),
            ("bytes of images", sum(table["length"].to_pylist()), ""),
            ("shards", len(table["shard"].unique()), ""),
        ],
        about=[("source", facts.source), ("license", table["license"][0].as_py())],
        counts=[
            ("files seen", facts.seen),
            ("stored", facts.stored),
            ("already present", facts.already_present),
            ("rejected", sum(reasons.values())),
        ],
        reasons=sorted(reasons.items()),
        checks=[(check.name, check.meaning, check.checked, _outcome(check.passed)) for check in validation.checks],
        sides=_sizes(np.minimum(table["width"].to_numpy(), table["height"].to_numpy())),
        labels=sorted(labels.items()),
    )
    write_bytes(folder / SUMMARY, page)
    write_checks(folder / VALIDATION, [("snapshot", check) for check in validation.checks])


def _outcome(passed: bool) -> Cell:
    return Cell("passed", mark="good") if passed else Cell("failed", mark="bad")


def _sizes(sides: np.ndarray) -> list[tuple[str, int, str]]:
    """Count the images in each range of sizes."""
    names = [*(f"{low} to {high - 1}" for low, high in pairwise(SIZE_EDGES)), f"from {SIZE_EDGES[-1]}"]
    end = max(int(sides.max()), SIZE_EDGES[-1]) + 1
    counts = np.histogram(sides, [*SIZE_EDGES, end])[0].tolist()
    return [(name, count, "") for name, count in zip(names, counts, strict=True)]
