"""The linear probe's grid of 52 heads against heads that torch trains one by one, on the same cached features."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from components.data.evaluation_set import Labels
from components.evaluation.config import ProbeConfig
from components.evaluation.protocols.probe import ProbeFeatures, fit

COUNT, DIM, LAYERS, CLASSES, STEPS = 2000, 384, 4, 10, 40
HEADS = (52, 4)  # of each side; the second has one head of each input


def sides() -> tuple[Callable[[], object], Callable[[], object]]:
    """Return both trainings: 40 steps of 1,024 of 1,800 train images, on features in float16."""
    generator = np.random.default_rng(0)
    targets = generator.integers(CLASSES, size=COUNT)
    directions = generator.standard_normal((CLASSES, DIM))
    cls_tokens = generator.standard_normal((COUNT, LAYERS, DIM)) + 0.1 * directions[targets][:, None]
    patches = generator.standard_normal((COUNT, DIM)) + 0.1 * directions[targets]
    features = ProbeFeatures(cls_tokens.astype(np.float16), patches.astype(np.float16))
    labels = Labels(tuple(map(str, range(CLASSES))), targets, np.arange(COUNT), np.arange(0))
    config = ProbeConfig(num_steps=STEPS)

    def grid() -> object:
        return fit(features, labels, config, np.random.default_rng(0), "benchmark")

    def single() -> list[torch.nn.Linear]:
        inputs = [(layers, patch) for layers in config.num_layers for patch in (False, True)]
        return [_train_plainly(features, targets, config, *one) for one in inputs]

    return grid, single


def _train_plainly(
    features: ProbeFeatures, targets: np.ndarray, config: ProbeConfig, layers: int, patch: bool
) -> torch.nn.Linear:
    head = torch.nn.Linear(DIM * (layers + patch), CLASSES)
    optimizer = torch.optim.SGD(head.parameters(), config.learning_rates[-1] * config.batch_size / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.num_steps, eta_min=0)
    generator = np.random.default_rng(0)
    for _ in range(config.num_steps):
        rows = generator.permutation(1800)[: config.batch_size]
        parts = [torch.from_numpy(features.cls_tokens[rows, -layers:]).flatten(1)]
        if patch:
            parts.append(torch.from_numpy(features.mean_patch_tokens[rows]))
        optimizer.zero_grad()
        logits = head(torch.cat(parts, dim=1).float())
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets[rows])).backward()
        optimizer.step()
        schedule.step()
    return head
