"""Cross-entropy between the class-token assignments of teacher and student crops (DINO)."""

from __future__ import annotations

from collections.abc import Iterator

from components.objective.centering import Targets
from components.objective.prototypes import PrototypeLoss, Term


def dino_loss(targets: Targets, weight: float, student_temp: float) -> PrototypeLoss:
    """Return the cross-entropy over pairs of a student crop and a different teacher crop, batch mean, in nats.

    DINO (arXiv 2104.14294, eq. 2), `dinov2/loss/dino_clstoken_loss.py`:

        for each student crop s, for each teacher crop t != s:
            loss -= weight * mean over b of (probs[t, b] * log_softmax(logits[s, b] / temp)).sum()

    The student's first G crops are the teacher's crops, the others are local. Cross-entropy is linear in the target, so
    the targets of all teacher crops paired with a student crop are summed first; for G = 2, global crops swap targets.

    Args:
        targets: of the teacher's crops, logits [G, B, K].
        weight: of the sum over pairs.
        student_temp: positive.

    Returns:
        A loss of two terms, local and global, over G + L crops of B rows.
    """
    crops, batch = targets.logits.shape[:2]

    def terms(images: slice) -> Iterator[Term]:
        probs = targets.rows(images)  # [G, n, K]
        summed = probs.sum(dim=0, keepdim=True)
        yield Term(slice(crops, None), summed, crops)
        yield Term(slice(0, crops), probs.neg_().add_(summed), crops - 1)

    weights = targets.shift.new_full((batch,), weight / max(batch, 1))
    return PrototypeLoss(terms, 2, weights, student_temp)
