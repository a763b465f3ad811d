"""Gram anchoring in a training: when snapshots are taken, what is compared with them, and that a run can go on."""

from __future__ import annotations

import pytest
import torch

from components.data.batch import TrainingBatches
from components.objective.gram import to_grid
from components.training.checkpoint import Checkpoints
from components.training.loop import Job
from components.training.schedules import Schedules
from components.training.step import TrainingStep
from tests.training.jobs import at_call, make_job, train_job

GRAM = {"weight": 3.0, "teacher_scale": 1, "after_steps": 2, "snapshot_every_steps": 2, "max_snapshots": 2}


def state(job: Job, name: str) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in getattr(job.networks, name).parameters()]


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.fixture
def values(pretrain_values):
    plain = pretrain_values()["backbone"] | {"drop_path": 0.0, "layer_scale_init": 1.0}
    return pretrain_values(steps=8, gram=GRAM, backbone=plain, ema={"momentum_start": 0.5}, checkpoint_every_steps=3)


def test_snapshots_and_the_term(values, curated):
    job = make_job(values, curated)
    training = TrainingStep(job.networks, job.config, job.seed, torch.device("cpu"))
    batches, schedules = TrainingBatches(job.stream, job.batch_plan()), Schedules(job.config)
    averages, terms = [], []
    for step in range(8):
        averages.append(state(job, "ema"))
        batch = batches[step]
        assert not isinstance(batch, Exception)
        normalized = batch.normalize(torch.device("cpu"))
        student = job.networks.student.backbone(normalized.global_crops, normalized.masks).patch_tokens.detach()
        losses = training(normalized, step, schedules.at(step)).losses
        terms.append(float(losses["gram"]))
        total = float(losses.pop("total"))
        assert total == pytest.approx(sum(map(float, losses.values())))  # the term is trained on
        if step >= 2:
            taken = 2 if step < 4 else 4  # after that there are no more
            assert equal(state(job, "gram_teacher"), averages[taken])
            anchor = job.networks.gram_teacher
            assert anchor is not None
            grams = [
                (unit := torch.nn.functional.normalize(tokens, dim=-1)) @ unit.transpose(1, 2)
                for tokens in (student, anchor.patch_tokens(normalized.global_crops))
            ]
            assert terms[-1] == pytest.approx(3.0 * float((grams[0] - grams[1]).square().mean()), rel=1e-4)
    assert terms[:2] == [0.0, 0.0]
    assert min(terms[2:]) > 0


def test_the_term_at_twice_the_resolution(pretrain_values, curated):
    """The anchor sees larger crops; also in two parts, whose mean the term is."""
    gram = {"weight": 3.0, "teacher_scale": 2, "after_steps": 0}
    plain = pretrain_values()["backbone"] | {"drop_path": 0.0, "layer_scale_init": 1.0}
    for parts in (1, 2):
        job = make_job(pretrain_values(gram=gram, backbone=plain, accumulation_steps=parts), curated)
        batch = TrainingBatches(job.stream, job.batch_plan())[0]
        assert not isinstance(batch, Exception)
        batch = batch.normalize(torch.device("cpu"))
        assert batch.gram_crops is not None
        assert batch.gram_crops.shape[-1] == 2 * batch.global_crops.shape[-1]
        training = job.training_step()
        student = job.networks.student.backbone(batch.global_crops, batch.masks).patch_tokens.detach()
        anchor = to_grid(job.networks.ema.patch_tokens(batch.gram_crops), student.shape[1])
        grams = [(u := torch.nn.functional.normalize(t, dim=-1)) @ u.transpose(1, 2) for t in (student, anchor)]
        term = float(training(batch, 0, Schedules(job.config).at(0)).losses["gram"])
        assert term == pytest.approx(3.0 * float((grams[0] - grams[1]).square().mean()), rel=1e-4)


def test_crops_are_as_without_anchoring_until_the_first_snapshot(pretrain_values, curated):
    """Crops so small that their JPEGs are decoded smaller, unless larger ones are cut out of the same pixels."""
    values = pretrain_values(crops={"global_size": 16, "local_size": 8, "num_local": 2})
    gram = {"weight": 1.0, "teacher_scale": 2, "after_steps": 2}
    jobs = [make_job(changed, curated) for changed in (values, values | {"gram": gram})]
    plain, with_gram_teacher = (TrainingBatches(job.stream, job.batch_plan()) for job in jobs)
    for step in range(4):
        one, other = plain[step], with_gram_teacher[step]
        assert not isinstance(one, Exception)
        assert not isinstance(other, Exception)
        assert (other.gram_crops is None) == (step < 2)
        pairs = ((one.global_crops, other.global_crops), (one.local_crops, other.local_crops))
        assert [torch.equal(*pair) for pair in pairs] == [step < 2] * 2


def test_a_run_that_goes_on_keeps_its_anchor(values, curated, tmp_path):
    whole = make_job(values, curated)
    train_job(whole, Checkpoints(tmp_path / "whole"))

    def stop() -> None:
        raise KeyboardInterrupt

    stopped = make_job(values, curated)
    at_call(stopped, 6, stop)
    with pytest.raises(KeyboardInterrupt):
        train_job(stopped, Checkpoints(tmp_path / "stopped"))
    resumed = make_job(values, curated)
    train_job(resumed, Checkpoints(tmp_path / "stopped"))
    for name in ("student", "ema", "gram_teacher"):
        assert equal(state(resumed, name), state(whole, name))
