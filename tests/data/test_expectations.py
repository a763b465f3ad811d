import hashlib
from pathlib import Path

import pyarrow as pa
import pytest

from components.core.errors import DatasetError
from components.data.expectations import SnapshotFacts, validate_snapshot
from components.data.manifest import (
    POOL_SCHEMA,
    QUARANTINE_SCHEMA,
    read_table,
    write_manifest,
    write_table,
)
from components.data.shards import ShardWriter

IMAGES = dict(sorted((hashlib.sha256(bytes([n])).hexdigest(), bytes([n])) for n in range(20)))
IDS = list(IMAGES)
FACTS = SnapshotFacts(source="photos", seen=25, stored=20, already_present=3)


def snapshot(folder: Path, change=lambda rows: None) -> Path:
    with ShardWriter(folder, 10**6) as writer:
        places = [writer.add(image_id, "bin", data) for image_id, data in IMAGES.items()]
    rows = [
        {
            "image_id": image_id,
            "shard": shard,
            "offset": offset,
            "length": length,
            "format": "PNG",
            "width": 4,
            "height": 3,
            "source": "photos",
            "source_uri": f"photos/{number}.png",
            "license": "CC0-1.0",
            "label": None,
            "split": None,
        }
        for number, (image_id, (shard, offset, length)) in enumerate(zip(IMAGES, places, strict=True))
    ]
    change(rows)
    write_manifest(pa.Table.from_pylist(rows, schema=POOL_SCHEMA), folder / "manifest.parquet")
    refused = [{"source_uri": uri, "source": "photos", "reason": "truncated", "detail": "half"} for uri in ("a", "b")]
    write_table(pa.Table.from_pylist(refused, QUARANTINE_SCHEMA), QUARANTINE_SCHEMA, folder / "rejected.parquet")
    return folder


def test_a_good_snapshot_passes_and_has_data_docs(tmp_path: Path) -> None:
    report = validate_snapshot(snapshot(tmp_path / "s"), FACTS, tmp_path / "docs")
    assert report.rows == 20
    assert all(check.passed for check in report.checks)
    assert {check.name for check in report.checks} >= {"ids_unique", "inside_shards", "bytes_match_id", "counts_add_up"}
    assert report.docs == tmp_path / "docs" / "index.html"
    pages = "".join(path.read_text() for path in (tmp_path / "docs" / "validations").rglob("*.html"))
    assert "ids_unique" in pages
    assert "Succeeded" in pages
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [
        "00000.tar",
        "manifest.parquet",
        "rejected.parquet",
    ]


def failures(message: str) -> dict[str, list[str]]:
    """Check -> named rows, of the one line that a failed validation says."""
    found = {}
    for part in message.partition("expectations failed: ")[2].split("; "):
        name, _, rows = part.partition(" rows: ")
        if rows.partition(": ")[0] and " (" in name:
            found[name.split(" (")[0]] = rows.split(", ")
    return found


def test_failed_expectations_name_themselves_and_their_rows(tmp_path: Path) -> None:
    odd_id = IDS[4][:-1] + "G"
    damage = {
        2: {"offset": 10**9},
        4: {"image_id": odd_id},
        5: {"offset": 512},
        7: {"width": 0},
        8: {"license": "  "},
        9: {"source": "elsewhere"},
        11: {"length": 2**63 - 1},
        12: {"shard": "00007.tar"},
        13: {"shard": "../s/00000.tar"},
    }
    folder = snapshot(tmp_path / "s", lambda rows: [rows[number].update(values) for number, values in damage.items()])
    with pytest.raises(DatasetError) as caught:
        validate_snapshot(folder, FACTS, tmp_path / "docs")
    assert "\n" not in str(caught.value)
    assert failures(str(caught.value)) == {
        "ids_are_sha256": [odd_id],
        "sizes_positive": [IDS[7]],
        "license_present": [IDS[8]],
        "source_known": [IDS[9]],
        "inside_shards": [IDS[2], IDS[11], IDS[12], IDS[13]],
        "bytes_match_id": [IDS[2], odd_id, IDS[5], IDS[11], IDS[12], IDS[13]],
    }
    failing = read_table(tmp_path / "docs" / "failing-rows.parquet", POOL_SCHEMA)
    assert failing["image_id"].to_pylist() == [odd_id if number == 4 else IDS[number] for number in sorted(damage)]


def test_an_image_listed_twice_or_out_of_order_fails(tmp_path: Path) -> None:
    def damage(rows: list[dict]) -> None:
        rows[4] = dict(rows[3])
        rows.insert(0, rows.pop())

    with pytest.raises(DatasetError) as caught:
        validate_snapshot(snapshot(tmp_path / "s", damage), FACTS, tmp_path / "docs")
    assert failures(str(caught.value)) == {"ids_unique": [IDS[3], IDS[3]], "ids_sorted": [IDS[0]]}


def test_only_ten_rows_are_named_and_all_are_kept(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "s", lambda rows: [row.update(height=0) for row in rows[:15]])
    with pytest.raises(DatasetError, match=rf"15 of 20 rows: {', '.join(IDS[:10])}, \.\.\.;"):
        validate_snapshot(folder, FACTS, tmp_path / "docs")
    assert read_table(tmp_path / "docs" / "failing-rows.parquet", POOL_SCHEMA)["image_id"].to_pylist() == IDS[:15]


def test_counts_must_agree_with_the_source(tmp_path: Path) -> None:
    facts = SnapshotFacts(source="photos", seen=24, stored=20, already_present=3)
    with pytest.raises(DatasetError, match=r"counts_add_up .*: off by 1"):
        validate_snapshot(snapshot(tmp_path / "s"), facts, tmp_path / "docs")
