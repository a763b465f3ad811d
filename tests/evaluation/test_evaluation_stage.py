import csv
import hashlib
import io
import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from skimage import data as photographs

from components.core.errors import DatasetError
from components.core.storage import sha256_dir
from components.data.evalset import read_evalset, write_config
from components.data.evalset_config import EvalsetConfig
from components.data.evalsets import read_named_set, read_sets
from components.data.evaluation_set import read_evaluation_set
from components.data.manifest import POOL_SCHEMA, write_manifest
from components.data.shards import ShardWriter
from components.evaluation.config import EvaluateConfig, InstanceConfig, KnnConfig, LinearConfig
from components.evaluation.features import Augmentation, EvaluationImages
from components.evaluation.stage import run
from components.model.config import Preprocessing, ViTConfig
from components.model.export import WeightsError, load_backbone, save_weights
from components.model.preprocessing import center_crop
from components.model.vit import VisionTransformer

CONFIG = EvaluateConfig(
    models={"teacher": "models/adapted", "small": "models/students/small"},
    preprocessing=Preprocessing(resize_size=36, crop_size=32),
    batch_size=16,
    num_workers=0,
    knn=KnnConfig(num_neighbors=(3, 200), reported=3),
    linear=LinearConfig(c_grid=(0.1, 10.0), max_iterations=100, tolerance=1e-4),
    instance=InstanceConfig(num_queries=20),
)


def tiles(per_class=12):
    """(label, split, image) of real photographs: every third tile is a test image."""
    for name in ("astronaut", "coffee", "brick"):
        photo = Image.fromarray(np.asarray(getattr(photographs, name)())).convert("RGB")
        for number in range(per_class):
            left, top = 90 * (number % 4), 90 * (number // 4)
            tile = photo.crop((left, top, left + 64, top + 48))
            yield name, "test" if number % 3 == 0 else "train", tile


def write_set(root, items, source="sample", snapshot="0123456789ab"):
    folder = root / "data" / "evaluation" / source / snapshot
    encoded = []
    for label, split, image in items:
        file = io.BytesIO()
        image.save(file, "PNG")
        encoded.append((hashlib.sha256(file.getvalue()).hexdigest(), file.getvalue(), label, split))
    facts = {"format": "PNG", "width": 64, "height": 48, "source": source, "source_uri": "test", "license": "CC0"}
    rows = []
    with ShardWriter(folder, 10**8) as writer:
        for image_id, content, label, split in sorted(encoded, key=lambda item: item[0]):
            place = zip(("shard", "offset", "length"), writer.add(image_id, "png", content), strict=True)
            rows.append({"image_id": image_id, **dict(place), "label": label, "split": split, **facts})
    write_manifest(pa.Table.from_pylist(rows, schema=POOL_SCHEMA), folder / "manifest.parquet")


@pytest.fixture
def workspace(tmp_path):
    torch.manual_seed(1)
    backbone = VisionTransformer(ViTConfig(patch_size=8, dim=48, depth=2, num_heads=3, image_size=32))
    save_weights(tmp_path / "models" / "students" / "small", backbone, None, {})
    return tmp_path


def test_labeled_set(workspace):
    write_set(workspace, tiles())
    before = torch.random.get_rng_state()
    result = run(CONFIG, workspace, 0, "small")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["num_train"], result["num_test"], result["num_classes"]) == (24, 12, 3)
    for values in (result, result["random"], result["descriptor"]):
        assert 0 <= values["knn_top1"] == values["knn_top1_k3"] <= 1
        assert {"linear_top1", "effective_rank", "knn_top1_k200"} <= set(values)
    assert result["descriptor"]["linear_top1"] > 0.8  # colors tell these three photographs apart
    difference = result["minus_random"]["knn_top1"]
    assert difference["mean"] == pytest.approx(result["knn_top1"] - result["random"]["knn_top1"])
    assert difference["low"] <= difference["mean"] <= difference["high"]

    folder = workspace / "reports" / "evaluate" / "small"
    assert sorted(path.name for path in folder.iterdir()) == [
        "by_image.parquet",
        "comparison.csv",
        "deciding.csv",
        "neighbors.jpg",
        "pca.jpg",
        "report.html",
        "sets",
    ]
    assert [path.name for path in (folder / "sets").iterdir()] == ["verdicts.txt"]  # DVC warns of an empty folder
    told = (folder / "sets/verdicts.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in told] == ["sample", "sample"]  # against random weights and the descriptor
    rows = list(csv.DictReader((folder / "comparison.csv").open()))
    assert {row["model"] for row in rows} == {"small", "random", "descriptor"}
    assert float(next(r["value"] for r in rows if r["metric"] == "linear_top1")) == result["linear_top1"]
    bars = {row["score"]: float(row["value"]) for row in csv.DictReader((folder / "deciding.csv").open())}
    expected = {"small": result, "random": result["random"], "descriptor": result["descriptor"]}
    assert bars == {f"sample knn_top1: {name}": values["knn_top1"] for name, values in expected.items()}
    page = (folder / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") >= 2
    assert "sample" in page
    assert "small is better than random" in page or "no better and no worse than random" in page
    assert not re.search(r"https?://", page)
    assert re.search(r"<small>\(\d\.\d{3} to \d\.\d{3}\)</small>", page)  # of accuracies

    values = pq.read_table(folder / "by_image.parquet")
    for model, metrics in (("small", result), ("random", result["random"])):
        for metric in ("knn_top1", "linear_top1"):
            chosen = pc.and_(pc.equal(values["model"], model), pc.equal(values["metric"], metric))
            assert pc.mean(values.filter(chosen)["value"]).as_py() == pytest.approx(metrics[metric])
    test_ids = read_evaluation_set(workspace / "data" / "evaluation")
    expected = test_ids.images["image_id"].take(pa.array(test_ids.labels.test)).to_pylist()
    assert values.filter(chosen)["image_id"].to_pylist() == expected

    first = sha256_dir(folder)
    shutil.rmtree(workspace / ".pedigree")  # the tokens, so that they are computed again
    assert run(CONFIG, workspace, 0, "small") == result
    assert sha256_dir(folder) == first


def test_set_without_labels(workspace, caplog):
    write_set(workspace, ((None, None, image) for _, _, image in tiles()))
    result = run(CONFIG, workspace, 0, "small")
    assert "no labels" in caplog.text
    assert result["num_images"] == 36
    assert "knn_top1" not in result
    assert 0 < result["instance_recall_at_1"] <= result["instance_map"] <= 1
    by_chance = (1 / np.arange(1, 37)).mean()
    assert result["descriptor"]["instance_map"] > 2 * by_chance
    assert (workspace / "reports" / "evaluate" / "small" / "neighbors.jpg").is_file()


def test_the_champion_is_compared_on_the_same_images(workspace, monkeypatch):
    write_set(workspace, tiles())
    asked = []
    folder = workspace / "models" / "students" / "small"
    monkeypatch.setattr(
        "components.evaluation.stage.download_weights", lambda uri, root: asked.append((uri, root)) or folder
    )
    config = CONFIG.model_copy(update={"champions": {"small": "models:/tiny/3"}})
    result = run(config, workspace, 0, "small")
    assert asked == [("models:/tiny/3", workspace)]
    assert "champion: models:/tiny/3" in (workspace / "reports/evaluate/small/report.html").read_text()
    assert result["champion"]["knn_top1"] == result["knn_top1"]  # it is the same model here
    same = result["minus_champion"]["linear_top1"]
    assert same["mean"] == 0.0
    assert 0 < same["high"] == -same["low"] < 0.5  # so few images do not say that two models are equal


def test_a_student_is_beside_its_teacher_whose_tokens_are_not_computed_again(workspace):
    write_set(workspace, tiles())
    torch.manual_seed(2)
    shape = ViTConfig(patch_size=8, dim=24, depth=1, num_heads=2, image_size=32)
    folders = {name: workspace / path for name, path in CONFIG.models.items()}
    save_weights(folders["teacher"], VisionTransformer(shape), None, {})
    backbone = load_backbone(folders["small"])
    save_weights(folders["small"], backbone, None, {"teacher_sha256": sha256_dir(folders["teacher"])})
    alone = run(CONFIG, workspace, 0, "teacher")
    assert "small" not in alone
    cache = workspace / ".pedigree/cache/tokens"
    before = {path: path.stat().st_mtime_ns for path in cache.glob("*/*.npy")}
    result = run(CONFIG, workspace, 0, "small")
    assert result["teacher"] == {key: alone[key] for key in result["teacher"]}
    assert set(result["minus_teacher"]) == {"knn_top1", "linear_top1"}
    after = {path: path.stat().st_mtime_ns for path in cache.glob("*/*.npy")}
    assert before.items() <= after.items()
    assert len(after) == len(before) + 4  # class and mean tokens of the student and of its random weights
    save_weights(folders["small"], backbone, None, {"teacher_sha256": "0" * 64})
    assert "teacher" not in run(CONFIG, workspace, 0, "small")


def test_no_set(workspace):
    with pytest.raises(DatasetError, match="no evaluation images"):
        run(CONFIG, workspace, 0, "small")


def test_crop_that_does_not_fit(workspace):
    write_set(workspace, tiles())
    with pytest.raises(
        DatasetError, match=r"preprocessing\.crop_size 30 is not a multiple of 8, the patch size of small"
    ):
        run(
            CONFIG.model_copy(update={"preprocessing": Preprocessing(resize_size=36, crop_size=30)}),
            workspace,
            0,
            "small",
        )
    assert not (workspace / "reports").exists()


def test_missing_model(workspace):
    write_set(workspace, tiles())
    with pytest.raises(WeightsError, match="models/adapted"):
        run(CONFIG, workspace, 0, "teacher")


def test_empty_test_split(workspace):
    write_set(workspace, ((label, "train", image) for label, _, image in tiles()))
    with pytest.raises(DatasetError, match=r"none with \['test'\]"):
        read_evaluation_set(workspace / "data" / "evaluation")


def test_class_with_a_single_image_is_left_out_and_named(workspace, caplog):
    lonely = Image.fromarray(photographs.chelsea()[:48, :64])
    write_set(workspace, [*tiles(), ("chelsea", "test", lonely)])
    labels = read_evaluation_set(workspace / "data" / "evaluation").labels
    assert len(labels.test) == 12
    assert "no train image of chelsea" in caplog.text


def test_one_class_measures_no_classes(workspace, caplog):
    write_set(workspace, [item for item in tiles() if item[0] == "brick"])
    assert read_evaluation_set(workspace / "data" / "evaluation").labels is None
    assert "do not measure classes" in caplog.text


def test_training_monitors_several_sets_as_one(workspace, caplog):
    every = list(tiles())
    root = workspace / "data" / "evaluation"
    write_set(workspace, every[:24])
    assert read_evaluation_set(root).labels is not None
    assert not caplog.records
    write_set(workspace, every[24:32], "bricks")
    write_set(workspace, ((None, None, image) for _, _, image in every[32:]), "plain")
    images = read_evaluation_set(root)
    assert "bricks, sample are measured as one set" in caplog.text
    assert "4 images without label (plain) are not in the measures of classes" in caplog.text
    measured = np.concatenate([images.labels.train, images.labels.test])
    sources = images.images.take(pa.array(measured))["source"].to_pylist()
    assert (sources.count("sample"), sources.count("bricks"), len(sources)) == (24, 8, 32)


def test_later_snapshots_of_a_source_are_one_set(workspace):
    every = list(tiles())
    root = workspace / "data" / "evaluation"
    write_set(workspace, every[:24])
    first = read_named_set(root, "sample")
    write_set(workspace, every[24:], snapshot="ba9876543210")
    both = read_named_set(root, "sample")
    assert (first.name, both.name) == ("sample", "sample")
    assert first.version != both.version != read_evalset(root / "sample" / "ba9876543210").version
    assert (len(first.train), len(both.train), len(both.test)) == (16, 24, 12)
    whole = workspace / "whole"
    write_set(whole, every)
    expected = read_named_set(whole / "data" / "evaluation", "sample")
    images = (EvaluationImages(one.images, CONFIG.preprocessing) for one in (both, expected))
    assert all(torch.equal(a, b) for a, b in zip(*images, strict=True))
    assert [one.name for one in read_sets(root)] == ["sample"]


def test_the_main_set_stays_when_others_are_added(workspace):
    every = list(tiles())
    root = workspace / "data" / "evaluation"
    write_set(workspace, every, "sample")
    write_set(workspace, ((None, None, image) for _, _, image in every), "a-plain-one")
    write_set(workspace, every, "added")
    write_config(root / "added" / "0123456789ab", EvalsetConfig(task="classification", license="CC0-1.0"))
    assert [one.name for one in read_sets(root)] == ["sample", "a-plain-one", "added"]


def test_split_by_hash_where_none_is_given(workspace):
    write_set(workspace, ((label, None, image) for label, _, image in tiles()))
    images = read_evaluation_set(workspace / "data" / "evaluation")
    ids = images.images["image_id"].to_pylist()
    assert images.labels.test.tolist() == [i for i, name in enumerate(ids) if int(name[:8], 16) % 5 == 0]
    assert len(images.labels.train) + len(images.labels.test) == 36


def test_crops_keep_the_aspect_ratio():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    crop = np.array(center_crop(image, Preprocessing(resize_size=64, crop_size=48)))
    assert crop.shape == (48, 48, 3)
    assert (crop == [0, 0, 255]).all()


def test_views_depend_on_seed_and_place_only(workspace):
    write_set(workspace, tiles())
    images = read_evaluation_set(workspace / "data" / "evaluation")
    views = [EvaluationImages(images, CONFIG.preprocessing, Augmentation(CONFIG.instance, seed)) for seed in (0, 0, 1)]
    assert torch.equal(views[0][5], views[1][5])
    assert not torch.equal(views[0][5], views[2][5])
