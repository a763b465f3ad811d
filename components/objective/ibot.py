"""Cross-entropy between teacher and student assignments of masked patches (iBOT)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from components.objective.centering import Targets
from components.objective.prototypes import PrototypeLoss, Term


def ibot_loss(targets: Targets, masks: Tensor, weight: float, student_temp: float) -> PrototypeLoss:
    """Return the cross-entropy of masked patches, mean over each image's patches, then over all images, in nats.

    iBOT (arXiv 2111.07832, eq. 3), `forward_masked` of `dinov2/loss/ibot_patch_loss.py`: a patch has weight
    1 / (masked patches of its image), and images without a masked patch contribute 0 to the mean.

    Args:
        targets: of the M masked patches, logits [M, K] in the order of `masks.nonzero()`.
        masks: [B, P] bool with M true entries.
        weight: of the mean.
        student_temp: positive.

    Returns:
        A loss of one term over one crop of M rows.

    Raises:
        ValueError: `masks` does not have one true entry for each row of targets.
    """
    per_image = masks.sum(dim=1)  # [B]
    weights = (weight / len(masks) / per_image.clamp(min=1)).unsqueeze(1).expand_as(masks)[masks]  # [M] float32
    if len(weights) != len(targets.logits):
        raise ValueError(f"masks have {len(weights)} true entries, but the teacher has {len(targets.logits)} patches")

    def terms(patches: slice) -> Iterator[Term]:
        yield Term(slice(None), targets.rows(patches).unsqueeze(0), 1)

    return PrototypeLoss(terms, 1, weights, student_temp)
