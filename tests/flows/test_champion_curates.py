"""A champion that embeds the pool is an exact version in the run's parameters, and its bytes name its embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient

from components.core.registered_weights import WEIGHTS_SHA256_TAG
from components.core.signing import sign_folder
from components.core.storage import sha256_file
from components.curation.embedders import resolve
from components.model.config import ViTConfig
from components.model.export import save_weights
from components.model.vit import VisionTransformer
from components.recipe import Recipe, load_recipe
from flows.git import WorkspaceError
from flows.registered import exact
from flows.workspace import params_text
from tests.flows.repository import PROJECT
from tests.keys import key_variables

EMBEDDER = "{kind: model, weights: models:/curator@champion, preprocessing: {resize_size: 32, crop_size: 28}}"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="module")
def client(root) -> Iterator[MlflowClient]:
    """A registry with two versions of one model, whose weights lie in `root` too."""
    uri = f"sqlite:///{root}/mlflow.db"
    client = MlflowClient(tracking_uri=uri)
    client.create_registered_model("curator")
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in {"MLFLOW_TRACKING_URI": uri, **key_variables(root / "keys")}.items():
            patch.setenv(variable, value)
        for seed in (1, 2):
            torch.manual_seed(seed)
            backbone = VisionTransformer(ViTConfig(dim=24, depth=1, num_heads=2, image_size=28))
            save_weights(root / f"weights-{seed}", backbone, None, {})
            sign_folder(root / f"weights-{seed}")
            tags = {WEIGHTS_SHA256_TAG: sha256_file(root / f"weights-{seed}" / "model.safetensors")}
            client.create_model_version("curator", str(root / f"weights-{seed}"), tags=tags)
        yield client


def test_the_champion_of_the_moment_is_an_input_of_the_run(client, root):
    recipe = load_recipe(PROJECT, "tiny-cpu", [f"embed.embedder={EMBEDDER}", f"embed.semantic={EMBEDDER}"])
    digests = []
    for version in ("1", "2"):
        client.set_registered_model_alias("curator", "champion", version)
        text = params_text(root, exact(recipe, client))  # what the run's params.yaml says
        section = yaml.safe_load(text)["embed"]
        assert section["embedder"]["weights"] == section["semantic"]["weights"] == f"models:/curator/{version}"
        config = Recipe.model_validate(yaml.safe_load(text)).embed
        assert config.semantic is not None
        resolved = resolve(config.semantic, root, "embed.semantic")
        local = config.semantic.model_copy(update={"weights": f"weights-{version}"})
        assert resolved.digest == resolve(local, root).digest  # of the bytes, wherever they lie
        digests.append(resolved.digest)
    assert digests[0] != digests[1]


def test_the_champion_teaches_as_an_exact_version(client, root):
    client.set_registered_model_alias("curator", "champion", "2")
    recipe = load_recipe(PROJECT, "tiny-cpu", ["distill.teacher_weights=models:/curator@champion"])
    text = params_text(root, exact(recipe, client))
    assert yaml.safe_load(text)["distill"]["teacher_weights"] == "models:/curator/2"
    recipe = load_recipe(PROJECT, "tiny-cpu", ["distill.teacher_weights=models:/curator@best"])
    with pytest.raises(WorkspaceError, match=r"^distill\.teacher_weights: models:/curator@best names no registered"):
        exact(recipe, client)


def test_a_teacher_that_is_not_there_is_told_before_the_first_stage(client, root, tmp_path):
    recipe = load_recipe(PROJECT, None, [f"distill.teacher_weights={tmp_path}/none"])
    with pytest.raises(WorkspaceError, match=r"distill\.teacher_weights: .*/none is no folder"):
        exact(recipe, client)


@pytest.mark.parametrize("key", ["embedder", "semantic"])
def test_an_alias_that_nothing_has_is_named(client, key):
    recipe = load_recipe(PROJECT, "tiny-cpu", [f"embed.{key}={EMBEDDER.replace('@champion', '@best')}"])
    with pytest.raises(WorkspaceError, match=rf"^embed\.{key}\.weights: models:/curator@best names no registered"):
        exact(recipe, client)
