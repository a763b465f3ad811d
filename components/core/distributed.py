"""Rank, world size and the collectives that training needs; all are no-ops in a single process."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_distributed() -> bool:
    """Return whether this process belongs to an initialized process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's rank; 0 in a single process."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of ranks; 1 in a single process."""
    return dist.get_world_size() if is_distributed() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum over ranks as a new tensor without gradient; the detached tensor itself in a single process."""
    if not is_distributed():
        return tensor.detach()
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)  # pyright: ignore[reportUnknownMemberType]
    return total


def barrier() -> None:
    """Wait until every rank has reached this call."""
    if is_distributed():
        dist.barrier()  # pyright: ignore[reportUnknownMemberType]


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor (every rank must call); return any other tensor unchanged."""
    return tensor.full_tensor() if _is_shared(tensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor, without a copy; return any other tensor unchanged."""
    return tensor.to_local() if _is_shared(tensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return the part of a full tensor that corresponds to this rank's shard of `other`."""
    if not _is_shared(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # Without a source rank each rank slices its own copy; nothing is sent.
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None).to_local()


def _is_shared(tensor: Tensor) -> TypeGuard[DTensor]:
    return is_distributed() and hasattr(tensor, "full_tensor")
