"""Contact sheets of captioned tiles, and PCA colors of features."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from math import ceil

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

TILE = 112  # pixels a side
GAP, MARGIN = 8, 12
LINE = 16  # pixels of a caption's line
INK, MUTED, PAPER, SHADE = "#1c2530", "#5b6875", "white", "#eef2f5"


@dataclass(frozen=True)
class Tile:
    """An image of a sheet with caption lines below it, truncated to its width; the first is dark, the others gray."""

    image: Image.Image
    captions: Sequence[str] = ()


def fit(image: Image.Image, side: int = TILE, *, smooth: bool = True) -> Image.Image:
    """Return the whole image padded to a square of `side` pixels.

    Args:
        image: of any size.
        side: of the square.
        smooth: bicubic; else nearest neighbor, for grids of patches.
    """
    resampling = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return ImageOps.pad(image, (side, side), resampling, color=SHADE)


def draw_sheet(rows: Sequence[Sequence[Tile]], caption: str = "", labels: Sequence[str] = ()) -> Image.Image:
    """Draw tiles in rows and columns.

    Args:
        rows: of tiles, of any sizes.
        caption: above the sheet, which is at least as wide.
        labels: left of the rows; none, or one for each row.
    """
    left = MARGIN + max((_width(label) + GAP for label in labels), default=0)
    top = MARGIN + (LINE + GAP if caption else 0)
    widths = [max(tile.image.width for tile in column if tile) for column in zip_longest(*rows)]
    heights = [max(tile.image.height + LINE * len(tile.captions) for tile in row) for row in rows]
    right = max(left + sum(width + GAP for width in widths) - GAP, MARGIN + _width(caption))
    sheet = Image.new("RGB", (right + MARGIN, top + sum(height + GAP for height in heights) - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), caption, MUTED, _font())
    for row, height, label in zip(rows, heights, labels or [""] * len(rows), strict=True):
        draw.text((left - GAP, top + row[0].image.height // 2), label, INK, _font(), anchor="rm")
        x = left
        for tile, width in zip(row, widths, strict=False):
            _place(sheet, tile, (x, top))
            x += width + GAP
        top += height + GAP
    return sheet


def in_columns(tiles: Sequence[Tile], columns: int) -> list[Sequence[Tile]]:
    """Break a sequence of tiles into rows."""
    return [tiles[start : start + columns] for start in range(0, len(tiles), columns)]


def jpeg(image: Image.Image) -> bytes:
    """Encode an image; equal images give equal bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@dataclass(frozen=True)
class Components:
    """Rows on their principal components."""

    scores: NDArray[np.float64]  # [N, K], of the centered rows
    shares: NDArray[np.float64]  # [K], of the variance


def principal_components(values: NDArray[np.floating], count: int) -> Components:
    """Compute the scores on the first principal components.

    The sign of each component is chosen so that its largest weight is positive, as scikit-learn's PCA does.

    Args:
        values: [N, D].
        count: of components, at most D.
    """
    centered = np.asarray(values, np.float64)
    centered = centered - centered.mean(axis=0)
    variances, axes = np.linalg.eigh(centered.T @ centered)
    variances, axes = variances[::-1][:count], axes[:, ::-1][:, :count]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    return Components(centered @ axes, variances / max(float((centered**2).sum()), 1e-12))


def pca_colors(patches: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return the first three principal components of all patches of the images as red, green and blue.

    As in DINOv2 (arXiv:2304.07193, Fig. 1), without background removal. Each component is stretched between its 2nd and
    98th percentile.

    Args:
        patches: [B, P, D], P the square of a whole number, D >= 3.

    Returns:
        [B, side, side, 3] with side * side = P; gray where the patches do not differ.
    """
    count, side = len(patches), round(patches.shape[1] ** 0.5)
    scores = principal_components(patches.reshape(-1, patches.shape[-1]), 3).scores  # [B * P, 3]
    low, high = np.percentile(scores, [2, 98], axis=0)
    spread = high - low
    alike = spread <= 1e-9 * max(1.0, float(np.abs(patches).max()))
    shares = np.where(alike, 0.5, (scores - low) / np.where(alike, 1.0, spread))
    return (255 * shares.clip(0, 1)).round().astype(np.uint8).reshape(count, side, side, 3)


def draw_pca(images: NDArray[np.uint8], colors: Mapping[str, NDArray[np.uint8]]) -> Image.Image:
    """Draw a row of images, and below it a row of `pca_colors` for each name.

    Args:
        images: [B, S, S, 3].
        colors: [B, side, side, 3] by name, such as of a model.
    """
    rows = [[Tile(fit(Image.fromarray(image))) for image in images]]
    rows += [[Tile(fit(Image.fromarray(one), smooth=False)) for one in each] for each in colors.values()]
    return draw_sheet(rows, labels=["images", *colors])


def _place(sheet: Image.Image, tile: Tile, corner: tuple[int, int]) -> None:
    sheet.paste(tile.image, corner)
    draw, (left, top) = ImageDraw.Draw(sheet), corner
    for number, text in enumerate(tile.captions):
        size, color = (13, INK) if number == 0 else (11, MUTED)
        place = (left, top + tile.image.height + 1 + LINE * number)
        draw.text(place, _shortened(text, tile.image.width, size), color, _font(size))


def _shortened(text: str, width: int, size: int) -> str:
    if _width(text, size) <= width:
        return text
    while text and _width(f"{text}…", size) > width:
        text = text[:-1]
    return f"{text}…"


def _width(text: str, size: int = 14) -> int:
    """Return the width of a line in whole pixels."""
    return ceil(_font(size).getlength(text))


@lru_cache
def _font(size: int = 14) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
