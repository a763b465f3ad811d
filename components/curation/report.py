"""Report of curation: a funnel, pictures of kept and removed images, and a self-contained page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from components.core.page import Picture, render
from components.core.pictures import principal_components
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
UNSEEN = "nsfw"  # the reason whose images are not shown
# The scores that a filter has a limit for: the reason, the parameter of `filters`, and what the score is.
SCORES = {
    "gray_share": ("grayscale", "max_gray_share", "share of gray pixels"),
    "entropy": ("blank", "min_entropy", "entropy of the brightness, bits"),
    "nsfw": ("nsfw", "max_nsfw", "probability of not being safe"),
}
pc: Any = pyarrow.compute  # created at import, invisible to pyright


@dataclass(frozen=True)
class Curation:
    """Results of a curation, for the report."""

    config: CurateConfig
    inputs: Inputs
    funnel: list[tuple[str, int]]  # step, images left after it
    found: Pool  # with findings of each image
    unique: Unique
    selection: Selection
    rejected: pa.Table
    gates: list[tuple[str, Check]]  # passed checks with their step
    note: str  # on the comparison with the previous set

    @property
    def recalls(self) -> dict[str, float]:
        """Recall of each searched index, see `Neighbors`."""
        has_samples = any(one.retrieve == "sample" for one in self.config.seed_sets.values())
        return self.unique.recalls | ({"images like the seeds": self.selection.recall} if has_samples else {})

    @property
    def kept(self) -> NDArray[np.int64]:
        """Pool rows in the curated set, ascending."""
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
    write_bytes(folder / "report.html", _page(result, album, kept))


def evenness(sizes: NDArray[np.int64]) -> float:
    """Return the entropy of the cluster shares relative to equal shares; 1 is perfectly even."""
    if len(sizes) < 2 or not sizes.sum():
        return 1.0
    shares = sizes[sizes > 0] / sizes.sum()
    return float(-(shares * np.log(shares)).sum() / np.log(len(sizes)))


def _page(result: Curation, album: grids.Album, kept: bytes) -> bytes:
    (_, total), (_, left) = result.funnel[0], result.funnel[-1]
    sample = result.selection.sample
    return render(
        "components/curation/report.html",
        title="Curation",
        kept=left,
        total=total,
        key=[
            ("images in the pool", total, ""),
            ("stay", left, f"{left / total:.1%}"),
            ("left out", total - left, f"{1 - left / total:.1%}"),
            ("gates passed", len(result.gates), ""),
        ],
        funnel=_funnel(result.funnel),
        notes=[result.note, *_faces(result)],
        parts=[_part(part) for part in result.selection.parts],
        parts_total=("total", "", "", "", "", sum(part.final for part in result.selection.parts)),
        levels=_levels(sample.levels) if sample else [],
        coverage=_coverage(result),
        sample=Picture(kept, "Kept images", "jpeg"),
        reasons=_reasons(result.rejected, album),
        histograms=_histograms(result),
        copies=list(result.unique.contamination.per_set.items()),
        recalls=_recalls(result.recalls),
        gates=[(step, check.name, check.meaning, check.checked, check.failing) for step, check in result.gates],
    )


def _funnel(steps: list[tuple[str, int]]) -> list[tuple[str, int, str]]:
    """Return each step with the number of images left and removed."""
    before = [steps[0][1], *(images for _, images in steps)]
    taken = [previous - images for previous, (_, images) in zip(before, steps, strict=False)]
    return [(name, images, f"-{gone:,}" if gone else "") for (name, images), gone in zip(steps, taken, strict=True)]


def _faces(result: Curation) -> list[str]:
    counts = result.found.findings["num_faces"]
    if counts.null_count == len(counts):
        return []
    blurred = int((counts.to_numpy()[result.kept] > 0).sum())
    return [f"In {blurred:,} of the images that stay, faces were found and blurred, in the set and on this page."]


def _part(part: CompositionRow) -> tuple[Any, ...]:
    """Return a row as in the paper's Table 15, with the number of collisions."""
    found = ("–", "–") if part.retrieved is None else (part.retrieved, part.collisions)
    return (part.seed_set, part.mode, part.seeds or "–", *found, part.final)


def _levels(levels: list[Clusters]) -> list[dict[str, Any]]:
    """Describe the levels, top level first, in the order of balancing."""
    shown = []
    for number, level in reversed(list(enumerate(levels, 1))):
        before, after = level.before, level.after
        name = "" if len(levels) == 1 else f"Level {number}: "
        largest = [f"{100 * sizes.max() / max(sizes.sum(), 1):.2f} %" for sizes in (before, after)]
        summary = (
            f"evenness {evenness(before):.3f} before and {evenness(after):.3f} after (1 is even); "
            f"the largest cluster has {largest[0]} before, {largest[1]} after"
        )
        picture = Picture(charts.cluster_sizes(before, after), "Share of the images in each cluster")
        shown.append({"name": f"{name}{len(before):,} clusters", "summary": summary, "picture": picture})
    return shown


def _coverage(result: Curation) -> Picture:
    """Draw the pool on its first two principal components."""
    generator = np.random.default_rng(0)
    rows = np.sort(generator.permutation(len(result.inputs.pool))[:MAP_POINTS])
    plane = principal_components(result.inputs.semantic[rows], 2)
    picture = charts.coverage(plane.scores, np.isin(rows, result.kept), plane.shares)
    return Picture(picture, "The pool on its first two principal components")


def _reasons(rejected: pa.Table, album: grids.Album) -> list[dict[str, Any]]:
    shown = []
    counts = value_counts(rejected["reason"])
    for reason in (r for r in MEANING if r in counts):
        picture = None
        if reason != UNSEEN:
            grid = grids.reason_grid(album, rejected.filter(pc.equal(rejected["reason"], reason)))
            picture = Picture(grid, f"Images left out: {reason}", "jpeg")
        summary = f"{counts[reason]:,} images · {MEANING[reason]}"
        shown.append({"name": reason.replace("_", " "), "summary": summary, "picture": picture})
    return shown


def _histograms(result: Curation) -> list[Picture]:
    config = result.config
    nearest = charts.similarity_histogram(
        result.unique.groups.nearest, config.dedup_similarity, "to the nearest other image of the pool"
    )
    pictures = [Picture(nearest, "Similarity to the nearest other image")]
    if len(result.inputs.evaluation):
        chart = charts.similarity_histogram(
            result.unique.contamination.nearest, config.decontamination_similarity, "to the nearest evaluation image"
        )
        pictures.append(Picture(chart, "Similarity to the nearest evaluation image"))
    rows, reasons = result.rejected["row"].to_numpy(), result.rejected["reason"].to_numpy()
    for name, (reason, limit, what) in SCORES.items():
        threshold = getattr(config.filters, limit)
        if threshold is None:
            continue
        values = result.found.findings[name].to_numpy().astype(np.float32)
        refused = np.zeros(len(values), bool)
        refused[rows[reasons == reason]] = True
        pictures.append(Picture(charts.score_histogram(values, refused, threshold, what), what))
    return pictures


def _recalls(recalls: dict[str, float]) -> list[tuple[str, str]]:
    return [(name, "1 (exact search)" if recall == 1 else f"{recall:.4f}") for name, recall in recalls.items()]
