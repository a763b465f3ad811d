"""KoLeo: spread the class tokens of a batch over the sphere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def koleo_loss(cls_tokens: Tensor, eps: float = 1e-8) -> Tensor:
    """Return the mean of -log(distance to the nearest other class token), in nats.

    KoLeo (Sablayrolles et al. 2019), as used by DINOv2 (arXiv 2304.07193, sec. 4; `dinov2/loss/koleo_loss.py`). Call it
    once per global crop, so that two crops of one image are never each other's neighbor.

    Args:
        cls_tokens: [B, D] student class tokens before the head; B >= 2.
        eps: added to every distance, so that duplicates cost a finite amount.

    Returns:
        [] float32 under any autocast dtype.

    Raises:
        ValueError: fewer than two images on this rank, so no neighbor exists.
    """
    if len(cls_tokens) < 2:
        raise ValueError(
            f"KoLeo needs at least 2 images per rank, got {len(cls_tokens)}; raise the batch size per rank or set "
            "koleo_weight to null"
        )
    with torch.autocast(cls_tokens.device.type, enabled=False):
        unit = F.normalize(cls_tokens.float(), dim=-1, eps=eps)  # [B, D]
        with torch.no_grad():  # the choice of neighbor has no gradient
            similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)  # [B, B]
            nearest = similarity.argmax(dim=1)  # [B]
        distance = F.pairwise_distance(unit, unit[nearest], eps=eps)  # [B]
        return -torch.log(distance + eps).mean()
