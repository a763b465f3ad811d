"""One training step: teacher, student, loss, gradient, update, moving average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from components.objective.total import Objective, StudentOutput, TeacherLogits, TeacherTargets
from components.training.config import TrainingConfig
from components.training.networks import Networks
from components.training.optimizer import build_optimizer, clip_gradients, set_values
from components.training.parallelize import parallelize
from components.training.schedules import StepValues


class DivergedError(PedigreeError):
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
    cls_tokens: Tensor  # [G*B, D] of the student's global crops, part by part
    teacher_cls_logits: Tensor  # [G*B, K]
    cls_patch_cosine: Tensor  # [], mean over the student's global crops


class TrainingStep:
    """The networks with all that changes them; call it once a step, or let `take_step` step several of them."""

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
        self.accumulation_steps = config.accumulation_steps
        self._clip_norm = config.optimizer.clip_grad_norm
        self._device_type = device.type
        self._half = config.half
        self._seed = seed
        self._gram, self._anchored = config.gram, False
        self._step, self._parts, self._centres = 0, list[StepOutput](), list[Tensor]()

    def __call__(self, batch: Batch, step: int, values: StepValues) -> StepOutput:
        """Train on a normalised batch, in `accumulation_steps` parts of equally many images.

        Each part is a batch of its own to the targets (Sinkhorn-Knopp and centres are over all ranks' images of the
        part) and to KoLeo; the gradient is the mean of the parts', and weights change once.

        Raises:
            DivergedError: a loss (on any rank) or a gradient is NaN or infinite. Nothing has changed.
        """
        (outcome,) = take_step([self], batch, step, values)
        if isinstance(outcome, DivergedError):
            raise outcome
        return outcome

    def begin(self, step: int) -> None:
        """Make ready for the parts of a step."""
        self._take_snapshot(step)
        self._step, self._parts = step, []
        self._centres = [buffer.clone() for buffer in self.objective.buffers()]

    def targets(self, batch: Batch, loss_masks: Tensor) -> TeacherLogits:
        """The teacher's view of one part of the step's images."""
        with self._autocast():
            return self.networks.teacher.targets(batch.global_crops, loss_masks)

    def assign(self, teacher: TeacherLogits, teacher_temp: float) -> TeacherTargets:
        """What the student is to say, given the teacher's view."""
        with self._autocast():
            return self.objective.targets(teacher, teacher_temp)

    def loss(self, batch: Batch, loss_masks: Tensor, targets: TeacherTargets) -> Tensor:
        """The loss of the next part, [], with its graph."""
        # Stochastic depth draws from torch's generator. Seeded anew for each step, rank and part, it has no state to
        # keep: a resumed run draws what an uninterrupted one draws, and a student what it draws by itself.
        drawn_by = [self._seed, self._step, rank(), len(self._parts)]
        torch.manual_seed(int(np.random.SeedSequence(drawn_by).generate_state(1)[0]))
        num_local = NUM_GLOBAL * len(batch.local_crops) // len(batch.global_crops)
        with self._autocast():
            head_losses = self.objective.head_losses(targets, loss_masks, num_local)
            if self._gram and self.networks.anchor and self._anchored:
                seen = batch.global_crops if batch.anchor_crops is None else batch.anchor_crops
                anchor = self.networks.anchor.patch_tokens(seen)
                if batch.anchor_crops is not None:
                    anchor = to_grid(anchor, loss_masks.shape[1])
                head_losses = replace(head_losses, gram=GramLoss(anchor, self._gram.weight))
            student: StudentOutput = self._parallel(
                batch.global_crops, batch.local_crops, batch.masks, loss_masks, head_losses
            )
        losses = self.objective(student)
        terms = {item.name: getattr(losses, item.name).detach() for item in fields(losses)}
        tokens = student.cls_tokens.detach()
        self._parts.append(StepOutput(terms, {}, tokens, targets.global_cls.logits, student.cls_patch_cosine))
        return losses.total

    def finish(self, values: StepValues) -> StepOutput | DivergedError:
        """Update the weights, if the losses and gradients of all parts are finite; otherwise all is as before."""
        parts, self._parts = self._parts, []
        terms = {name: torch.stack([part.losses[name] for part in parts]).mean() for name in parts[0].losses}
        try:
            # Only now, after backward also of what is not finite: then FSDP2 keeps nothing of the earlier parts.
            _check_losses(terms, self._step)
            grad_norms = clip_gradients(self.networks.student, self._clip_norm)
            _check_gradients(grad_norms, self._step)
        except DivergedError as error:
            for buffer, value in zip(self.objective.buffers(), self._centres, strict=True):
                buffer.copy_(value)
            self.optimizer.zero_grad()
            return error
        set_values(self.optimizer, values)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.networks.ema.follow(self.networks.student, values.ema_momentum)
        joined = [torch.cat([getattr(o, name) for o in parts]) for name in ("cls_tokens", "teacher_cls_logits")]
        cosine = torch.stack([part.cls_patch_cosine for part in parts]).mean()
        return StepOutput(terms, grad_norms, joined[0], joined[1], cosine)

    @contextmanager
    def reduced(self, *, last: bool) -> Iterator[None]:
        """Gradients are reduced over ranks with the last part only."""
        network = self._parallel
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(last)
        with nullcontext() if last or not isinstance(network, DistributedDataParallel) else network.no_sync():
            yield

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device_type, torch.bfloat16, enabled=self._half)

    def _take_snapshot(self, step: int) -> None:
        """Set the anchor to the average where this step is due to, and say whether the step is anchored."""
        if self._gram is None or self.networks.anchor is None:
            return
        number, rest = divmod(step - self._gram.after_steps, self._gram.snapshot_every_steps)
        self._anchored = number >= 0
        if rest == 0 and 0 <= number < self._gram.max_snapshots:
            self.networks.anchor.follow(self.networks.ema, 0.0)


def take_step(
    trainings: Sequence[TrainingStep], batch: Batch, step: int, values: StepValues
) -> list[StepOutput | DivergedError]:
    """Let each training take one step on the same batch; the teacher, which they share, looks at it once.

    Returns:
        For each training what its step left, or why it was not taken.
    """
    for training in trainings:
        training.begin(step)
    first = trainings[0]
    parts = split_images(batch, first.accumulation_steps)
    for number, part in enumerate(parts):
        masks = part.masks
        if masks is None:  # nothing is hidden: the patch loss is taken on every patch (distillation)
            patches = (part.global_crops.shape[-1] // first.networks.student.backbone.config.patch_size) ** 2
            masks = part.global_crops.new_ones(len(part.global_crops), patches, dtype=torch.bool)
        seen = first.targets(part, masks)
        # Sinkhorn-Knopp looks at these logits only, so that its targets are all students'; centres are each one's own.
        own = trainings if first.objective.config.centering == "softmax" else [first]
        targets = [training.assign(seen, values.teacher_temp) for training in own] * (len(trainings) // len(own))
        del seen  # handed out below: the last student's backward must not hold the logits, which nobody needs any more
        for training in trainings:
            with training.reduced(last=number + 1 == len(parts)):
                loss = training.loss(part, masks, targets.pop(0))
                (loss / len(parts)).backward()
    return [training.finish(values) for training in trainings]


def split_images(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch of B images into `parts` batches of B / parts; crop-major, like the whole."""
    if parts == 1:
        return [batch]
    images = len(batch.global_crops) // NUM_GLOBAL

    def cut(rows: Tensor) -> list[Tensor]:
        by_crop = rows.unflatten(0, (-1, images)) if len(rows) else rows.unsqueeze(1).expand(0, images, *rows.shape[1:])
        return [part.flatten(0, 1) for part in by_crop.tensor_split(parts, dim=1)]

    optional = [[None] * parts if rows is None else cut(rows) for rows in (batch.masks, batch.anchor_crops)]
    cuts = zip(cut(batch.global_crops), cut(batch.local_crops), *optional, strict=True)
    return [Batch(large, small, hidden, batch.skipped, anchor) for large, small, hidden, anchor in cuts]


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
