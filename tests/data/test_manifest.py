from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.core.errors import DatasetError
from components.data.manifest import (
    CURATED_SCHEMA,
    POOL_SCHEMA,
    QUARANTINE_SCHEMA,
    read_collection,
    read_manifest,
    read_table,
    write_manifest,
    write_table,
)


def row(image_id: str, **changes: object) -> dict[str, object]:
    values = {
        "image_id": image_id,
        "shard": "00000.tar",
        "offset": 512,
        "length": 10,
        "format": "JPEG",
        "width": 4,
        "height": 3,
        "source": "photos",
        "source_uri": "photos/a.jpg",
        "license": "CC0-1.0",
        "label": None,
        "split": None,
    }
    return values | changes


def pool(*ids: str) -> pa.Table:
    return pa.Table.from_pylist([row(image_id) for image_id in ids], schema=POOL_SCHEMA)


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    table = pool("a", "b")
    write_manifest(table, tmp_path / "manifest.parquet")
    read = read_manifest(tmp_path / "manifest.parquet")
    assert read.schema.equals(POOL_SCHEMA)
    assert read.equals(table)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.parquet"]


def test_what_earlier_versions_wrote_is_read_without_where_it_came_from(tmp_path: Path) -> None:
    old = pool("a").append_column("source_version", pa.array(["v1"]))
    pq.write_table(old.append_column("ingested_at", pa.array([0])), tmp_path / "manifest.parquet")
    assert read_manifest(tmp_path / "manifest.parquet").equals(pool("a"))


def test_equal_rows_give_equal_bytes_however_they_are_chunked(tmp_path: Path) -> None:
    write_manifest(pool("a", "b"), tmp_path / "one.parquet")
    reordered = pa.concat_tables([pool("a"), pool("b")]).select(POOL_SCHEMA.names[::-1])
    write_manifest(reordered, tmp_path / "two.parquet")
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_curated_manifests_have_their_own_schema(tmp_path: Path) -> None:
    extra = {"origin": "balanced", "query_id": None, "similarity": 0.5, "group_id": "a", "cluster_path": "12"}
    write_manifest(pa.Table.from_pylist([row("a") | extra], schema=CURATED_SCHEMA), tmp_path / "manifest.parquet")
    assert read_manifest(tmp_path / "manifest.parquet").schema.equals(CURATED_SCHEMA)
    assert read_collection(tmp_path)["cluster_path"].to_pylist() == ["12"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop_columns("license"), "missing columns.*license"),
        (lambda table: table.append_column("extra", pa.array([1])), "unknown columns.*extra"),
        (lambda table: table.set_column(0, "image_id", pa.array([None], pa.string())), "image_id.*1 empty"),
        (lambda table: table.set_column(2, "offset", pa.array(["x"])), "offset.*holds string, expected int64"),
    ],
)
def test_a_table_that_is_not_a_manifest_is_refused(tmp_path: Path, change, message: str) -> None:
    pq.write_table(
        change(pool("a").cast(pa.schema([f.with_nullable(True) for f in POOL_SCHEMA]))), tmp_path / "m.parquet"
    )
    with pytest.raises(DatasetError, match=message):
        read_manifest(tmp_path / "m.parquet")


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"m\.parquet: no such file"):
        read_manifest(tmp_path / "m.parquet")
    (tmp_path / "m.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DatasetError, match="not a readable Parquet file"):
        read_manifest(tmp_path / "m.parquet")


def test_a_collection_is_all_finished_snapshots_in_order(tmp_path: Path) -> None:
    write_manifest(pool("c"), tmp_path / "web" / "1111" / "manifest.parquet")
    write_manifest(pool("a", "b"), tmp_path / "photos" / "2222" / "manifest.parquet")
    write_manifest(pool("x"), tmp_path / "photos" / ".3333.partial" / "manifest.parquet")
    table = read_collection(tmp_path)
    assert table.schema.equals(POOL_SCHEMA)
    assert table["image_id"].to_pylist() == ["a", "b", "c"]
    assert table["shard"].to_pylist() == ["photos/2222/00000.tar"] * 2 + ["web/1111/00000.tar"]


def test_a_collection_without_snapshots_is_an_empty_table(tmp_path: Path) -> None:
    assert read_collection(tmp_path / "nowhere").schema.equals(POOL_SCHEMA)
    assert read_collection(tmp_path).num_rows == 0


def test_other_tables_are_checked_against_the_schema_asked_for(tmp_path: Path) -> None:
    values = {"source_uri": ["u"], "source": ["s"], "reason": ["truncated"], "detail": ["d"], "image_id": [None]}
    write_table(pa.table(values), QUARANTINE_SCHEMA, tmp_path / "r.parquet")
    assert read_table(tmp_path / "r.parquet", QUARANTINE_SCHEMA).to_pylist()[0]["reason"] == "truncated"
    with pytest.raises(DatasetError, match="missing columns"):
        read_table(tmp_path / "r.parquet", POOL_SCHEMA)
