"""The stage `curate` with seed sets, and the gates that stop it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from components.core.errors import DatasetError
from components.core.storage import sha256_dir
from components.curation import grids
from components.curation.config import CurateConfig, CurationError, EmbedConfig, LevelConfig
from components.curation.explain import CuratedTables, explain
from components.curation.inputs import POOL, read_inputs
from components.curation.pack import Pool
from components.curation.rejections import rejections
from components.curation.report import Curation, write_report
from components.curation.select import select
from components.curation.stage import curate, embed
from components.curation.unique import drop_copies
from components.data.manifest import CURATED_SCHEMA, FINDINGS, REJECTED_SCHEMA, read_manifest, read_table

SCHEMAS = {"manifest.parquet": CURATED_SCHEMA, "rejected.parquet": REJECTED_SCHEMA}
LEVELS = [LevelConfig(num_clusters=4), LevelConfig(num_clusters=2)]
CONFIG = CurateConfig(levels=LEVELS)
SEEDS = {
    "flowers": {"as_is": True, "retrieve": "sample", "k": 2},
    "asking": {"retrieve": "sample", "k": 3},
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, photos, encode, write_collection):
    """Two seeds that are taken, one that only asks, and eight others, one of them a larger copy of a seed."""
    root = tmp_path_factory.mktemp("mixed")
    larger = photos[0].resize((240, 240), Image.Resampling.BICUBIC)
    crawl = [(f"{i}.png", encode(photo)) for i, photo in enumerate(photos[3:10])]
    write_collection(root / "data/pool", [*crawl, ("larger.png", encode(larger))], "crawl")
    write_collection(root / "data/pool", [("a.png", encode(photos[0])), ("b.png", encode(photos[1]))], "flowers")
    write_collection(root / "data/pool", [("c.png", encode(photos[2]))], "asking")
    write_collection(root / "data/evaluation", [("d.png", encode(photos[11]))], "benchmark")
    embed(EmbedConfig(workers=1), root, 0)
    config = CurateConfig.model_validate({"levels": LEVELS, "seed_sets": SEEDS, "target_images": 3})
    return root, curate(config, root, 0)


def test_each_part_is_in_once_and_says_why(mixed):
    root, results = mixed
    inputs = read_inputs(root)
    ids, sources = (inputs.pool[name].to_pylist() for name in ("image_id", "source"))
    kept = {row["image_id"]: row for row in read_manifest(root / "data/curated/manifest.parquet").to_pylist()}
    rejected = {
        row["image_id"]: row for row in read_table(root / "data/curated/rejected.parquet", REJECTED_SCHEMA).to_pylist()
    }
    assert kept.keys() | rejected.keys() == set(ids)
    assert not kept.keys() & rejected.keys()

    seeds = [i for i, source in enumerate(sources) if source == "flowers"]
    asking = sources.index("asking")
    larger = next(i for i, uri in enumerate(inputs.pool["source_uri"].to_pylist()) if uri == "larger.png")
    assert {ids[i] for i in seeds} == {i for i, row in kept.items() if row["origin"] == "seed"}
    assert rejected[ids[larger]]["reason"] == "near_duplicate"  # although it has more pixels than the seed
    assert rejected[ids[larger]]["duplicate_of"] in {ids[i] for i in seeds}
    assert rejected[ids[asking]]["reason"] == "only_a_query"

    candidates = [i for i, source in enumerate(sources) if source == "crawl" and i != larger]
    best: dict[int, tuple[float, int]] = {}
    for query, k in [*((seed, 2) for seed in seeds), (asking, 3)]:
        similarities = {i: float(inputs.semantic[i] @ inputs.semantic[query]) for i in candidates}
        for i in sorted(similarities, key=lambda i: -similarities[i])[:k]:
            best[i] = max(best.get(i, (-1.0, -1)), (similarities[i], query))
    retrieved = {i: row for i, row in kept.items() if row["origin"] == "retrieved"}
    assert retrieved.keys() == {ids[i] for i in best}
    for i, (similarity, query) in best.items():
        row = retrieved[ids[i]]
        assert (row["query_id"], row["seed_set"]) == (ids[query], sources[query])
        assert row["similarity"] == pytest.approx(similarity, abs=1e-5)

    drawn = [row for row in kept.values() if row["origin"] == "balanced"]
    assert len(drawn) <= 3
    assert results["origins"] == {"seed": 2, "retrieved": len(best)} | ({"balanced": len(drawn)} if drawn else {})
    assert results["images"]["curated"] == len(kept)
    assert results["images"]["candidates"] == len(ids) - 1
    assert all(len(row["cluster_path"].split("/")) == 2 for row in [*kept.values(), rejected[ids[asking]]])
    page = (root / "reports/curate/report.html").read_text()
    assert "<td>flowers</td><td>as is</td>" in page
    assert "<td>flowers</td><td>sample k=2</td>" in page


def test_every_image_can_be_explained(mixed):
    root, _ = mixed
    tables = CuratedTables(root / "data/curated/manifest.parquet", root / "data/curated/rejected.parquet")
    pool = read_inputs(root).pool
    answers = [explain(tables, image_id) for image_id in pool["image_id"].to_pylist()]
    kept = read_manifest(tables.manifest)
    assert sum(answer.kept for answer in answers) == len(kept)
    for answer in answers:
        assert answer.scores["entropy"] > 0
        if answer.reason in ("near_duplicate", "retrieved"):
            assert answer.other is not None
            assert answer.other.where in ("kept", "left out")


def test_a_pool_of_seeds_alone_is_taken_as_it_is(small_workspace):
    embed(EmbedConfig(workers=1), small_workspace, 0)
    config = CurateConfig.model_validate({"levels": LEVELS, "seed_sets": {"photos": {"as_is": True}}})
    results = curate(config, small_workspace, 0)
    assert results["origins"] == {"seed": 11}
    assert results["rejected"] == {"evaluation_copy": 1}


def test_without_a_balanced_part_seed_sets_alone_decide(mixed, tmp_path_factory, monkeypatch):
    def table(root, name, key):
        return {
            row["image_id"]: row[key] for row in read_table(root / "data/curated" / name, SCHEMAS[name]).to_pylist()
        }

    asked = {"levels": LEVELS, "seed_sets": SEEDS, "target_images": 0}
    made = {}
    for way, values in {
        "nearest": asked | {"levels": []},
        "clusters": asked | {"seed_sets": SEEDS | {"asking": {"retrieve": "cluster", "min_seeds": 1}}},
    }.items():
        root = tmp_path_factory.mktemp("without") / "workspace"
        shutil.copytree(mixed[0], root, ignore=shutil.ignore_patterns("curated", "reports"))
        with monkeypatch.context() as patch:
            if way == "nearest":
                patch.setattr("components.curation.select.hierarchical_kmeans", None)  # a call would fail
            results = curate(CurateConfig.model_validate(values), root, 0)
        made[way] = table(root, "manifest.parquet", "origin"), table(root, "rejected.parquet", "reason"), results
        page = (root / "reports/curate/report.html").read_text()
        assert "No balanced part" in page
        assert "the rest of the pool" not in page
        assert set(table(root, "manifest.parquet", "cluster_path").values()) == {None} or way == "clusters"
    few = {"asking": {"retrieve": "cluster", "min_seeds": 2}}
    with pytest.raises(CurationError, match="no image is left of 9: the seed sets bring none in; lower"):
        curate(CurateConfig.model_validate(asked | {"seed_sets": few}), root, 0)
    with_sample = table(mixed[0], "manifest.parquet", "origin")
    expected = {image_id: origin for image_id, origin in with_sample.items() if origin != "balanced"}
    kept, rejected, results = made["nearest"]
    assert kept == expected
    reasons = table(mixed[0], "rejected.parquet", "reason")
    reasons |= dict.fromkeys(with_sample.keys() - kept.keys(), "not_sampled")
    assert rejected == {i: "not_retrieved" if why == "not_sampled" else why for i, why in reasons.items()}
    assert results["clusters"] == {}
    kept, rejected, _ = made["clusters"]
    assert set(kept.values()) == {"seed", "retrieved"}
    assert len(kept) + len(rejected) == len(with_sample) + len(reasons) - len(with_sample.keys() & reasons.keys())


def test_a_gate_that_fails_leaves_nothing_behind(small_workspace):
    embed(EmbedConfig(workers=1), small_workspace, 0)
    values = {"levels": LEVELS, "target_images": 8, "gates": {"max_cluster_share": 0.1}}
    with pytest.raises(DatasetError, match=r"after sampling: .*clusters_balanced .*no cluster has more than 10"):
        curate(CurateConfig.model_validate(values), small_workspace, 0)
    assert sorted(path.name for path in (small_workspace / "data").iterdir()) == ["embeddings", "evaluation", "pool"]
    assert not (small_workspace / "reports").exists()
    assert (small_workspace / ".pedigree/data-docs/curated/index.html").exists()
    assert not (small_workspace / ".pedigree/curation").exists()


def test_a_set_far_from_the_last_one_is_stopped_and_the_last_one_stays(
    small_workspace, photos, encode, write_collection
):
    config = CurateConfig.model_validate({"levels": LEVELS, "gates": {"size_ratio": (0.5, 1.2)}})
    embed(EmbedConfig(workers=1), small_workspace, 0)
    curate(config, small_workspace, 0)
    (remembered,) = (small_workspace / ".pedigree/curation").iterdir()
    assert json.loads(remembered.read_text()) == {"photos": 11}
    before = sha256_dir(small_workspace / "data/curated")
    more = [(f"more{i}.png", encode(photo.rotate(90))) for i, photo in enumerate(photos[:6])]
    write_collection(small_workspace / "data/pool", more)
    embed(EmbedConfig(workers=1), small_workspace, 0)
    with pytest.raises(DatasetError, match=r"size_as_before \(.*the set before had 11, .*size_ratio\): off by"):
        curate(config, small_workspace, 0)
    assert sha256_dir(small_workspace / "data/curated") == before
    assert json.loads(remembered.read_text()) == {"photos": 11}
    allowed = config.model_copy(update={"gates": config.gates.model_copy(update={"size_ratio": (0.5, 2.0)})})
    curate(allowed, small_workspace, 0)
    assert json.loads(remembered.read_text())["photos"] > 13


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"seed_sets": {"moon": {"as_is": True}}},
            "curate.seed_sets.moon: no image of such a source; sources .*: photos",
        ),
        ({"seed_sets": {"photos": {"retrieve": "sample"}}}, "all images only ask for images like theirs"),
        ({"gates": {"previous": "nowhere.parquet"}}, "curate.gates.previous: .*nowhere.parquet does not exist"),
        ({"filters": {"max_nsfw": 0.5}}, "curate.filters.max_nsfw needs a score"),
    ],
)
def test_parameters_that_the_pool_cannot_answer(small_workspace, values, told):
    embed(EmbedConfig(workers=1), small_workspace, 0)
    with pytest.raises(CurationError, match=told):
        curate(CurateConfig.model_validate({"levels": LEVELS} | values), small_workspace, 0)


def test_no_picture_shows_what_the_classifier_refused(mixed, monkeypatch):
    root, _ = mixed
    inputs = read_inputs(root)
    shown: list[int] = []
    monkeypatch.setattr(grids.Album, "pool_tile", lambda _, row: shown.append(row) or Image.new("RGB", (112, 112)))
    count = len(inputs.pool)
    nulls = {field.name: pa.nulls(count, field.type) for field in FINDINGS}
    ids = inputs.pool["image_id"].combine_chunks()
    pool = Pool(root / POOL, inputs.pool, ids, pa.table(nulls), inputs.scores["faces"])
    rows = np.arange(count)
    unique = drop_copies(inputs, rows[3:], rows[:0], CONFIG)
    selection = select(inputs, unique.rows, {}, CONFIG, 0)
    refused = rejections(rows[:3], "nsfw", "score 0.9 > 0.5")
    result = Curation(CONFIG, inputs, [("pool", count)], pool, unique, selection, refused, [], "note")
    write_report(result, root, root / "unseen")
    assert set(shown) <= set(rows[3:])
    assert "<h3>nsfw " in (root / "unseen/report.html").read_text()
