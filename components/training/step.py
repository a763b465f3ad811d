"""One training step: teacher, student, loss, gradient, update, moving average."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from components.core.distributed import all_reduce_sum, rank, world_size
from components.data.batch import Batch
from components.objective.total import Objective
from components.training.config import TrainingConfig
from components.training.networks import Networks, StudentOutput
from components.training.optimizer import build_optimizer, clip_gradients, set_values
from components.training.parallelize import parallelize
from components.training.schedules import StepValues


class DivergedError(RuntimeError):
    """A loss or gradient is not finite; the weights are those of the step before.

    Attributes:
        values: this rank's losses, or the norms of its gradients.
    """

    def __init__(self, message: str, values: Mapping[str, Tensor | float]) -> None:
        super().__init__(message)
        self.values = {name: float(value) for name, value in values.items()}


@dataclass(frozen=True)
class StepOutput:
    """What a step leaves for the monitors; nothing carries a gradient."""

    losses: dict[str, Tensor]  # the total and each term, on this rank
    grad_norms: dict[str, Tensor]  # of backbone, dino_head and ibot_head, before clipping
    cls_tokens: Tensor  # [G*B, D] of the student's global crops
    teacher_cls_logits: Tensor  # [G*B, K]


class TrainingStep:
    """The networks with all that changes them; call it once a step."""

    def __init__(self, networks: Networks, config: TrainingConfig, seed: int, device: torch.device) -> None:
        self.networks = networks
        student = networks.student
        prototypes = [head.config.num_prototypes for head in (student.dino_head, student.ibot_head)]
        self.objective = Objective(config.objective, *prototypes).to(device)
        self._parallel: nn.Module = parallelize(networks, config, device)
        self.optimizer = build_optimizer(student, config.optimizer)
        self._clip_norm = config.optimizer.clip_grad_norm
        self._device_type = device.type
        self._half = config.precision == "bfloat16"
        self._seed = seed

    def __call__(self, batch: Batch, step: int, values: StepValues) -> StepOutput:
        """Train on a normalised batch.

        Raises:
            DivergedError: a loss (on any rank) or a gradient is NaN or infinite. No weight has changed.
        """
        # Stochastic depth draws from torch's generator. Seeded anew for each step and rank, it has no state to keep:
        # a resumed run draws what an uninterrupted one draws.
        torch.manual_seed(int(np.random.SeedSequence([self._seed, step, rank()]).generate_state(1)[0]))
        patches = (batch.global_crops.shape[-1] // self.networks.student.backbone.config.patch_size) ** 2
        loss_masks = batch.masks
        if loss_masks is None:  # nothing is hidden: the patch loss is taken on every patch (distillation)
            loss_masks = batch.global_crops.new_ones(len(batch.global_crops), patches, dtype=torch.bool)
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self._half), self._attention():
            teacher = self.networks.teacher.targets(batch.global_crops, loss_masks)
            student: StudentOutput = self._parallel(batch.global_crops, batch.local_crops, batch.masks, loss_masks)
        losses = self.objective(student.logits, teacher, student.cls_tokens, loss_masks, values.teacher_temp)
        terms = {item.name: getattr(losses, item.name).detach() for item in fields(losses)}
        _check_losses(terms, step)
        with self._attention():
            losses.total.backward()
        grad_norms = clip_gradients(self.networks.student, self._clip_norm)
        _check_gradients(grad_norms, step)
        set_values(self.optimizer, values)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.networks.ema.follow(self.networks.student, values.ema_momentum)
        return StepOutput(terms, grad_norms, student.cls_tokens.detach(), teacher.global_cls)

    def _attention(self) -> AbstractContextManager[object]:
        """On CPU, attention as plain matrix products: the fused kernel's backward took half of a step (LOG.md)."""
        return sdpa_kernel(SDPBackend.MATH) if self._device_type == "cpu" else nullcontext()


def _check_losses(terms: dict[str, Tensor], step: int) -> None:
    flags = torch.zeros(world_size(), len(terms), device=terms["total"].device)
    flags[rank()] = torch.stack([~torch.isfinite(term) for term in terms.values()]).float()
    broken = all_reduce_sum(flags).cpu()  # every rank must know, or the others would wait for this one
    if broken.any():
        names = [name for name, column in zip(terms, broken.T, strict=True) if column.any()]
        ranks = [number for number, row in enumerate(broken) if row.any()]
        raise DivergedError(
            f"step {step}: loss is not finite (terms: {', '.join(names)}; ranks: {ranks}); weights are those before "
            "this step. Lower optimizer.base_lr or lengthen optimizer.warmup_steps; if only koleo is concerned, look "
            "for duplicate images",
            terms,
        )


def _check_gradients(norms: dict[str, Tensor], step: int) -> None:
    broken = [name for name, norm in norms.items() if not torch.isfinite(norm)]
    if broken:
        raise DivergedError(
            f"step {step}: gradient of {', '.join(broken)} is not finite although the loss is; weights are those "
            "before this step. Lower optimizer.base_lr, or set precision to float32",
            norms,
        )
