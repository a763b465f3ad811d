"""The whole training objective: DINO on class tokens, iBOT on masked patches, KoLeo on class tokens before the head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from components.objective.centering import SoftmaxCentering, Targets, sinkhorn_knopp
from components.objective.config import ObjectiveConfig
from components.objective.dino import dino_loss
from components.objective.gram import GramLoss
from components.objective.ibot import ibot_loss
from components.objective.koleo import koleo_loss
from components.objective.prototypes import PrototypeLoss


@dataclass(frozen=True)
class TeacherLogits:
    """Head outputs of the teacher for the unmasked global crops.

    Attributes:
        global_cls: [G * B, K], crop-major (all images of crop 1, then of crop 2, ...).
        masked_patches: [M, K'], in the order of `masks.nonzero()`; no rows if nothing is masked.
    """

    global_cls: Tensor
    masked_patches: Tensor


@dataclass(frozen=True)
class TeacherTargets:
    """Teacher probabilities after centering, in the rows of `TeacherLogits`."""

    global_cls: Targets
    masked_patches: Targets


@dataclass(frozen=True)
class HeadLosses:
    """Losses that the student's heads compute in place of logits."""

    dino: PrototypeLoss  # of class tokens [(G + L) * B, D], global crops first, crop-major
    ibot: PrototypeLoss  # of masked patches [M, D]
    gram: GramLoss | None = None  # of all patches of the global crops [G * B, P, D]


@dataclass(frozen=True)
class StudentOutput:
    """Loss terms and features of the student for a batch.

    Attributes:
        dino: [2] float32, terms of local and global crops.
        ibot: [1] float32.
        cls_tokens: [G * B, D] class tokens of the global crops before the head, crop-major.
        cls_patch_cosine: [] float32, of the global crops; for the monitors.
        gram: [] float32; None without Gram anchoring.
    """

    dino: Tensor
    ibot: Tensor
    cls_tokens: Tensor
    cls_patch_cosine: Tensor
    gram: Tensor | None = None


@dataclass(frozen=True)
class Losses:
    """Weighted terms, which add up to `total`. All [] float32, in nats except `gram`."""

    total: Tensor
    dino_local: Tensor
    dino_global: Tensor
    ibot: Tensor
    koleo: Tensor
    gram: Tensor


# So that wrappers which look for tensors in a module's output find them.
torch.export.register_dataclass(StudentOutput)
torch.export.register_dataclass(Losses)


class Objective(nn.Module):
    """Weighted sum of the terms, as in `dinov2/train/ssl_meta_arch.py` (METHOD 3.1).

    `targets` centers the teacher's logits; `head_losses` builds the losses that the student's heads evaluate; `forward`
    adds their results and KoLeo. With T = G (G - 1) + G L pairs of crops:
    dino_local and dino_global are dino_weight / T times the sum over their pairs; ibot is ibot_weight times the mean
    over all G B crops; koleo is koleo_weight times the sum over the G crops.

    The centers of the softmax centering are buffers, so checkpoints must include them.
    """

    def __init__(self, config: ObjectiveConfig, dino_prototypes: int, ibot_prototypes: int) -> None:
        super().__init__()
        self.config = config
        if config.centering == "softmax":
            self.dino_centering = SoftmaxCentering(dino_prototypes, config.center_momentum)
            self.ibot_centering = SoftmaxCentering(ibot_prototypes, config.center_momentum)

    def targets(self, teacher: TeacherLogits, teacher_temp: float) -> TeacherTargets:
        """Return targets by the configured centering; they keep references to the logits. Every rank must call.

        Args:
            teacher: no gradient flows into its logits.
            teacher_temp: positive.
        """
        config = self.config
        if config.centering == "softmax":
            return TeacherTargets(
                self.dino_centering(teacher.global_cls, teacher_temp),
                self.ibot_centering(teacher.masked_patches, teacher_temp),
            )
        pair = (teacher.global_cls, teacher.masked_patches)
        return TeacherTargets(*(sinkhorn_knopp(rows, teacher_temp, config.sinkhorn_iterations) for rows in pair))

    def head_losses(self, targets: TeacherTargets, masks: Tensor, num_local: int, num_global: int = 2) -> HeadLosses:
        """Return the losses for the student's heads.

        Args:
            targets: of the teacher.
            masks: [G * B, P] bool, crop-major; true patches enter the patch loss.
            num_local: L, local crops of an image.
            num_global: G, at least 2.

        Raises:
            ValueError: shapes that do not fit together.
        """
        config = self.config
        _check_rows(len(targets.global_cls.logits), masks, num_global)
        pairs = num_global * (num_global - 1 + num_local)
        return HeadLosses(
            dino_loss(targets.global_cls.by_crop(num_global), config.dino_weight / pairs, config.student_temp),
            ibot_loss(targets.masked_patches, masks, config.ibot_weight, config.student_temp),
        )

    def forward(self, student: StudentOutput, num_global: int = 2) -> Losses:
        """Add the terms of the heads and KoLeo, in float32 under any autocast dtype.

        Raises:
            ValueError: one image per rank and koleo_weight is set.
        """
        koleo = self._koleo(student.cls_tokens, num_global)
        local_term, global_term = student.dino.detach().unbind()
        gram = torch.zeros_like(koleo) if student.gram is None else student.gram
        total = student.dino.sum() + student.ibot.sum() + koleo + gram
        return Losses(total, local_term, global_term, student.ibot.detach().sum(), koleo, gram)

    def _koleo(self, cls_tokens: Tensor, crops: int) -> Tensor:
        weight = self.config.koleo_weight
        if weight is None:  # e.g. because a rank holds one image
            return cls_tokens.new_zeros((), dtype=torch.float32)
        terms = [koleo_loss(tokens) for tokens in cls_tokens.chunk(crops)]
        return weight * torch.stack(terms).sum()


def _check_rows(rows: int, masks: Tensor, crops: int) -> None:
    if crops < 2 or not rows or rows % crops:
        raise ValueError(f"global_cls must hold 2 or more crops of each image, got {rows} rows for {crops} crops")
    if len(masks) != rows:
        raise ValueError(f"teacher and masks must agree on the number of global crops, got {rows} and {len(masks)}")
