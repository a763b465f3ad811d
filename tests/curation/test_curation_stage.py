from __future__ import annotations

import csv
import json
import re
import shutil

import numpy as np
import pytest
from pydantic import ValidationError

from components.core.storage import sha256_dir
from components.curation.config import CurateConfig, CurationError, EmbedConfig, LevelConfig
from components.curation.stage import curate, embed
from components.data.manifest import REJECTED_SCHEMA, read_collection, read_manifest, read_table
from components.data.shards import ShardReader, decode_image

CURATE = CurateConfig(levels=[LevelConfig(num_clusters=64), LevelConfig(num_clusters=16)])


@pytest.fixture(scope="module")
def curated(sample_workspace, tmp_path_factory):
    """The sample pool, embedded by two workers and curated whole: (workspace, results)."""
    root = tmp_path_factory.mktemp("curated") / "workspace"
    shutil.copytree(sample_workspace, root)
    return root, embed(EmbedConfig(workers=2), root, 0), curate(CURATE, root, 0)


def test_every_planted_copy_and_leak_is_found_and_no_good_image_is_lost(curated, planted):
    root, _, results = curated
    pool = read_collection(root / "data/pool")
    rejected = {
        row["image_id"]: row for row in read_table(root / "data/curated/rejected.parquet", REJECTED_SCHEMA).to_pylist()
    }
    kept = set(read_manifest(root / "data/curated/manifest.parquet")["image_id"].to_pylist())
    expected = set()  # all that must go
    for item in planted:
        if item["kind"] in ("re_encoded", "resized"):
            gone, stays = (item["id"], item["of_id"]) if item["of_id"] in kept else (item["of_id"], item["id"])
            assert rejected[gone]["reason"] == "near_duplicate"
            assert rejected[gone]["duplicate_of"] == stays
            assert rejected[gone]["similarity"] > 0.6
            assert item["kind"] == "re_encoded" or gone == item["id"]  # the larger one stays
            expected.add(gone)
        elif item["kind"].startswith("leak"):
            assert rejected[item["id"]]["reason"] == "evaluation_copy"
            assert rejected[item["id"]]["duplicate_of"] == item["of_id"]
            assert rejected[item["id"]]["detail"] == "evaluation set sample-evaluation"
            expected.add(item["id"])
        elif item["kind"] == "tiny":
            assert rejected[item["id"]]["reason"] == "too_small"
            expected.add(item["id"])
    assert set(rejected) == expected
    assert kept == set(pool["image_id"].to_pylist()) - expected
    assert results["rejected"] == {"evaluation_copy": 30, "near_duplicate": 100, "too_small": 15}
    assert results["evaluation_copies"] == {"sample-evaluation": 30}
    assert results["images"]["curated"] == len(kept) == len(pool) - 145


def test_both_tables_say_what_was_found_of_each_image(curated):
    root, _, _ = curated
    kept = read_manifest(root / "data/curated/manifest.parquet")
    rejected = read_table(root / "data/curated/rejected.parquet", REJECTED_SCHEMA).to_pylist()
    reader = ShardReader(root / "data/curated")
    for row in kept.slice(0, 5).to_pylist():
        image = decode_image(reader.read(row["shard"], row["offset"], row["length"]))
        counts = np.bincount(np.asarray(image.convert("L")).ravel())
        shares = counts[counts > 0] / counts.sum()
        assert row["entropy"] == pytest.approx(-(shares * np.log2(shares)).sum(), abs=1e-5)
        assert row["group_id"] == row["image_id"]
        assert row["nsfw"] is row["num_faces"] is row["derived_from"] is None
    assert all(row["group_id"] == row["duplicate_of"] for row in rejected if row["reason"] == "near_duplicate")
    assert all(row["group_id"] is None for row in rejected if row["reason"] == "too_small")
    assert {path.count("/") for path in kept["cluster_path"].to_pylist()} == {1}


def test_same_bytes_for_another_number_of_workers_and_what_was_left_out_is_said(
    curated, sample_workspace, tmp_path, caplog
):
    root = tmp_path / "workspace"
    shutil.copytree(sample_workspace, root)
    embed(EmbedConfig(workers=1), root, 0)
    caplog.set_level("INFO")
    curate(CURATE, root, 0)
    for folder in ("data/embeddings", "data/curated"):
        assert sha256_dir(root / folder) == sha256_dir(curated[0] / folder)
    total, small, leaks, copies = [line for line in caplog.messages if line.startswith("left out")]
    assert re.fullmatch(r"left out: 145 of [\d,]+ images, \d\.\d %", total)
    assert small.startswith("left out, too_small 15, ")
    assert small.endswith("; curate.filters.min_side decides, now 16")
    assert leaks.startswith("left out, evaluation_copy 30, ")
    assert leaks.endswith("; curate.decontamination_similarity decides, now 0.45")
    uri = r"[\w./-]+\.\w+"
    example = rf"{uri} \(\d\.\d\d like {uri}, group of \d\)"
    assert re.fullmatch(
        rf"left out, near_duplicate 100, .* stays: {example}; {example}; curate.dedup_similarity decides, now 0.6",
        copies,
    )


def test_report(curated):
    folder = curated[0] / "reports/curate"
    with (folder / "funnel.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == ["pool", "filtered", "decontaminated", "deduplicated", "curated"]
    counts = [int(row["images"]) for row in rows]
    assert counts == [counts[0], counts[0] - 15, counts[0] - 45, counts[0] - 145, counts[0] - 145]
    checks = json.loads((folder / "validation.json").read_text())
    assert {check["of"] for check in checks} >= {"after the filters", "curated set"}, checks
    page = (folder / "report.html").read_text()
    for reason in ("too small", "evaluation copy", "near duplicate"):
        assert f"<h3>{reason} " in page
    assert "Level 2: 16 clusters" in page
    assert page.count("1 (exact search)") == 2
    assert not re.findall(r'(?:src|href)="(?!data:)', page)  # self-contained
    for name in ("kept.jpg", "removed.jpg"):
        assert decode_image((folder / name).read_bytes()).width > 800


def test_balanced_sample(curated, tmp_path):
    root = tmp_path / "workspace"
    shutil.copytree(curated[0], root)
    results = curate(CurateConfig(levels=[LevelConfig(num_clusters=20)], target_images=300), root, 0)
    table = read_manifest(root / "data/curated/manifest.parquet")
    sizes = np.unique(table["cluster_path"].to_numpy(), return_counts=True)[1]
    assert len(table) == results["images"]["curated"] == 300
    assert sizes.tolist() == [15] * 20
    assert results["rejected"]["not_sampled"] == results["images"]["deduplicated"] - 300


def test_no_pool_and_no_images(tmp_path):
    with pytest.raises(CurationError, match="no pool yet; add images first: pedigree ingest"):
        embed(EmbedConfig(), tmp_path, 0)
    (tmp_path / "data/pool").mkdir(parents=True)
    with pytest.raises(CurationError, match="the pool has no images"):
        curate(CURATE, tmp_path, 0)


def test_embeddings_of_other_images_are_refused(small_workspace, photos, encode, write_collection):
    with pytest.raises(CurationError, match="no embeddings yet; run the stage embed first"):
        curate(CURATE, small_workspace, 0)
    embed(EmbedConfig(workers=1), small_workspace, 0)
    write_collection(small_workspace / "data/evaluation", [("new.png", encode(photos[3]))], "later")
    with pytest.raises(CurationError, match="data/evaluation changed after it was embedded; run the stage embed again"):
        curate(CURATE, small_workspace, 0)


def test_when_a_filter_takes_all_nothing_is_written(small_workspace):
    embed(EmbedConfig(workers=1), small_workspace, 0)
    config = CurateConfig.model_validate({"levels": [{"num_clusters": 2}], "filters": {"min_side": 500}})
    with pytest.raises(CurationError, match=r"no image is left of 12: too_small 12; loosen curate\.filters"):
        curate(config, small_workspace, 0)
    assert not (small_workspace / "data/curated").exists()


def test_without_evaluation_sets_nothing_is_decontaminated(small_workspace):
    shutil.rmtree(small_workspace / "data/evaluation")
    embed(EmbedConfig(workers=1), small_workspace, 0)
    results = curate(CurateConfig(levels=[LevelConfig(num_clusters=2)]), small_workspace, 0)
    assert results["images"]["curated"] == 12
    assert results["evaluation_copies"] == {}


@pytest.mark.parametrize(
    "values",
    [
        {"dedup_similarity": 1.2},
        {"decontamination_similarity": 0},
        {"num_neighbors": 0},
        {"levels": []},
        {"gates": {"size_ratio": (2.0, 0.5)}},
    ],
)
def test_values_out_of_range(values):
    with pytest.raises(ValidationError):
        CurateConfig.model_validate({"levels": [{"num_clusters": 2}]} | values)
