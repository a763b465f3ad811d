from __future__ import annotations

import hashlib
import tarfile

import numpy as np
import pyarrow as pa
import pytest

from components.core.storage import sha256_dir
from components.curation.config import CurationError
from components.curation.faces import blur
from components.curation.pack import CHOSEN_SCHEMA, Pool, check_accounting, pack
from components.curation.rejections import rejections
from components.curation.scores import BOX
from components.data.manifest import FINDINGS, REJECTED_SCHEMA, read_collection, read_table
from components.data.shards import ShardReader, decode_image


def test_every_row_is_in_or_out_once():
    check_accounting(4, np.array([0, 2]), np.array([3, 1]))
    with pytest.raises(CurationError, match="of 4 pool images, 1 are neither in nor out and 1 are both"):
        check_accounting(4, np.array([0, 2]), np.array([3, 2]))


def packed(root, pool, order, folder, *, max_bytes=300_000, faces=None, workers=1):
    out = np.setdiff1d(np.arange(len(pool)), order)
    chosen = pa.Table.from_pylist([{"row": row, "origin": "balanced"} for row in order], CHOSEN_SCHEMA)
    findings = pa.table({field.name: pa.nulls(len(pool), field.type) for field in FINDINGS})
    findings = findings.set_column(0, FINDINGS[0], pa.array([str(row) for row in range(len(pool))]))
    boxes = pa.chunked_array([pa.array([(faces or {}).get(row) for row in range(len(pool))], pa.list_(BOX))])
    whole = Pool(root / "data/pool", pool, pool["image_id"].combine_chunks(), findings, boxes)
    folder.mkdir()
    pack(whole, chosen, rejections(out, "not_sampled", "cluster 0"), folder, max_bytes, workers)
    return read_collection(folder)


def test_bytes_are_the_pools_and_do_not_depend_on_the_order_of_choice(small_workspace):
    pool = read_collection(small_workspace / "data/pool")
    table = packed(small_workspace, pool, [9, 0, 4, 5], small_workspace / "a")
    packed(small_workspace, pool, [0, 4, 5, 9], small_workspace / "b")
    assert sha256_dir(small_workspace / "a") == sha256_dir(small_workspace / "b")
    assert table["image_id"].to_pylist() == sorted(pool["image_id"].take([0, 4, 5, 9]).to_pylist())
    members = {}
    for path in sorted((small_workspace / "a").glob("*.tar")):
        with tarfile.open(path) as shard:
            members |= {m.name: hashlib.sha256(shard.extractfile(m).read()).hexdigest() for m in shard.getmembers()}
    assert {name.split(".")[0]: digest for name, digest in members.items()} == {
        i: i for i in table["image_id"].to_pylist()
    }
    clusters = dict(zip(table["image_id"].to_pylist(), table["cluster_path"].to_pylist(), strict=True))
    assert clusters == {pool["image_id"][row].as_py(): str(row) for row in (0, 4, 5, 9)}
    rejected = read_table(small_workspace / "a/rejected.parquet", REJECTED_SCHEMA)
    assert rejected["cluster_path"].to_pylist() == ["1", "2", "3", "6", "7", "8", "10", "11"]
    assert rejected["source_uri"].to_pylist() == pool["source_uri"].take([1, 2, 3, 6, 7, 8, 10, 11]).to_pylist()


def test_bytes_that_are_not_the_image_are_refused(small_workspace):
    pool = read_collection(small_workspace / "data/pool")
    path = small_workspace / "data/pool" / pool["shard"][3].as_py()
    data = bytearray(path.read_bytes())
    data[pool["offset"][3].as_py() + 100] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CurationError, match=f"not the bytes of image {pool['image_id'][3].as_py()}"):
        packed(small_workspace, pool, [2, 3], small_workspace / "a")


def test_faces_are_blurred_in_a_new_image_that_names_the_old_one(small_workspace):
    pool = read_collection(small_workspace / "data/pool")
    box = {"x": 40, "y": 30, "w": 50, "h": 60}
    jpeg = pool["format"].to_pylist().index("JPEG")
    chosen = sorted({0, 4, 5, jpeg})
    table = packed(small_workspace, pool, chosen, small_workspace / "a", faces={4: [box], 5: [], jpeg: [box]})
    rows = {row["derived_from"] or row["image_id"]: row for row in table.to_pylist()}
    assert list(rows) != sorted(rows)  # in order of the new ids
    assert table["image_id"].to_pylist() == sorted(table["image_id"].to_pylist())
    assert set(rows) == set(pool["image_id"].take(chosen).to_pylist())
    blurred = {key for key, row in rows.items() if row["derived_from"]}
    assert blurred == set(pool["image_id"].take([4, jpeg]).to_pylist())
    original, reader = ShardReader(small_workspace / "data/pool"), ShardReader(small_workspace / "a")
    for place in (4, jpeg):
        old = pool.slice(place, 1).to_pylist()[0]
        new = rows[old["image_id"]]
        assert (new["format"], new["width"], new["height"]) == (old["format"], old["width"], old["height"])
        assert new["group_id"] == old["image_id"]
        data = reader.read(new["shard"], new["offset"], new["length"])
        assert hashlib.sha256(data).hexdigest() == new["image_id"]
        expected = np.asarray(
            blur(decode_image(original.read(old["shard"], old["offset"], old["length"])), [box]), np.float32
        )
        difference = np.abs(np.asarray(decode_image(data), np.float32) - expected)
        assert difference.max() == 0 if old["format"] == "PNG" else difference.mean() < 3
    assert (
        sorted(path.suffix for path in (small_workspace / "a").iterdir() if path.suffix != ".tar") == [".parquet"] * 2
    )
