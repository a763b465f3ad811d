"""Layers of a vision transformer block, under the parameter names of the published DINOv2 weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from components.model.attention import Layout, attend
from components.model.config import ViTConfig

Checkpointing = Literal["none", "selective", "full"]
Draws = Iterator[tuple[str, Callable[[Tensor], object]]]  # parameter names with their initializers

NORM_EPS = 1e-6  # `dinov2/models/vision_transformer.py`; torch's default is 1e-5


class Attention(nn.Module):
    """Multi-head self-attention with biases (`dinov2/layers/attention.py`) over packed sequences."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Attend within each sequence: packed [T, D] to [T, D]."""
        return self.proj(attend(self.qkv(tokens), layout, self.num_heads))


class Mlp(nn.Module):
    """Two linear layers with GELU between (`dinov2/layers/mlp.py`)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform each token: [..., D] to [..., D]."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class SwiGlu(nn.Module):
    """Gated feed-forward SiLU(x W1) * (x W2), W1 and W2 in one projection (`dinov2/layers/swiglu_ffn.py`)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8  # same parameter count as an MLP, in multiples of 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform each token: [..., D] to [..., D]."""
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """Learned scale per channel of a residual branch (CaiT, arXiv 2103.17239)."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def reset_parameters(self) -> None:
        """Set the initial values, as torch's layers do under this name."""
        nn.init.constant_(self.gamma, self.init)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scale channels: [..., D] to [..., D]."""
        return tokens * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale and subset stochastic depth (`dinov2/layers/block.py`).

    Attributes:
        checkpointing: which activations are recomputed in the backward pass: `none`, all but the outputs of matrix
            products (`selective`), or all but the block's input (`full`).
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        hidden = int(config.dim * config.ffn_ratio)
        self.drop_path = config.drop_path
        self.checkpointing: Checkpointing = "none"
        self.norm1 = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.attn = Attention(config.dim, config.num_heads)
        self.ls1 = LayerScale(config.dim, config.layer_scale_init)
        self.norm2 = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.mlp = SwiGlu(config.dim, hidden) if config.ffn == "swiglu" else Mlp(config.dim, hidden)
        self.ls2 = LayerScale(config.dim, config.layer_scale_init)

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Apply both residual branches to packed tokens: [T, D] to [T, D]."""
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self._transform(tokens, layout)
        context = _selective_contexts if self.checkpointing == "selective" else noop_context_fn
        output = checkpoint(
            self._transform,
            tokens,
            layout,
            use_reentrant=False,
            context_fn=context,
            preserve_rng_state=self.training and self.drop_path > 0,  # recomputation must draw the same subset
        )
        assert isinstance(output, Tensor)
        return output

    def _transform(self, tokens: Tensor, layout: Layout) -> Tensor:
        drop_path = self.drop_path if self.training else 0.0
        tokens = add_to_subset(tokens, layout, lambda x, part: self.ls1(self.attn(self.norm1(x), part)), drop_path)
        return add_to_subset(tokens, layout, lambda x, _: self.ls2(self.mlp(self.norm2(x))), drop_path)


def linear_draws(module: nn.Module, prefix: str) -> Draws:
    """Yield the initializers of all linear layers in a module, as `_init_weights` of DINOv2 (`dinov2/layers/`)."""
    for name, layer in module.named_modules(prefix=prefix):
        if isinstance(layer, nn.Linear):
            yield f"{name}.weight", partial(nn.init.trunc_normal_, std=0.02)
            yield f"{name}.bias", nn.init.zeros_


def add_to_subset(
    tokens: Tensor, layout: Layout, branch: Callable[[Tensor, Layout], Tensor], drop_path: float
) -> Tensor:
    """Add a residual branch to a random subset of each group's sequences, scaled to the expectation of the full sum.

    `drop_add_residual_stochastic_depth` of `dinov2/layers/block.py`: of B sequences of a group, the branch is computed
    for only s = max(floor(B (1 - d)), 1), which saves a fraction d of its compute and activations, and is added with
    weight B / s.

    Args:
        tokens: packed [T, D].
        layout: of `tokens`.
        branch: maps packed tokens of a smaller layout to the same shape.
        drop_path: fraction d of sequences that skip the branch, in [0, 1).

    Returns:
        [T, D], of the dtype of `tokens`.
    """
    if drop_path == 0:  # first: an exported graph has no number of sequences to compute with
        return tokens + branch(tokens, layout)
    subset = tuple((max(int(count * (1 - drop_path)), 1), length) for count, length in layout)
    if subset == layout:
        return tokens + branch(tokens, layout)
    rows, weights, start = [], [], 0
    for (count, length), (size, _) in zip(layout, subset, strict=True):
        chosen = torch.randperm(count, device=tokens.device)[:size, None] * length
        rows.append((start + chosen + torch.arange(length, device=tokens.device)).flatten())
        weights.append(tokens.new_full((size * length, 1), count / size))
        start += count * length
    index = torch.cat(rows)
    added = branch(tokens.index_select(0, index), subset) * torch.cat(weights)
    return tokens.index_add(0, index, added.to(tokens.dtype))


def _selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return contexts of selective checkpointing: save the outputs of linear layers and fused attention only."""
    return create_selective_checkpoint_contexts(_saved_ops())  # pyright: ignore[reportArgumentType]


@cache
def _saved_ops() -> list[Any]:
    from torch.nn.attention.varlen import varlen_attn  # noqa: F401 - registers the last one; see `varlen_attention`

    aten = torch.ops.aten
    return [
        aten.mm.default,
        aten.addmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.torch_attn._varlen_attn.default,
    ]
