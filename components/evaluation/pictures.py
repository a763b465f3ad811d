"""Pictures of frozen features: principal components of patches in colour, and nearest neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from components.core.knn import nearest
from components.data.evaluation_set import EvaluationSet
from components.evaluation.features import EvaluationImages

TILE, GAP, MARGIN, LINE, FRAME = 128, 8, 12, 20, 4  # pixels
INK, PAPER, MUTED = (25, 28, 33), (255, 255, 255), (110, 115, 122)
NUM_NEIGHBOURS = 6
RIGHT, WRONG, PLAIN = (28, 140, 72), (208, 52, 44), (190, 194, 200)


@dataclass(frozen=True)
class Neighbours:
    """One query, its class, and its nearest images with their classes; classes are None without labels."""

    query: Image.Image
    query_class: str | None
    images: Sequence[Image.Image]
    classes: Sequence[str | None]


def pca_colours(patches: NDArray[np.floating]) -> NDArray[np.uint8]:
    """First three principal components of the patches of some images together, as red, green and blue.

    As the figures of DINOv2 (arXiv:2304.07193, Fig. 1), without its removal of the background. Each component is
    stretched between its 2nd and 98th percentile; its sign is chosen so that its largest weight is positive.

    Args:
        patches: [B, P, D].

    Returns:
        [B, P, 3] uint8; grey where the patches do not differ.
    """
    flat = np.asarray(patches, dtype=np.float64).reshape(-1, patches.shape[-1])
    centred = flat - flat.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:3]  # [3, D]
    axes *= np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]
    scores = centred @ axes.T  # [B * P, 3]
    low, high = np.percentile(scores, [2, 98], axis=0)
    spread = high - low
    flat_components = spread <= 1e-9 * max(1.0, float(np.abs(flat).max()))
    shares = np.where(flat_components, 0.5, (scores - low) / np.where(flat_components, 1.0, spread))
    colours = (255 * shares.clip(0, 1)).round().astype(np.uint8)
    return colours.reshape(*patches.shape[:2], -1)


def choose_queries(images: EvaluationSet, count: int, seed: int) -> list[int]:
    """Images to show, at random: test images of different classes as far as they go, or any where none are known."""
    generator = np.random.default_rng(seed)
    if images.labels is None:
        return [int(index) for index in generator.permutation(images.images.num_rows)[:count]]
    order = generator.permutation(images.labels.test)
    _, first = np.unique(images.labels.targets[order], return_index=True)
    spread = [*generator.permutation(first), *sorted(set(range(len(order))) - set(first.tolist()))]
    return [int(order[place]) for place in spread[:count]]


def neighbour_rows(
    images: EvaluationSet, pixels: EvaluationImages, features: NDArray[np.floating], queries: Sequence[int]
) -> list[Neighbours]:
    """Each query with its nearest train images, or nearest other images where there are no classes."""
    labels = images.labels
    gallery = np.arange(len(features)) if labels is None else labels.train
    count = min(NUM_NEIGHBOURS + 1, len(gallery))
    found = gallery[nearest(features[list(queries)], features[gallery], count).indices]  # [Q, count]

    def picture(index: int) -> Image.Image:
        return Image.fromarray(pixels[index].numpy())

    def name(index: int) -> str | None:
        return None if labels is None else labels.classes[labels.targets[index]]

    rows = []
    for query, row in zip(queries, found.tolist(), strict=True):
        others = [index for index in row if index != query][:NUM_NEIGHBOURS]
        rows.append(Neighbours(picture(query), name(query), [*map(picture, others)], [*map(name, others)]))
    return rows


def draw_pca(images: NDArray[np.uint8], patches: Mapping[str, NDArray[np.floating]]) -> Image.Image:
    """A row of images [B, S, S, 3], and below it a row of patch colours for each model."""
    labels = ["images", *patches]
    left = MARGIN + _text_width(labels) + GAP
    sheet, draw = _sheet(left + len(images) * (TILE + GAP) - GAP + MARGIN, len(labels))
    for row, label in enumerate(labels):
        top = MARGIN + row * (TILE + GAP)
        draw.text((left - GAP, top + TILE // 2), label, INK, _font(), anchor="rm")
        tiles = images if row == 0 else [_square(image) for image in pca_colours(patches[label])]
        for column, tile in enumerate(tiles):
            resampling = Image.Resampling.LANCZOS if row == 0 else Image.Resampling.NEAREST
            picture = Image.fromarray(np.ascontiguousarray(tile)).resize((TILE, TILE), resampling)
            sheet.paste(picture, (left + column * (TILE + GAP), top))
    return sheet


def draw_neighbours(rows: Sequence[Neighbours]) -> Image.Image:
    """A row for each query: the query, then its nearest images, framed green where the class is right and red else."""
    columns = 1 + max(len(row.images) for row in rows)
    step = TILE + GAP + LINE
    split = 2 * GAP  # between query and neighbours
    width = 2 * MARGIN + columns * (TILE + GAP) - GAP + split
    sheet = Image.new("RGB", (width, 2 * MARGIN + LINE + len(rows) * step - GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), "query", INK, _font())
    draw.text((MARGIN + TILE + GAP + split, MARGIN), "nearest, in order", INK, _font())
    for number, row in enumerate(rows):
        top = MARGIN + LINE + number * step
        _paste(sheet, row.query, (MARGIN, top), row.query_class, None)
        for column, (image, name) in enumerate(zip(row.images, row.classes, strict=True)):
            left = MARGIN + (column + 1) * (TILE + GAP) + split
            colour = PLAIN if row.query_class is None else RIGHT if name == row.query_class else WRONG
            _paste(sheet, image, (left, top), name, colour)
    return sheet


def _paste(
    sheet: Image.Image, image: Image.Image, place: tuple[int, int], name: str | None, frame: tuple[int, int, int] | None
) -> None:
    draw = ImageDraw.Draw(sheet)
    left, top = place
    inset = FRAME if frame else 0
    if frame:
        draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), fill=frame)
    side = TILE - 2 * inset
    sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (left + inset, top + inset))
    if name:
        draw.text((left, top + TILE + 1), _shortened(name), MUTED, _font(12))


def _sheet(width: int, rows: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", (width, 2 * MARGIN + rows * (TILE + GAP) - GAP), PAPER)
    return sheet, ImageDraw.Draw(sheet)


def _square(colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    side = round(len(colours) ** 0.5)  # crops are square
    return colours.reshape(side, side, 3)


def _shortened(name: str) -> str:
    while _font(12).getlength(name) > TILE and len(name) > 1:
        name = name.rstrip("…")[:-1] + "…"
    return name


def _text_width(labels: Sequence[str]) -> int:
    return int(max(_font().getlength(label) for label in labels)) + 1


def _font(size: int = 14) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
