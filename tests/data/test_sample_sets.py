"""The sample's evaluation sets: right for the check, apart from the pool, and too hard for a color histogram."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from skimage import data
from skimage.color import rgb2hsv

from components.core.storage import sha256_dir
from components.data import sample_pool, sample_sets
from components.data.evalset import read_evalset
from components.data.evalset_check import check_set
from components.data.sample_sets import MATERIALS, SIDE, build_sample_sets
from tests.data.evalset_folders import add

pytestmark = pytest.mark.usefixtures("quick_judge")
photographs = cache(sample_pool.load_photographs)
TASKS = ("classification", "segmentation", "depth", "retrieval")


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "sets"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_sets, "load_photographs", photographs)
        build_sample_sets(folder)
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_each_set_is_small_and_right(sample: Path, task: str) -> None:
    made = add(sample / task, task)
    assert list(made.notes) == (["folder names are no labels in a set of task retrieval"] * (task == "retrieval"))
    assert 100 < sum(made.images.values()) < 300
    check_set(made.snapshot, sample.parent / "docs")
    found = read_evalset(made.snapshot)
    assert set(found.images.images["width"].to_pylist()) == {SIDE}
    if task == "depth":
        depths = [found.depth(index) for index in range(len(found.images.images))]
        assert np.nanmin(depths) == pytest.approx(2.1347, abs=1e-3)  # 994.978 * 0.193001 / (58.872 + 31.086)
        assert np.nanmax(depths) < 4.2
        assert 0.05 < np.isnan(depths).mean() < 0.15
    if task == "retrieval":
        assert {(len(query.easy), len(query.hard), len(query.junk)) for query in found.queries} == {(2, 3, 2)}


def test_no_set_depends_on_the_region_of_the_pool(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    painted = {}
    for name, photo in photographs().items():
        painted[name] = photo.copy()
        box = (0, 0, sample_pool.pool_width(name, photo) - 1, photo.height)
        ImageDraw.Draw(painted[name]).rectangle(box, fill=255 if photo.mode == "L" else (255, 0, 255))
    monkeypatch.setattr(sample_sets, "load_photographs", lambda: painted)
    build_sample_sets(tmp_path / "again")
    for task in TASKS:
        assert sha256_dir(tmp_path / "again" / task) == sha256_dir(sample / task)


def test_the_masks_are_exact(tmp_path: Path) -> None:
    shades = {name: 40 * number + 20 for number, name in enumerate(MATERIALS)}
    flat = {name: Image.new("RGB", (400, 300), (shade, shade, shade)) for name, shade in shades.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_sets, "MATERIAL_LIGHT", (1.0, 1.0))
        patch.setattr(sample_sets, "TRAIN_SCENES", 4)
        patch.setattr(sample_sets, "TEST_SCENES", 0)
        sample_sets._segmentation(tmp_path, flat, np.random.default_rng(0))
    for number in range(4):
        pixels = np.asarray(Image.open(tmp_path / f"images/train/{number:03d}.jpg").convert("L")).astype(float)
        mask = np.asarray(Image.open(tmp_path / f"targets/train/{number:03d}.png"))
        assert 2 <= len(np.unique(mask)) <= 4
        assert np.abs(pixels - np.array(list(shades.values()))[mask]).max() < 20  # JPEG; shades differ by 40


def test_the_depth_is_of_the_left_photograph() -> None:
    left, right, disparity = data.stereo_motorcycle()
    y, x = np.nonzero(sample_sets.motorcycle_depth())
    there = np.round(x - disparity[y, x]).astype(int)
    y, x, there = y[there >= 0], x[there >= 0], there[there >= 0]
    assert np.abs(left[y, x].astype(float) - right[y, there]).mean() < 10  # 47 with the other sign


def test_a_color_histogram_is_not_enough(sample: Path) -> None:
    def load(split: str) -> tuple[np.ndarray, list[str]]:
        paths = sorted((sample / "classification/images" / split).rglob("*.jpg"))
        return np.stack([histogram(path) for path in paths]), [path.parent.name for path in paths]

    def histogram(path: Path) -> np.ndarray:
        colors = rgb2hsv(np.asarray(Image.open(path))).reshape(-1, 3)
        shares = np.sqrt(np.histogramdd(colors, bins=(8, 4, 4), range=[(0, 1)] * 3)[0].ravel())
        return shares / np.linalg.norm(shares)

    (train, known), (test, labels) = load("train"), load("test")
    nearest = np.argsort(-test @ train.T, axis=1)[:, :10]
    guesses = [Counter(known[index] for index in row).most_common(1)[0][0] for row in nearest]
    accuracy = np.mean([guess == label for guess, label in zip(guesses, labels, strict=True)])
    assert 1 / 8 - 0.05 < accuracy < 0.35  # of eight classes
