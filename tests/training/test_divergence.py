import json
import logging
import math

import pytest
import torch
from safetensors.torch import load_file

from components.core.config import validate
from components.data.batch import Batch, TrainingBatches
from components.data.stream import ImageStream
from components.pretraining import stage as pretraining
from components.pretraining.config import PretrainConfig
from components.training.alerts import read_alerts
from components.training.checkpoint import Checkpoints, Progress
from components.training.loop import Job
from components.training.schedules import Schedules
from components.training.step import DivergedError, TrainingStep
from tests.training.jobs import at_call, break_call, make_job, train_job

CPU = torch.device("cpu")


def make_step(job: Job) -> TrainingStep:
    return TrainingStep(job.networks, job.config, job.seed, CPU)


def everything(training: TrainingStep) -> list[torch.Tensor]:
    modules = (training.networks.student, training.networks.ema, training.objective)
    states = (training.optimizer.state[p] for p in training.networks.student.parameters())
    moments = [state[key] for state in states for key in ("step", "exp_avg", "exp_avg_sq")]
    return [tensor for module in modules for tensor in module.state_dict().values()] + moments


def test_a_step_that_is_not_finite_changes_nothing(curated, pretrain_values, tmp_path, caplog):
    """A run in which step 2 breaks ends in the bits of one that never takes it: weights, average, centers, moments."""
    # A network with small LayerScale looks like a collapse at its start, and loading in the trainer like starvation.
    quiet = {"alerts": {"after_steps": 5, "max_wait_share": 1.0}}
    values = pretrain_values(steps=5, objective={"centering": "softmax"}, monitor=quiet)
    job = make_job(values, curated)
    break_call(job, 2)
    with caplog.at_level(logging.WARNING, "components"):
        rows = train_job(job, Checkpoints(tmp_path))
    assert [row["step"] for row in rows] == [1, 2, 4, 5]
    assert [(alert.step, alert.kind) for alert in read_alerts(tmp_path)] == [(3, "not_finite")]
    assert len([record for record in caplog.records if record.name.startswith("components")]) == 1
    assert "alert: step 2: loss is not finite (terms: total, dino_local, dino_global; ranks: [0])" in caplog.text
    assert "Step skipped, 1 of at most 10" in caplog.text

    skipping = make_step(make_job(values, curated))
    batches, schedules = TrainingBatches(job.stream, job.batch_plan()), Schedules(job.config)
    for step in (0, 1, 3, 4):
        batch = batches[step]
        assert not isinstance(batch, Exception)
        skipping(batch.normalize(CPU), step, schedules.at(step))
    found = make_step(make_job(values, curated))
    assert Checkpoints(tmp_path).load_newest(found) == Progress(5, skipped_steps=1)
    expected = everything(skipping)
    assert len(expected) > 100
    assert all(torch.equal(a, b) for a, b in zip(expected, everything(found), strict=True))


def test_a_skipped_step_that_is_taken_again_is_told_once(curated, pretrain_values, tmp_path):
    """Killed after it, but before its checkpoint, as a run may be."""
    quiet = {"alerts": {"after_steps": 6, "max_wait_share": 1.0}}
    values = pretrain_values(monitor=quiet)

    def kill() -> None:
        raise KeyboardInterrupt

    killed = make_job(values, curated)
    for number in (1, 4):
        break_call(killed, number)
    at_call(killed, 5, kill)
    with pytest.raises(KeyboardInterrupt):
        train_job(killed, Checkpoints(tmp_path))
    assert [alert.step for alert in read_alerts(tmp_path)] == [2, 5]
    again = make_job(values, curated)
    train_job(again, Checkpoints(tmp_path))  # this time it does not break
    assert [alert.step for alert in read_alerts(tmp_path)] == [2]


def test_a_run_that_diverges_ends_with_what_one_needs_to_see_it_again(workspace, curated, pretrain_values):
    """A learning rate beyond all measure: step 0 ruins the weights, 1 and 2 are skipped, 3 ends the run."""
    optimizer = {"base_lr": 1e30, "warmup_steps": 0, "freeze_last_layer_steps": 0, "clip_grad_norm": None}
    values = pretrain_values(optimizer=optimizer, max_skipped_steps=2)
    config = validate(PretrainConfig, values, "test")
    with pytest.raises(
        DivergedError, match=r"^pretrain: step 3: loss is not finite \(terms: .*2 steps were skipped before"
    ) as first:
        pretraining.run(config, workspace, seed=0)
    assert not (workspace / "models").exists()
    (dump,) = workspace.glob(".pedigree/checkpoints/*/diverged_step_3")
    assert {path.suffix for path in dump.iterdir()} == {".json", ".safetensors"}
    facts = json.loads((dump / "dump.json").read_text())
    stream = ImageStream(curated, config.stream, seed=0)
    assert (facts["step"], facts["seed"], facts["first_position"]) == (3, 0, 24)
    assert facts["image_ids"] == stream.image_ids(24, 8)

    # From the dump and the checkpoint beside it, without the data.
    tensors = load_file(dump / "rank_0.safetensors")
    batch = Batch(tensors["global_crops"], tensors["local_crops"], tensors["masks"], [])
    training = make_step(make_job(values, curated))
    assert Checkpoints(dump.parent).load_newest(training) == Progress(3, skipped_steps=2)
    with pytest.raises(DivergedError) as again:
        training(batch.normalize(CPU), 3, Schedules(config).at(3))
    losses = json.loads((dump / "rank_0.json").read_text())["values"]
    assert losses == {name: repr(value) for name, value in again.value.values.items()}
    assert not math.isfinite(float(losses["total"]))
    # And by starting the run again, which goes on from there.
    with pytest.raises(DivergedError) as restarted:
        pretraining.run(config, workspace, seed=0)
    assert str(restarted.value) == str(first.value)
