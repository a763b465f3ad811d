"""Pretrain, adapt and distill as `python -m components` calls them, on real photographs."""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file, save_file

from components.adaptation import stage as adaptation
from components.adaptation.config import AdaptConfig
from components.core.config import ConfigError, validate
from components.core.errors import EngineError, known
from components.core.registered_weights import WEIGHTS_SHA256_TAG
from components.core.signing import sign_folder
from components.core.storage import sha256_file
from components.distillation import stage as distillation
from components.distillation.config import DistillConfig
from components.model.export import load_backbone, to_dinov2
from components.model.vit import VisionTransformer, resample_positions
from components.objective.config import GramConfig
from components.pretraining import stage as pretraining
from components.pretraining.config import PretrainConfig
from components.training import delivery, pictures
from components.training.loss_table import read_rows
from components.training.parallelize import EXIT_INTERRUPTED, launch
from tests.keys import key_variables
from tests.training.jobs import broken, load_heads, write_labeled

ONE_STEP = {
    "optimizer": {"warmup_steps": 0, "freeze_last_layer_steps": 0},
    "teacher": {"temp_warmup_steps": 0},
}
RUN = """
import json, logging, sys
from pathlib import Path
import torch
from components.pretraining.config import PretrainConfig
from components.pretraining.stage import run
logging.basicConfig(level=logging.INFO)
torch.set_num_threads(1)
run(PretrainConfig.model_validate(json.loads(sys.argv[1])), Path(sys.argv[2]), seed=0)
"""


def digest(folder: Path) -> list[str]:
    return [sha256_file(folder / name) for name in ("model.safetensors", "heads.safetensors")]


def read_losses(path: Path) -> list[float]:
    with path.open(newline="") as file:
        return [float(row["loss_total"]) for row in csv.DictReader(file)]


def test_pretrain_adapt_distill(workspace, curated, pretrain_values, tiny, backbone):
    config = validate(PretrainConfig, pretrain_values(), "test")
    figures = pretraining.run(config, workspace, seed=0)
    assert (figures["steps"], figures["images_seen"]) == (6, 48)
    folder = workspace / "models" / "pretrained"
    provenance = json.loads((folder / "config.json").read_text())["provenance"]
    assert provenance["dataset_sha256"] == hashlib.sha256((curated / "manifest.parquet").read_bytes()).hexdigest()
    assert (provenance["seed"], provenance["steps"], provenance["images_seen"]) == (0, 6, 48)
    assert provenance["config"] == config.model_dump(mode="json")
    report = workspace / "reports" / "pretrain"
    assert len(read_losses(report / "loss.csv")) == 6
    for name in ("crops.jpg", "pca.jpg"):
        assert min(Image.open(report / name).size) > 100
    assert list((workspace / ".pedigree" / "checkpoints").iterdir()) == []  # deleted: the outputs stand

    larger = tiny(
        steps=2, crops={"global_size": 48, "local_size": 24, "num_local": 2}, teacher={"temp_warmup_steps": 0}
    )
    adaptation.run(validate(AdaptConfig, larger, "test"), workspace, seed=0)
    adapted = workspace / "models" / "adapted"
    assert json.loads((adapted / "config.json").read_text())["provenance"]["initial_weights_sha256"]
    assert digest(adapted) != digest(folder)
    assert load_backbone(adapted).config.model_dump() == config.backbone.model_dump() | {"image_size": 48}
    # A few steps from the pretrained weights, not from new ones.
    start, end = (load_backbone(path).pos_embed.detach() for path in (folder, adapted))
    start = resample_positions(start, config.backbone, 6, 6)
    assert 0 < float((start - end).abs().max()) < 0.2 * float(start.abs().max())

    students = {"small": {"backbone": backbone | {"dim": 16, "image_size": None}}, "other": {"backbone": backbone}}
    distilled = validate(DistillConfig, tiny(students=students), "test")
    before = digest(adapted)
    distillation.run(distilled, workspace, seed=0, name="tiny")
    assert digest(adapted) == before
    small = workspace / "models" / "students" / "small"
    assert (load_backbone(small).config.dim, load_backbone(small).config.image_size) == (16, 32)  # its global crops
    assert {n: h.config for n, h in load_heads(small).items()} == {n: h.config for n, h in load_heads(adapted).items()}
    assert (workspace / distillation.REPORTS / "small" / "loss.csv").exists()
    provenance = json.loads((small / "config.json").read_text())["provenance"]
    assert set(provenance["config"]["students"]) == {"small"}
    assert provenance["teacher_sha256"]

    patch16 = tiny(students={"big": {"backbone": backbone | {"patch_size": 16}}})
    with pytest.raises(ConfigError, match="patch_size is 16, the teacher's is 8"):
        distillation.run(validate(DistillConfig, patch16, "test"), workspace, seed=0, name="tiny")


def test_published_weights_stand_still_while_new_heads_warm_up(workspace, pretrain_values, tmp_path):
    values = pretrain_values(steps=4)
    torch.manual_seed(1)
    start = to_dinov2(VisionTransformer(validate(PretrainConfig, values, "test").backbone))
    save_file(start, tmp_path / "published.safetensors")
    sha256 = sha256_file(tmp_path / "published.safetensors")
    init = {"weights": str(tmp_path / "published.safetensors"), "sha256": sha256}
    with pytest.raises(ConfigError, match=r"new heads, which would ruin them at once: set optimizer\.freeze_back"):
        validate(PretrainConfig, values | {"init": init}, "test")
    folder = workspace / "models" / "pretrained"
    for frozen, moves in ((4, False), (2, True)):
        optimizer = values["optimizer"] | {"freeze_backbone_steps": frozen, "freeze_last_layer_steps": 0}
        config = validate(PretrainConfig, values | {"init": init, "optimizer": optimizer}, "test")
        pretraining.run(config, workspace, seed=0)
        end = load_file(folder / "model.safetensors")
        assert all(torch.equal(start[name], end[name]) for name in start) == (not moves)
        assert json.loads((folder / "config.json").read_text())["provenance"]["initial_weights_sha256"] == sha256
        lengths = load_heads(folder)["dino"].last_layer.weight_g
        assert not torch.equal(lengths, torch.ones_like(lengths))  # heads learn all the while


def test_a_registered_version_teaches_if_it_has_heads(workspace, pretrain_values, tiny, backbone, monkeypatch):
    pretraining.run(validate(PretrainConfig, pretrain_values(steps=1, **ONE_STEP), "test"), workspace, seed=0)
    uri = f"sqlite:///{workspace}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client, pretrained = MlflowClient(tracking_uri=uri), workspace / "models" / "pretrained"
    client.create_registered_model("big")
    tags = {WEIGHTS_SHA256_TAG: sha256_file(pretrained / "model.safetensors")}
    headless = shutil.copytree(pretrained, workspace / "headless", ignore=lambda *_: ["heads.safetensors"])
    for variable, value in key_variables(workspace / "keys").items():
        monkeypatch.setenv(variable, value)
    for folder in (pretrained, headless):
        sign_folder(folder)
        client.create_model_version("big", str(folder), tags=tags)
    values = tiny(steps=1, students={"s": {"backbone": backbone}}, **ONE_STEP)

    def distil(teacher: str) -> None:
        config = validate(DistillConfig, values | {"teacher_weights": teacher}, "test")
        distillation.run(config, workspace, seed=0, name="tiny")

    distil("models:/big/1")
    provenance = json.loads((workspace / "models" / "students" / "s" / "config.json").read_text())["provenance"]
    assert provenance["config"]["teacher_weights"] == "models:/big/1"
    with pytest.raises(ConfigError, match=r"models:/big/2: registered without heads, which students learn from"):
        distil("models:/big/2")
    with pytest.raises(ConfigError, match=r"models:/big@champion: an alias is not an exact version"):
        distil("models:/big@champion")


def test_a_student_learns_its_frozen_teacher(workspace, pretrain_values, tiny, backbone):
    pretraining.run(validate(PretrainConfig, pretrain_values(), "test"), workspace, seed=0)
    pretrained = workspace / "models" / "pretrained"
    (workspace / "models" / "adapted").symlink_to(pretrained)
    optimizer = {"base_lr": 0.02, "warmup_steps": 3, "freeze_last_layer_steps": 0}
    values = tiny(
        steps=40, students={"s": {"backbone": backbone}}, optimizer=optimizer, ema={"momentum_start": 0.5},
        checkpoint_every_steps=40,
    )  # fmt: skip
    distillation.run(validate(DistillConfig, values, "test"), workspace, seed=0, name="tiny")
    losses = read_losses(workspace / distillation.REPORTS / "s" / "loss.csv")
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3


def test_a_stage_that_failed_after_training_does_not_train_again(workspace, pretrain_values, monkeypatch):
    config = validate(PretrainConfig, pretrain_values(), "test")
    figures = pretraining.run(config, workspace, seed=0)
    made = digest(workspace / "models" / "pretrained")
    monkeypatch.setattr(delivery, "train", lambda *_: pytest.fail("trained again"))
    shutil.rmtree(workspace / "models")  # as DVC does before it runs a stage
    shutil.rmtree(workspace / "reports")
    left = workspace / ".pedigree" / "checkpoints" / figures["run_key"]  # killed before it could delete them
    (left / "step_6").mkdir(parents=True)
    assert pretraining.run(config, workspace, seed=0) == figures
    assert not left.exists()
    assert digest(workspace / "models" / "pretrained") == made
    assert {path.name for path in (workspace / "reports" / "pretrain").iterdir()} == {
        "crops.jpg",
        "loss.csv",
        "pca.jpg",
    }
    monkeypatch.undo()
    (kept,) = (workspace / ".pedigree" / "cache" / "trained").iterdir()
    (kept / "weights" / "model.safetensors").write_bytes(b"damaged")
    assert pretraining.run(config, workspace, seed=0)["steps"] == config.steps
    assert digest(workspace / "models" / "pretrained") == made
    delivery.forget(workspace, figures["run_key"])  # the stage has reported: what follows trains again
    assert list(kept.parent.iterdir()) == []


def start_run(values: dict, workspace: Path) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", RUN, json.dumps(values), str(workspace)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_step(workspace: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not list(workspace.glob(f".pedigree/checkpoints/*/step_{step}")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_and_stopped_runs_end_in_the_same_bits(workspace, curated, pretrain_values, tmp_path_factory):
    """SIGKILL in the middle, then SIGTERM, then to the end: the weights are those of an uninterrupted run."""
    values = pretrain_values(steps=80, checkpoint_every_steps=4)
    whole = tmp_path_factory.mktemp("whole")
    (whole / "data").mkdir()
    (whole / "data" / "curated").symlink_to(curated)
    pretraining.run(validate(PretrainConfig, values, "test"), whole, seed=0)

    killed = start_run(values, workspace)
    wait_for_step(workspace, 8, killed)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert not (workspace / "models").exists()

    # With a worker process, which changes nothing, and which the signal to the group reaches too.
    stopped = start_run(values | {"stream": {"num_workers": 1, "window_shards": 2}}, workspace)
    wait_for_step(workspace, 20, stopped)
    os.killpg(stopped.pid, signal.SIGTERM)
    log = stopped.stderr.read()
    assert stopped.wait() == EXIT_INTERRUPTED, log
    assert "resumed after" in log
    assert "start it again to go on" in log

    pretraining.run(validate(PretrainConfig, values, "test"), workspace, seed=0)
    assert digest(workspace / "models" / "pretrained") == digest(whole / "models" / "pretrained")
    reports = [folder / "reports" / "pretrain" / "loss.csv" for folder in (workspace, whole)]
    assert read_losses(reports[0]) == read_losses(reports[1])  # no row twice, none missing


def test_two_processes_equal_one(workspace, curated, pretrain_values, tmp_path_factory, monkeypatch):
    """Same batch over all ranks, which share the weights. KoLeo seeks its neighbors on each rank: it is left out."""
    backbone = pretrain_values()["backbone"] | {"drop_path": 0.0, "layer_scale_init": 1.0}
    monitor = {"knn": {"every_steps": 2, "num_neighbors": 3}, "pictures_every_steps": 3}
    values = pretrain_values(
        steps=4, objective={"koleo_weight": None}, backbone=backbone, monitor=monitor,
        gram={"weight": 1.0, "teacher_scale": 1, "after_steps": 0},
    )  # fmt: skip
    write_labeled(workspace / "data" / "evaluation")
    shown = []
    monkeypatch.setattr(pictures, "log_file", lambda path, folder: shown.append((path.name, Image.open(path).size)))
    pretraining.run(validate(PretrainConfig, values, "test"), workspace, seed=0)
    assert [name for name, _ in shown] == ["pca_step_3.jpg"]
    assert min(shown[0][1]) > 100
    two = tmp_path_factory.mktemp("two")
    (two / "data").mkdir()
    (two / "data" / "evaluation").symlink_to(workspace / "data" / "evaluation")
    (two / "data" / "curated").symlink_to(curated)
    figures = pretraining.run(
        validate(PretrainConfig, values | {"num_processes": 2, "sharding": "fsdp"}, "test"), two, seed=0
    )
    assert figures["steps"] == 4
    reports = [folder / "reports" / "pretrain" / "loss.csv" for folder in (workspace, two)]
    np.testing.assert_allclose(read_losses(reports[0]), read_losses(reports[1]), rtol=2e-5)
    found = [[row["knn_top1"] for row in read_rows(report)] for report in reports]
    assert found[0] == found[1]
    assert [value is None for value in found[0]] == [True, False, True, False]
    one, other = (load_file(f / "models" / "pretrained" / "model.safetensors") for f in (workspace, two))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_rank_that_fails_says_why(workspace, pretrain_values):
    values = pretrain_values(batch_size=96, num_processes=2)
    with pytest.raises(EngineError, match=r"rank . of 2: .*the curated set has 48 images, fewer than one batch of 96"):
        pretraining.run(validate(PretrainConfig, values, "test"), workspace, seed=0)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (3, "batch_size 8 is not a multiple of number of ranks 3; use for example 9"),
        (16, "batch_size 8 is not a multiple of number of ranks 16; use for example 32"),
        (8, "batch_size 8 leaves a rank fewer than 2 images, and KoLeo needs a neighbor: use 16 or a larger multiple"),
    ],
)
def test_a_batch_that_the_ranks_of_torchrun_cannot_share(workspace, pretrain_values, monkeypatch, ranks, message):
    monkeypatch.setattr("components.training.loop.world_size", lambda: ranks)
    with pytest.raises(ConfigError, match=message):
        pretraining.run(validate(PretrainConfig, pretrain_values(), "test"), workspace, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"base_lr": -1.0}}, "optimizer.base_lr: Input should be greater than 0 (given: -1.0)"),
        ({"optimizer": {"warmup_steps": 9}}, "optimizer.warmup_steps is 9, more than the 6 steps of the run"),
        ({"crops": {"global_size": 36, "local_size": 16}}, "crops.global_size 36 is not a multiple of backbone.patch"),
        ({"num_processes": 3}, "batch_size 8 is not a multiple of num_processes 3; use for example 9"),
        ({"num_processes": 8}, "batch_size 8 leaves a rank fewer than 2 images, and KoLeo needs"),
        ({"teacher": {"temp_start": 0.08, "temp_warmup_steps": 3}}, "temp_start 0.08 is above temp_end 0.07"),
        ({"teacher": {"temp_start": 0.0}}, "teacher.temp_start: Input should be greater than 0"),
        ({"ema": {"momentum_start": 1.5}}, "ema.momentum_start: Input should be less than or equal to 1"),
        ({"gram": {}}, "gram.after_steps: required, but not given"),
        ({"step": 10}, "step: unknown key; did you mean 'steps'?"),
    ],
)  # fmt: skip
def test_refuses(pretrain_values, changes, message):
    with pytest.raises(ConfigError) as error:
        validate(PretrainConfig, pretrain_values(**changes), "params.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("students", "message"),
    [
        ({}, "students: Dictionary should have at least 1 item"),
        ({"teacher": {}}, "'teacher' cannot name a student"),
        ({"A/B": {}}, "'A/B' cannot name a student"),
        ({"s": {"backbone": {"drop_path": 0.1}}}, "backbone.drop_path is 0.1; distillation trains whole depth: use 0"),
        (
            {"s": {"backbone": {"patch_size": 16, "image_size": 224}}},
            "crops.local_size 98 is not a multiple of students.s.backbone.patch_size 16",
        ),
    ],
)
def test_distill_refuses(students, message):
    with pytest.raises(ConfigError) as error:
        validate(DistillConfig, {"students": students}, "params.yaml")
    assert message in str(error.value)


def test_defaults_are_the_papers():
    """The paper's own values are legal, and the published numbers come out of them."""
    config = PretrainConfig()
    assert (config.steps, config.batch_size, config.backbone.depth, config.dino_head.num_prototypes) == (
        625_000, 3_072, 24, 131_072,
    )  # fmt: skip
    assert AdaptConfig().crops.global_size == 518
    gram = validate(AdaptConfig, {"gram": {}}, "test").gram  # DINOv3's gram_anchor.yaml
    assert gram == GramConfig(weight=2.0, teacher_scale=2, after_steps=0, snapshot_every_steps=10_000)
    assert DistillConfig(students={"s": {}}).batch_size == 2_048  # pyright: ignore[reportArgumentType]


def test_a_defect_of_a_rank_keeps_its_traceback():
    with pytest.raises(RuntimeError, match=r"rank . of 2: RuntimeError: The size of tensor a") as caught:
        launch(broken, 2)
    assert known(caught.value) is None
    assert "torch.ones(3) + torch.ones(4)" in "".join(traceback.format_exception(caught.value))
