"""Pictures of dense predictions: masks, depth maps, and patches of two photographs that match."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from components.core.knn import nearest
from components.core.pictures import SHADE, Tile, draw_sheet, fit, in_columns

SIDE = 168  # pixels of a tile
SWATCH = 14  # pixels of a legend's height
OPACITY = 0.65  # of a mask's colors over the image
MATCH_SIDE = 336  # pixels of a photograph with matches
MAX_MATCHES = 40  # drawn; more lines hide the photographs
COLUMNS = 3
CAPTION = "Left to right: image, truth, prediction"


def draw_segmentation(
    images: NDArray[np.uint8], truth: NDArray[np.uint8], predicted: NDArray[np.uint8], classes: Sequence[str]
) -> Image.Image:
    """Draw a row for each image: the image, its mask and the predicted mask, and a legend of the classes in them.

    Args:
        images: [B, H, W, 3].
        truth: [B, h, w] class indices; other values, such as that of ignored pixels, get no color.
        predicted: [B, h, w] class indices.
        classes: names.
    """
    colors = class_colors(len(classes))
    rows = []
    for image, *masks in zip(images, truth, predicted, strict=True):
        pictures = [Image.fromarray(image), *(_overlay(image, mask, colors) for mask in masks)]
        rows.append([Tile(fit(picture, SIDE)) for picture in pictures])
    shown = [int(index) for index in np.union1d(truth, predicted) if index < len(classes)]
    swatches = [_swatch("#" + bytes(colors[index]).hex(), classes[index]) for index in shown]
    if (truth >= len(classes)).any():
        swatches.append(_swatch(SHADE, "no color: ignored"))
    return draw_sheet([*rows, *in_columns(swatches, COLUMNS)], CAPTION)


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


def draw_depth(images: NDArray[np.uint8], truth: NDArray[np.floating], predicted: NDArray[np.floating]) -> Image.Image:
    """Draw a row for each image: the image, its depth and the predicted depth, and below them the scale of colors.

    The scale is one for all rows, from the 2nd to the 98th percentile of all true and predicted depths.

    Args:
        images: [B, H, W, 3].
        truth: [B, h, w]; gray where it is not finite.
        predicted: [B, h, w].

    Raises:
        ValueError: no true depth is finite.
    """
    known = np.isfinite(truth)
    if not known.any():
        raise ValueError("no depth to draw: no value of truth is finite")
    low, high = np.percentile(np.concatenate([truth[known], predicted.ravel()]), [2, 98])
    rows = []
    for image, *maps in zip(images, truth, predicted, strict=True):
        pictures = [Image.fromarray(image), *(_depth_colors(one, low, high) for one in maps)]
        rows.append([Tile(fit(picture, SIDE)) for picture in pictures])
    bar = _depth_colors(np.broadcast_to(np.linspace(low, high, SIDE), (SWATCH, SIDE)), low, high)
    legend = [Tile(bar, (f"depth {low:.3g} to {high:.3g}",))]
    if not known.all():
        legend.append(_swatch(SHADE, "not measured"))
    return draw_sheet([*rows, legend], CAPTION)


def _depth_colors(depth: NDArray[np.floating], low: float, high: float) -> Image.Image:
    from matplotlib import colormaps  # imported here, because not every evaluation draws depth

    shares = (depth - low) / max(high - low, 1e-12)
    colors = colormaps["viridis"].with_extremes(bad=SHADE)(np.ma.masked_invalid(shares))  # [h, w, 4]
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
