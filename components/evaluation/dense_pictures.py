"""Pictures of dense predictions: masks, depth maps, and patches of two photographs that match."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from components.core.knn import nearest
from components.core.pictures import SHADE, Tile, draw_sheet, fit, in_columns

SIDE = 128  # pixels of a tile
SWATCH = 14  # pixels of a legend's height
UNMEASURED = "#a3abb4"  # in no scale of colors
OPACITY = 0.65  # of a mask's colors over the image
DEPTH_MAP, ERROR_MAP = "viridis", "magma"  # of matplotlib; both also differ in lightness
MATCH_SIDE = 336  # pixels of a photograph with matches
MAX_MATCHES = 40  # drawn; more lines hide the photographs


@dataclass(frozen=True)
class Shown:
    """Images of a picture, a row each.

    Attributes:
        images: B of [H, W, 3] uint8.
        names: [B] below them.
        truth: B of [h, w].
    """

    images: Sequence[NDArray[np.uint8]]
    names: Sequence[str]
    truth: Sequence[NDArray[Any]]


@dataclass(frozen=True)
class Predicted:
    """What one model predicted.

    Attributes:
        maps: B of [h, w].
        notes: [B] below them, such as a score.
        errors: B of [h, w], of depth; empty for masks.
    """

    maps: Sequence[NDArray[Any]]
    notes: Sequence[str]
    errors: Sequence[NDArray[np.floating]] = ()


def draw_segmentation(shown: Shown, predicted: Mapping[str, Predicted], classes: Sequence[str]) -> Image.Image:
    """Draw a row for each image: image, mask, and the mask predicted by each model; and a legend of classes in them.

    Args:
        shown: truth is class indices, uint8; other values, such as that of ignored pixels, get no color.
        predicted: by model.
        classes: names.
    """
    colors = class_colors(len(classes))

    def cell(row: int, mask: NDArray[np.uint8], *captions: str) -> Tile:
        return Tile(fit(_overlay(shown.images[row], mask, colors), SIDE), captions)

    rows = [
        [_photo(shown, row), cell(row, truth, "truth"),
         *(cell(row, one.maps[row], name, one.notes[row]) for name, one in predicted.items())]
        for row, truth in enumerate(shown.truth)
    ]  # fmt: skip
    values: list[int] = np.unique(np.concatenate([one.ravel() for one in _all_maps(shown, predicted)])).tolist()
    swatches = [_swatch("#" + bytes(colors[value]).hex(), classes[value]) for value in values if value < len(classes)]
    if values[-1] >= len(classes):
        swatches.append(_swatch(SHADE, "no color: ignored"))
    return draw_sheet([*rows, *in_columns(swatches, len(rows[0]))])


def _photo(shown: Shown, row: int) -> Tile:
    return Tile(fit(Image.fromarray(shown.images[row]), SIDE), ("image", shown.names[row]))


def _all_maps(shown: Shown, predicted: Mapping[str, Predicted]) -> list[NDArray[Any]]:
    return [*shown.truth, *(one for each in predicted.values() for one in each.maps)]


def _swatch(color: str, name: str) -> Tile:
    return Tile(Image.new("RGB", (SIDE, SWATCH), color), (name,))


def class_colors(count: int) -> NDArray[np.uint8]:
    """Return distinct colors, [count, 3]: hues that golden-ratio steps spread, in three lightnesses."""
    hues = (np.arange(count) * 0.618034) % 1
    colors = [colorsys.hls_to_rgb(hue, (0.5, 0.65, 0.35)[number % 3], 0.85) for number, hue in enumerate(hues)]
    return (255 * np.array(colors)).round().astype(np.uint8)


def _overlay(image: NDArray[np.uint8], mask: NDArray[np.uint8], colors: NDArray[np.uint8]) -> Image.Image:
    height, width = image.shape[:2]
    labels = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    known = labels < len(colors)
    mixed = image.astype(np.float64)
    mixed[known] = (1 - OPACITY) * mixed[known] + OPACITY * colors[labels[known]]
    return Image.fromarray(mixed.round().astype(np.uint8))


def draw_depth(shown: Shown, predicted: Mapping[str, Predicted]) -> Image.Image:
    """Draw a row for each image: image, depth, and each model's depth and error; below them the scales of colors.

    Depths have one scale, from the 2nd to the 98th percentile of all true and predicted ones; errors have another, from
    0 to the 98th percentile of all.

    Args:
        shown: truth is in meters; gray where it is not finite.
        predicted: by model; errors are in meters, gray where they are not finite.

    Raises:
        ValueError: no true depth is finite.
    """
    if not any(np.isfinite(one).any() for one in shown.truth):
        raise ValueError("no depth to draw: no value of truth is finite")
    near, far = _percentiles(_all_maps(shown, predicted))
    worst = _percentiles([error for one in predicted.values() for error in one.errors])[1] if predicted else 0.0

    def depth(values: NDArray[np.floating], *captions: str) -> Tile:
        return Tile(fit(_colors(values, near, far, DEPTH_MAP), SIDE), captions)

    def error(values: NDArray[np.floating]) -> Tile:
        return Tile(fit(_colors(values, 0, worst, ERROR_MAP), SIDE), ("error",))

    rows = []
    for row, truth in enumerate(shown.truth):
        cells = [_photo(shown, row), depth(truth, "truth")]
        for name, one in predicted.items():
            cells += [depth(one.maps[row], name, one.notes[row]), error(one.errors[row])]
        rows.append(cells)
    legend = [_scale("depth", near, far, DEPTH_MAP), _scale("error", 0, worst, ERROR_MAP)]
    if not all(np.isfinite(one).all() for one in shown.truth):
        legend.append(_swatch(UNMEASURED, "not measured"))
    return draw_sheet([*rows, *in_columns(legend, len(rows[0]))])


def _percentiles(maps: Sequence[NDArray[np.floating]]) -> tuple[float, float]:
    """Return the 2nd and 98th percentile of all finite values."""
    values = np.concatenate([one[np.isfinite(one)] for one in maps])
    low, high = np.percentile(values, [2, 98])
    return float(low), float(high)


def _scale(name: str, low: float, high: float, colors: str) -> Tile:
    bar = _colors(np.broadcast_to(np.linspace(low, high, SIDE), (SWATCH, SIDE)), low, high, colors)
    return Tile(bar, (f"{name} {low:.3g} to {high:.3g} m",))


def _colors(values: NDArray[np.floating], low: float, high: float, name: str) -> Image.Image:
    from matplotlib import colormaps  # imported here, because not every evaluation draws depth

    shares = (values - low) / max(high - low, 1e-12)
    colors = colormaps[name].with_extremes(bad=UNMEASURED)(np.ma.masked_invalid(shares))  # [h, w, 4]
    return Image.fromarray((255 * colors[..., :3]).round().astype(np.uint8))


@dataclass(frozen=True)
class Matches:
    """Pairs of patches of two photographs, the most similar pair first.

    Attributes:
        first: [M, 2] centers of the patches in the first photograph, x and y as shares of its width and height.
        second: [M, 2] the same in the second.
        similarities: [M] cosines.
    """

    first: NDArray[np.float64]
    second: NDArray[np.float64]
    similarities: NDArray[np.float64]


def patch_matches(tokens_a: NDArray[np.floating], tokens_b: NDArray[np.floating]) -> Matches:
    """Find the pairs of patches that are each other's nearest neighbor by cosine (arXiv:2304.07193, Fig. 10).

    Args:
        tokens_a: [rows, columns, D] patch tokens of the first photograph.
        tokens_b: [rows, columns, D] of the second; its grid may be another.
    """
    flat_a, flat_b = tokens_a.reshape(-1, tokens_a.shape[-1]), tokens_b.reshape(-1, tokens_b.shape[-1])
    forth, back = nearest(flat_a, flat_b, 1), nearest(flat_b, flat_a, 1)
    partners = forth.indices[:, 0]  # [patches of a]
    mutual = np.flatnonzero(back.indices[partners, 0] == np.arange(len(partners)))
    mutual = mutual[np.argsort(-forth.similarities[mutual, 0], kind="stable")]
    return Matches(_centers(tokens_a)[mutual], _centers(tokens_b)[partners[mutual]], forth.similarities[mutual, 0])


def _centers(tokens: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the centers of the patches, [P, 2], as shares of width and height."""
    rows, columns = tokens.shape[:2]
    y, x = np.divmod(np.arange(rows * columns), columns)
    return np.stack([(x + 0.5) / columns, (y + 0.5) / rows], axis=1)


def draw_matches(image_a: Image.Image, image_b: Image.Image, matches: Matches) -> Image.Image:
    """Draw two photographs side by side, with lines between the most similar of the matching patches.

    The photographs are drawn as squares; a line's color tells its place in the first from left to right.
    """
    gap = 24
    pair = Image.new("RGB", (2 * MATCH_SIDE + gap, MATCH_SIDE), "white")
    for number, image in enumerate((image_a, image_b)):
        pair.paste(image.convert("RGB").resize((MATCH_SIDE, MATCH_SIDE)), (number * (MATCH_SIDE + gap), 0))
    draw = ImageDraw.Draw(pair)
    count = min(len(matches.first), MAX_MATCHES)
    for start, end in zip(MATCH_SIDE * matches.first[:count], MATCH_SIDE * matches.second[:count], strict=True):
        red, green, blue = colorsys.hsv_to_rgb(0.85 * start[0] / MATCH_SIDE, 1.0, 1.0)
        color = (round(255 * red), round(255 * green), round(255 * blue))
        places = [(start[0], start[1]), (end[0] + MATCH_SIDE + gap, end[1])]
        draw.line(places, color, 1)
        for place in places:
            draw.circle(place, 3, color)
    caption = f"{count} of {len(matches.first)} patches that are each other's nearest, the most similar first"
    return draw_sheet([[Tile(pair)]], caption)
