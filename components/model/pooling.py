"""Pool the tokens of an image into its feature: the class token, or also the texture of the patch tokens.

Evaluation, embedders, `pedigree embed` and the registered model share it, so that a served model gives the evaluated
features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from components.model.config import Pooling, Preprocessing
from components.model.vit import VisionTransformer

TEXTURE_LENGTH = 2.5  # of the texture, beside a class token of length 1
FLOOR = 1e-3  # standard deviations are seen above it; those of tokens after a norm are about 1


def pooled(cls_token: Tensor, patches: Sequence[Tensor], pooling: Pooling) -> Tensor:
    """Return the features of B images, [B, F] float32.

    Args:
        cls_token: [B, D], of the last layer, after the last norm.
        patches: patch tokens of the last layers, [B, P, E] each, after the last norm.
        pooling: `cls` gives the class token as it is; `cls_texture` a vector of it, of length 1, and of the texture of
            each layer, together of length 2.5.
    """
    if pooling == "cls":
        return cls_token.float()
    # Below FLOOR a texture is rounding error of an image without any; its length stays small.
    textures = [functional.normalize(texture(tokens), dim=1, eps=FLOOR) for tokens in patches]
    scale = TEXTURE_LENGTH / len(textures) ** 0.5
    return torch.cat([functional.normalize(cls_token.float(), dim=1), *(scale * one for one in textures)], dim=1)


def texture(patches: Tensor) -> Tensor:
    """Return the logarithm of each channel's standard deviation over the patches, minus the mean of channels, [B, E].

    A factor that all channels share drops out, and so does an offset that all patches share. Huang and Belongie 2017
    (arXiv:1703.06868) describe the style of an image by standard deviations of channels; components/LOG.md has what
    these features gain where the light changes.

    Args:
        patches: [B, P, E].
    """
    deviations = (patches.float().std(dim=1, correction=0) + FLOOR).log()
    return deviations - deviations.mean(dim=1, keepdim=True)


def features(backbone: VisionTransformer, images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return the features of preprocessed and normalized images [B, 3, S, S], [B, F] float32."""
    layers = backbone.last_layers(images, preprocessing.num_layers(backbone.config))
    return pooled(layers[-1].cls_token, [layer.patch_tokens for layer in layers], preprocessing.pooling)
