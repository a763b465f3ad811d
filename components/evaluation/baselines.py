"""What every model is shown beside: an untrained network of its shape, and the descriptor of colors and edges."""

from __future__ import annotations

import torch

from components.model.config import ViTConfig
from components.model.vit import VisionTransformer

RANDOM, DESCRIPTOR = "random", "descriptor"


def random_network(shape: ViTConfig, seed: int) -> VisionTransformer:
    """Return an untrained network in evaluation mode, on CPU, without changing the global random state.

    With the small initial LayerScale the class token hardly depends on the image, so that logistic regression is at
    chance. With a LayerScale of 1 the random blocks contribute, which makes a meaningful baseline.

    Args:
        shape: of the model that it is held against.
        seed: of the weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VisionTransformer(shape.model_copy(update={"layer_scale_init": 1.0})).eval()
