"""Cross-entropy between the class-token assignments of teacher and student crops (DINO)."""

from __future__ import annotations

import torch
from torch import Tensor


def dino_loss(
    student_logits: Tensor, teacher_probs: Tensor, student_temp: float, *, skip_same_crop: bool = False
) -> Tensor:
    """Sum over pairs of a student and a teacher crop of the cross-entropy, mean over the batch, in nats.

    DINO (arXiv 2104.14294, eq. 2), `dinov2/loss/dino_clstoken_loss.py`:

        for each student crop s, for each teacher crop t:
            loss -= mean over b of (probs[t, b] * log_softmax(logits[s, b] / temp)).sum()

    Args:
        student_logits: [S, B, K].
        teacher_probs: [T, B, K], rows that sum to 1; taken as constant.
        student_temp: positive.
        skip_same_crop: leave out the pairs s = t, where student and teacher saw the same crop; S = T. With two global
            crops that is the released code's swap of the teacher's crops.

    Returns:
        [] float32, whatever the autocast dtype; 0 if there is no student crop.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        log_probs = torch.log_softmax(student_logits.float() / student_temp, dim=-1)  # [S, B, K]
        targets = teacher_probs.detach().float()
        # Cross-entropy is linear in the target, so the teacher crops paired with a student crop are summed first.
        if skip_same_crop:
            others = [targets.roll(shift, dims=0) for shift in range(1, len(targets))]
            summed = torch.stack(others).sum(dim=0)  # [S, B, K]
        else:
            summed = targets.sum(dim=0, keepdim=True)  # [1, B, K]
        return -(summed * log_probs).sum() / student_logits.shape[1]
