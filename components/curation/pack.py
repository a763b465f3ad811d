"""Write the curated set: the chosen images' bytes, and the reasons of all choices and rejections."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from components.core.engine import map_shards
from components.curation.config import CurationError
from components.curation.embed import split_by_shard
from components.curation.faces import Box, blur
from components.data.manifest import (
    CURATED_SCHEMA,
    FINDINGS,
    MANIFEST,
    POOL_SCHEMA,
    REJECTED,
    REJECTED_SCHEMA,
    write_manifest,
    write_table,
)
from components.data.shards import EXTENSIONS, ShardReader, ShardWriter, decode_image, shard_starts

# Why an image is in: `row` is a row of the pool; the other columns are those of CURATED_SCHEMA.
CHOSEN_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        *(CURATED_SCHEMA.field(name) for name in ("origin", "seed_set", "query_id", "similarity")),
    ]
)
PLACE = ("shard", "offset", "length")
JPEG_QUALITY = 95  # of JPEG images with blurred faces; other formats become PNG
BLURRED = ("image_id", "derived_from", "format", "width", "height", "length")  # columns that blurring changes

pc: Any = pyarrow.compute  # created at import, invisible to pyright


@dataclass(frozen=True)
class Pool:
    """Candidate images with the results of curation."""

    folder: Path  # base folder of the shards
    images: pa.Table  # [N] rows of POOL_SCHEMA
    group_id: pa.Array  # [N] id of the duplicate component's keeper; null if filtered out
    findings: pa.Table  # [N] the columns FINDINGS
    faces: pa.ChunkedArray  # [N] boxes to blur, as in SCORES_SCHEMA; null if not computed


@dataclass(frozen=True)
class BlurTask:
    """Images of one pool shard whose faces are blurred."""

    pool: Path
    rows: pa.Table  # [n] of POOL_SCHEMA, and `faces`
    staging: Path  # receives the new images, in files named by id


@dataclass(frozen=True)
class PackTask:
    """One shard of the curated set."""

    pool: Path
    rows: pa.Table  # [n] image_id, derived_from, format, and place in the pool
    staging: Path  # contains images with blurred faces
    folder: Path
    number: int
    max_bytes: int


def check_accounting(num_images: int, chosen: NDArray[np.int64], rejected: NDArray[np.int64]) -> None:
    """Check that every pool row is either chosen or rejected, exactly once.

    Raises:
        CurationError: with the numbers of lost and of double-counted rows.
    """
    counts = np.bincount(np.concatenate([chosen, rejected]), minlength=num_images)
    lost, twice = int((counts == 0).sum()), int((counts > 1).sum())
    if lost or twice or len(counts) > num_images:
        raise CurationError(f"of {num_images} pool images, {lost} are neither in nor out and {twice} are both")


def pack(
    pool: Pool, chosen: pa.Table, rejected: pa.Table, folder: Path, max_bytes: int, workers: int | None = None
) -> None:
    """Write manifest.parquet, rejected.parquet and the shards; equal choices give equal bytes.

    Args:
        pool: the candidates.
        chosen: rows of CHOSEN_SCHEMA.
        rejected: the table of `rejections`, for all others.
        folder: existing, empty.
        max_bytes: of one shard.
        workers: for blurring and packing, see `map_shards`; their number does not change the bytes.

    Raises:
        CurationError: the bytes of an image do not match its id.
    """
    check_accounting(len(pool.images), chosen["row"].to_numpy(), rejected["row"].to_numpy())
    chosen = chosen.sort_by("row")
    rows = chosen["row"]
    images = pool.images.take(rows)
    columns = {name: images[name] for name in POOL_SCHEMA.names}
    columns |= {name: chosen[name] for name in CHOSEN_SCHEMA.names[1:]}
    columns |= _findings(pool, rows) | {"derived_from": pa.nulls(len(images), pa.string())}
    table = pa.table({name: columns[name] for name in CURATED_SCHEMA.names}, schema=CURATED_SCHEMA)
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        table = _blur_faces(pool, table, rows, Path(staging), workers)
        table = table.sort_by("image_id")
        starts = shard_starts(table["length"].to_pylist(), max_bytes)
        places_table = table.select(["image_id", "derived_from", "format", *PLACE])
        tasks = [
            PackTask(pool.folder, _rows(places_table, start, end), Path(staging), folder, number, max_bytes)
            for number, (start, end) in enumerate(pairwise([*starts, len(table)]))
        ]
        places = [place for shard in map_shards(pack_shard, tasks, workers=workers, what="packing") for place in shard]
    table = _with_columns(table, dict(zip(PLACE, zip(*places, strict=True), strict=True)))
    write_manifest(table, folder / MANIFEST)
    write_table(rejected_table(pool, rejected), REJECTED_SCHEMA, folder / REJECTED)


def rejected_table(pool: Pool, rejected: pa.Table) -> pa.Table:
    """Return the rejections in REJECTED_SCHEMA, in pool order."""
    ordered = rejected.sort_by("row")
    images = pool.images.take(ordered["row"])
    columns = {name: images[name] for name in ("image_id", "source", "source_uri")}
    columns |= {name: ordered[name] for name in ("reason", "duplicate_of", "similarity", "detail")}
    columns |= _findings(pool, ordered["row"])
    return pa.table({name: columns[name] for name in REJECTED_SCHEMA.names})


def _findings(pool: Pool, rows: pa.ChunkedArray) -> dict[str, pa.ChunkedArray]:
    found = pool.findings.take(rows)
    columns = {field.name: found[field.name] for field in FINDINGS}
    return columns | {"group_id": pa.chunked_array([pool.group_id.take(rows.combine_chunks())])}


def _blur_faces(pool: Pool, table: pa.Table, rows: pa.ChunkedArray, staging: Path, workers: int | None) -> pa.Table:
    """Write a blurred version of each image with faces, in a file named by its id; return the updated table."""
    faces = pool.faces.take(rows)
    places = np.flatnonzero(pc.fill_null(pc.list_value_length(faces), 0).to_numpy())
    places_table = table.select(POOL_SCHEMA.names).append_column("faces", faces).take(pa.array(places))
    tasks = [BlurTask(pool.folder, _rows(part, 0, len(part)), staging) for _, part in split_by_shard(places_table)]
    made = [one for shard in map_shards(blur_shard, tasks, workers=workers, what="blurring faces") for one in shard]
    new = {name: table[name].to_pylist() for name in BLURRED}
    for place, values in zip(places.tolist(), made, strict=True):
        for name, value in zip(BLURRED, values, strict=True):
            new[name][place] = value
    return _with_columns(table, new)


def blur_shard(task: BlurTask) -> list[tuple[Any, ...]]:
    """Blur the images of one shard; return the columns BLURRED of each."""
    reader, made = ShardReader(task.pool), []
    for old in task.rows.to_pylist():
        boxes: list[Box] = old["faces"]
        image = blur(decode_image(_read(reader, task.pool, old)), boxes)
        kind = "JPEG" if old["format"] == "JPEG" else "PNG"
        buffer = io.BytesIO()
        image.save(buffer, kind, quality=JPEG_QUALITY)
        data = buffer.getvalue()
        image_id = hashlib.sha256(data).hexdigest()
        (task.staging / image_id).write_bytes(data)
        made.append((image_id, old["image_id"], kind, *image.size, len(data)))
    return made


def pack_shard(task: PackTask) -> list[tuple[str, int, int]]:
    """Copy the images of one shard, sorted by id; return their new places."""
    reader = ShardReader(task.pool)
    places: list[tuple[str, int, int]] = []
    with ShardWriter(task.folder, task.max_bytes, task.number) as writer:
        for row in task.rows.to_pylist():
            blurred = row["derived_from"] is not None
            data = (task.staging / row["image_id"]).read_bytes() if blurred else _read(reader, task.pool, row)
            places.append(writer.add(row["image_id"], EXTENSIONS[row["format"]], data))
    return places


def _rows(table: pa.Table, start: int, end: int) -> pa.Table:
    """Copy rows of a table, because pickling a slice sends the whole table."""
    return table.take(pa.array(range(start, end), pa.int64()))


def _with_columns(table: pa.Table, columns: Mapping[str, Sequence[Any]]) -> pa.Table:
    for name, values in columns.items():
        field = CURATED_SCHEMA.field(name)
        table = table.set_column(CURATED_SCHEMA.get_field_index(name), field, pa.array(values, field.type))
    return table


def _read(reader: ShardReader, pool_folder: Path, row: dict[str, Any]) -> bytes:
    data = reader.read(row["shard"], row["offset"], row["length"])
    if hashlib.sha256(data).hexdigest() != row["image_id"]:
        where = f"{pool_folder / row['shard']} at byte {row['offset']}"
        raise CurationError(f"{where}: not the bytes of image {row['image_id']}; the pool was changed, pull it again")
    return data
