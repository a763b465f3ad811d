"""Collections made from encoded images, as ingest would write them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from components.data.manifest import MANIFEST, POOL_SCHEMA, write_manifest
from components.data.shards import EXTENSIONS, ImageError, ShardWriter, decode_image


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_collection(
    folder: Path, files: Iterable[tuple[str, bytes]], *, source: str = "photos", max_bytes: int = 2**24
) -> pa.Table:
    """Write one snapshot below `folder` (data/pool or data/evaluation); files that are no image are left out."""
    by_id = {hashlib.sha256(data).hexdigest(): (name, data) for name, data in sorted(files, reverse=True)}
    snapshot = folder / source / "0123456789ab"
    rows = []
    with ShardWriter(snapshot, max_bytes) as writer:
        for image_id, (name, data) in sorted(by_id.items()):
            try:
                image = decode_image(data)
            except ImageError:
                continue
            shard, offset, length = writer.add(image_id, EXTENSIONS[str(image.format)], data)
            rows.append(
                {
                    "image_id": image_id,
                    "shard": shard,
                    "offset": offset,
                    "length": length,
                    "format": image.format,
                    "width": image.width,
                    "height": image.height,
                    "source": source,
                    "source_uri": name,
                    "source_version": "1",
                    "license": "CC0-1.0",
                    "ingested_at": datetime(2026, 1, 1, tzinfo=UTC),
                    "label": None,
                    "split": None,
                }
            )
    table = pa.Table.from_pylist(rows, schema=POOL_SCHEMA)
    write_manifest(table, snapshot / MANIFEST)
    return table


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    """The sample pool, built once and left unchanged: folder with pool/, evaluation/, ground_truth.json."""
    from components.data.sample_pool import build_sample_pool

    folder = tmp_path_factory.mktemp("sample") / "sample"
    build_sample_pool(folder)
    return folder


def files_below(folder: Path) -> list[tuple[str, bytes]]:
    return [
        (path.relative_to(folder.parent).as_posix(), path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
