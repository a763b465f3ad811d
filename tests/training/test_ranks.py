"""Several ranks train what one does: DistributedDataParallel, FSDP2, and checkpoints that go from one to the other."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from components.core.config import validate
from components.core.distributed import rank
from components.core.storage import s3_client, write_json
from components.data.batch import Batch, TrainingBatches
from components.distillation.config import DistillConfig
from components.distillation.stage import REPORTS, distill
from components.training.checkpoint import Checkpoints
from components.training.checkpoint_store import INDEX
from components.training.loss_table import read_rows
from components.training.parallelize import gather, launch
from components.training.schedules import Schedules
from components.training.step import TrainingStep
from tests.training.jobs import break_call, make_job, train_job, write_teacher

# As far apart as float32 sums in another order come in 4 steps; AdamW's first steps enlarge what is near 0.
LOSS = {"rtol": 2e-5}
WEIGHTS = {"rtol": 1e-3, "atol": 2e-4}
STUDENTS = {"small": 16, "wide": 48}  # width by name
NEWEST, BUCKET = "step_4", "checkpoints-of-ranks"


def run(
    values: dict[str, Any], curated: Path, folder: Path, *, broken: int | None = None, uri: str | None = None
) -> list[dict[str, Any]]:
    """Train a job and keep its checkpoints and `ema.safetensors`; one call of the student may break on rank 1."""
    job = make_job(values, curated)
    if broken is not None and rank() == 1:
        break_call(job, broken)
    rows = train_job(job, Checkpoints(folder, uri))
    if network := gather(job.networks.ema):
        save_file(network.state_dict(), folder / "ema.safetensors")
    return rows


def run_in_parts_of_two_ranks(values: dict[str, Any], curated: Path, folder: Path) -> list[float]:
    """On one rank, accumulate parts that hold the images which two ranks have in theirs; return the losses."""
    job = make_job(values | {"accumulation_steps": 2}, curated)
    training = TrainingStep(job.networks, job.config, job.seed, torch.device("cpu"))
    batches, losses = TrainingBatches(job.stream, job.batch_plan()), []
    order = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])  # of the 8 images; rank 1 has the last four
    for step in range(job.config.steps):
        batch = batches[step]
        assert isinstance(batch, Batch)
        assert batch.masks is not None
        crops = (batch.global_crops, batch.local_crops, batch.masks)
        mixed = [rows.unflatten(0, (-1, 8))[:, order].flatten(0, 1) for rows in crops]
        output = training(Batch(*mixed, []).normalize(torch.device("cpu")), step, Schedules(job.config).at(step))
        losses.append(float(output.losses["total"]))
    folder.mkdir()
    save_file(job.networks.ema.state_dict(), folder / "ema.safetensors")
    return losses


def distil(root: Path, **changes: Any) -> None:
    """Distill the teacher of a workspace into its two students."""
    config = validate(DistillConfig, json.loads((root / "values.json").read_text()) | changes, "test")
    distill(config, root, 0, "tiny", root / "models" / "adapted")


def compiled(values: dict[str, Any], curated: Path, folder: Path) -> dict[str, Any]:
    """Train with compiled blocks; rows, and how many graphs were traced. The C++ code, minutes of g++, is left out."""
    from torch._dynamo.utils import counters

    plain = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self: plain(self, backend="aot_eager")
    try:
        rows = run(values | {"compile": True}, curated, folder)
    finally:
        torch.nn.Module.compile = plain
    return {"rows": rows, "graphs": counters["stats"]["unique_graphs"]}


def on_each_rank(values: dict[str, Any], curated: Path, root: Path) -> dict[str, Any]:
    """All that needs two ranks, in one start of them."""
    rows: dict[str, Any] = {"threads": torch.get_num_threads()}
    torch.set_num_threads(1)
    for sharding in ("ddp", "fsdp"):
        changed = values | {"sharding": sharding}
        rows[sharding] = run(changed, curated, root / sharding)
        rows[f"{sharding} goes on"] = run(changed, curated, root / f"{sharding}_from_one")
        parts = changed | {"accumulation_steps": 2}
        rows[f"{sharding} parts"] = run(parts, curated, root / f"{sharding}_parts")
        distil(root / f"{sharding}_distilled", sharding=sharding)
        # The second part of step 1 breaks, when the gradient of its first part is there already.
        rows[f"{sharding} broken"] = run(parts, curated, root / f"{sharding}_broken", broken=3)
    half = values | {"sharding": "fsdp", "precision": "bfloat16"}
    rows["half"] = run(half, curated, root / "half")
    # On S3: the first run's newest checkpoint is lost, the second goes on in another folder.
    sharded, uri = values | {"sharding": "fsdp"}, f"s3://{BUCKET}/{root.name}"
    rows["s3"] = run(sharded, curated, root / "s3", uri=uri)
    if rank() == 0:
        s3_client().delete_object(Bucket=BUCKET, Key=f"{root.name}/{NEWEST}/{INDEX}")
    torch.distributed.barrier()
    rows["again"] = run(sharded, curated, root / "again", uri=uri)
    return rows


@pytest.fixture(scope="module")
def curated_runs(storage, curated, tmp_path_factory):
    """(values, curated set, folder of runs, rows by run) of runs on one and on two ranks."""
    root = tmp_path_factory.mktemp("runs")
    head = {"num_prototypes": 64, "hidden_dim": 32, "bottleneck_dim": 16}
    shape = {"patch_size": 8, "dim": 32, "depth": 2, "num_heads": 2, "num_registers": 1, "image_size": 32}
    plain = shape | {"ffn": "mlp", "drop_path": 0.0}
    values: dict[str, Any] = {
        "steps": 4, "batch_size": 8, "precision": "float32", "checkpoint_every_steps": 2, "log_every_steps": 1,
        "stream": {"num_workers": 0, "window_shards": 2},
        "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
        "optimizer": {"base_lr": 0.01, "warmup_steps": 1, "freeze_last_layer_steps": 1, "layer_decay": 0.9},
        "teacher": {"temp_warmup_steps": 3}, "backbone": plain | {"layer_scale_init": 1.0},
        "dino_head": head, "ibot_head": head, "objective": {"koleo_weight": None},  # KoLeo seeks neighbors on a rank
    }  # fmt: skip
    rows = {"one": run(values, curated, root / "one")}
    rows["one half"] = run(values | {"precision": "bfloat16"}, curated, root / "one_half")
    for name in ("ddp_from_one", "fsdp_from_one"):
        shutil.copytree(root / "one", root / name)
        shutil.rmtree(root / name / NEWEST)
    rows["parts"] = run_in_parts_of_two_ranks(values, curated, root / "parts")
    students = {name: {"backbone": shape | {"layer_scale_init": 1.0, "dim": dim}} for name, dim in STUDENTS.items()}
    common = {k: v for k, v in values.items() if k not in ("backbone", "dino_head", "ibot_head")}
    for name in ("one", "ddp", "fsdp"):
        workspace = root / f"{name}_distilled"
        write_json(workspace / "values.json", common | {"students": students})
        (workspace / "data").mkdir()
        (workspace / "data" / "curated").symlink_to(curated)
        write_teacher(values, curated, workspace / "models" / "adapted")
    distil(root / "one_distilled", share_teacher=False)
    s3_client().create_bucket(Bucket=BUCKET)
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    rows |= launch(on_each_rank, 2, values, curated, root)
    torch.set_num_threads(before)
    return values, curated, root, rows


def test_a_rank_has_its_share_of_the_threads(curated_runs):
    assert curated_runs[-1]["threads"] == 3  # of 7


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss_total"] for row in rows]


def assert_same_weights(one: Path, other: Path) -> None:
    expected, found = (load_file(folder / "ema.safetensors") for folder in (one, other))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **WEIGHTS, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_ranks_train_what_one_trains(curated_runs, sharding):
    _, _, root, rows = curated_runs
    np.testing.assert_allclose(losses(rows[sharding]), losses(rows["one"]), **LOSS)
    for name in ("grad_norm_backbone", "grad_norm_dino_head", "grad_norm_ibot_head"):
        np.testing.assert_allclose([r[name] for r in rows[sharding]], [r[name] for r in rows["one"]], rtol=1e-3)
    assert_same_weights(root / "one", root / sharding)


def test_half_precision_with_sharded_weights_is_close(curated_runs):
    rows = curated_runs[3]
    np.testing.assert_allclose(losses(rows["half"]), losses(rows["one half"]), rtol=0.02)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_run_of_one_rank_goes_on_on_two(curated_runs, sharding):
    _, _, root, rows = curated_runs
    assert [row["step"] for row in rows[f"{sharding} goes on"]] == [1, 2, 3, 4]
    np.testing.assert_allclose(losses(rows[f"{sharding} goes on"]), losses(rows["one"]), **LOSS)
    assert_same_weights(root / "one", root / f"{sharding}_from_one")


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_run_of_two_ranks_goes_on_on_one(curated_runs, tmp_path, sharding):
    values, curated, root, rows = curated_runs
    folder = tmp_path / "run"
    shutil.copytree(root / sharding, folder)
    shutil.rmtree(folder / NEWEST)
    found = run(values, curated, folder)
    np.testing.assert_allclose(losses(found), losses(rows["one"]), **LOSS)
    assert_same_weights(root / "one", folder)


def test_on_as_many_ranks_the_bits_are_the_same(curated_runs):
    """The second of the runs on S3 took two steps only, and had the report of the first two from the checkpoint."""
    _, _, root, rows = curated_runs
    first, *others = (load_file(root / name / "ema.safetensors") for name in ("fsdp", "s3", "again"))
    assert all(torch.equal(first[name], other[name]) for name in first for other in others)
    assert [row["step"] for row in rows["again"]] == [1, 2, 3, 4]
    assert rows["again"][:2] == rows["s3"][:2]


def test_what_breaks_on_one_rank_is_skipped_on_all(curated_runs):
    """Step 1 breaks on rank 1 only; both go on, and so equally that sharded and whole weights agree at the end."""
    _, _, root, rows = curated_runs
    assert [row["step"] for row in rows["ddp broken"]] == [row["step"] for row in rows["fsdp broken"]] == [1, 3, 4]
    np.testing.assert_allclose(losses(rows["fsdp broken"]), losses(rows["ddp broken"]), **LOSS)
    assert_same_weights(root / "ddp_broken", root / "fsdp_broken")
    assert all(tensor.isfinite().all() for tensor in load_file(root / "fsdp_broken" / "ema.safetensors").values())


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_parts_of_two_ranks_are_accumulated_as_on_one(curated_runs, sharding):
    """Gradients are exchanged with the last part only, and those of the first part are in the sum."""
    _, _, root, rows = curated_runs
    np.testing.assert_allclose(losses(rows[f"{sharding} parts"]), rows["parts"], **LOSS)
    assert_same_weights(root / "parts", root / f"{sharding}_parts")


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_students_with_one_teacher_on_two_ranks_are_what_each_is_alone_on_one(curated_runs, sharding):
    root = curated_runs[2]
    places = (root / "one_distilled", root / f"{sharding}_distilled")
    for name in STUDENTS:
        alone, together = (read_rows(place / REPORTS / name / "loss.csv") for place in places)
        np.testing.assert_allclose(losses(together), losses(alone), **LOSS)
        expected, weights = (load_file(place / "models" / "students" / name / "model.safetensors") for place in places)
        for key, tensor in expected.items():
            torch.testing.assert_close(weights[key], tensor, **WEIGHTS, msg=lambda m, n=key: f"{n}: {m}")


@pytest.mark.slow  # two ranks load the compiler; `test_step` has compiled blocks on one
def test_blocks_that_are_compiled_and_sharded_train_the_same(curated_runs):
    values, curated, root, rows = curated_runs
    made = launch(compiled, 2, values | {"sharding": "fsdp"}, curated, root / "compiled")
    assert made["graphs"] >= 2  # a block of the student and of the teacher, which all others share
    np.testing.assert_allclose(losses(made["rows"]), losses(rows["fsdp"]), **LOSS)
    assert_same_weights(root / "fsdp", root / "compiled")
