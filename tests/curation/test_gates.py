"""Each gate, with data that it lets through and data that it must stop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from components.core.errors import DatasetError
from components.curation import gates
from components.data.expectations import DataDocs
from components.data.manifest import (
    CURATED_SCHEMA,
    MANIFEST,
    REJECTED,
    REJECTED_SCHEMA,
    read_manifest,
    write_manifest,
    write_table,
)
from tests.data.test_expectations import IDS, failures, snapshot


@pytest.fixture
def docs(tmp_path) -> DataDocs:
    return DataDocs(tmp_path / "docs")


def rows(**columns) -> pa.Table:
    count = len(next(iter(columns.values())))
    given = {"image_id": IDS[:count], "width": [9] * count, "height": [9] * count, "license": ["CC0-1.0"] * count}
    return pa.table(given | columns)


def embedded(vectors: np.ndarray, first: int = 0) -> gates.Embedded:
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return gates.Embedded(rows(image_id=IDS[first : first + len(unit)]), unit, np.arange(len(unit)))


def stopped(call) -> dict[str, list[str]]:
    """What a gate says when it stops: each check and the rows that it names."""
    with pytest.raises(DatasetError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return failures(str(caught.value))


def test_after_the_filters(docs):
    gates.after_filter(docs, rows(width=[9, 30]), 9, None)
    bad = rows(image_id=[IDS[0], IDS[1], IDS[1], IDS[3]], width=[9, 30, 30, 8], license=["MIT", "x", "mit", "MIT"])
    assert stopped(lambda: gates.after_filter(docs, bad, 9, ["MIT"])) == {
        "ids_unique": [IDS[1], IDS[1]],
        "large_enough": [IDS[3]],
        "license_allowed": [IDS[1]],
    }


def test_after_deduplication(docs):
    vectors = np.eye(8)
    gates.after_dedup(docs, embedded(vectors), gates.Limit(0.6))
    vectors[3, 5] = 1  # images 3 and 5 at 0.7071
    gates.after_dedup(docs, embedded(vectors), gates.Limit(0.7072))
    found = stopped(lambda: gates.after_dedup(docs, embedded(vectors), gates.Limit(0.6)))
    assert found == {"no_duplicates": [IDS[3], IDS[5]]}
    gates.after_dedup(docs, embedded(vectors), gates.Limit(0.6, allowed_share=0.25))


def test_only_a_sample_is_asked_where_there_are_many(monkeypatch):
    monkeypatch.setattr(gates, "SAMPLE_PAIRS", 0)
    monkeypatch.setattr(gates, "BLOCK", 64)
    vectors = np.repeat(np.random.default_rng(0).standard_normal((150, 16)), 2, axis=0)
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    images = gates.Embedded(pa.table({"image_id": [str(i) for i in range(300)]}), unit, np.arange(300))
    failing, asked = gates.alike(images, images, 0.999)
    assert asked == failing.sum() == gates.SAMPLE_IMAGES


def test_after_decontamination(docs):
    vectors, evaluation = np.eye(8), np.zeros((2, 8))
    evaluation[0, :4] = 1  # 0.5 to each of the first four
    evaluation[1, 7] = 1
    far = gates.Embedded(rows(image_id=IDS[10:11]), embedded(evaluation).vectors, np.array([0]))
    gates.after_decontamination(docs, embedded(vectors), far, gates.Limit(0.5))
    near = gates.Embedded(rows(image_id=[IDS[10], IDS[6]]), embedded(evaluation).vectors, np.arange(2))
    found = stopped(lambda: gates.after_decontamination(docs, embedded(vectors), near, gates.Limit(0.45)))
    assert found == {"no_evaluation_image": [IDS[6]], "no_evaluation_copies": [*IDS[:4], IDS[7]]}


def test_after_sampling(docs):
    before = np.array([60, 20, 20])
    drawn = np.repeat([0, 1, 2], [6, 2, 2])
    gates.after_sampling(docs, rows(image_id=IDS[:10]), gates.Balance(drawn, before, None))
    worse = np.repeat([0, 1, 2], [1, 7, 2])
    found = stopped(lambda: gates.after_sampling(docs, rows(image_id=IDS[:10]), gates.Balance(worse, before, None)))
    assert found == {"clusters_balanced": IDS[1:8]}
    found = stopped(lambda: gates.after_sampling(docs, rows(image_id=IDS[:10]), gates.Balance(drawn, before, 0.5)))
    assert found == {"clusters_balanced": IDS[:6]}


def curated(folder: Path, change=lambda rows: None) -> Path:
    snapshot(folder)
    kept = [
        row | dict.fromkeys(set(CURATED_SCHEMA.names) - row.keys())
        for row in read_manifest(folder / MANIFEST).to_pylist()
    ]
    for row in kept:
        row.update(origin="balanced", group_id=row["image_id"])
    change(kept)
    write_manifest(pa.Table.from_pylist(kept, schema=CURATED_SCHEMA), folder / MANIFEST)
    out = [{"image_id": "x", "source": "photos", "source_uri": "u", "reason": "too_small", "detail": "8 px"}]
    write_table(pa.Table.from_pylist(out, REJECTED_SCHEMA), REJECTED_SCHEMA, folder / REJECTED)
    return folder


def test_each_row_of_the_pool_is_in_or_out(tmp_path, docs):
    folder = curated(tmp_path / "c")
    gates.all_accounted(docs, folder, pa.table({"image_id": [*IDS, "x"]}))
    lost = [*IDS, "x", "lost", IDS[4]]  # the second IDS[4] is told of nowhere
    found = stopped(lambda: gates.all_accounted(docs, folder, pa.table({"image_id": lost})))
    assert found == {"accounted_for": [IDS[4], "lost", IDS[4]]}
    with pytest.raises(DatasetError, match=r"nothing_else .*: off by 2"):
        gates.all_accounted(docs, folder, pa.table({"image_id": IDS[1:]}))


def test_a_blurred_image_stands_for_the_one_it_was_made_from(tmp_path, docs):
    folder = curated(tmp_path / "c", lambda rows: rows[3].update(derived_from="original"))
    gates.all_accounted(docs, folder, pa.table({"image_id": [*IDS[:3], "original", *IDS[4:], "x"]}))


def test_the_whole_set(tmp_path, docs):
    folder = curated(tmp_path / "c")
    report = gates.validate_curated(docs, folder, ["CC0-1.0"], None)
    assert report.rows == 20
    assert report.docs == tmp_path / "docs" / "index.html"

    def damage(rows):
        rows[2].update(origin="guessed")
        rows[3].update(license="MIT")
        rows[4].update(origin="retrieved", query_id=IDS[0])
        rows[5].update(offset=10**9)

    folder = curated(tmp_path / "d", damage)
    with DataDocs(tmp_path / "docs") as site:
        found = stopped(lambda: gates.validate_curated(site, folder, ["CC0-1.0"], None))
    assert found == {
        "origin_known": [IDS[2]],
        "license_allowed": [IDS[3]],
        "retrieval_explained": [IDS[4]],
        "inside_shards": [IDS[5]],
        "bytes_match_id": [IDS[5]],
    }
    failing = read_manifest(tmp_path / "docs" / "failing-rows.parquet")
    assert failing["image_id"].to_pylist() == IDS[2:6]
    pages = "".join(path.read_text() for path in (tmp_path / "docs" / "validations").rglob("*.html"))
    assert "origin_known" in pages
    assert "Failed" in pages


def test_drift_from_the_set_before(tmp_path, docs):
    folder = curated(tmp_path / "c", lambda rows: [row.update(source="crawl") for row in rows[:5]])
    gates.validate_curated(docs, folder, None, gates.Drift({"photos": 17, "crawl": 3}, 0.1, (0.5, 2.0)))
    shifted = gates.Drift({"photos": 19, "crawl": 1}, 0.19, (0.5, 2.0))
    found = stopped(lambda: gates.validate_curated(docs, folder, None, shifted))
    assert found == {"sources_as_before": [*IDS[:10], "..."]}
    for sources, told in (({"photos": 34, "crawl": 9}, "off by 2"), ({"photos": 7, "crawl": 2}, "off by 2")):
        with pytest.raises(DatasetError, match=rf"1 expectations failed: size_as_before .*: {told}"):
            gates.validate_curated(docs, folder, None, gates.Drift(sources, 0.1, (0.5, 2.0)))
    gone = gates.Drift({"photos": 15, "crawl": 5, "archive": 4}, 0.15, (0.5, 2.0))
    with pytest.raises(DatasetError, match=r"no_source_lost \(no large source is gone \(archive\)\): off by 1"):
        gates.validate_curated(docs, folder, None, gone)
