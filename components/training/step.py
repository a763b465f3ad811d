"""One training step: teacher, student, loss, gradient, update, EMA."""

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
from components.core.errors import PedigreeError
from components.data.batch import Batch
from components.data.crops import NUM_GLOBAL
from components.objective.gram import GramLoss, to_grid
from components.objective.total import Objective, StudentOutput, TeacherTargets
from components.training.config import TrainingConfig
from components.training.networks import Networks
from components.training.optimizer import build_optimizer, clip_gradients, set_values
from components.training.parallelize import parallelize
from components.training.schedules import StepValues


class DivergedError(PedigreeError):
    """A loss or gradient is not finite; the weights are unchanged.

    Attributes:
        values: this rank's losses, or its gradient norms.
    """

    def __init__(self, message: str, values: Mapping[str, Tensor | float]) -> None:
        super().__init__(message)
        self.values = {name: float(value) for name, value in values.items()}


@dataclass(frozen=True)
class StepOutput:
    """Outputs of a step for the monitors; all are detached."""

    losses: dict[str, Tensor]  # the total and each term, on this rank
    grad_norms: dict[str, Tensor]  # of backbone, dino_head and ibot_head, before clipping
    cls_tokens: Tensor  # [G*B, D] of the student's global crops, by micro-batch
    teacher_cls_logits: Tensor  # [G*B, K]
    cls_patch_cosine: Tensor  # [], mean over the student's global crops


class TrainingStep:
    """Networks with their optimizer and objective; call it once per step.

    Attributes:
        networks: prepared by `parallelize`, which the constructor calls.
    """

    def __init__(self, networks: Networks, config: TrainingConfig, seed: int, device: torch.device) -> None:
        self.networks = networks
        student = networks.student
        prototypes = [head.config.num_prototypes for head in (student.dino_head, student.ibot_head)]
        self.objective = Objective(config.objective, *prototypes).to(device)
        self._parallel: nn.Module = parallelize(networks, config, device)
        self.optimizer = build_optimizer(student, config.optimizer)
        self.accumulation_steps = config.accumulation_steps
        self._clip_norm = config.optimizer.clip_grad_norm
        self._device_type = device.type
        self._bfloat16 = config.bfloat16
        self._seed = seed
        self._gram, self._gram_active = config.gram, False

    def __call__(self, batch: Batch, step: int, values: StepValues) -> StepOutput:
        """Train on a normalized batch, in `accumulation_steps` equal micro-batches.

        Targets (Sinkhorn-Knopp and centers, over all ranks) and KoLeo are computed per micro-batch; the gradient is the
        mean over micro-batches, and weights are updated once.

        Raises:
            DivergedError: a loss (on any rank) or a gradient is NaN or infinite. The state is unchanged.
        """
        self._take_snapshot(step)
        centers = [buffer.clone() for buffer in self.objective.buffers()]
        parts, outputs = split_images(batch, self.accumulation_steps), list[StepOutput]()
        for number, part in enumerate(parts):
            masks = self._loss_masks(part)
            # No local variable holds the targets, so that the backward pass can free their memory.
            with self._reduced(last=number + 1 == len(parts)):
                loss, output = self._loss(part, masks, self._targets(part, masks, values), (step, number))
                (loss / len(parts)).backward()
            outputs.append(output)
        terms = {name: torch.stack([part.losses[name] for part in outputs]).mean() for name in outputs[0].losses}
        try:
            # Checked after the backward pass, so that FSDP2 keeps no gradients of earlier micro-batches.
            _check_losses(terms, step)
            grad_norms = clip_gradients(self.networks.student, self._clip_norm)
            _check_gradients(grad_norms, step)
        except DivergedError:
            for buffer, value in zip(self.objective.buffers(), centers, strict=True):
                buffer.copy_(value)
            self.optimizer.zero_grad()
            raise
        set_values(self.optimizer, values)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.networks.ema.update_ema(self.networks.student, values.ema_momentum)
        return _joined(outputs, terms, grad_norms)

    def _loss_masks(self, batch: Batch) -> Tensor:
        """Return the patches in the patch loss, [G*B, P] bool; all of them without masking (distillation)."""
        if batch.masks is not None:
            return batch.masks
        patches = (batch.global_crops.shape[-1] // self.networks.student.backbone.config.patch_size) ** 2
        return batch.global_crops.new_ones(len(batch.global_crops), patches, dtype=torch.bool)

    def _targets(self, batch: Batch, loss_masks: Tensor, values: StepValues) -> TeacherTargets:
        """Return the teacher probabilities after centering."""
        with self._autocast():
            logits = self.networks.teacher.targets(batch.global_crops, loss_masks)
            return self.objective.targets(logits, values.teacher_temp)

    def _loss(
        self, batch: Batch, loss_masks: Tensor, targets: TeacherTargets, drawn_by: tuple[int, int]
    ) -> tuple[Tensor, StepOutput]:
        """Return the loss of a micro-batch, [] with its graph, and its outputs.

        Args:
            batch: the micro-batch.
            loss_masks: [G*B, P] bool, patches that enter the patch loss.
            targets: of the teacher.
            drawn_by: step and index of the micro-batch.
        """
        # Stochastic depth draws from torch's generator. Reseeding it for each step, rank and micro-batch makes a
        # resumed run equal to an uninterrupted one, and a student in a group equal to one that is trained alone.
        step, part = drawn_by
        torch.manual_seed(int(np.random.SeedSequence([self._seed, step, rank(), part]).generate_state(1)[0]))
        num_local = NUM_GLOBAL * len(batch.local_crops) // len(batch.global_crops)
        with self._autocast():
            head_losses = self.objective.head_losses(targets, loss_masks, num_local)
            head_losses = replace(head_losses, gram=self._gram_loss(batch, loss_masks.shape[1]))
            student: StudentOutput = self._parallel(
                batch.global_crops, batch.local_crops, batch.masks, loss_masks, head_losses
            )
        losses = self.objective(student)
        terms = {item.name: getattr(losses, item.name).detach() for item in fields(losses)}
        tokens = student.cls_tokens.detach()
        return losses.total, StepOutput(terms, {}, tokens, targets.global_cls.logits, student.cls_patch_cosine)

    def _gram_loss(self, batch: Batch, num_patches: int) -> GramLoss | None:
        if self._gram is None or self.networks.gram_teacher is None or not self._gram_active:
            return None
        if batch.gram_crops is None:
            return GramLoss(self.networks.gram_teacher.patch_tokens(batch.global_crops), self._gram.weight)
        gram = self.networks.gram_teacher.patch_tokens(batch.gram_crops)
        return GramLoss(to_grid(gram, num_patches), self._gram.weight)

    @contextmanager
    def _reduced(self, *, last: bool) -> Iterator[None]:
        """Reduce gradients over ranks in the last micro-batch only."""
        network = self._parallel
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(last)
        with nullcontext() if last or not isinstance(network, DistributedDataParallel) else network.no_sync():
            yield

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device_type, torch.bfloat16, enabled=self._bfloat16)

    def _take_snapshot(self, step: int) -> None:
        """Update the Gram teacher from the EMA at scheduled steps, and set whether Gram anchoring is active."""
        if self._gram is None or self.networks.gram_teacher is None:
            return
        number, rest = divmod(step - self._gram.after_steps, self._gram.snapshot_every_steps)
        self._gram_active = number >= 0
        if rest == 0 and 0 <= number < self._gram.max_snapshots:
            self.networks.gram_teacher.update_ema(self.networks.ema, 0.0)


def _joined(parts: list[StepOutput], terms: dict[str, Tensor], grad_norms: dict[str, Tensor]) -> StepOutput:
    joined = [torch.cat([getattr(o, name) for o in parts]) for name in ("cls_tokens", "teacher_cls_logits")]
    cosine = torch.stack([part.cls_patch_cosine for part in parts]).mean()
    return StepOutput(terms, grad_norms, joined[0], joined[1], cosine)


def split_images(batch: Batch, parts: int) -> list[Batch]:
    """Split a batch of B images into `parts` crop-major batches of B / parts."""
    if parts == 1:
        return [batch]
    images = len(batch.global_crops) // NUM_GLOBAL

    def cut(rows: Tensor) -> list[Tensor]:
        by_crop = rows.unflatten(0, (-1, images)) if len(rows) else rows.unsqueeze(1).expand(0, images, *rows.shape[1:])
        return [part.flatten(0, 1) for part in by_crop.tensor_split(parts, dim=1)]

    optional = [[None] * parts if rows is None else cut(rows) for rows in (batch.masks, batch.gram_crops)]
    cuts = zip(cut(batch.global_crops), cut(batch.local_crops), *optional, strict=True)
    return [Batch(large, small, hidden, batch.skipped, gram) for large, small, hidden, gram in cuts]


def _check_losses(terms: dict[str, Tensor], step: int) -> None:
    flags = torch.zeros(world_size(), len(terms), device=terms["total"].device)
    flags[rank()] = torch.stack([~torch.isfinite(term) for term in terms.values()]).float()
    broken = all_reduce_sum(flags).cpu()  # on all ranks, so that they raise together
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
