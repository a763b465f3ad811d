"""Cross-entropy between teacher and student assignments of masked patches (iBOT)."""

from __future__ import annotations

import torch
from torch import Tensor


def ibot_loss(student_logits: Tensor, teacher_probs: Tensor, masks: Tensor, student_temp: float) -> Tensor:
    """Cross-entropy of masked patches, mean over the patches of an image, then over all images, in nats.

    iBOT (arXiv 2111.07832, eq. 3), `forward_masked` of `dinov2/loss/ibot_patch_loss.py`: a patch weighs
    1 / (masked patches of its image), and images without a masked patch count in the mean with 0.

    Args:
        student_logits: [M, K], in the order of `masks.nonzero()`.
        teacher_probs: [M, K], rows that sum to 1; taken as constant.
        masks: [B, P] bool with M true entries.
        student_temp: positive.

    Returns:
        [] float32, whatever the autocast dtype; 0 if nothing is masked.

    Raises:
        ValueError: `masks` does not have one true entry for each row of logits.
    """
    per_image = masks.sum(dim=1)  # [B]
    weights = (1.0 / per_image.clamp(min=1)).unsqueeze(1).expand_as(masks)[masks]  # [M] float32
    if not len(weights) == len(student_logits) == len(teacher_probs):
        raise ValueError(
            f"masks have {len(weights)} true entries, but there are {len(student_logits)} student and "
            f"{len(teacher_probs)} teacher patches"
        )
    with torch.autocast(student_logits.device.type, enabled=False):
        log_probs = torch.log_softmax(student_logits.float() / student_temp, dim=-1)
        cross_entropy = -(teacher_probs.detach().float() * log_probs).sum(dim=-1)  # [M]
        return (cross_entropy * weights).sum() / len(masks)
