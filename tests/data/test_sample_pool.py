import hashlib
import json
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.core.storage import sha256_dir
from components.data.ingest import ingest
from components.data.ingest_config import IngestRequest
from components.data.manifest import QUARANTINE_SCHEMA, read_collection, read_table
from components.data.sample_pool import COPIES, LEAKS, SAMPLE_LICENSE, TINY, build_sample_pool, load_photographs
from components.data.shards import ShardReader, decode_image

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
BROKEN = {"truncated": 3, "not_an_image": 2, "animated": 1, "too_many_pixels": 1, "unsupported_format": 1}


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "sample"
    build_sample_pool(folder)
    return folder


@pytest.fixture(scope="module")
def truth(sample: Path) -> dict:
    return json.loads((sample / "ground_truth.json").read_text())


@pytest.fixture(scope="module")
def collections(sample: Path) -> Path:
    root = sample.parent
    shared = {
        "name": "sample",
        "license": SAMPLE_LICENSE,
        "pool": root / "pool",
        "evaluation": root / "evaluation",
        "docs_folder": root / "docs",
    }
    ingest(IngestRequest.parse(source=str(sample / "pool"), **shared))
    ingest(IngestRequest.parse(source=str(sample / "evaluation"), as_evaluation=True, **shared))
    return root


def test_the_sample_is_the_same_every_time(sample: Path, tmp_path: Path) -> None:
    build_sample_pool(tmp_path / "again", seed=0)
    assert sha256_dir(tmp_path / "again") == sha256_dir(sample)


def test_the_pool_has_a_long_tail_and_the_evaluation_set_many_classes(sample: Path) -> None:
    pool = Counter(path.parent.name for path in (sample / "pool").rglob("*.*"))
    assert 2_000 <= sum(pool.values()) <= 3_500
    assert max(pool.values()) > 10 * min(pool.values())
    splits = {
        split: Counter(p.parent.name for p in (sample / "evaluation" / split).rglob("*.*"))
        for split in ("train", "test")
    }
    assert set(splits["train"]) == set(splits["test"]) <= set(pool)
    assert len(splits["train"]) >= 10
    assert sum(splits["train"].values()) + sum(splits["test"].values()) >= 500


def test_views_have_moderate_sizes(sample: Path) -> None:
    sizes = [Image.open(path).size for path in (sample / "pool").rglob("[0-9]*.jpg")]
    assert min(min(size) for size in sizes) >= 56
    assert max(max(size) for size in sizes) <= 180


def overlap(one: list[int], other: list[int]) -> int:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0, width) * max(0, height)


def test_no_evaluation_pixel_is_in_the_pool_and_no_train_pixel_in_test(sample: Path, truth: dict) -> None:
    regions: dict[tuple[str, str], list[list[int]]] = {}
    for path, (photograph, *box) in truth["boxes"].items():
        part = "pool" if path.startswith("pool/") else path.split("/")[1]
        regions.setdefault((photograph, part), []).append(box)
    for photograph in {name for name, _ in regions}:
        for one, other in (("pool", "train"), ("pool", "test"), ("train", "test")):
            pairs = product(regions.get((photograph, one), []), regions.get((photograph, other), []))
            assert not any(overlap(a, b) for a, b in pairs), (photograph, one, other)
    # The boxes say the truth: every ordinary file is the view of its box.
    photographs = load_photographs()
    generator = np.random.default_rng(1)
    paths = sorted(path for path in truth["boxes"] if (sample / path).exists())
    for path in generator.choice(paths, 200, replace=False):
        name, *box = truth["boxes"][path]
        view = Image.open(sample / path)
        expected = photographs[name].crop(box).resize(view.size, Image.Resampling.BICUBIC)
        difference = np.asarray(view, dtype=float) - np.asarray(expected, dtype=float)
        assert np.abs(difference).mean() < 8, path


def test_views_of_one_scale_overlap_little(truth: dict) -> None:
    groups: dict[tuple, list[list[int]]] = {}
    for path, (photograph, *box) in truth["boxes"].items():
        if path.startswith("pool/"):
            groups.setdefault((photograph, box[2] - box[0], box[3] - box[1]), []).append(box)
    for (_, width, height), boxes in groups.items():
        for number, box in enumerate(boxes):
            assert all(overlap(box, other) <= 0.31 * width * height for other in boxes[:number])


def test_what_was_planted_is_what_the_ground_truth_says(sample: Path, truth: dict) -> None:
    counts = Counter(item["kind"] for item in truth["planted"])
    forms = {"grayscale": 1, "alpha": 1, "exif_rotation": 1}
    assert counts == COPIES | LEAKS | {"tiny": TINY} | forms | BROKEN
    for item in truth["planted"]:
        data = (sample / item["path"]).read_bytes()
        if item["kind"] in BROKEN:
            continue
        image = decode_image(data)
        assert (max(image.size) < 16) == (item["kind"] == "tiny")
        if item["of"] is None:
            continue
        assert item["of"].startswith("evaluation/") == item["kind"].startswith("leak_")
        original = (sample / item["of"]).read_bytes()
        assert (data == original) == item["kind"].endswith("exact")
        if not item["kind"].endswith("exact") and item["kind"] != "tiny":
            copy = np.asarray(image.resize(decode_image(original).size), dtype=float)
            assert np.abs(copy - np.asarray(decode_image(original), dtype=float)).mean() < 15


def test_ingest_rejects_every_broken_file_and_loses_no_good_one(sample: Path, truth: dict, collections: Path) -> None:
    pool = read_collection(collections / "pool")
    rejected = read_table(next((collections / "pool").rglob("rejected.parquet")), QUARANTINE_SCHEMA).to_pylist()
    by_path = {"pool/" + row["source_uri"]: row for row in rejected}
    broken = {item["path"]: item["kind"] for item in truth["planted"] if item["kind"] in BROKEN}
    assert {path: row["reason"] for path, row in by_path.items() if row["reason"] != "exact_copy"} == broken
    # Of two files with the same bytes, one is in.
    pairs = [{item["path"], item["of"]} for item in truth["planted"] if item["kind"] == "exact"]
    copies = {path for path, row in by_path.items() if row["reason"] == "exact_copy"}
    assert len(copies) == len(pairs)
    assert all(len(pair & copies) == 1 for pair in pairs)
    files = {path.relative_to(sample).as_posix() for path in (sample / "pool").rglob("*.*")}
    expected = {hashlib.sha256((sample / path).read_bytes()).hexdigest() for path in files - set(broken)}
    assert set(pool["image_id"].to_pylist()) == expected
    assert pool.num_rows == len(files) - len(broken) - len(pairs)


def test_the_evaluation_set_keeps_labels_and_splits(sample: Path, collections: Path) -> None:
    table = read_collection(collections / "evaluation").to_pylist()
    files = list((sample / "evaluation").rglob("*.jpg"))
    assert len(table) == len(files)
    expected = {hashlib.sha256(p.read_bytes()).hexdigest(): (p.parent.parent.name, p.parent.name) for p in files}
    assert {row["image_id"]: (row["split"], row["label"]) for row in table} == expected


def test_odd_forms_come_out_upright_and_over_white(truth: dict, sample: Path, collections: Path) -> None:
    photographs = load_photographs()
    reader = ShardReader(collections / "pool")
    rows = {row["source_uri"]: row for row in read_collection(collections / "pool").to_pylist()}
    originals = {path: box for path, box in truth["boxes"].items() if not (sample / path).exists()}
    assert len(originals) == 3  # their places were taken by the odd forms
    for item in truth["planted"]:
        if item["kind"] != "exif_rotation":
            continue
        row = rows[item["path"].removeprefix("pool/")]
        image = decode_image(reader.read(row["shard"], row["offset"], row["length"]))
        assert image.size == (row["width"], row["height"])
        distances = []
        for name, *box in originals.values():
            view = photographs[name].crop(box).convert("RGB").resize(image.size)
            distances.append(np.abs(np.asarray(view, dtype=float) - np.asarray(image, dtype=float)).mean())
        assert min(distances) < 8
