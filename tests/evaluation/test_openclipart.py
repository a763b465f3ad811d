"""Pictures that are no photographs, with palettes and transparency: 150 of openclipart-png, in the public domain.

`openclipart.tar.xz` has 30 of each of five classes, made smaller; `python -m tests.benchmarks.openclipart` has all.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

from components.data.evalset import Evalset, read_evalset
from components.data.evalset_add import add_evalset
from components.data.evalset_config import EvalsetRequest
from components.evaluation.compare import compare
from components.evaluation.config import KnnConfig
from components.evaluation.settings import settings_for
from components.model.config import ViTConfig
from components.model.export import save_weights
from components.model.vit import VisionTransformer
from components.recipe import load_recipe
from tests.benchmarks import openclipart

PACKED = Path(__file__).with_name("openclipart.tar.xz")
CLASSES = ("animals", "buildings", "food", "plants", "transportation")
CONFIG = load_recipe(Path(), "tiny-cpu").evaluate


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    with tarfile.open(PACKED) as packed:
        packed.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def evalset(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Evalset:
    folder = tmp_path_factory.mktemp("set")
    assert openclipart.write_set(pictures, folder / "in", None) == len(CLASSES)
    request = {"source": folder / "in", "name": "clips", "evaluation": folder / "evaluation"}
    made = add_evalset(EvalsetRequest.parse(**request, docs_folder=folder / "docs"))
    return read_evalset(made.snapshot)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    shape = ViTConfig(patch_size=6, dim=24, depth=2, num_heads=2, image_size=60, layer_scale_init=1.0)
    folder = tmp_path_factory.mktemp("weights") / "model"
    save_weights(folder, VisionTransformer(shape), None, {})
    return str(folder)


def test_copies_and_rests_are_left_out_and_told(pictures: Path, capsys: pytest.CaptureFixture[str]):
    with Image.open(next(pictures.rglob("*.png"))) as image:
        assert (image.mode, "transparency" in image.info) == ("P", True)
    found = openclipart.usable(pictures)
    assert {name: len(paths) for name, paths in found.items()} == dict.fromkeys(CLASSES, 30)
    assert "left out: {'copies': 2, 'too large': 0}" in capsys.readouterr().out


def test_the_table(evalset: Evalset, weights: str, tmp_path: Path):
    lines = openclipart.table(evalset, [weights], CONFIG, tmp_path / "tokens").splitlines()
    assert lines[0].startswith("| model | knn_top1 | linear_top1 | probe_top1 | knn_top1_1shot |")
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {weights}", "| random", "| descriptor"]


def test_neighbors_are_those_of_scikit_learn(evalset: Evalset, weights: str, tmp_path: Path):
    """The weighted vote of both: softmax of cosines by temperature, among ten neighbors."""
    config = CONFIG.model_copy(update={"knn": KnnConfig(num_neighbors=(10,), reported=10)})
    model = openclipart.load(weights, evalset, config.preprocessing)
    models = [model, *openclipart.baselines(model, 0)]
    found = compare(evalset, models, ("knn",), settings_for(evalset, config), tmp_path / "tokens", 0)
    labels = evalset.images.labels
    for name, scores in found.scores.items():
        features = normalize(found.tokens[name].features.astype(np.float64))
        voters = KNeighborsClassifier(10, weights=lambda far: np.exp((1 - far**2 / 2) / 0.07), algorithm="brute")
        voters.fit(features[labels.train], labels.targets[labels.train])
        expected = voters.score(features[labels.test], labels.targets[labels.test])
        assert scores.metrics["knn_top1"] == pytest.approx(expected)
    chance = 1 / len(CLASSES)
    assert found.scores["descriptor"].metrics["knn_top1"] > 1.5 * chance
