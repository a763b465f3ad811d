"""The curated set on disk: the chosen images' bytes, why each is in, and why each other is out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from components.core.progress import track
from components.curation.rejections import CurationError
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
from components.data.shards import EXTENSIONS, ShardReader, ShardWriter

# Why an image is in: `row` is a row of the pool; the other columns are those of CURATED_SCHEMA.
CHOSEN_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        *(CURATED_SCHEMA.field(name) for name in ("origin", "seed_set", "query_id", "similarity")),
    ]
)
PLACE = ("shard", "offset", "length")


@dataclass(frozen=True)
class Pool:
    """The images to choose from, and what curation found of each."""

    folder: Path  # below which the shards lie
    images: pa.Table  # [N] rows of POOL_SCHEMA
    group_id: pa.Array  # [N] the id that stands for its component of duplicates; null for what was filtered out
    findings: pa.Table  # [N] the columns FINDINGS


def check_accounting(num_images: int, chosen: NDArray[np.int64], rejected: NDArray[np.int64]) -> None:
    """Every row of the pool is in or out, exactly once.

    Raises:
        CurationError: how many rows are lost, and how many are counted twice.
    """
    counts = np.bincount(np.concatenate([chosen, rejected]), minlength=num_images)
    lost, twice = int((counts == 0).sum()), int((counts > 1).sum())
    if lost or twice or len(counts) > num_images:
        raise CurationError(f"of {num_images} pool images, {lost} are neither in nor out and {twice} are both")


def pack(pool: Pool, chosen: pa.Table, rejected: pa.Table, folder: Path, max_bytes: int) -> None:
    """Write manifest.parquet, rejected.parquet and the shards; equal choices give equal bytes.

    Args:
        pool: what there was to choose from.
        chosen: rows of CHOSEN_SCHEMA, the images that are in.
        rejected: the table of `rejections`, for all others.
        folder: existing, empty.
        max_bytes: of one shard.

    Raises:
        CurationError: an image whose bytes are not those that its id was made from.
    """
    check_accounting(len(pool.images), chosen["row"].to_numpy(), rejected["row"].to_numpy())
    ids = pool.images["image_id"].take(chosen["row"]).to_numpy().astype("S64")
    chosen = chosen.take(pa.array(np.argsort(ids, kind="stable")))
    rows = chosen["row"]
    images = pool.images.take(rows)
    columns = {name: images[name] for name in POOL_SCHEMA.names}
    columns |= _copy_bytes(pool.folder, images, folder, max_bytes)
    columns |= {name: chosen[name] for name in CHOSEN_SCHEMA.names[1:]}
    columns |= _findings(pool, rows) | {"derived_from": pa.nulls(len(images), pa.string())}
    write_manifest(pa.table({name: columns[name] for name in CURATED_SCHEMA.names}), folder / MANIFEST)
    write_table(rejected_table(pool, rejected), REJECTED_SCHEMA, folder / REJECTED)


def rejected_table(pool: Pool, rejected: pa.Table) -> pa.Table:
    """The rejections in REJECTED_SCHEMA, in pool order."""
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


def _copy_bytes(pool_folder: Path, images: pa.Table, folder: Path, max_bytes: int) -> dict[str, pa.Array]:
    """Copy the images, which are in order of their ids; returns the columns that say where they lie now."""
    reader = ShardReader(pool_folder)
    rows = images.select(["image_id", *PLACE, "format"]).to_pylist()
    places: list[tuple[str, int, int]] = []
    with ShardWriter(folder, max_bytes) as writer:
        for row in track(rows, "packing", len(rows)):
            data = reader.read(row["shard"], row["offset"], row["length"])
            if hashlib.sha256(data).hexdigest() != row["image_id"]:
                where = f"{pool_folder / row['shard']} at byte {row['offset']}"
                raise CurationError(
                    f"{where}: not the bytes of image {row['image_id']}; the pool was changed, pull it again"
                )
            places.append(writer.add(row["image_id"], EXTENSIONS[row["format"]], data))
    return {name: pa.array([p[i] for p in places], POOL_SCHEMA.field(name).type) for i, name in enumerate(PLACE)}
