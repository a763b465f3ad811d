"""The stored position grid is that of the crops that a stage trains on, and adaptation takes it up resampled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from components.model.config import HeadConfig, ViTConfig
from components.model.export import load_backbone, save_weights
from components.model.head import ProjectionHead
from components.model.vit import VisionTransformer, resample_positions
from components.recipe import load_recipe, recipe_names
from components.training.config import TrainingConfig
from components.training.initial import load_network
from components.training.networks import self_distillation
from components.training.parallelize import parallelize

WAYS = {"antialias": {}, "offset": {"interpolate_antialias": False, "interpolate_offset": 0.1}}
CHANNELS = 32


def smooth_table(side: int) -> Tensor:
    """A table [P, D] of smooth functions of the place in the image, read at the centers of the grid's cells."""
    generator = torch.Generator().manual_seed(1)
    waves = torch.cos(torch.pi * torch.arange(4).unsqueeze(1) * (torch.arange(side) + 0.5) / side).double()  # [4, side]
    u, v = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    amplitudes = torch.randn(4, 4, CHANNELS, generator=generator).double() / (1 + u**2 + v**2).unsqueeze(-1)
    return 0.02 * torch.einsum("uy,vx,uvd->yxd", waves, waves, amplitudes).flatten(0, 1)


def reading(stored: int, side: int, config: ViTConfig) -> Tensor:
    """Matrix that makes a table of `side` x `side` of a stored one."""
    if side == stored:
        return torch.eye(side**2).double()
    return resample_positions(torch.eye(stored**2 + 1).unsqueeze(0), config, side, side)[0, 1:, 1:].double()


def fitted(stored: int, config: ViTConfig) -> Tensor:
    """A table as training leaves it that fits what it reads (224 and 98 pixels) and moves no further from its start."""
    matrix = torch.cat([reading(stored, side, config) for side in (16, 7)])
    wanted = torch.cat([smooth_table(side) for side in (16, 7)])
    start = 0.02 * torch.randn(stored**2, CHANNELS, generator=torch.Generator().manual_seed(2)).double()
    table = start + torch.linalg.lstsq(matrix, wanted - matrix @ start, driver="gelsd").solution
    assert (matrix @ table - wanted).norm() < 0.01 * wanted.norm()  # at the sizes of training both are right
    return table


@pytest.mark.parametrize("way", WAYS)
def test_a_table_fitted_at_the_crops_own_grid_is_right_at_518_pixels(way):
    config, truth = ViTConfig(**WAYS[way]), smooth_table(37)
    errors = {
        stored: float((reading(stored, 37, config) @ fitted(stored, config) - truth).norm() / truth.norm())
        for stored in (16, 37)
    }
    assert errors[16] < 0.01
    assert errors[37] > 0.8  # 1,369 values a channel of 305 that are read: the rest stays as it was drawn


def test_a_resampled_ramp_is_the_ramp():
    """Bicubic interpolation keeps what is linear: the cell in column j of 37 has its center at (j + 1/2) / 37."""
    ramp = ((torch.arange(16) + 0.5) / 16).expand(16, 16).reshape(1, 256, 1)
    table = resample_positions(torch.cat([torch.full((1, 1, 1), 7.0), ramp], 1), ViTConfig(), 37, 37)
    assert table.shape == (1, 1 + 37 * 37, 1)
    assert table[0, 0, 0] == 7.0  # the class token's
    grid = table[0, 1:, 0].reshape(37, 37)
    assert grid[5, 18] == pytest.approx(0.5)
    assert grid[30, 10] == pytest.approx(10.5 / 37)


@pytest.mark.parametrize("way", WAYS)
def test_adaptation_starts_from_what_was_pretrained(tmp_path, way):
    torch.manual_seed(0)
    shape = ViTConfig(patch_size=8, dim=32, depth=2, num_heads=2, image_size=32, layer_scale_init=1.0, **WAYS[way])
    heads = {name: ProjectionHead(32, HeadConfig(num_prototypes=8, hidden_dim=8)) for name in ("dino", "ibot")}
    save_weights(tmp_path / "weights", VisionTransformer(shape), heads, {})
    network = load_network(tmp_path / "weights", image_size=72)
    parallelize(self_distillation(network), TrainingConfig(), torch.device("cpu"))
    assert network.backbone.config == shape.model_copy(update={"image_size": 72})
    assert network.backbone.pos_embed.shape == (1, 1 + 9 * 9, 32)
    images = torch.randn(2, 3, 72, 72)
    with torch.no_grad():
        expected = load_backbone(tmp_path / "weights")(images).patch_tokens
        torch.testing.assert_close(network.backbone.eval()(images).patch_tokens, expected)


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_store_the_grid_of_their_crops(name):
    recipe = load_recipe(Path(__file__).parents[2], name)
    if name == "continue-dinov2":  # the released weights have the grid of 518 pixels
        assert recipe.pretrain.backbone.image_size == 518
        return
    assert recipe.pretrain.backbone.image_size is None
    assert {student.backbone.image_size for student in recipe.distill.students.values()} == {None}
    shape = recipe.pretrain.backbone.trained_at(recipe.pretrain.crops.global_size)
    with torch.device("meta"):
        assert VisionTransformer(shape).grid_size == recipe.pretrain.crops.global_size // shape.patch_size


def test_a_grid_that_is_named_is_kept():
    assert ViTConfig(image_size=518).trained_at(224).image_size == 518
    with pytest.raises(ValueError, match="image_size: required"):
        VisionTransformer(ViTConfig())
