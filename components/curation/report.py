"""What curation did, for people: a funnel, pictures of what stayed and what went, and one self-contained page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from components.core.storage import write_bytes
from components.curation import charts, grids
from components.curation.config import CurateConfig
from components.curation.inputs import EVALUATION, Inputs
from components.curation.pack import Pool
from components.curation.rejections import MEANING, value_counts
from components.curation.retrieve import CompositionRow
from components.curation.select import Clusters, Selection
from components.curation.unique import Unique
from components.data.expectations import Check

MAP_POINTS = 20_000  # images on the coverage map
UNSEEN = "nsfw"  # the reason whose images no picture shows
# The scores that a filter has a limit for: the reason, the parameter of `filters`, and what the score is.
SCORES = {
    "gray_share": ("grayscale", "max_gray_share", "share of grey pixels"),
    "entropy": ("blank", "min_entropy", "entropy of the brightness, bits"),
    "nsfw": ("nsfw", "max_nsfw", "probability of not being safe"),
}
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c2530;max-width:1040px;margin:2.5em auto;padding:0 1.2em}
h1{font-size:1.7em;margin:0}h2{font-size:1.2em;margin:2.2em 0 .5em}h3{font-size:1em;margin:1.6em 0 .4em}
p{margin:.3em 0 .8em}p.lead,p.note,h3 span{color:#5b6875;font-weight:400}p.lead{margin:.2em 0 1.5em}
table{border-collapse:collapse;width:100%}td,th{padding:.35em .7em;border-bottom:1px solid #e3e8ed;text-align:left}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}th{color:#5b6875;font-weight:600}
tr.sum td{font-weight:600;border-bottom:0}
img{max-width:100%;border-radius:4px}.two{display:grid;grid-template-columns:1fr 1fr;gap:1.2em}code{color:#5b6875}
"""
pc: Any = pyarrow.compute  # its functions are made when it is imported, where pyright does not see them


@dataclass(frozen=True)
class Curation:
    """A finished curation: what the report is made of."""

    config: CurateConfig
    inputs: Inputs
    funnel: list[tuple[str, int]]  # step, images left after it
    found: Pool  # what was found of each image
    unique: Unique
    selection: Selection
    rejected: pa.Table
    gates: list[tuple[str, Check]]  # passed, with the step after which each stands
    note: str  # what the set was compared with

    @property
    def recalls(self) -> dict[str, float]:
        """Of each index that was searched, see `Neighbors`."""
        asked = any(one.retrieve == "sample" for one in self.config.seed_sets.values())
        return self.unique.recalls | ({"images like the seeds": self.selection.recall} if asked else {})

    @property
    def kept(self) -> NDArray[np.int64]:
        """Rows of the pool that are in, ascending."""
        return self.selection.chosen["row"].to_numpy()


def write_report(result: Curation, root: Path, folder: Path) -> None:
    """Write funnel.csv, kept.jpg, removed.jpg and report.html into `folder`."""
    rows = "".join(f"{stage},{images}\n" for stage, images in result.funnel)
    write_bytes(folder / "funnel.csv", f"stage,images\n{rows}".encode())
    album = grids.Album(result.found, result.inputs.evaluation, root / EVALUATION)
    kept = grids.kept_grid(album, result.kept)
    write_bytes(folder / "kept.jpg", kept)
    decent = result.rejected.filter(pc.not_equal(result.rejected["reason"], UNSEEN))
    write_bytes(folder / "removed.jpg", grids.removed_grid(album, decent))
    write_bytes(folder / "report.html", _page(result, album, kept).encode())


def evenness(sizes: NDArray[np.int64]) -> float:
    """Entropy of the clusters' shares over the entropy of equal shares: 1 is perfectly even."""
    if len(sizes) < 2 or not sizes.sum():
        return 1.0
    shares = sizes[sizes > 0] / sizes.sum()
    return float(-(shares * np.log(shares)).sum() / np.log(len(sizes)))


def _page(result: Curation, album: grids.Album, kept: bytes) -> str:
    lead = f"{result.funnel[-1][1]:,} of {result.funnel[0][1]:,} images stay; each other has its reason in"
    sections = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Curation</title><style>{STYLE}</style>',
        f'<h1>Curation</h1><p class="lead">{lead} <code>data/curated/rejected.parquet</code>.</p>',
        charts.inline(charts.funnel(result.funnel), "Images left after each step"),
        *(f'<p class="note">{html.escape(note)}</p>' for note in (result.note, *_faces(result))),
        "<h2>What the set is made of</h2>",
        _parts(result.selection.parts),
        "<h2>Balance</h2>",
        *(_clusters(result.selection.sample.levels) if result.selection.sample else ["<p>No balanced part.</p>"]),
        "<h2>Coverage</h2>",
        _coverage(result),
        "<h2>A sample of what stays</h2>",
        charts.inline(kept, "Kept images", "jpeg"),
        "<h2>Why images were left out</h2>",
        *_reasons(result.rejected, album),
        '<h2>Similarity and scores</h2><div class="two">',
        *_histograms(result),
        "</div><h2>Copies of evaluation images</h2>",
        _table(("evaluation set", "images removed from the pool"), list(result.unique.contamination.per_set.items())),
        "<h2>Recall of the indexes</h2>",
        _table(("searched", "share of the exact pairs that were found"), _recalls(result.recalls)),
        f"<h2>Gates: {len(result.gates)} passed</h2>",
        _table(("after", "gate", "what must hold", "checked", "failing"), _gates(result.gates), numbers=2),
        "</html>\n",
    ]
    return "\n".join(sections)


def _faces(result: Curation) -> list[str]:
    counts = result.found.findings["num_faces"]
    if counts.null_count == len(counts):
        return []
    blurred = int((counts.to_numpy()[result.kept] > 0).sum())
    return [f"In {blurred:,} of the images that stay, faces were found and blurred, in the set and on this page."]


def _parts(parts: list[CompositionRow]) -> str:
    """As the paper's Table 15, with how often an image was found that was in already."""

    def row(part: CompositionRow) -> tuple:
        found = ("–", "–") if part.retrieved is None else (part.retrieved, part.collisions)
        return (part.seed_set, part.mode, part.seeds or "–", *found, part.final)

    head = ("part", "mode", "seed images", "found", "of them already in", "final")
    total = ("total", "", "", "", "", sum(part.final for part in parts))
    return _table(head, [row(part) for part in parts], numbers=4, total=total)


def _clusters(levels: list[Clusters]) -> list[str]:
    """The top level first: its clusters are what the sample is balanced over before all others."""
    sections = []
    for number, level in reversed(list(enumerate(levels, 1))):
        before, after = level.before, level.after
        name = "" if len(levels) == 1 else f"Level {number}: "
        largest = [f"{100 * sizes.max() / max(sizes.sum(), 1):.2f} %" for sizes in (before, after)]
        told = (
            f"evenness {evenness(before):.3f} before and {evenness(after):.3f} after (1 is even); "
            f"the largest cluster has {largest[0]} before, {largest[1]} after"
        )
        sections.append(f"<h3>{name}{len(before):,} clusters <span>· {told}</span></h3>")
        sections.append(charts.inline(charts.cluster_sizes(before, after), "Share of the images in each cluster"))
    return sections


def _coverage(result: Curation) -> str:
    """The pool on the plane of its first two principal components."""
    generator = np.random.default_rng(0)
    rows = np.sort(generator.permutation(len(result.inputs.pool))[:MAP_POINTS])
    vectors = result.inputs.semantic[rows].astype(np.float64)
    vectors -= vectors.mean(axis=0)
    values, axes = np.linalg.eigh(vectors.T @ vectors)
    values, axes = values[::-1][:2], axes[:, ::-1][:, :2]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])  # else the sign is arbitrary
    share = values / max(float((vectors**2).sum()), 1e-12)
    picture = charts.coverage(vectors @ axes, np.isin(rows, result.kept), share)
    return charts.inline(picture, "The pool on its first two principal components")


def _reasons(rejected: pa.Table, album: grids.Album) -> list[str]:
    sections = []
    counts = value_counts(rejected["reason"])
    for reason in (r for r in MEANING if r in counts):
        told = f"{counts[reason]:,} images · {html.escape(MEANING[reason])}"
        sections.append(f"<h3>{reason.replace('_', ' ')} <span>· {told}</span></h3>")
        if reason == UNSEEN:
            sections.append('<p class="note">Not shown.</p>')
            continue
        grid = grids.reason_grid(album, rejected.filter(pc.equal(rejected["reason"], reason)))
        sections.append(charts.inline(grid, f"Images left out: {reason}", "jpeg"))
    return sections or ["<p>None was.</p>"]


def _histograms(result: Curation) -> list[str]:
    config = result.config
    nearest = charts.similarity_histogram(
        result.unique.groups.nearest, config.dedup_similarity, "to the nearest other image of the pool"
    )
    pictures = [charts.inline(nearest, "Similarity to the nearest other image")]
    if len(result.inputs.evaluation):
        chart = charts.similarity_histogram(
            result.unique.contamination.nearest, config.decontamination_similarity, "to the nearest evaluation image"
        )
        pictures.append(charts.inline(chart, "Similarity to the nearest evaluation image"))
    rows, reasons = result.rejected["row"].to_numpy(), result.rejected["reason"].to_numpy()
    for name, (reason, limit, what) in SCORES.items():
        threshold = getattr(config.filters, limit)
        if threshold is None:
            continue
        values = result.found.findings[name].to_numpy().astype(np.float32)
        refused = np.zeros(len(values), bool)
        refused[rows[reasons == reason]] = True
        pictures.append(charts.inline(charts.score_histogram(values, refused, threshold, what), what))
    return pictures


def _recalls(recalls: dict[str, float]) -> list[tuple[str, str]]:
    return [(name, "1 (exact search)" if recall == 1 else f"{recall:.4f}") for name, recall in recalls.items()]


def _gates(passed: list[tuple[str, Check]]) -> list[tuple]:
    return [(step, check.name, check.meaning, check.checked, check.failing) for step, check in passed]


def _table(
    head: tuple[str, ...], rows: Sequence[tuple], *, numbers: int = 1, total: tuple[Any, ...] | None = None
) -> str:
    """An HTML table whose last columns are numbers."""

    def line(cells: tuple, tag: str, kind: str = "") -> str:
        shown = []
        for place, cell in enumerate(cells):
            text = f"{cell:,}" if isinstance(cell, int) else html.escape(str(cell))
            right = ' class="n"' if place >= len(cells) - numbers else ""
            shown.append(f"<{tag}{right}>{text}</{tag}>")
        return f"<tr{kind}>{''.join(shown)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    end = line(total, "td", ' class="sum"') if total else ""
    return f"<table>{line(head, 'th')}{body}{end}</table>" if rows else "<p>None.</p>"
