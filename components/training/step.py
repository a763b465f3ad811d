"""One training step: teacher, student, loss, gradient, update, moving average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from components.core.distributed import all_reduce_sum, rank, world_size
from components.data.batch import Batch
from components.data.crops import NUM_GLOBAL
from components.objective.gram import GramLoss
from components.objective.total import Objective, StudentOutput
from components.training.config import TrainingConfig
from components.training.networks import Networks
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
    cls_patch_cosine: Tensor  # [], mean over the student's global crops


class TrainingStep:
    """The networks with all that changes them; call it once a step."""

    def __init__(self, networks: Networks, config: TrainingConfig, seed: int, device: torch.device) -> None:
        self.networks = networks
        student = networks.student
        prototypes = [head.config.num_prototypes for head in (student.dino_head, student.ibot_head)]
        self.objective = Objective(config.objective, *prototypes).to(device)
        student.backbone.checkpoint_activations(config.activation_checkpointing)
        if config.compile:
            for network in {student, networks.teacher}:
                for block in network.backbone.blocks:
                    block.compile()
        self._parallel: nn.Module = parallelize(networks, config, device)
        self.optimizer = build_optimizer(student, config.optimizer)
        self._clip_norm = config.optimizer.clip_grad_norm
        self._accumulation_steps = config.accumulation_steps
        self._device_type = device.type
        self._half = config.precision == "bfloat16"
        self._seed = seed
        self._gram, self._anchored = config.gram, False

    def __call__(self, batch: Batch, step: int, values: StepValues) -> StepOutput:
        """Train on a normalised batch, in `accumulation_steps` parts of equally many images.

        Each part is a batch of its own to the targets (Sinkhorn-Knopp and centres are over all ranks' images of the
        part) and to KoLeo; the gradient is the mean of the parts', and weights change once.

        Raises:
            DivergedError: a loss (on any rank) or a gradient is NaN or infinite. No weight has changed.
        """
        self._take_snapshot(step)
        # Stochastic depth draws from torch's generator. Seeded anew for each step and rank, it has no state to keep:
        # a resumed run draws what an uninterrupted one draws.
        torch.manual_seed(int(np.random.SeedSequence([self._seed, step, rank()]).generate_state(1)[0]))
        parts = split_images(batch, self._accumulation_steps)
        outputs = []
        for number, part in enumerate(parts, start=1):
            with self._reduced(last=number == len(parts)):
                outputs.append(self._add_gradient(part, values.teacher_temp))
        terms = {name: torch.stack([out.losses[name] for out in outputs]).mean() for name in outputs[0].losses}
        # Only now, after backward also of what is not finite: then FSDP2 keeps nothing of the parts before the last.
        _check_losses(terms, step)
        grad_norms = clip_gradients(self.networks.student, self._clip_norm)
        _check_gradients(grad_norms, step)
        set_values(self.optimizer, values)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.networks.ema.follow(self.networks.student, values.ema_momentum)
        joined = [_join_images([getattr(o, name) for o in outputs]) for name in ("cls_tokens", "teacher_cls_logits")]
        cosine = torch.stack([out.cls_patch_cosine for out in outputs]).mean()
        return StepOutput(terms, grad_norms, joined[0], joined[1], cosine)

    def _take_snapshot(self, step: int) -> None:
        """Set the anchor to the average where this step is due to, and say whether the step is anchored."""
        if self._gram is None or self.networks.anchor is None:
            return
        number, rest = divmod(step - self._gram.after_steps, self._gram.snapshot_every_steps)
        self._anchored = number >= 0
        if rest == 0 and 0 <= number < self._gram.max_snapshots:
            self.networks.anchor.follow(self.networks.ema, 0.0)

    def _add_gradient(self, batch: Batch, teacher_temp: float) -> StepOutput:
        """Add the gradient of one part of the step's images."""
        loss_masks = batch.masks
        if loss_masks is None:  # nothing is hidden: the patch loss is taken on every patch (distillation)
            patches = (batch.global_crops.shape[-1] // self.networks.student.backbone.config.patch_size) ** 2
            loss_masks = batch.global_crops.new_ones(len(batch.global_crops), patches, dtype=torch.bool)
        num_local = NUM_GLOBAL * len(batch.local_crops) // len(batch.global_crops)
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self._half):
            teacher = self.networks.teacher.targets(batch.global_crops, loss_masks)
            head_losses = self.objective.head_losses(teacher, loss_masks, teacher_temp, num_local)
            if self._gram and self.networks.anchor and self._anchored:
                anchor = self.networks.anchor.patch_tokens(batch.global_crops)
                head_losses = replace(head_losses, gram=GramLoss(anchor, self._gram.weight))
            student: StudentOutput = self._parallel(
                batch.global_crops, batch.local_crops, batch.masks, loss_masks, head_losses
            )
        losses = self.objective(student)
        terms = {item.name: getattr(losses, item.name).detach() for item in fields(losses)}
        del head_losses
        (losses.total / self._accumulation_steps).backward()
        return StepOutput(terms, {}, student.cls_tokens.detach(), teacher.global_cls, student.cls_patch_cosine)

    @contextmanager
    def _reduced(self, *, last: bool) -> Iterator[None]:
        """Gradients are reduced over ranks with the last part only."""
        network = self._parallel
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(last)
        with nullcontext() if last or not isinstance(network, DistributedDataParallel) else network.no_sync():
            yield


def split_images(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch of B images into `parts` batches of B / parts; crop-major, like the whole."""
    if parts == 1:
        return [batch]
    images = len(batch.global_crops) // NUM_GLOBAL

    def cut(rows: Tensor) -> list[Tensor]:
        by_crop = rows.unflatten(0, (-1, images)) if len(rows) else rows.unsqueeze(1).expand(0, images, *rows.shape[1:])
        return [part.flatten(0, 1) for part in by_crop.tensor_split(parts, dim=1)]

    masks = [None] * parts if batch.masks is None else cut(batch.masks)
    cuts = zip(cut(batch.global_crops), cut(batch.local_crops), masks, strict=True)
    return [Batch(large, small, hidden, batch.skipped) for large, small, hidden in cuts]


def _join_images(parts: list[Tensor]) -> Tensor:
    """Crop-major [G * b, N] of each part as [G * B, N] of all."""
    return torch.cat([part.unflatten(0, (NUM_GLOBAL, -1)) for part in parts], dim=1).flatten(0, 1)


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
