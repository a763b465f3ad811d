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
    MANIFEST,
    POOL_SCHEMA,
    REJECTED,
    REJECTED_SCHEMA,
    write_manifest,
    write_table,
)
from components.data.shards import EXTENSIONS, ShardReader, ShardWriter


@dataclass(frozen=True)
class Chosen:
    """The images that are in."""

    rows: NDArray[np.int64]  # [M] in the pool
    group_id: list[str]  # [M] the id that stands for their component of duplicates
    cluster_path: list[str]  # [M]


def check_accounting(num_images: int, chosen: NDArray[np.int64], rejected: NDArray[np.int64]) -> None:
    """Every row of the pool is in or out, exactly once.

    Raises:
        CurationError: how many rows are lost, and how many are counted twice.
    """
    counts = np.bincount(np.concatenate([chosen, rejected]), minlength=num_images)
    lost, twice = int((counts == 0).sum()), int((counts > 1).sum())
    if lost or twice or len(counts) > num_images:
        raise CurationError(f"of {num_images} pool images, {lost} are neither in nor out and {twice} are both")


def pack(pool_folder: Path, pool: pa.Table, chosen: Chosen, rejected: pa.Table, folder: Path, max_bytes: int) -> None:
    """Write manifest.parquet, rejected.parquet and the shards; equal choices give equal bytes.

    Args:
        pool_folder: below which the pool's shards lie.
        pool: its manifest.
        chosen: the images that are in.
        rejected: the table of `rejections`, for all others.
        folder: existing, empty.
        max_bytes: of one shard.

    Raises:
        CurationError: an image whose bytes are not those that its id was made from.
    """
    check_accounting(len(pool), chosen.rows, rejected["row"].to_numpy())
    order = np.argsort(pool["image_id"].to_numpy()[chosen.rows].astype("S64"), kind="stable")
    images = pool.take(pa.array(chosen.rows[order]))
    places = _copy_bytes(pool_folder, images, folder, max_bytes)
    count = len(images)
    columns = {name: images[name] for name in POOL_SCHEMA.names} | places
    columns["origin"] = pa.array(["balanced"] * count, pa.string())
    columns["query_id"] = pa.nulls(count, pa.string())
    columns["similarity"] = pa.nulls(count, pa.float32())
    columns["group_id"] = pa.array(chosen.group_id, pa.string()).take(pa.array(order))
    columns["cluster_path"] = pa.array(chosen.cluster_path, pa.string()).take(pa.array(order))
    manifest = pa.Table.from_arrays([columns[name] for name in CURATED_SCHEMA.names], schema=CURATED_SCHEMA)
    write_manifest(manifest, folder / MANIFEST)
    write_table(rejected_table(pool, rejected), REJECTED_SCHEMA, folder / REJECTED)


def rejected_table(pool: pa.Table, rejected: pa.Table) -> pa.Table:
    """The rejections in REJECTED_SCHEMA, in pool order."""
    ordered = rejected.sort_by("row")
    images = pool.take(ordered["row"])
    columns = {name: images[name] for name in ("image_id", "source", "source_uri")}
    columns |= {name: ordered[name] for name in ("reason", "duplicate_of", "similarity", "detail")}
    return pa.Table.from_arrays([columns[name] for name in REJECTED_SCHEMA.names], schema=REJECTED_SCHEMA)


def _copy_bytes(pool_folder: Path, images: pa.Table, folder: Path, max_bytes: int) -> dict[str, pa.Array]:
    """Copy the images, which are in order of their ids; returns the columns that say where they lie now."""
    reader = ShardReader(pool_folder)
    rows = images.select(["image_id", "shard", "offset", "length", "format"]).to_pylist()
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
    names = ("shard", "offset", "length")
    return {n: pa.array([p[i] for p in places], POOL_SCHEMA.field(n).type) for i, n in enumerate(names)}
