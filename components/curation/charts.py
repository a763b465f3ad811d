"""The charts of the curation report, as PNG bytes."""

from __future__ import annotations

import base64
import html
import io

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

BLUE, GREY, RED, INK = "#2f6fab", "#c3ccd5", "#c8452e", "#1c2530"


def inline(picture: bytes, alt: str, kind: str = "png") -> str:
    """An <img> that carries its own bytes."""
    data = base64.b64encode(picture).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/{kind};base64,{data}">'


def funnel(steps: list[tuple[str, int]]) -> bytes:
    """One bar a step, with the images left and how many that step took."""
    figure, axes = _figure(10, 0.5 * len(steps) + 0.3)
    first = steps[0][1]
    for place, (_, images) in enumerate(steps):
        taken = steps[place - 1][1] - images if place else 0
        axes.barh(place, first, color="#eef2f5", height=0.7)
        axes.barh(place, images, color=BLUE, height=0.7)
        label = f"{images:,}" + (f"   (-{taken:,})" if taken else "")
        inside = images > first * 0.3
        axes.text(
            images - first * 0.01 if inside else images + first * 0.01,
            place,
            label,
            va="center",
            ha="right" if inside else "left",
            color="white" if inside else INK,
        )
    axes.set_yticks(range(len(steps)), [name for name, _ in steps])
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.margins(x=0, y=0.02)
    return _png(figure)


def similarity_histogram(values: NDArray[np.float32], threshold: float, what: str) -> bytes:
    """Images by cosine, on a logarithmic scale, with the threshold marked."""
    figure, axes = _figure(5.4, 3)
    edges = np.linspace(-0.2, 1, 61).tolist()
    axes.hist(values[(values > -1) & (values <= threshold)], edges, color=BLUE)
    axes.hist(values[values > threshold], edges, color=RED)
    axes.axvline(threshold, color=INK, linewidth=1, linestyle="--")
    axes.text(threshold - 0.01, 0.97, f"{threshold:g}", transform=axes.get_xaxis_transform(), ha="right", va="top")
    axes.set_yscale("log")
    axes.set_xlabel(f"cosine {what}")
    axes.set_ylabel("images")
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def cluster_sizes(before: NDArray[np.int64], after: NDArray[np.int64]) -> bytes:
    """Images of each cluster, largest first, before and after sampling."""
    figure, axes = _figure(10, 2.8)
    order = np.argsort(-before, kind="stable")
    places = np.arange(len(before))
    axes.fill_between(places, before[order], step="mid", color=GREY, label="before")
    axes.fill_between(places, after[order], step="mid", color=BLUE, label="after")
    axes.set_xlabel("clusters, largest first")
    axes.set_ylabel("images")
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _figure(width: float, height: float):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
