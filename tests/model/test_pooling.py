"""The feature of an image: by hand, and what another light leaves of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from components.model.config import Preprocessing, ViTConfig
from components.model.pooling import features, pooled, texture
from components.model.vit import VisionTransformer

SHAPE = ViTConfig(patch_size=8, dim=12, depth=5, num_heads=3, image_size=32, layer_scale_init=1.0)


def test_texture_by_hand():
    """Two channels with standard deviations 1 and e^2, one that is the same everywhere."""
    values = np.array([[[-1.0, 10 + np.exp(2)], [1.0, 10 - np.exp(2)]]])  # [1, 2, 2]
    np.testing.assert_allclose(texture(torch.from_numpy(values).float()), [[-1.0, 1.0]], atol=1e-3)
    flat = texture(torch.full((1, 4, 3), 7.0))
    assert torch.equal(flat, torch.zeros(1, 3))


def test_rounding_of_an_image_without_texture_is_not_made_longer():
    tokens = torch.ones(1, 30, 8) + 1e-6 * torch.randn(1, 30, 8, generator=torch.Generator().manual_seed(0))
    found = pooled(torch.ones(1, 8), [tokens], "cls_texture")
    np.testing.assert_allclose(found[0, :8].norm(), 1, rtol=1e-5)
    assert found[0, 8:].norm() < 2


def test_another_contrast_and_another_color_of_light_leave_it():
    tokens = 5 * torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0))
    changed = 0.4 * tokens + torch.arange(8.0)
    np.testing.assert_allclose(texture(changed), texture(tokens), atol=2e-3)
    assert (texture(tokens)[0] - texture(tokens)[1]).abs().max() > 0.1


def test_the_feature_is_a_class_token_and_a_texture_of_each_layer():
    torch.manual_seed(0)
    backbone, images = VisionTransformer(SHAPE).eval(), torch.randn(2, 3, 32, 32)
    both = Preprocessing(resize_size=32, crop_size=32, pooling="cls_texture")
    with torch.inference_mode():
        found, layers = features(backbone, images, both), backbone.last_layers(images, 4)
        only_class = features(backbone, images, both.model_copy(update={"pooling": "cls"}))
        torch.testing.assert_close(only_class, backbone(images).cls_token)
    assert found.shape == (2, both.feature_dim(SHAPE)) == (2, 5 * 12)
    torch.testing.assert_close(found[:, :12], functional.normalize(only_class, dim=1))
    for number, layer in enumerate(layers):
        part = found[:, 12 * (number + 1) : 12 * (number + 2)]
        logs = np.log(layer.patch_tokens.double().numpy().std(axis=1) + 1e-3)
        logs -= logs.mean(axis=1, keepdims=True)
        np.testing.assert_allclose(part, 1.25 * logs / np.linalg.norm(logs, axis=1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(found.norm(dim=1), np.hypot(1, 2.5), rtol=1e-5)


@pytest.mark.parametrize(("depth", "dim"), [(2, 36), (4, 60), (9, 60)])
def test_it_reads_at_most_four_layers(depth: int, dim: int):
    shape = SHAPE.model_copy(update={"depth": depth})
    size = Preprocessing(resize_size=32, crop_size=32, pooling="cls_texture")
    backbone = VisionTransformer(shape).eval()
    with torch.inference_mode():
        assert features(backbone, torch.zeros(1, 3, 32, 32), size).shape[1] == size.feature_dim(shape) == dim
    assert pooled(torch.ones(1, 3), [], "cls").tolist() == [[1, 1, 1]]
    assert size.at(16) == Preprocessing(resize_size=16, crop_size=16, pooling="cls_texture")
