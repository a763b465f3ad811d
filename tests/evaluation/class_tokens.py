"""Features by a plain call of the network."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from components.model.preprocessing import to_input
from components.model.vit import VisionTransformer


@torch.inference_mode()
def class_tokens(backbone: VisionTransformer, images: torch.Tensor) -> NDArray[np.float32]:
    """Class tokens after the last norm, [B, D], of images [B, S, S, 3] uint8."""
    return backbone.eval()(to_input(images.permute(0, 3, 1, 2))).cls_token.numpy()
