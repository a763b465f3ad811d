"""Gram anchoring: keep the pairwise similarities of an image's patches close to those of an earlier teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


@dataclass(frozen=True)
class GramLoss:
    """Weight times the mean squared difference of the Gram matrices of student and teacher (arXiv 2508.10104, sec. 4).

    The Gram matrix of an image is [P, P], the cosines of its patch features; the mean is over its entries and over
    images, as in the released code (the paper writes a sum).

    Attributes:
        teacher: [N, P, D'] patch features of the frozen network.
        weight: of the term.
    """

    teacher: Tensor
    weight: float

    def __call__(self, patch_tokens: Tensor) -> Tensor:
        """Return the term for the student's patches [N, P, D] of the same images, [] float32."""
        with torch.autocast(patch_tokens.device.type, enabled=False):
            unit = F.normalize(patch_tokens.float(), dim=-1)
            teacher = F.normalize(self.teacher.float(), dim=-1)
            return self.weight * cast(Tensor, _GramDifference.apply(unit, teacher))  # pyright: ignore[reportUnknownMemberType]


def to_grid(patch_tokens: Tensor, patches: int) -> Tensor:
    """Resample patch features of a square grid to another: bicubic without antialiasing, as in the released code.

    Args:
        patch_tokens: [N, P', D].
        patches: P of the other grid.

    Returns:
        [N, P, D] float32.
    """
    side, target_side = math.isqrt(patch_tokens.shape[1]), math.isqrt(patches)
    grid = cast(Tensor, patch_tokens.float().transpose(1, 2).unflatten(2, (side, side)))  # [N, D, h', w']
    return F.interpolate(grid, (target_side, target_side), mode="bicubic").flatten(2).transpose(1, 2)


class _GramContext(FunctionCtx):
    gradient: Tensor  # [N, P, D]


class _GramDifference(torch.autograd.Function):
    """Mean squared difference and its gradient, one image's matrices at a time."""

    @staticmethod
    def forward(ctx: _GramContext, unit: Tensor, teacher: Tensor) -> Tensor:
        images, patches, _ = unit.shape
        total, gradient = unit.new_zeros(()), torch.empty_like(unit)
        for student_patches, teacher_patches, grad in zip(unit, teacher, gradient, strict=True):
            difference = student_patches @ student_patches.T - teacher_patches @ teacher_patches.T  # [P, P]
            total += difference.square().mean()
            torch.mm(difference, student_patches, out=grad)
        ctx.gradient = gradient.mul_(4 / (patches**2 * images))
        return total / images

    @staticmethod
    @once_differentiable
    def backward(ctx: _GramContext, incoming: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.gradient * incoming, None
