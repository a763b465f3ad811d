"""Attention within each of many packed sequences, grouped by length."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# How sequences lie in packed tokens [T, D], one after another: (number of sequences, tokens of each) of each group.
Layout = tuple[tuple[int, int], ...]

SCORES_BYTES = 2**24  # of attention scores that exist at a time on a CPU; fits its caches


def attend(qkv: Tensor, layout: Layout, num_heads: int) -> Tensor:
    """Compute scaled dot-product attention within each sequence: packed [T, 3 D] to [T, D].

    It calls torch's fused kernels, once for all groups if the device supports that, else once per group. On a CPU in
    bfloat16 it uses matrix products, which are 2.5 times as fast there (components/LOG.md).
    """
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16:
        mixed = _ProductAttention.apply(qkv, layout, num_heads)
        assert isinstance(mixed, Tensor)
        return mixed
    if len(layout) > 1 and _has_varlen(qkv, num_heads):
        return varlen_attention(qkv, layout, num_heads)
    return fused_attention(qkv, layout, num_heads)


def varlen_attention(qkv: Tensor, layout: Layout, num_heads: int) -> Tensor:
    """Compute `attend` by one call of FlashAttention's varlen kernel, without copies or padding."""
    from torch.nn.attention.varlen import varlen_attn  # imports torch.compile (2.6 s), which CPU runs avoid

    lengths = [length for count, length in layout for _ in range(count)]
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(qkv.device, non_blocking=True)
    query, key, value = qkv.view(len(qkv), 3, num_heads, -1).unbind(1)
    mixed = varlen_attn(query, key, value, starts, starts, max(lengths), max(lengths))
    assert isinstance(mixed, Tensor)
    return mixed.flatten(1)


def _has_varlen(qkv: Tensor, num_heads: int) -> bool:
    """Return whether FlashAttention supports the input: NVIDIA Ampere or newer, half precision, head dim up to 256."""
    if qkv.device.type != "cuda" or torch.version.cuda is None or qkv.dtype not in (torch.bfloat16, torch.float16):
        return False
    width = qkv.shape[1] // (3 * num_heads)
    return width % 8 == 0 and width <= 256 and torch.cuda.get_device_capability(qkv.device) >= (8, 0)


def fused_attention(qkv: Tensor, layout: Layout, num_heads: int) -> Tensor:
    """Compute `attend` by one call of torch's fused kernels per group, without masks or padding."""
    groups = []
    for (count, length), part in zip(layout, qkv.split([c * n for c, n in layout]), strict=True):
        query, key, value = part.view(count, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)  # [count, heads, length, D / heads]
        groups.append(mixed.transpose(1, 2).reshape(count * length, -1))
    return groups[0] if len(groups) == 1 else torch.cat(groups)


class _ProductAttention(torch.autograd.Function):
    """Attention by matrix products; saves only its input and recomputes the probabilities in the backward pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, qkv: Tensor, layout: Layout, num_heads: int) -> Tensor:
        ctx.save_for_backward(qkv)
        ctx.layout, ctx.num_heads = layout, num_heads  # pyright: ignore[reportAttributeAccessIssue]
        output = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        for rows, shape in _pieces(qkv, layout, num_heads):
            query, key, value = _heads(qkv[rows], shape)
            _write(output[rows], torch.bmm(_probabilities(query, key), value), shape, 0)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (qkv,) = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        result = torch.empty_like(qkv)
        for rows, shape in _pieces(qkv, ctx.layout, ctx.num_heads):  # pyright: ignore[reportAttributeAccessIssue]
            query, key, value = _heads(qkv[rows], shape)
            (grad_output,) = _heads(gradient[rows], shape)
            probabilities = _probabilities(query, key)
            grad_value = torch.bmm(probabilities.transpose(1, 2), grad_output)
            grad_scores = torch._softmax_backward_data(  # pyright: ignore[reportPrivateImportUsage]
                torch.bmm(grad_output, value.transpose(1, 2)), probabilities, -1, probabilities.dtype
            ).mul_(query.shape[-1] ** -0.5)
            grad_key = torch.bmm(grad_scores.transpose(1, 2), query)
            for place, part in enumerate((torch.bmm(grad_scores, key), grad_key, grad_value)):
                _write(result[rows], part, shape, place)
        return result, None, None


def _pieces(qkv: Tensor, layout: Layout, num_heads: int) -> Iterator[tuple[slice, tuple[int, int, int, int]]]:
    """Yield the rows of a few sequences at a time, with their shape [sequences, tokens, heads, D / heads]."""
    start, width = 0, qkv.shape[1] // (3 * num_heads)
    for count, length in layout:
        step = max(1, SCORES_BYTES // (length * length * num_heads * qkv.element_size()))
        for first in range(0, count, step):
            num_sequences = min(step, count - first)
            yield slice(start, start + num_sequences * length), (num_sequences, length, num_heads, width)
            start += num_sequences * length


def _heads(rows: Tensor, shape: tuple[int, int, int, int]) -> tuple[Tensor, ...]:
    """Split [rows, parts * D] into `parts` tensors [sequences * heads, tokens, D / heads]."""
    count, length, num_heads, width = shape
    parts = rows.view(count, length, -1, num_heads, width).permute(2, 0, 3, 1, 4)
    return parts.reshape(len(parts), count * num_heads, length, width).unbind(0)


def _write(rows: Tensor, part: Tensor, shape: tuple[int, int, int, int], place: int) -> None:
    """Write [sequences * heads, tokens, D / heads] into part `place` of [rows, parts * D]."""
    count, length, num_heads, width = shape
    rows.view(count, length, -1, num_heads, width)[:, :, place] = part.view(count, num_heads, length, width).transpose(
        1, 2
    )


def _probabilities(query: Tensor, key: Tensor) -> Tensor:
    return torch.softmax(torch.bmm(query * query.shape[-1] ** -0.5, key.transpose(1, 2)), dim=-1)
