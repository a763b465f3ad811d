"""Images that were withdrawn: what ingest refuses, and snapshots that are rebuilt without them."""

from __future__ import annotations

import hashlib
import io
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from components.core.config import ConfigError
from components.core.storage import sha256_file
from components.data.ingest import IngestReport, ingest
from components.data.ingest_config import IngestError, IngestRequest
from components.data.manifest import MANIFEST, QUARANTINE_SCHEMA, REJECTED, read_manifest, read_table
from components.data.provenance import read_provenance
from components.data.rebuild import rebuild
from components.data.shards import ShardReader
from components.data.tombstones import NearCopies, Tombstone, fingerprint, read_withdrawn, tombstone_folder

PHOTO = Image.fromarray(np.asarray(skimage.data.astronaut()))
OTHERS = [Image.fromarray(np.asarray(getattr(skimage.data, name)())) for name in ("chelsea", "coffee", "rocket")]


def encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def take(root: Path, source: Path, **options: object) -> IngestReport:
    values: dict[str, object] = {"name": "photos", "license": "CC0-1.0", "pool": root / "pool", "workers": 1}
    values |= {"evaluation": root / "evaluation", "docs_folder": root / "docs", "source": str(source)}
    return ingest(IngestRequest.parse(**(values | options)))


def withdraw(root: Path, images: list[bytes], near: list[Image.Image] | None = None) -> None:
    signs = [sign for image in near or () if (sign := fingerprint(image))]
    Tombstone(
        takedown="w-0123456789ab", reason="consent withdrawn", withdrawn_at=datetime(2026, 11, 30, tzinfo=UTC),
        withdrawn_by="Ann", images=tuple(sorted(map(sha, images))), fingerprints=tuple(signs),
    ).write(tombstone_folder(root / "pool"))  # fmt: skip


def test_a_withdrawn_image_and_its_near_copies_are_refused_with_the_reason(tmp_path: Path) -> None:
    files = {
        "original.png": encoded(PHOTO, "PNG"),
        "again.jpg": encoded(PHOTO, "JPEG", quality=60),
        "half.webp": encoded(PHOTO.resize((256, 256)), "WEBP"),
        "other.png": encoded(OTHERS[0], "PNG"),
    }
    (tmp_path / "in").mkdir()
    for name, data in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    withdraw(tmp_path, [files["original.png"]])
    first = take(tmp_path, tmp_path / "in", name="by-hash")
    assert (first.stored, first.rejected) == (3, {"withdrawn": 1})
    told = "taken down on 2026-11-30 (w-0123456789ab): consent withdrawn"
    assert any(line == f"rejected, withdrawn 1, such as original.png: {told}" for line in first.notes)
    assert first.pool_snapshot is not None
    (row,) = read_table(first.pool_snapshot / REJECTED, QUARANTINE_SCHEMA).to_pylist()
    assert (row["reason"], row["image_id"], row["detail"]) == ("withdrawn", sha(files["original.png"]), told)

    withdraw(tmp_path, [files["original.png"]], near=[PHOTO])
    near = take(tmp_path, tmp_path / "in", name="by-sight")
    assert (near.stored, near.rejected) == (1, {"withdrawn": 3})
    assert any(f"again.jpg: a near copy of an image that was {told}" in line for line in near.notes)
    for name in ("other.png", "original.png"):
        (tmp_path / "in" / name).unlink()
    with pytest.raises(IngestError, match=r"no image in 2 files \(withdrawn 2\).*consent withdrawn"):
        take(tmp_path, tmp_path / "in", name="nothing-left")


def test_fingerprints_tell_copies_from_other_pictures() -> None:
    near = NearCopies([str(fingerprint(image)) for image in OTHERS])
    for image in OTHERS:
        copy = Image.open(io.BytesIO(encoded(image.resize((image.width // 2, image.height // 2)), "JPEG", quality=50)))
        assert near.find(copy) == fingerprint(image)
    assert near.find(PHOTO) is None
    flat = Image.new("RGB", (64, 64), "gray")
    assert fingerprint(flat) is None
    assert NearCopies([]).find(PHOTO) is near.find(flat) is None


def test_a_damaged_tombstone_stops_the_ingest(tmp_path: Path) -> None:
    folder = tombstone_folder(tmp_path / "pool")
    folder.mkdir()
    (folder / "w-0123456789ab.json").write_text("{")
    with pytest.raises(ConfigError, match=r"w-0123456789ab\.json: images: required"):
        read_withdrawn(folder)


def test_a_rebuilt_snapshot_keeps_the_bytes_of_untouched_shards(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(12):
        (tmp_path / "in" / f"{number}.png").write_bytes(encoded(PHOTO.crop((number, 0, number + 40, 40)), "PNG"))
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    old = take(tmp_path, tmp_path / "in", shard_bytes=24_000).pool_snapshot
    assert old is not None
    table = read_manifest(old / MANIFEST)
    shards = table["shard"].unique().to_pylist()
    assert len(shards) > 3
    whole = [row["image_id"] for row in table.to_pylist() if row["shard"] == shards[2]]
    one = table["image_id"][0].as_py()
    new = rebuild(old, {one, *whole}, "w-0: why", tmp_path / "docs")
    assert new is not None
    left = read_manifest(new / MANIFEST)
    assert left["image_id"].to_pylist() == [i for i in table["image_id"].to_pylist() if i not in {one, *whole}]
    assert left["shard"].unique().to_pylist() == [name for name in shards if name != shards[2]]
    for name in shards:
        same = (new / name).exists() and sha256_file(new / name) == sha256_file(old / name)
        assert same == (name not in (shards[0], shards[2]))
    reader = ShardReader(new)
    for row in left.to_pylist():
        assert sha(reader.read(row["shard"], row["offset"], row["length"])) == row["image_id"]
    rejected = read_table(new / REJECTED, QUARANTINE_SCHEMA).to_pylist()
    assert sum(row["reason"] == "withdrawn" and row["detail"] == "w-0: why" for row in rejected) == 1 + len(whole)
    assert sum(row["reason"] != "withdrawn" for row in rejected) == 1
    assert read_provenance(new) == read_provenance(old)
    assert rebuild(old, {one, *whole}, "w-0: why", tmp_path / "docs") == new  # again, as after a kill
    # Ingest names it likewise, so that ingesting the source again stores nothing.
    assert take(tmp_path, tmp_path / "in", name="again", shard_bytes=24_000).pool_snapshot.name == old.name
    for image_id in (one, *whole):
        (tmp_path / "in" / next(r["source_uri"] for r in table.to_pylist() if r["image_id"] == image_id)).unlink()
    assert take(tmp_path, tmp_path / "in", name="less", shard_bytes=24_000).pool_snapshot.name == new.name
    assert rebuild(old, set(table["image_id"].to_pylist()), "all", tmp_path / "docs") is None
