"""Cross-entropy over prototypes without materializing all logits, which would be the largest tensors of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from components.objective.centering import chunks, pieces

# Of logits that exist at a time: many more rows than `chunks` gives, since products of few rows are slow, and each adds
# to all of the prototypes' gradient.
LOGITS_BYTES = {"cpu": 2**25, "cuda": 2**28}


@dataclass(frozen=True)
class Term:
    """Part of one loss term for some rows: the cross-entropy of the crops `crops` with `target`."""

    crops: slice  # of the student's V; each crop belongs to one term
    target: Tensor  # [V' or 1, n, K] float32, read-only
    mass: int  # what a row of `target` sums to


@dataclass(frozen=True)
class PrototypeLoss:
    """Weighted sum over rows of -(target * log_softmax(features . prototypes / temp)), for one head.

    It is called with the inputs of the head's last layer, [V * M, d] features of V student crops of M rows, crop-major,
    and the layer's weights, so that the logits and their gradients are computed and freed in chunks.

    Attributes:
        terms: yields the parts of all terms for a slice of rows, always in the same order.
        num_terms: number of terms.
        weights: [M] float32, of each row in the sum.
        student_temp: positive.
    """

    terms: Callable[[slice], Iterable[Term]]
    num_terms: int
    weights: Tensor
    student_temp: float

    def __call__(self, features: Tensor, weight_v: Tensor, weight_g: Tensor) -> Tensor:
        """Return the terms [num_terms] float32. Only their unweighted sum is differentiable, and only once.

        Args:
            features: [V * M, d].
            weight_v: [K, d], directions of the prototypes.
            weight_g: [K, 1], lengths of the prototypes.
        """
        terms = _PrototypeLoss.apply(features, weight_v, weight_g, self)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return cast(Tensor, terms)


class _Context(FunctionCtx):
    gradients: tuple[Tensor, Tensor, Tensor]  # of features, weight_v and weight_g


class _PrototypeLoss(torch.autograd.Function):
    """Compute the gradients in the forward pass, while a chunk of the logits exists."""

    @staticmethod
    def forward(ctx: _Context, features: Tensor, weight_v: Tensor, weight_g: Tensor, loss: PrototypeLoss) -> Tensor:
        device = features.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
        with torch.autocast(device, enabled=False):
            norm = torch.linalg.vector_norm(weight_v, dim=1, keepdim=True, dtype=torch.float32)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            length = cast(Tensor, norm)
            scale = weight_g / length
            prototypes = torch.empty_like(weight_v, dtype=dtype)
            for some in _blocks(weight_v):
                prototypes[some] = weight_v[some] * scale[some]
            crops = max(1, len(features) // max(1, len(loss.weights)))
            by_crop = features.detach().to(dtype).view(crops, len(loss.weights), features.shape[1])  # [V, M, d]
            terms, grad_features, grad_v = _forward_backward(by_crop, prototypes, loss)
            grad_g = torch.empty_like(length)
            # In place: from the gradient of prototypes to those of directions and lengths.
            for some in _blocks(weight_v):
                grad_g[some] = (grad_v[some] * weight_v[some]).sum(dim=1, keepdim=True).div_(length[some])
                grad_v[some].addcmul_(weight_v[some], grad_g[some] / length[some], value=-1).mul_(scale[some])
        ctx.gradients = (grad_features.view_as(features), grad_v, grad_g)
        return terms

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients = ctx.gradients
        del ctx.gradients
        return (*(part.mul_(gradient[0]) for part in gradients), None)


def _forward_backward(features: Tensor, prototypes: Tensor, loss: PrototypeLoss) -> tuple[Tensor, Tensor, Tensor]:
    """Return the terms, and the gradients of their sum for `features` [V, M, d] and `prototypes` [K, d] (float32)."""
    crops, num_rows, _ = features.shape
    terms = torch.zeros(loss.num_terms, device=features.device)
    grad_features = torch.empty_like(features)
    grad_prototypes = torch.zeros_like(prototypes, dtype=torch.float32)
    row_bytes = crops * len(prototypes) * features.element_size()
    for rows in pieces(num_rows, row_bytes, LOGITS_BYTES.get(features.device.type, 2**25)):
        seen = features[:, rows].flatten(0, 1)
        logits = seen @ prototypes.T  # [V * n, K]
        by_crop = cast(Tensor, logits.unflatten(0, (crops, -1)))  # [V, n, K]
        terms += _terms_and_gradient(by_crop, rows.start, loss)
        grad_features[:, rows] = (logits @ prototypes).unflatten(0, (crops, -1))
        for some in _blocks(prototypes):
            grad_prototypes[some] += logits[:, some].T @ seen
    return terms, grad_features, grad_prototypes


def _terms_and_gradient(logits: Tensor, start: int, loss: PrototypeLoss) -> Tensor:
    """Return the terms of the rows from `start` on; overwrite their logits [V, n, K] with the gradient of the sum."""
    terms = torch.zeros(loss.num_terms, device=logits.device)
    for rows in chunks(logits.shape[1], logits.shape[0] * logits.shape[2], logits.device.type):
        of_loss = slice(start + rows.start, start + rows.stop)
        weights = loss.weights[of_loss, None]  # [n, 1]
        for number, term in enumerate(loss.terms(of_loss)):
            part = logits[term.crops, rows]  # [V', n, K]
            if not part.numel():
                continue
            scores = part.float().div_(loss.student_temp)
            scores -= scores.amax(dim=-1, keepdim=True)
            agreement = (term.target * scores).sum(dim=-1, keepdim=True)  # [V', n, 1]
            total = scores.exp_().sum(dim=-1, keepdim=True)
            terms[number] += ((term.mass * total.log() - agreement) * weights).sum()
            part.copy_(scores.mul_(term.mass / total).sub_(term.target).mul_(weights / loss.student_temp))
    return terms


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Yield slices of the rows of [K, d] weights, so that temporaries stay small."""
    return chunks(weight.shape[0], weight.shape[1], weight.device.type)
