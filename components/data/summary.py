"""A snapshot's summary: one HTML file beside the manifest, complete in itself, equal bytes for equal snapshots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from html import escape
from pathlib import Path

import numpy as np

from components.core.storage import write_bytes
from components.data.expectations import SnapshotFacts, ValidationReport
from components.data.manifest import MANIFEST, QUARANTINE_SCHEMA, REJECTED, read_manifest, read_table

SUMMARY = "summary.html"
SIZE_EDGES = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # pixels, of the shorter side
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.2rem .8rem .2rem 0;text-align:left}
tr{border-bottom:1px solid #ddd}td.n{text-align:right}.ok{color:#176d2d}.bad{color:#b3261e}"""


def write_summary(folder: Path, title: str, facts: SnapshotFacts, validation: ValidationReport) -> None:
    """Write `summary.html` into a snapshot folder."""
    table = read_manifest(folder / MANIFEST)
    reasons = Counter(read_table(folder / REJECTED, QUARANTINE_SCHEMA)["reason"].to_pylist())
    first = table.slice(0, 1).to_pylist()[0]
    about = [
        ("source", facts.source),
        ("license", first["license"]),
        ("images here", table.num_rows),
        ("bytes of images", sum(table["length"].to_pylist())),
        ("shards", len(table["shard"].unique())),
    ]
    counts = [
        ("files seen", facts.seen),
        ("stored", facts.stored),
        ("already present", facts.already_present),
        ("rejected", sum(reasons.values())),
    ]
    labels = Counter(label or "(none)" for label in table["label"].to_pylist())
    checks = [(check.name, check.meaning, check.checked, check.passed) for check in validation.checks]
    sides = np.minimum(table["width"].to_numpy(), table["height"].to_numpy())
    parts = [
        f"<h1>{escape(title)}</h1>",
        _table(about),
        "<h2>The source, counted</h2>",
        _table(counts),
        "<h2>Rejected, by reason</h2>",
        _table(sorted(reasons.items())) if reasons else "<p>Nothing was rejected.</p>",
        "<h2>Expectations</h2>",
        _table(checks),
        "<h2>Shorter side, pixels</h2>",
        _histogram(sides),
        "<h2>Labels</h2>",
        _table(sorted(labels.items())),
    ]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    write_bytes(folder / SUMMARY, (head + "\n".join(parts) + "</html>\n").encode())


def _table(rows: Iterable[tuple[object, ...]]) -> str:
    return "<table>" + "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows) + "</table>"


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return '<td class="ok">passed</td>' if value else '<td class="bad">failed</td>'
    if isinstance(value, int):
        return f'<td class="n">{value:,}</td>'
    return f"<td>{escape(str(value))}</td>"


def _histogram(sides: np.ndarray) -> str:
    """Inline SVG: one bar for each range of sizes, with its count."""
    edges = [*SIZE_EDGES, max(int(sides.max()), SIZE_EDGES[-1]) + 1]
    counts = np.histogram(sides, edges)[0]
    bars = []
    for row, count in enumerate(counts):
        width, top = 380 * int(count) // max(int(counts.max()), 1), 22 * row
        last = row == len(SIZE_EDGES) - 1
        name = f"from {edges[row]}" if last else f"{edges[row]} to {edges[row + 1] - 1}"
        bars.append(f'<text x="0" y="{top + 15}">{name}</text><text x="{120 + width}" y="{top + 15}">{count:,}</text>')
        bars.append(f'<rect x="110" y="{top + 2}" width="{width}" height="17" fill="#4470ad"/>')
    return f'<svg width="600" height="{22 * len(counts)}" font-size="13" role="img">{"".join(bars)}</svg>'
