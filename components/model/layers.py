"""The parts of a vision transformer block, with the parameter names of the published DINOv2 weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.model.config import ViTConfig

NORM_EPS = 1e-6  # `dinov2/models/vision_transformer.py`; torch's default is 1e-5


class Attention(nn.Module):
    """Multi-head self-attention with biases, by the fused kernel (`dinov2/layers/attention.py`)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix tokens of one image: [B, N, D] to [B, N, D]."""
        batch, length, dim = tokens.shape
        qkv = self.qkv(tokens).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, N, D / heads]
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, dim))


class Mlp(nn.Module):
    """Two linear layers with GELU between (`dinov2/layers/mlp.py`)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform each token: [B, N, D] to [B, N, D]."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class SwiGlu(nn.Module):
    """Gated feed-forward SiLU(x W1) * (x W2), W1 and W2 in one projection (`dinov2/layers/swiglu_ffn.py`)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8  # same parameter count as an MLP, in multiples of 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform each token: [B, N, D] to [B, N, D]."""
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch (CaiT, arXiv 2103.17239)."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, tokens: Tensor) -> Tensor:
        """Scale channels: [..., D] to [..., D]."""
        return tokens * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale and subset stochastic depth (`dinov2/layers/block.py`)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        hidden = int(config.dim * config.ffn_ratio)
        self.drop_path = config.drop_path
        self.norm1 = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.attn = Attention(config.dim, config.num_heads)
        self.ls1 = LayerScale(config.dim, config.layer_scale_init)
        self.norm2 = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.mlp = SwiGlu(config.dim, hidden) if config.ffn == "swiglu" else Mlp(config.dim, hidden)
        self.ls2 = LayerScale(config.dim, config.layer_scale_init)

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply both residual branches: [B, N, D] to [B, N, D]."""
        drop_path = self.drop_path if self.training else 0.0
        tokens = add_to_subset(tokens, lambda x: self.ls1(self.attn(self.norm1(x))), drop_path)
        return add_to_subset(tokens, lambda x: self.ls2(self.mlp(self.norm2(x))), drop_path)


def add_to_subset(tokens: Tensor, branch: Callable[[Tensor], Tensor], drop_path: float) -> Tensor:
    """Add a residual branch to a random subset of the images, scaled so that the expectation is the full sum.

    `drop_add_residual_stochastic_depth` of `dinov2/layers/block.py`: the branch is computed for only
    s = max(floor(B (1 - d)), 1) images, which saves a fraction d of its compute and activations, and is added with
    weight B / s.

    Args:
        tokens: [B, N, D].
        branch: maps [s, N, D] to [s, N, D].
        drop_path: fraction d of images that skip the branch, in [0, 1).

    Returns:
        [B, N, D], of the dtype of `tokens`.
    """
    batch = tokens.shape[0]
    kept = max(int(batch * (1 - drop_path)), 1)
    if kept >= batch:
        return tokens + branch(tokens)
    chosen = torch.randperm(batch, device=tokens.device)[:kept]
    return tokens.index_add(0, chosen, branch(tokens[chosen]).to(tokens.dtype), alpha=batch / kept)
