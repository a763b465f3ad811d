"""What is told before the first stage: files that are missing, images that do not suffice, disks that are full."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pyarrow as pa
import pytest

from components.core.config import ConfigError
from components.data import shared_memory
from components.data.manifest import POOL_SCHEMA, write_manifest
from components.recipe import Recipe, load_recipe, recipe_names
from components.training.initial import draw_network
from flows.preflight import check, named_files, num_parameters
from flows.sources import choose
from tests.flows.repository import PROJECT, git_lines

DISK = namedtuple("DISK", "total used free")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout with 40 images of two sources, and 8 evaluation images of one."""
    git_lines(tmp_path, "init", "-q")
    add(tmp_path / "data/pool/cats/ab", 30)
    add(tmp_path / "data/pool/dogs/cd", 10)
    add(tmp_path / "data/evaluation/cats/ef", 8)
    return tmp_path


def add(folder: Path, count: int) -> None:
    row = dict.fromkeys(POOL_SCHEMA.names, "x") | dict.fromkeys(("offset", "length", "width", "height"), 1)
    rows = [row | {"image_id": str(k)} for k in range(count)]
    write_manifest(pa.Table.from_pylist(rows, POOL_SCHEMA), folder / "manifest.parquet")
    folder.with_suffix(".dvc").write_text(f"outs: [{{md5: a.dir, size: {2**30}, path: {folder.name}}}]\n")


def recipe(*settings: str) -> Recipe:
    return load_recipe(PROJECT, "tiny-cpu", settings)


def faults(checkout: Path, given: Recipe, *sources: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(checkout, given, choose(checkout, sources or None))
    return str(caught.value).splitlines()


def test_a_run_that_can_go_on_is_let_on(checkout):
    check(checkout, recipe(), choose(checkout, None))
    check(checkout, recipe("distill.teacher_weights=models:/cat@champion"), choose(checkout, None))


def test_batches_larger_than_the_images(checkout):
    given = recipe("adapt.batch_size=48", "adapt.accumulation_steps=3", "pretrain.batch_size=41")
    assert faults(checkout, given) == [
        "pretrain.batch_size is 41, but the sources hold 40 images (cats 30, dogs 10): set pretrain.batch_size=40 or "
        "less, or add more images",
        "adapt.batch_size is 48, but the sources hold 40 images (cats 30, dogs 10): set adapt.batch_size=39 or "
        "less, or add more images",
    ]
    told = faults(checkout, recipe("curate.target_images=5"))
    assert len(told) == 3
    assert told[2].startswith("distill.batch_size is 32, but curate.target_images is 5: set distill.batch_size=5")


def test_images_that_are_not_here_are_not_counted(checkout, caplog):
    shutil.rmtree(checkout / "data/pool/dogs/cd")
    caplog.set_level("INFO")
    check(checkout, recipe("pretrain.batch_size=1000"), choose(checkout, None))
    assert "batch sizes not checked: dogs/cd is not in this checkout" in caplog.text


def test_an_evaluation_set_is_needed(checkout):
    (told,) = faults(checkout, recipe("pretrain.batch_size=8", "adapt.batch_size=8", "distill.batch_size=8"), "dogs")
    assert told.startswith("data/evaluation: no evaluation images of dogs, and the stage evaluate needs some: pedigree")
    add(checkout / "data/evaluation/benchmark/aa", 3)  # of no source of the pool
    check(
        checkout,
        recipe("pretrain.batch_size=8", "adapt.batch_size=8", "distill.batch_size=8"),
        choose(checkout, ["dogs"]),
    )


def test_files_that_the_run_would_not_find(checkout):
    for name in ("external/sscd.pt", "flows/nsfw.onnx"):
        (checkout / name).parent.mkdir()
        (checkout / name).write_text("weights")
    sha = "0" * 64
    given = recipe(
        "embed.embedder={kind: torchscript, path: external/sscd.pt}",
        "embed.semantic={kind: model, weights: /nowhere/weights}",
        "embed.scores={nsfw: {kind: onnx, path: flows/nsfw.onnx}, faces: {kind: onnx, path: faces.onnx}}",
        "curate.gates.previous=gone.parquet",
        f"pretrain.init={{weights: none.pth, sha256: '{sha}'}}",
        "pretrain.optimizer.freeze_backbone_steps=1",
        "distill.teacher_weights=models/none",
        "curate.seed_sets={birds: {as_is: true}}",
    )
    told = faults(checkout, given)
    assert told[0] == (
        "embed.embedder.path: external/sscd.pt is in this checkout but not in git, so the run's folder does not have "
        f"it; set embed.embedder.path={checkout}/external/sscd.pt"
    )
    assert [line.partition(":")[0] for line in told[1:]] == [
        "embed.semantic.weights", "embed.scores.faces.path", "curate.gates.previous", "pretrain.init.weights",
        "distill.teacher_weights", "curate.seed_sets.birds",
    ]  # fmt: skip
    assert told[1].endswith(": /nowhere/weights does not exist; give the path of a file or folder that does")
    git_lines(checkout, "add", "external")
    assert faults(checkout, given)[0].startswith("embed.semantic.weights")


def test_every_recipe_is_walked_through():
    found = {key for name in recipe_names() for key, _ in named_files(load_recipe(PROJECT, name).model_dump())}
    assert {"embed.embedder.path", "distill.teacher_weights"} <= found


def test_disks_without_room(checkout, monkeypatch, caplog):
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DISK(0, 0, 2**30))
    check(checkout, recipe(), choose(checkout, None))
    told = caplog.text
    assert "1.00 GiB are free, a run that computes all stages needs about 4.04 (" in told
    assert "curated images 2.00, " in told
    assert "curated images in S3 2.00, " in told
    assert "checkpoints 0.03" in told
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://s3.example.com")
    check(checkout, recipe(), choose(checkout, None))
    assert "needs about 2.03 (" in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DISK(0, 0, 2**20))
    assert faults(checkout, recipe())[-1].endswith("/.pedigree: 1 MiB are free, and a run needs 100 MiB at least")


def test_loaders_that_shared_memory_cannot_hold(checkout, monkeypatch):
    room = {shared_memory.SHARED_MEMORY: DISK(0, 0, 7 * 2**20)}
    monkeypatch.setattr(shutil, "disk_usage", lambda where: room.get(where, DISK(0, 0, 2**40)))
    larger = ("pretrain.crops.global_size=48", "pretrain.crops.local_size=24")
    told = faults(checkout, recipe("pretrain.stream.num_workers=6", "evaluate.num_workers=9", *larger))
    assert [line.partition(": set ")[2].partition(",")[0] for line in told] == [
        "evaluate.num_workers=4", "pretrain.stream.num_workers=5",
    ]  # fmt: skip
    assert told[1].startswith(
        "/dev/shm has 7 MiB free, and pretrain.stream.num_workers=6 keeps up to 13 batches of 0.6 MiB there"
    )


def test_parameters_are_counted_as_they_are():
    given = load_recipe(PROJECT, "tiny-cpu").pretrain
    shape = given.backbone.trained_at(given.crops.global_size)
    network = draw_network(shape, {"dino": given.dino_head, "ibot": given.ibot_head}, seed=0)
    real = sum(parameter.numel() for parameter in network.parameters())
    assert num_parameters(given.backbone, (given.dino_head, given.ibot_head)) == pytest.approx(real, rel=0.03)


def test_torch_is_not_needed():
    code = "import sys, flows.preflight; assert not {'torch', 'prefect', 'dvc', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)
