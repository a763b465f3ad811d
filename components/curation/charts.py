"""Charts of the curation report, as PNG bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from components.core.charts import BLUE, GRAY, RED, new_figure, png
from components.core.pictures import INK

BARS = 2000


def similarity_histogram(values: NDArray[np.float32], threshold: float, what: str) -> bytes:
    """Draw a histogram of cosines on a logarithmic scale, with the threshold marked."""
    figure, axes = _figure(5.4, 3)
    edges = np.linspace(-0.2, 1, 61).tolist()
    axes.hist(values[(values > -1) & (values <= threshold)], edges, color=BLUE)
    axes.hist(values[values > threshold], edges, color=RED)
    axes.axvline(threshold, color=INK, linewidth=1, linestyle="--")
    axes.text(threshold - 0.01, 0.97, f"{threshold:g}", transform=axes.get_xaxis_transform(), ha="right", va="top")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)  # so that a bar of one image is visible
    axes.set_xlabel(f"cosine {what}")
    axes.set_ylabel("images")
    axes.spines[["top", "right"]].set_visible(False)
    return png(figure)


def score_histogram(values: NDArray[np.float32], refused: NDArray[np.bool_], threshold: float, what: str) -> bytes:
    """Draw a histogram of a score on a logarithmic scale, with the threshold marked and rejected images in red.

    Args:
        values: [N], NaN for images without the score.
        refused: [N].
        threshold: of the filter.
        what: the score and its unit.
    """
    figure, axes = _figure(5.4, 2.6)
    known = np.isfinite(values)
    low, high = (float(values[known].min()), float(values[known].max())) if known.any() else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1, 61).tolist()
    axes.hist([values[known & ~refused], values[known & refused]], edges, color=[BLUE, RED], stacked=True)
    axes.axvline(threshold, color=INK, linewidth=1, linestyle="--")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)  # so that a bar of one image is visible
    axes.set_xlabel(what)
    axes.set_ylabel("images")
    axes.spines[["top", "right"]].set_visible(False)
    return png(figure)


def cluster_sizes(before: NDArray[np.int64], after: NDArray[np.int64]) -> bytes:
    """Draw the share of images in each cluster, largest first, before and after sampling; at most BARS clusters.

    Args:
        before: [C] candidates per cluster.
        after: [C] sampled images per cluster.
    """
    figure, axes = _figure(10, 2.8)
    order = np.argsort(-before, kind="stable")
    shown = order[np.unique(np.linspace(0, len(order) - 1, min(BARS, len(order))).astype(int))]
    edges = np.linspace(0.5, len(order) + 0.5, len(shown) + 1)
    for sizes, color, label in ((before, GRAY, "what could be drawn"), (after, BLUE, "the balanced sample")):
        shares = 100 * sizes[shown] / max(sizes.sum(), 1)
        axes.stairs(shares, edges, fill=True, color=color, alpha=0.45, linewidth=0)
        axes.stairs(shares, edges, color=color, linewidth=1.5, label=label)
    even = 100 / len(order)
    axes.axhline(even, color=INK, linewidth=0.8, linestyle="--")
    axes.text(0.995, even, "even", transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=8)
    axes.set_xlabel("clusters, largest of the pool first")
    axes.set_ylabel("% of the images")
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return png(figure)


def coverage(points: NDArray[np.float64], kept: NDArray[np.bool_], explained: NDArray[np.float64]) -> bytes:
    """Draw images on a plane: rejected ones in gray, kept ones in blue over them.

    Args:
        points: [n, 2].
        kept: [n].
        explained: [2] share of the variance along each axis.
    """
    figure, axes = _figure(10, 5)
    size = float(np.clip(20_000 / max(len(points), 1), 2, 12))
    for chosen, color, label in ((~kept, GRAY, "left out"), (kept, BLUE, "kept")):
        axes.scatter(*points[chosen].T, s=size, color=color, linewidths=0, label=f"{label} ({chosen.sum():,} shown)")
    axes.set_xlabel(f"first principal component, {explained[0]:.0%} of the variance")
    axes.set_ylabel(f"second, {explained[1]:.0%}")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(frameon=False, markerscale=2)
    axes.spines[["top", "right"]].set_visible(False)
    return png(figure)


def _figure(width: float, height: float):
    figure = new_figure(width, height)
    return figure, figure.subplots()
