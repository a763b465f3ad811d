"""Grids of kept images, and of removed images beside their originals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from components.core.pictures import TILE, Tile, draw_sheet, fit, in_columns, jpeg
from components.curation.faces import blur
from components.curation.pack import Pool
from components.data.shards import ShardReader, decode_image

INNER_GAP = 2  # pixels within a pair
COLUMNS = 4  # pairs in a row
KEPT_COLUMNS, KEPT_IMAGES = 8, 48
PAIRS_PER_REASON = 8


@dataclass(frozen=True)
class Album:
    """Access to the images of the pool and of the evaluation sets."""

    pool: Pool
    evaluation: pa.Table
    evaluation_folder: Path

    def pool_tile(self, row: int) -> Image.Image:
        """Return a pool image as a square tile, with blurred faces."""
        image = _decode(self.pool.images, row, self.pool.folder)
        boxes = self.pool.faces[row].as_py()
        return fit(blur(image, boxes) if boxes else image)

    def find_tile(self, image_id: str) -> Image.Image:
        """Return the tile of an image id, from the pool or from an evaluation set."""
        row = pc.index(self.pool.images["image_id"], image_id).as_py()
        if row >= 0:
            return self.pool_tile(row)
        row = pc.index(self.evaluation["image_id"], image_id).as_py()
        return fit(_decode(self.evaluation, row, self.evaluation_folder))


def kept_grid(album: Album, rows: NDArray[np.int64]) -> bytes:
    """Return a JPEG of evenly spaced kept images, which is a random sample, because ids are hashes."""
    return _plain_grid(album, rows, KEPT_IMAGES)


def removed_grid(album: Album, rejected: pa.Table) -> bytes:
    """Return a JPEG of removed images by reason: on the left the image, on the right its original, if any."""
    tiles = []
    for item in _examples(rejected):
        other = None if item["duplicate_of"] is None else album.find_tile(item["duplicate_of"])
        similarity = "" if item["similarity"] is None else f"  {item['similarity']:.3f}"
        captions = (f"{item['reason'].replace('_', ' ')}{similarity}", item["detail"])
        tiles.append(Tile(_pair(album.pool_tile(item["row"]), other), captions))
    return jpeg(draw_sheet(in_columns(tiles, COLUMNS), "" if tiles else "no image was removed"))


def reason_grid(album: Album, rejected: pa.Table) -> bytes:
    """Return a JPEG of images removed for one reason; a denser grid if they have no originals."""
    if rejected["duplicate_of"].null_count < len(rejected):
        return removed_grid(album, rejected)
    return _plain_grid(album, rejected["row"].to_numpy(), 2 * KEPT_COLUMNS)


def _plain_grid(album: Album, rows: NDArray[np.int64], count: int) -> bytes:
    """Return a JPEG of `count` evenly spaced pool rows."""
    shown = rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))]
    return jpeg(draw_sheet(in_columns([Tile(album.pool_tile(int(row))) for row in shown], KEPT_COLUMNS)))


def _pair(image: Image.Image, other: Image.Image | None) -> Image.Image:
    pair = Image.new("RGB", (2 * TILE + INNER_GAP, TILE), "white")
    pair.paste(image)
    if other:
        pair.paste(other, (TILE + INNER_GAP, 0))
    return pair


def _examples(rejected: pa.Table) -> list[dict]:
    """Return a few rejections of each reason, least similar first, because those are the most doubtful."""
    table = rejected.sort_by([("reason", "ascending"), ("similarity", "ascending"), ("row", "ascending")])
    reasons = table["reason"].to_numpy()
    first = {reason: int(np.argmax(reasons == reason)) for reason in np.unique(reasons)}
    parts = [table.slice(at, min(PAIRS_PER_REASON, int((reasons == r).sum()))) for r, at in first.items()]
    return [row for part in parts for row in part.to_pylist()]


def _decode(images: pa.Table, row: int, folder: Path) -> Image.Image:
    place = images.slice(row, 1).to_pylist()[0]
    return decode_image(ShardReader(folder).read(place["shard"], place["offset"], place["length"]))
