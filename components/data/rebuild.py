"""Rebuild a snapshot without withdrawn images: a new folder, in which untouched shards keep their bytes and names."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute

from components.core.storage import atomic_dir
from components.data import evalset, expectations, summary
from components.data.ingest import snapshot_name
from components.data.manifest import (
    MANIFEST,
    POOL_SCHEMA,
    QUARANTINE_SCHEMA,
    REJECTED,
    read_manifest,
    read_table,
    write_manifest,
    write_table,
)
from components.data.provenance import read_provenance
from components.data.shards import EXTENSIONS, ShardReader, ShardWriter
from components.data.tombstones import WITHDRAWN

logger = logging.getLogger(__name__)
pc: Any = pyarrow.compute  # created at import, invisible to pyright


def rebuild(snapshot: Path, withdrawn: Collection[str], why: str, docs_folder: Path) -> Path | None:
    """Write the snapshot without some images beside the old one, validated, with the old one's provenance.

    Args:
        snapshot: its folder, which is left as it is.
        withdrawn: image ids.
        why: detail of the rows that `rejected.parquet` gets for them.
        docs_folder: parent of the folder that receives the Data Docs.

    Returns:
        The new folder, which may have been there already; None if no image is left.

    Raises:
        DatasetError: the old snapshot is damaged, or the new one failed its validation.
    """
    table = read_manifest(snapshot / MANIFEST)
    out = pc.is_in(table["image_id"], value_set=pa.array(sorted(withdrawn), pa.string()))
    left, gone = table.filter(pc.invert(out)), table.filter(out)
    if not len(left):
        return None
    folder = snapshot.with_name(snapshot_name(left))
    title = f"{snapshot.parent.parent.name}-{snapshot.parent.name}-{folder.name}"
    if not folder.is_dir():
        with atomic_dir(folder) as staging:
            write_manifest(_write_shards(snapshot, staging, left, set(gone["shard"].to_pylist())), staging / MANIFEST)
            for line in evalset.without_images(snapshot, staging, left):
                logger.warning("%s: %s", snapshot, line)
            rejected = _rejected(snapshot, gone, why)
            write_table(rejected, QUARANTINE_SCHEMA, staging / REJECTED)
            facts = expectations.SnapshotFacts(
                left["source"][0].as_py(), len(left) + len(rejected), len(left), already_present=0
            )
            validation = expectations.validate_snapshot(staging, facts, docs_folder / title)
            summary.write_summary(staging, title, facts, validation)
    folder = evalset.named_by_version(folder)
    if provenance := read_provenance(snapshot):
        provenance.write(folder)
    return folder


def _write_shards(snapshot: Path, staging: Path, left: pa.Table, touched: set[str]) -> pa.Table:
    """Copy the untouched shards, and write the others without the withdrawn images; return the new manifest."""
    reader, parts = ShardReader(snapshot), []
    for shard in left["shard"].unique().to_pylist():
        rows = left.filter(pc.equal(left["shard"], shard))
        parts.append(_write_again(reader, staging, shard, rows) if shard in touched else rows)
        if shard not in touched:
            _link_or_copy(snapshot / shard, staging / shard)
    return pa.concat_tables(parts)


def _write_again(reader: ShardReader, staging: Path, shard: str, rows: pa.Table) -> pa.Table:
    """Write one shard of these rows under its old name; it is never larger than before, so it is never split."""
    with ShardWriter(staging, max_bytes=2**63, first=int(Path(shard).stem)) as writer:
        places = [
            writer.add(row["image_id"], EXTENSIONS[row["format"]], reader.read(shard, row["offset"], row["length"]))
            for row in rows.to_pylist()
        ]
    offsets = pa.array([offset for _, offset, _ in places], pa.int64())
    return rows.set_column(rows.schema.get_field_index("offset"), POOL_SCHEMA.field("offset"), offsets)


def _rejected(snapshot: Path, gone: pa.Table, why: str) -> pa.Table:
    """Return the rejected files of the snapshot, and the withdrawn images."""
    before = read_table(snapshot / REJECTED, QUARANTINE_SCHEMA)
    constant = {"reason": WITHDRAWN, "detail": why}
    rows = [{**constant, **row} for row in gone.select(["image_id", "source_uri", "source"]).to_pylist()]
    both = pa.concat_tables([before, pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA)])
    return both.sort_by([("source_uri", "ascending"), ("reason", "ascending")])


def _link_or_copy(old: Path, new: Path) -> None:
    """Give a file a second name, as DVC does with its cache; copy it where the disk cannot."""
    try:
        os.link(old, new)
    except OSError:
        shutil.copyfile(old, new)
