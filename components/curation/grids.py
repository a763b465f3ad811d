"""Grids of images: what stayed, and what went beside the image that it duplicates."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from components.curation.faces import blur
from components.curation.pack import Pool
from components.data.shards import ShardReader, decode_image

TILE = 112  # pixels
GAP = 8
INNER_GAP = 2  # within a pair
TEXT = 34  # pixels below a pair, two lines
COLUMNS = 4  # pairs in a row
KEPT_COLUMNS, KEPT_IMAGES = 8, 48
PAIRS_PER_REASON = 8

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Album:
    """Where the images of the pool and of the evaluation sets are found."""

    pool: Pool
    evaluation: pa.Table
    evaluation_folder: Path

    def pool_tile(self, row: int) -> Image.Image:
        """The pool image of that row, fitted into a square tile; its faces are blurred here too."""
        image = _decode(self.pool.images, row, self.pool.folder)
        boxes = self.pool.faces[row].as_py()
        return _tile(blur(image, boxes) if boxes else image)

    def find_tile(self, image_id: str) -> Image.Image:
        """The image of that id, from the pool or from an evaluation set."""
        row = pc.index(self.pool.images["image_id"], image_id).as_py()
        if row >= 0:
            return self.pool_tile(row)
        row = pc.index(self.evaluation["image_id"], image_id).as_py()
        return _tile(_decode(self.evaluation, row, self.evaluation_folder))


def kept_grid(album: Album, rows: NDArray[np.int64]) -> bytes:
    """JPEG of an even sample of the kept images; ids are hashes, so their order is a random one."""
    shown = rows[np.unique(np.linspace(0, len(rows) - 1, min(KEPT_IMAGES, len(rows))).astype(int))]
    return _tiles(album, shown)


def _tiles(album: Album, shown: NDArray[np.int64]) -> bytes:
    height = -(-len(shown) // KEPT_COLUMNS)
    sheet = Image.new("RGB", (KEPT_COLUMNS * (TILE + GAP) + GAP, height * (TILE + GAP) + GAP), "white")
    for place, row in enumerate(shown):
        sheet.paste(album.pool_tile(int(row)), _corner(place, KEPT_COLUMNS, TILE, TILE))
    return _jpeg(sheet)


def removed_grid(album: Album, rejected: pa.Table) -> bytes:
    """JPEG of removed images of each reason: left the image, right the one that it duplicates, if there is one."""
    shown = _examples(rejected)
    width, height = 2 * TILE + INNER_GAP, TILE + TEXT
    lines = -(-max(len(shown), 1) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (width + GAP) + GAP, lines * (height + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    for place, item in enumerate(shown):
        x, y = _corner(place, COLUMNS, width, height)
        sheet.paste(album.pool_tile(item["row"]), (x, y))
        if item["duplicate_of"] is not None:
            sheet.paste(album.find_tile(item["duplicate_of"]), (x + TILE + INNER_GAP, y))
        similarity = "" if item["similarity"] is None else f"  {item['similarity']:.3f}"
        draw.text((x, y + TILE + 2), item["reason"].replace("_", " ") + similarity, "#1c2530", font)
        draw.text((x, y + TILE + 18), _shortened(item["detail"], draw, small, width), "#5b6875", small)
    if not shown:
        draw.text((GAP, GAP), "no image was removed", "#1c2530", font)
    return _jpeg(sheet)


def reason_grid(album: Album, rejected: pa.Table) -> bytes:
    """JPEG of images removed for one reason; those without another image beside them stand closer."""
    if rejected["duplicate_of"].null_count < len(rejected):
        return removed_grid(album, rejected)
    rows = rejected["row"].to_numpy()
    shown = rows[np.unique(np.linspace(0, len(rows) - 1, min(2 * KEPT_COLUMNS, len(rows))).astype(int))]
    return _tiles(album, shown)


def _examples(rejected: pa.Table) -> list[dict]:
    """A few rejections of each reason; the least similar first, because those are the ones to look at."""
    table = rejected.sort_by([("reason", "ascending"), ("similarity", "ascending"), ("row", "ascending")])
    reasons = table["reason"].to_numpy()
    first = {reason: int(np.argmax(reasons == reason)) for reason in np.unique(reasons)}
    parts = [table.slice(at, min(PAIRS_PER_REASON, int((reasons == r).sum()))) for r, at in first.items()]
    return [row for part in parts for row in part.to_pylist()]


def _decode(images: pa.Table, row: int, folder: Path) -> Image.Image:
    place = images.slice(row, 1).to_pylist()[0]
    return decode_image(ShardReader(folder).read(place["shard"], place["offset"], place["length"]))


def _tile(image: Image.Image) -> Image.Image:
    return ImageOps.pad(image, (TILE, TILE), Image.Resampling.BICUBIC, color="#eef2f5")


def _corner(place: int, columns: int, width: int, height: int) -> tuple[int, int]:
    return place % columns * (width + GAP) + GAP, place // columns * (height + GAP) + GAP


def _shortened(text: str, draw: ImageDraw.ImageDraw, font: Font, width: int) -> str:
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."


def _jpeg(sheet: Image.Image) -> bytes:
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
