"""Schemas of the manifests, and reading and writing them as Parquet.

Manifests are inputs of stages and contain no provenance: the same images of a source give the same bytes, whoever
ingests them, when and from where. `provenance.py` writes that beside the snapshot.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.core.errors import DatasetError
from components.core.storage import disk_errors

MANIFEST = "manifest.parquet"
REJECTED = "rejected.parquet"

POOL_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),  # SHA-256 of the encoded bytes, hex
        pa.field("shard", pa.string(), nullable=False),  # file name inside the snapshot folder
        pa.field("offset", pa.int64(), nullable=False),  # of the image's bytes inside the tar
        pa.field("length", pa.int64(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),  # pixels, after EXIF rotation
        pa.field("height", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("source_uri", pa.string(), nullable=False),  # relative to the source's root
        pa.field("license", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("split", pa.string()),  # train | test: always in evaluation sets, in a pool if its source has splits
    ]
)

# What curation found of an image, in or out; empty where it never came so far.
FINDINGS = (
    pa.field("cluster_path", pa.string()),  # from the top level down: "3/17/204"
    pa.field("gray_share", pa.float32()),  # of the pixels
    pa.field("entropy", pa.float32()),  # bits, of the luma histogram
    pa.field("nsfw", pa.float32()),  # probability; null if not computed
    pa.field("num_faces", pa.int32()),  # null if not computed
)
CURATED_SCHEMA = pa.schema(
    [
        *POOL_SCHEMA,
        pa.field("derived_from", pa.string()),  # image_id in the pool, if the bytes were changed (faces blurred)
        pa.field("origin", pa.string(), nullable=False),  # seed | retrieved | balanced
        pa.field("seed_set", pa.string()),  # of a seed, or of the seed that retrieved this one
        pa.field("query_id", pa.string()),  # the seed image that retrieved this one
        pa.field("similarity", pa.float32()),  # cosine to that seed
        pa.field("group_id", pa.string(), nullable=False),  # image_id kept for this component of duplicates
        *FINDINGS,
    ]
)

# Why ingest did not take a file; image_id is null where the bytes could not be read at all.
QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("image_id", pa.string()),
    ]
)

# Why curation left an image of the pool out.
REJECTED_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("duplicate_of", pa.string()),
        pa.field("similarity", pa.float32()),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("group_id", pa.string()),
        *FINDINGS,
    ]
)


# Of manifests of earlier versions; provenance has them now.
RETIRED = ("source_version", "ingested_at")


def write_manifest(table: pa.Table, path: Path) -> None:
    """Write a pool or curated manifest; equal rows give equal bytes."""
    write_table(table, manifest_schema(table.column_names, path), path)


def read_manifest(path: Path) -> pa.Table:
    """Read a pool or curated manifest, in its stored order, with its schema checked."""
    table = _read(path)
    return _conform(table, manifest_schema(table.column_names, path), path)


def read_collection(root: Path) -> pa.Table:
    """Read the manifests of all images below `root`, with `shard` relative to `root`.

    Args:
        root: a collection of snapshots (`<root>/<source>/<snapshot>/manifest.parquet`, in sorted order), or a folder
            with one `manifest.parquet`, such as the curated set.

    Returns:
        The rows of all manifests; an empty pool table if there is none.
    """
    if (root / MANIFEST).is_file():
        return read_manifest(root / MANIFEST)
    return read_snapshots(root, snapshot_manifests(root))


def read_snapshots(root: Path, manifests: Iterable[Path]) -> pa.Table:
    """Read the manifests of some snapshots below `root`, with `shard` relative to `root`."""
    tables = [below(root, path.parent, read_manifest(path)) for path in manifests]
    return pa.concat_tables(tables) if tables else POOL_SCHEMA.empty_table()


def below(root: Path, snapshot: Path, table: pa.Table) -> pa.Table:
    """Return a snapshot's rows with `shard` relative to a folder above it."""
    prefix = snapshot.relative_to(root).as_posix()
    shards = pc.binary_join_element_wise(pa.scalar(prefix), table["shard"], "/")  # pyright: ignore[reportAttributeAccessIssue]
    return table.set_column(table.schema.get_field_index("shard"), POOL_SCHEMA.field("shard"), shards)


def snapshot_manifests(root: Path) -> list[Path]:
    """Return the sorted manifests of the finished snapshots in a collection; unfinished ones have a leading dot."""
    found = (path for path in root.glob(f"*/*/{MANIFEST}") if path.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(root).parts))


def write_table(table: pa.Table, schema: pa.Schema, path: Path) -> None:
    """Write rows of a known schema as zstd Parquet, atomically; equal rows give equal bytes."""
    conformed = _conform(table, schema, path).combine_chunks()
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.partial")
    try:
        with disk_errors(path):
            pq.write_table(conformed, staging, compression="zstd")
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read a Parquet file and check it against `schema`."""
    return _conform(_read(path), schema, path)


def manifest_schema(columns: list[str], path: Path) -> pa.Schema:
    """Return the schema, pool or curated, with exactly these columns."""
    for schema in (POOL_SCHEMA, CURATED_SCHEMA):
        if set(columns) == set(schema.names):
            return schema
    nearest = POOL_SCHEMA if "origin" not in columns else CURATED_SCHEMA
    missing = sorted(set(nearest.names) - set(columns))
    unknown = sorted(set(columns) - set(nearest.names))
    raise DatasetError(f"{path}: not a manifest: missing columns {missing}, unknown columns {unknown}")


def _read(path: Path) -> pa.Table:
    try:
        table = pq.ParquetFile(path).read()
        return table.drop_columns([name for name in RETIRED if name in table.column_names])
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DatasetError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _conform(table: pa.Table, schema: pa.Schema, path: Path) -> pa.Table:
    """Cast rows to the schema's column order and types (Parquet stores seconds as milliseconds)."""
    if set(table.column_names) != set(schema.names):
        missing = sorted(set(schema.names) - set(table.column_names))
        unknown = sorted(set(table.column_names) - set(schema.names))
        raise DatasetError(f"{path}: missing columns {missing}, unknown columns {unknown}")
    columns = []
    for field in schema:
        column = table[field.name]
        if not field.nullable and column.null_count:
            raise DatasetError(f"{path}: column {field.name!r} has {column.null_count} empty values; none are allowed")
        try:
            columns.append(column.cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            message = f"{path}: column {field.name!r} holds {column.type}, expected {field.type}: {error}"
            raise DatasetError(message) from None
    return pa.Table.from_arrays(columns, schema=schema)
