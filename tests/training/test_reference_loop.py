"""Each stage's weights against a loop that is written plainly: no checkpoints, monitors, wrapping or sharing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from components.adaptation import stage as adaptation
from components.adaptation.config import AdaptConfig
from components.core.config import validate
from components.data.batch import BatchPlan, TrainingBatches
from components.data.stream import ImageStream
from components.distillation import stage as distillation
from components.distillation.config import DistillConfig
from components.model.export import load_backbone
from components.objective.total import Objective
from components.pretraining import stage as pretraining
from components.pretraining.config import PretrainConfig
from components.training.config import TrainingConfig
from components.training.initial import draw_network, fill, load_network
from components.training.networks import Networks, self_distillation
from components.training.networks import distillation as taught_by
from components.training.optimizer import build_optimizer, clip_gradients, set_values
from components.training.schedules import Schedules
from tests.training.jobs import load_heads

CPU = torch.device("cpu")


def reference(networks: Networks, config: TrainingConfig, stream: ImageStream, masking: Any, seed: int) -> Networks:
    """Train the networks: targets, loss, backward, clip, update, average."""
    for network in networks.distinct():
        network.to_empty(device="cpu")
    fill(networks.distinct())
    student = networks.student
    objective = Objective(config.objective, *(head.config.num_prototypes for head in student.heads.values()))
    optimizer, schedules = build_optimizer(student, config.optimizer), Schedules(config)
    plan = BatchPlan(seed, config.batch_size, student.backbone.config.patch_size, config.crops, masking)
    batches = TrainingBatches(stream, plan)
    for step in range(config.steps):
        loaded, values = batches[step], schedules.at(step)
        assert not isinstance(loaded, Exception)
        batch = loaded.normalize(CPU)
        patches = (config.crops.global_size // student.backbone.config.patch_size) ** 2
        masks = torch.ones(len(batch.global_crops), patches, dtype=torch.bool) if batch.masks is None else batch.masks
        targets = objective.targets(networks.teacher.targets(batch.global_crops, masks), values.teacher_temp)
        losses = objective.head_losses(targets, masks, config.crops.num_local)
        seen = student(batch.global_crops, batch.local_crops, batch.masks, masks, losses)
        objective(seen).total.backward()
        clip_gradients(student, config.optimizer.clip_grad_norm)
        set_values(optimizer, values)
        optimizer.step()
        optimizer.zero_grad()
        networks.ema.update_ema(student, values.ema_momentum)
    return networks


def assert_shipped(networks: Networks, folder: Path) -> None:
    """The weights of a folder are, bit for bit, the average's."""
    pairs = [(load_backbone(folder), networks.ema.backbone)]
    heads = load_heads(folder)
    pairs += [(heads[name], head) for name, head in networks.ema.heads.items()]
    for shipped, expected in pairs:
        found = shipped.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())


@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
def test_every_stage_makes_what_a_plain_loop_makes(workspace, pretrain_values, tiny, backbone, centering):
    shared = {"objective": {"centering": centering}}
    values = pretrain_values(**shared)
    pretrain = validate(PretrainConfig, values | {"backbone": values["backbone"] | {"drop_path": 0.0}}, "test")
    adapt = validate(AdaptConfig, tiny(**shared, crops={"global_size": 48, "local_size": 16, "num_local": 2}), "test")
    students = {"small": {"backbone": backbone | {"dim": 16}}, "wide": {"backbone": backbone | {"depth": 3}}}
    distill = validate(DistillConfig, tiny(**shared, students=students), "test")
    pretraining.run(pretrain, workspace, 0)
    adaptation.run(adapt, workspace, 0)
    distillation.run(distill, workspace, 0, "tiny")

    models, curated = workspace / "models", workspace / "data" / "curated"
    heads = {"dino": pretrain.dino_head, "ibot": pretrain.ibot_head}
    start = draw_network(pretrain.backbone.trained_at(pretrain.crops.global_size), heads, 0)
    stream = ImageStream(curated, pretrain.stream, 0)
    trained = reference(self_distillation(start), pretrain, stream, pretrain.masking, 0)
    assert_shipped(trained, models / "pretrained")
    start, stream = load_network(models / "pretrained", adapt.crops.global_size), ImageStream(curated, adapt.stream, 1)
    assert_shipped(reference(self_distillation(start), adapt, stream, adapt.masking, 1), models / "adapted")
    for name, student in distill.students.items():
        start = draw_network(student.backbone.trained_at(distill.crops.global_size), heads, 0)
        networks = taught_by(start, load_network(models / "adapted"))
        stream = ImageStream(curated, distill.stream, 0)
        assert_shipped(reference(networks, distill, stream, None, 0), models / "students" / name)
