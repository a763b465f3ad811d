"""Alerts, each made to happen in a training."""

from __future__ import annotations

import logging
import time

import pytest
import torch

from components.data.batch import TrainingBatches
from components.training.alerts import Alert, Alerts, Watch, read_alerts
from components.training.checkpoint import Checkpoints
from components.training.config import AlertConfig
from tests.training.jobs import make_job, train_job


def test_collapse_is_told_once_with_step_rank_term_and_cause(curated, pretrain_values, tmp_path, caplog):
    """All images have the same features, and a learning rate so small that it stays so."""
    optimizer = {"base_lr": 1e-12, "min_lr": 0.0, "warmup_steps": 1, "freeze_last_layer_steps": 0}
    monitor = {"alerts": {"max_wait_share": 1.0}}  # loading in the trainer counts as waiting
    job = make_job(pretrain_values(steps=4, optimizer=optimizer, monitor=monitor), curated)
    training = job.training_step()
    with torch.no_grad():
        for network in (job.networks.student, job.networks.ema):
            network.backbone.norm.weight.zero_()
            network.backbone.norm.bias.fill_(1.0)
    with caplog.at_level(logging.WARNING, "components"):
        rows = train_job(job, Checkpoints(tmp_path), training)
    assert [row["feature_std"] for row in rows] == [pytest.approx(0, abs=1e-6)] * 4
    assert [row["cls_patch_cosine"] for row in rows] == [pytest.approx(1.0)] * 4
    assert [row["prototypes_used"] for row in rows] == [1 / 64] * 4
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3  # one a term, and none in the warm-up's step
    assert told[0].startswith("pretrain: alert: step 2: collapse: feature_std is ")
    assert told[1].startswith("pretrain: alert: step 2: collapse: effective_rank is ")
    assert told[2].startswith("pretrain: alert: step 2: collapse: target_entropy is 4.16, above 4.14 (ranks: [0]); ")
    assert "lower optimizer.base_lr" in told[0]
    assert [f"pretrain: alert: {alert.message}" for alert in read_alerts(tmp_path)] == told


def test_starvation_is_told_from_the_second_row_on(curated, pretrain_values, tmp_path, monkeypatch):
    made = TrainingBatches.__getitem__

    def slow(self, step):
        time.sleep(1.0 if step in (1, 2, 3) else 0.0)
        return made(self, step)

    monkeypatch.setattr(TrainingBatches, "__getitem__", slow)
    train_job(make_job(pretrain_values(steps=4), curated), Checkpoints(tmp_path))
    starved = [alert for alert in read_alerts(tmp_path) if alert.kind == "starvation"]
    assert len(starved) == 1
    assert starved[0].step in (2, 3)  # the second row in a row; the first batch may come late too
    assert "data_wait_share is 0." in starved[0].message
    assert "raise stream.num_workers" in starved[0].message


def test_ranks_are_named_and_what_went_away_may_come_back(tmp_path):
    watch = Watch(Alerts(tmp_path, 0), AlertConfig(), after_steps=10, max_entropy=4.0)
    healthy = {"feature_std": [0.8, 0.7], "effective_rank": [9.0, 9.0], "target_entropy": [2.0, 2.0]}
    rows = [(10, [0.8, 0.01]), (20, [0.8, 0.02]), (30, [0.8, 0.03]), (40, [0.8, 0.7]), (50, [0.04, 0.05])]
    for step, spread in rows:
        watch.check(step, {**healthy, "feature_std": spread, "data_wait_share": [0.0, 0.4]})
    first, again = read_alerts(tmp_path)
    assert (first.step, again.step) == (20, 50)
    assert "feature_std is 0.02, below 0.1 (ranks: [1])" in first.message
    assert "feature_std is 0.04, below 0.1 (ranks: [0, 1])" in again.message
    Alerts(tmp_path, 60).add(Alert(70, "collapse", "once more"))  # a run that goes on keeps what was told
    assert [alert.step for alert in read_alerts(tmp_path)] == [20, 50, 70]
