"""One side of the `step` benchmark in a process of its own, so that its peak memory is its own.

    python -m tests.benchmarks.step_side '{"side": "ours"}'

For each line on stdin it trains one step and answers with one line of JSON; at the end of stdin it ends.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from components.data.batch import Batch
from components.data.config import MaskingConfig
from components.data.masking import sample_masks
from components.model.config import HeadConfig, ViTConfig
from components.model.head import ProjectionHead
from components.model.vit import VisionTransformer
from components.training.config import TrainingConfig
from components.training.networks import Network, Networks, self_distillation
from components.training.schedules import StepValues
from components.training.step import TrainingStep
from tests.benchmarks import step_without
from tests.benchmarks.ibot_baseline import PlainStep

VALUES = StepValues(lr=1e-4, last_layer_lr=1e-4, weight_decay=0.04, ema_momentum=0.994, teacher_temp=0.04)


@dataclass(frozen=True)
class Side:
    """What a side does; `without` names one technique of ours that it does not use (step_without.py)."""

    side: str  # "ours" or "plain"
    precision: str = "bfloat16"
    activation_checkpointing: str = "selective"
    without: str | None = None
    batch_size: int = 8
    prototypes: int = 65_536
    drop_path: float = 0.3  # the ImageNet-1k recipe

    def line(self) -> str:
        """The argument that makes `main` run this side."""
        return json.dumps(asdict(self))


def networks(side: Side) -> Networks:
    """ViT-S/14 with registers and two heads, seeded."""
    torch.manual_seed(0)
    shape = ViTConfig(dim=384, depth=12, num_heads=6, image_size=224, drop_path=side.drop_path)
    backbone = VisionTransformer(shape)
    head = HeadConfig(num_prototypes=side.prototypes)
    return self_distillation(Network(backbone, {name: ProjectionHead(384, head) for name in ("dino", "ibot")}))


def batch(side: Side) -> Batch:
    """2 x 224 and 8 x 98 pixels of noise; half of the global crops masked."""
    size = side.batch_size
    masks = torch.from_numpy(sample_masks(2 * size, (16, 16), MaskingConfig(), np.random.default_rng(0)))
    return Batch(torch.randn(2 * size, 3, 224, 224), torch.randn(8 * size, 3, 98, 98), masks, [])


def training(side: Side) -> Callable[[int], Any]:
    """A function that trains one step."""
    images = batch(side)
    if side.side == "plain":
        plain = PlainStep(networks(side), TrainingConfig())
        return lambda step: plain(images, VALUES)
    values = {
        "batch_size": side.batch_size,
        "precision": side.precision,
        "activation_checkpointing": side.activation_checkpointing,
    }
    config = TrainingConfig.model_validate(values)
    kind = step_without.leave_out(side.without) if side.without else TrainingStep
    step = kind(networks(side), config, 0, torch.device("cpu"))
    return lambda number: step(images, number, VALUES)


def main() -> None:
    """Train a step for each line on stdin."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    imported = _peak_mib()
    step = training(Side(**json.loads(sys.argv[1])))
    for number, _ in enumerate(sys.stdin):
        begun = time.perf_counter()
        step(number)
        answer = {"seconds": time.perf_counter() - begun, "peak_mib": _peak_mib(), "imported_mib": imported}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
