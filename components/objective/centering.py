"""Teacher targets: turn logits into probabilities that cannot collapse onto a few prototypes.

Both kinds of centering end in a softmax over logits minus a shift per prototype. Targets are therefore stored as the
logits and the shift [K], and the probabilities are computed for a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from components.core import distributed

# exp(-75) is far below what float32 resolves in a sum, yet divided by any batch size still a normal number.
MIN_EXPONENT = -75.0
CHUNK_BYTES = {"cpu": 2**21, "cuda": 2**28}  # of float32 temporaries: fits a CPU's cache, few kernel launches on a GPU


def chunks(num_rows: int, row_numbers: int, device_type: str) -> Iterator[slice]:
    """Yield slices of rows with `row_numbers` float32 numbers each, CHUNK_BYTES at a time."""
    return pieces(num_rows, 4 * row_numbers, CHUNK_BYTES.get(device_type, 2**24))


def pieces(num_rows: int, row_bytes: int, max_bytes: int) -> Iterator[slice]:
    """Yield slices of rows of at most `max_bytes`, or of one row if a row is larger."""
    step = max(1, max_bytes // row_bytes)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


@dataclass(frozen=True)
class Targets:
    """Assignments of rows to prototypes: softmax(max(logits / temp - top, floor) - shift).

    Attributes:
        logits: [..., M, K] of the teacher, in their original dtype.
        temp: of the teacher.
        shift: [K] float32.
        top: [] float32.
        floor: smallest exponent.
    """

    logits: Tensor
    temp: float
    shift: Tensor
    top: Tensor
    floor: float

    def rows(self, rows: slice = slice(None)) -> Tensor:
        """Return the probabilities of some rows, [..., n, K] float32, each row summing to 1."""
        return self.exponents(rows).sub_(self.shift).softmax(dim=-1)

    def exponents(self, rows: slice) -> Tensor:
        """Return the softmax's exponents before the shift, [..., n, K] float32, as a new tensor."""
        exponents = self.logits[..., rows, :].to(torch.float32, copy=True)
        return exponents.div_(self.temp).sub_(self.top).clamp_(min=self.floor)

    def by_crop(self, crops: int) -> Targets:
        """Return the targets with crop-major rows [G * B] viewed as [G, B]; `rows` then selects images."""
        return replace(self, logits=self.logits.unflatten(0, (crops, -1)))


@torch.no_grad()
def sinkhorn_knopp(teacher_logits: Tensor, teacher_temp: float, num_iterations: int = 3) -> Targets:
    """Assign the rows of all ranks to prototypes, each prototype about equally often.

    SwAV (arXiv 2006.09882, sec. 3.1), `sinkhorn_knopp_teacher` of `dinov2/loss/`: take E = exp(logits / temp), then
    alternately scale every prototype to equal weight over the rows of all ranks and every row to sum 1. The function
    serves class tokens and masked patches: a rank may have any number of rows, even none, but every rank must call.

    The scaled matrix is diag(u) E diag(v), so only u [M] and v [K] are computed: u = 1 / (E v), v = 1 / (u E), with E
    recomputed in chunks. Two further differences from the released code do not change its values. Its divisions by K
    and by the global number of rows, and its first normalization, cancel and are omitted. It overflows once a logit
    exceeds 88 * temp: here the largest logit of all ranks is subtracted first (which also cancels) and exponents are
    clamped at -75, so that finite logits always give finite targets.

    Args:
        teacher_logits: [M, K], M may differ between ranks; the result keeps a reference.
        teacher_temp: positive.
        num_iterations: at least 1.
    """
    num_rows, num_prototypes = teacher_logits.shape
    top = _max_over_ranks(teacher_logits) / teacher_temp
    targets = Targets(teacher_logits, teacher_temp, torch.zeros_like(top), top, MIN_EXPONENT)
    scale: Tensor | None = None  # v
    for _ in range(num_iterations):
        total = torch.zeros(num_prototypes, device=top.device)  # u E over this rank's rows
        for rows in chunks(num_rows, num_prototypes, top.device.type):
            assigned = targets.exponents(rows).exp_()  # [n, K]
            with torch.autocast(top.device.type, enabled=False):
                total += assigned.sum(dim=0) if scale is None else (assigned @ scale).reciprocal_() @ assigned
        scale = distributed.all_reduce_sum(total).reciprocal()
    assert scale is not None
    return replace(targets, shift=-scale.log())


class SoftmaxCentering(nn.Module):
    """Softmax of logits minus their running mean (`softmax_center_teacher` of `dinov2/loss/`; DINO eq. 4).

    A batch is centered with the previous center; then, in training mode only, the center moves toward the mean of the
    rows of all ranks. Ranks with different numbers of masked patches are weighted by rows; the released code averages
    the ranks' means, which is equal if the numbers are.
    """

    center: Tensor

    def __init__(self, num_prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, num_prototypes))

    @torch.no_grad()
    def forward(self, teacher_logits: Tensor, teacher_temp: float) -> Targets:
        """Center and sharpen rows [M, K]; the result keeps a reference. Every rank must call."""
        shift = (self.center / teacher_temp)[0]
        if self.training:
            self._update(teacher_logits)
        return Targets(teacher_logits, teacher_temp, shift, shift.new_zeros(()), -torch.inf)

    def _update(self, logits: Tensor) -> None:
        rows = distributed.all_reduce_sum(self.center.new_tensor(float(len(logits))))
        total = distributed.all_reduce_sum(logits.sum(dim=0, keepdim=True, dtype=torch.float32))  # [1, K]
        # Without any row the mean would be 0 / 0, so keep the center. No `if`: it would synchronize with the device.
        moved = self.center * self.momentum + total / rows.clamp(min=1) * (1 - self.momentum)
        self.center.copy_(torch.where(rows > 0, moved, self.center))


def _max_over_ranks(values: Tensor) -> Tensor:
    """Return the maximum over all ranks, [] float32, by an all-reduce sum of one slot per rank."""
    slots = torch.zeros(distributed.world_size(), device=values.device)
    slots[distributed.rank()] = values.max() if values.numel() else -torch.inf
    return distributed.all_reduce_sum(slots).max()
