"""The whole training objective: DINO on class tokens, iBOT on masked patches, KoLeo on class tokens before the head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from components.objective.centering import SoftmaxCentering, sinkhorn_knopp
from components.objective.config import ObjectiveConfig
from components.objective.dino import dino_loss
from components.objective.ibot import ibot_loss
from components.objective.koleo import koleo_loss


@dataclass(frozen=True)
class StudentLogits:
    """Head outputs of the student, crops stacked crop-major (all images of crop 1, then of crop 2, ...).

    Attributes:
        global_cls: [G * B, K].
        local_cls: [L * B, K]; no rows without local crops.
        masked_patches: [M, K'], in the order of `masks.nonzero()`; no rows if nothing is masked.
    """

    global_cls: Tensor
    local_cls: Tensor
    masked_patches: Tensor


@dataclass(frozen=True)
class TeacherLogits:
    """Head outputs of the teacher, which sees global crops only, unmasked.

    Attributes:
        global_cls: [G * B, K], crop-major.
        masked_patches: [M, K'], of the same patches as the student's.
    """

    global_cls: Tensor
    masked_patches: Tensor


@dataclass(frozen=True)
class Losses:
    """Terms as they enter the total, weights included: the four add up to it. All [] float32, in nats."""

    total: Tensor
    dino_local: Tensor
    dino_global: Tensor
    ibot: Tensor
    koleo: Tensor


# So that wrappers which look for tensors in a module's output find them.
torch.export.register_dataclass(Losses)


class Objective(nn.Module):
    """Weighted sum of the terms, as in `dinov2/train/ssl_meta_arch.py` (METHOD 3.1).

    With T = G (G - 1) + G L pairs of crops: dino_local and dino_global are dino_weight / T times the sum over their
    pairs; ibot is ibot_weight times the mean over all G B crops; koleo is koleo_weight times the sum over the G crops.
    The centres of the softmax centring are buffers and belong into checkpoints.
    """

    def __init__(self, config: ObjectiveConfig, dino_prototypes: int, ibot_prototypes: int) -> None:
        super().__init__()
        self.config = config
        if config.centering == "softmax":
            self.dino_centering = SoftmaxCentering(dino_prototypes, config.center_momentum)
            self.ibot_centering = SoftmaxCentering(ibot_prototypes, config.center_momentum)

    def forward(
        self,
        student: StudentLogits,
        teacher: TeacherLogits,
        student_cls_tokens: Tensor,
        masks: Tensor,
        teacher_temp: float,
        num_global_crops: int = 2,
    ) -> Losses:
        """Compute every term in float32, whatever the autocast dtype. Every rank must call, for the teacher's targets.

        Args:
            student: logits of the student.
            teacher: logits of the teacher; no gradient flows into them.
            student_cls_tokens: [G * B, D] class tokens of the global crops before the head, crop-major.
            masks: [G * B, P] bool, crop-major; true patches were hidden from the student.
            teacher_temp: positive.
            num_global_crops: G, at least 2.

        Raises:
            ValueError: shapes that do not fit together, or one image per rank with a positive koleo_weight.
        """
        crops = num_global_crops
        _check_rows(student, teacher, masks, crops)
        targets = self._targets(teacher, teacher_temp)
        by_crop = targets.global_cls.unflatten(0, (crops, -1))  # [G, B, K]
        batch, prototypes = by_crop.shape[1:]
        local_logits = student.local_cls.reshape(-1, batch, prototypes)  # [L, B, K]
        pairs = crops * (crops - 1) + crops * len(local_logits)
        scale, temp = self.config.dino_weight / pairs, self.config.student_temp
        dino_local = scale * dino_loss(local_logits, by_crop, temp)
        global_logits = student.global_cls.unflatten(0, (crops, -1))
        dino_global = scale * dino_loss(global_logits, by_crop, temp, skip_same_crop=True)
        ibot = self.config.ibot_weight * ibot_loss(student.masked_patches, targets.masked_patches, masks, temp)
        koleo = self._koleo(student_cls_tokens, crops)
        return Losses(dino_local + dino_global + ibot + koleo, dino_local, dino_global, ibot, koleo)

    def _targets(self, teacher: TeacherLogits, teacher_temp: float) -> TeacherLogits:
        """Teacher logits turned into probabilities, in the same layout."""
        if self.config.centering == "softmax":
            return TeacherLogits(
                self.dino_centering(teacher.global_cls, teacher_temp),
                self.ibot_centering(teacher.masked_patches, teacher_temp),
            )
        iterations = self.config.sinkhorn_iterations
        return TeacherLogits(
            sinkhorn_knopp(teacher.global_cls, teacher_temp, iterations),
            sinkhorn_knopp(teacher.masked_patches, teacher_temp, iterations),
        )

    def _koleo(self, cls_tokens: Tensor, crops: int) -> Tensor:
        if not self.config.koleo_weight:  # a weight of 0 is how a run with one image per rank does without it
            return cls_tokens.new_zeros((), dtype=torch.float32)
        terms = [koleo_loss(tokens) for tokens in cls_tokens.chunk(crops)]
        return self.config.koleo_weight * torch.stack(terms).sum()


def _check_rows(student: StudentLogits, teacher: TeacherLogits, masks: Tensor, crops: int) -> None:
    rows = len(student.global_cls)
    if crops < 2 or not rows or rows % crops:
        raise ValueError(f"global_cls must hold 2 or more crops of each image, got {rows} rows for {crops} crops")
    if len(teacher.global_cls) != rows or len(masks) != rows:
        raise ValueError(f"student, teacher and masks must agree, got {rows}, {len(teacher.global_cls)}, {len(masks)}")
    if len(student.local_cls) % (rows // crops):
        raise ValueError(f"local_cls has {len(student.local_cls)} rows, not a multiple of {rows // crops} images")
