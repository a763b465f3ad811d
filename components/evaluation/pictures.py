"""Pictures of an evaluation: sampled queries and their nearest neighbors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from components.core.knn import nearest
from components.core.pictures import TILE, Tile, draw_sheet, fit
from components.data.evalset import EASY, HARD, JUNK, RELATIONS, Evalset, Query
from components.data.evaluation_set import EvaluationSet
from components.evaluation.features import EvaluationImages

FRAME = 4  # pixels
NUM_NEIGHBORS = 6
FRAMES = {True: "#1c8c48", False: "#d0342c", None: "#bec2c8"}  # of a right, a wrong and another image
SPACE = Tile(Image.new("RGB", (TILE // 8, 1), "white"))  # between a query and its neighbors


@dataclass(frozen=True)
class Neighbors:
    """A query and its nearest images with their names, such as classes, and whether they are right; None: neither."""

    query: Image.Image
    name: str | None
    images: Sequence[Image.Image]
    names: Sequence[str | None]
    right: Sequence[bool | None]


def choose_queries(images: EvaluationSet, count: int, seed: int) -> list[int]:
    """Choose random images to show: test images of as many classes as possible, or any images without labels."""
    generator = np.random.default_rng(seed)
    if images.labels is None:
        return [int(index) for index in generator.permutation(images.images.num_rows)[:count]]
    order = generator.permutation(images.labels.test)
    _, first = np.unique(images.labels.targets[order], return_index=True)
    spread = [*generator.permutation(first), *sorted(set(range(len(order))) - set(first.tolist()))]
    return [int(order[place]) for place in spread[:count]]


def neighbor_rows(
    images: EvaluationSet, pixels: EvaluationImages, features: NDArray[np.floating], queries: Sequence[int]
) -> list[Neighbors]:
    """Find the nearest train images of each query, or the nearest other images without labels."""
    labels = images.labels
    gallery = np.arange(len(features)) if labels is None else labels.gallery
    count = min(NUM_NEIGHBORS + 1, len(gallery))
    found = gallery[nearest(features[list(queries)], features[gallery], count).indices]  # [Q, count]

    def picture(index: int) -> Image.Image:
        return Image.fromarray(pixels[index].numpy())

    def name(index: int) -> str | None:
        return None if labels is None else labels.classes[labels.targets[index]]

    rows = []
    for query, row in zip(queries, found.tolist(), strict=True):
        others = [index for index in row if index != query][:NUM_NEIGHBORS]
        names = [*map(name, others)]
        right = [None if one is None else one == name(query) for one in names]
        rows.append(Neighbors(picture(query), name(query), [*map(picture, others)], names, right))
    return rows


def retrieved_rows(
    evalset: Evalset, pixels: EvaluationImages, features: NDArray[np.floating], queries: Sequence[Query]
) -> list[Neighbors]:
    """Find the images of the gallery nearest to each query of a retrieval set; junk is neither right nor wrong."""
    gallery = evalset.gallery
    rows = []
    for query in queries:
        near = nearest(features[[query.index]], features[gallery], min(NUM_NEIGHBORS, len(gallery)))
        found = gallery[near.indices[0]].tolist()
        related = {int(row): name for name in RELATIONS for row in getattr(query, name)}
        names = [related.get(index, "other") for index in found]
        right = [None if name == JUNK else name in (EASY, HARD) for name in names]
        images = [Image.fromarray(pixels[index].numpy()) for index in found]
        rows.append(Neighbors(Image.fromarray(pixels[query.index].numpy()), None, images, names, right))
    return rows


def draw_neighbors(rows: Sequence[Neighbors]) -> Image.Image:
    """Draw a row for each query: the query, then its nearest images, framed green if they are right, red if wrong."""
    sheet = []
    for row in rows:
        found = zip(row.images, row.names, row.right, strict=True)
        tiles = [_tile(_framed(image, FRAMES[right]), name) for image, name, right in found]
        sheet.append([_tile(fit(row.query), row.name), SPACE, *tiles])
    return draw_sheet(sheet, "The query, then its nearest images in order")


def _framed(image: Image.Image, color: str) -> Image.Image:
    return ImageOps.expand(fit(image, TILE - 2 * FRAME), FRAME, color)


def _tile(image: Image.Image, name: str | None) -> Tile:
    return Tile(image, (name,) if name else ())
