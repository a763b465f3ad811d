"""Teacher targets: logits become probabilities that cannot collapse onto a few prototypes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from components.core import distributed

# exp(-75) is far below what float32 resolves in a sum, yet divided by any batch size still a normal number.
MIN_EXPONENT = -75.0


@torch.no_grad()
def sinkhorn_knopp(teacher_logits: Tensor, teacher_temp: float, num_iterations: int = 3) -> Tensor:
    """Assign the rows of all ranks to prototypes, each prototype about equally often.

    SwAV (arXiv 2006.09882, sec. 3.1), `sinkhorn_knopp_teacher` of `dinov2/loss/`: take exp(logits / temp), then in turn
    scale every prototype to equal weight over the rows of all ranks and every row to sum 1. One function serves class
    tokens and masked patches: a rank may bring any number of rows, none too, but every rank must call.

    Two things differ from the released code without changing its values. Its divisions by K and by the global number of
    rows, and its first normalisation, cancel, so they are left out. It overflows once a logit exceeds 88 * temp: here
    the largest logit of all ranks is subtracted first (cancels too) and exponents below -75 are raised to that, so
    that finite logits always give finite targets.

    Args:
        teacher_logits: [M, K], M may differ between ranks.
        teacher_temp: positive.
        num_iterations: at least 1.

    Returns:
        [M, K] float32, rows that sum to 1.
    """
    exponents = teacher_logits.float() / teacher_temp
    assigned = torch.exp((exponents - _max_over_ranks(exponents)).clamp(min=MIN_EXPONENT))
    for _ in range(num_iterations):
        assigned /= distributed.all_reduce_sum(assigned.sum(dim=0, keepdim=True))  # over rows of all ranks: [1, K]
        assigned /= assigned.sum(dim=1, keepdim=True)  # [M, 1]
    return assigned


class SoftmaxCentering(nn.Module):
    """Softmax of logits less their running mean (`softmax_center_teacher` of `dinov2/loss/`; DINO eq. 4).

    A batch is centred with the centre from before it; then the centre moves towards the mean of the rows of all ranks,
    in training mode only. Ranks with different numbers of masked patches count by rows; the released code averages
    the ranks' means, which is the same where the numbers are equal.
    """

    center: Tensor

    def __init__(self, num_prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, num_prototypes))

    @torch.no_grad()
    def forward(self, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """Centre and sharpen: [M, K] to [M, K] float32, rows that sum to 1. Every rank must call."""
        logits = teacher_logits.float()
        probs = torch.softmax((logits - self.center) / teacher_temp, dim=-1)
        if self.training:
            self._update(logits)
        return probs

    def _update(self, logits: Tensor) -> None:
        rows = distributed.all_reduce_sum(logits.new_tensor(float(len(logits))))
        total = distributed.all_reduce_sum(logits.sum(dim=0, keepdim=True))  # [1, K]
        # Without a row anywhere the mean would be 0 / 0, and the centre stays. No branch: it would wait for the device.
        moved = self.center * self.momentum + total / rows.clamp(min=1) * (1 - self.momentum)
        self.center.copy_(torch.where(rows > 0, moved, self.center))


def _max_over_ranks(values: Tensor) -> Tensor:
    """Largest entry of all ranks' tensors, [] ; each rank adds its own to one slot of a sum, so that sums suffice."""
    slots = values.new_zeros(distributed.world_size())
    slots[distributed.rank()] = values.max() if values.numel() else -torch.inf
    return distributed.all_reduce_sum(slots).max()
