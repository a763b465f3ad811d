"""Projection head from tokens to logits over prototypes."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.model.config import HeadConfig
from components.model.layers import Draws, linear_draws

LayerLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


class WeightNormLinear(nn.Module):
    """Linear layer without bias; each weight row has a direction `weight_v` and a trainable length `weight_g`.

    Weight normalization (arXiv 1602.07868). DINOv2, unlike DINO, leaves the length trainable.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(out_dim, 1))
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the initial values, as torch's layers do under this name."""
        nn.init.ones_(self.weight_g)
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # torch's default for linear layers, as in DINOv2

    def forward(self, inputs: Tensor, loss: LayerLoss | None = None) -> Tensor:
        """Map [..., in_dim] to [..., out_dim]; with `loss`, return `loss(inputs, weight_v, weight_g)`."""
        if loss is not None:
            return loss(inputs, self.weight_v, self.weight_g)
        length = torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
        return F.linear(inputs, self.weight_v * (self.weight_g / length))


class ProjectionHead(nn.Module):
    """MLP to a bottleneck, L2 normalization, weight-normalized prototypes (`dinov2/layers/dino_head.py`)."""

    def __init__(self, in_dim: int, config: HeadConfig) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.config = config
        widths = [in_dim, *[config.hidden_dim] * (config.num_layers - 1), config.bottleneck_dim]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = WeightNormLinear(config.bottleneck_dim, config.num_prototypes)
        for name, draw in self.draws():
            draw(self.get_parameter(name))

    def draws(self) -> Draws:
        """Yield the initializers in drawing order; the last layer initializes itself."""
        yield from linear_draws(self.mlp, "mlp")

    def forward(self, tokens: Tensor, loss: LayerLoss | None = None) -> Tensor:
        """Return the logits over prototypes, [N, in_dim] to [N, K]: cosines times the prototype's length.

        Args:
            tokens: [N, in_dim].
            loss: computed in place of the logits, from unit features [N, bottleneck_dim] and the last layer's weights,
                [K, bottleneck_dim] and [K, 1], so that it can compute the logits in chunks inside the module's forward.
        """
        bottleneck = self.mlp(tokens)
        eps = 1e-6 if bottleneck.dtype == torch.float16 else 1e-12  # 1e-12 underflows in half precision
        return self.last_layer(F.normalize(bottleneck, dim=-1, eps=eps), loss)
