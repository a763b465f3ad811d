"""What curation did, for people: a funnel, pictures of what stayed and what went, and one self-contained page."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from components.core.storage import write_bytes
from components.curation import charts, grids
from components.curation.config import CurateConfig
from components.curation.decontaminate import Contamination
from components.curation.rejections import MEANING, reason_counts

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c2530;max-width:1040px;margin:2.5em auto;padding:0 1.2em}
h1{font-size:1.7em;margin:0}h2{font-size:1.15em;margin:2em 0 .5em}p.lead{color:#5b6875;margin:.2em 0 1.5em}
table{border-collapse:collapse;width:100%}td,th{padding:.35em .7em;border-bottom:1px solid #e3e8ed;text-align:left}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}th{color:#5b6875;font-weight:600}
img{max-width:100%;border-radius:4px}.two{display:grid;grid-template-columns:1fr 1fr;gap:1.2em}code{color:#5b6875}
"""


@dataclass(frozen=True)
class Curation:
    """A finished curation: what the report is made of."""

    config: CurateConfig
    funnel: list[tuple[str, int]]  # step, images left after it
    pool: pa.Table
    evaluation: pa.Table
    kept: NDArray[np.int64]  # [M] rows of the pool
    rejected: pa.Table
    nearest: NDArray[np.float32]  # [F] cosine of each filtered image to the nearest other
    contamination: Contamination
    labels: NDArray[np.int64]  # [U] the cluster of each deduplicated image
    sampled: NDArray[np.int64]  # [M] indices into them


def write_report(result: Curation, pool_folder: Path, evaluation_folder: Path, folder: Path) -> None:
    """Write funnel.csv, kept.jpg, removed.jpg and report.html into `folder`."""
    rows = "".join(f"{stage},{images}\n" for stage, images in result.funnel)
    write_bytes(folder / "funnel.csv", f"stage,images\n{rows}".encode())
    album = grids.Album(result.pool, pool_folder, result.evaluation, evaluation_folder)
    kept = grids.kept_grid(album, result.kept)
    removed = grids.removed_grid(album, result.rejected)
    write_bytes(folder / "kept.jpg", kept)
    write_bytes(folder / "removed.jpg", removed)
    write_bytes(folder / "report.html", _page(result, kept, removed).encode())


def _page(result: Curation, kept: bytes, removed: bytes) -> str:
    config = result.config
    dedup, decontamination = config.dedup_similarity, config.decontamination_similarity
    nearest = charts.similarity_histogram(result.nearest, dedup, "to the nearest other image of the pool")
    histograms = charts.inline(nearest, "Similarity to the nearest other image")
    if len(result.evaluation):
        chart = charts.similarity_histogram(
            result.contamination.nearest, decontamination, "to the nearest evaluation image"
        )
        histograms += charts.inline(chart, "Similarity to the nearest evaluation image")
    before = np.bincount(result.labels)
    after = np.bincount(result.labels[result.sampled], minlength=len(before))
    lead = f"{result.funnel[-1][1]:,} of {result.funnel[0][1]:,} images stay; each other has its reason in"
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Curation</title><style>{STYLE}</style>',
            f'<h1>Curation</h1><p class="lead">{lead} <code>data/curated/rejected.parquet</code>.</p>',
            charts.inline(charts.funnel(result.funnel), "Images left after each step"),
            "<h2>Why images were left out</h2>",
            _reasons(result.rejected),
            "<h2>Copies of evaluation images</h2>",
            _table(("evaluation set", "images removed from the pool"), list(result.contamination.per_set.items())),
            '<h2>Similarity</h2><div class="two">',
            histograms,
            f"</div><h2>{len(before):,} clusters, before and after balancing</h2>",
            charts.inline(charts.cluster_sizes(before, after), "Images of each cluster"),
            "<h2>Left out, each beside the image it duplicates</h2>",
            charts.inline(removed, "Removed images", "jpeg"),
            "<h2>A sample of what stays</h2>",
            charts.inline(kept, "Kept images", "jpeg"),
            "</html>\n",
        ]
    )


def _reasons(rejected: pa.Table) -> str:
    counts = reason_counts(rejected)
    rows = [(reason, MEANING[reason], counts[reason]) for reason in MEANING if reason in counts]
    return _table(("reason", "meaning", "images"), rows)


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    """An HTML table whose last column is a number."""

    def line(cells: tuple, tag: str) -> str:
        *texts, number = cells
        shown = f"{number:,}" if isinstance(number, int) else html.escape(str(number))
        left = "".join(f"<{tag}>{html.escape(str(text))}</{tag}>" for text in texts)
        return f'<tr>{left}<{tag} class="n">{shown}</{tag}></tr>'

    body = "".join(line(row, "td") for row in rows)
    return f"<table>{line(head, 'th')}{body}</table>" if rows else "<p>None.</p>"
