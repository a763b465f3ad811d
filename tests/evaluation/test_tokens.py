"""Tokens of an evaluation set: those of the evaluation, kept, and shared by ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing as mp

from components.data.evaluation_set import read_evaluation_set
from components.evaluation import encoders
from components.evaluation import tokens as module
from components.evaluation.cost import pass_cost
from components.evaluation.encoders import BackboneEncoder, DescriptorEncoder
from components.evaluation.features import EvaluationImages
from components.evaluation.tokens import Loading, TokenRequest, Tokens, find_tokens
from components.model.config import Preprocessing, ViTConfig
from components.model.pooling import features
from components.model.preprocessing import to_input
from components.model.vit import VisionTransformer
from components.training.config import EnergyConfig
from tests.evaluation.class_tokens import class_tokens
from tests.evaluation.test_evaluation_stage import tiles, write_set

SIZE = Preprocessing(resize_size=36, crop_size=32)


def backbone() -> VisionTransformer:
    torch.manual_seed(1)
    config = ViTConfig(patch_size=8, dim=48, depth=5, num_heads=3, image_size=32, layer_scale_init=1.0)
    return VisionTransformer(config).eval()


def request(root: Path, dense: bool = True, workers: int = 0, size: Preprocessing = SIZE) -> TokenRequest:
    images = EvaluationImages(read_evaluation_set(root / "data/evaluation"), size)
    return TokenRequest(images, "v1", size, Loading(batch_size=7, num_workers=workers), dense)


def arrays(found: Tokens) -> list[np.ndarray]:
    return [np.array(part) for part in (*found.of_images, found.patches) if part is not None]


def test_they_are_those_of_the_network_and_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_set(tmp_path, tiles())
    asked, model = request(tmp_path), backbone()
    encoder = BackboneEncoder(model)
    found = find_tokens(encoder, "w1", asked, tmp_path / "cache")
    others = find_tokens(encoder, "w1", request(tmp_path, workers=1), tmp_path / "by a worker")
    assert all(np.array_equal(a, b) for a, b in zip(arrays(found), arrays(others), strict=True))
    pixels = torch.stack([asked.images[index] for index in range(len(asked.images))])
    np.testing.assert_allclose(found.features, class_tokens(model, pixels), atol=1e-6)
    with torch.inference_mode():
        layers = model.last_layers(to_input(pixels.permute(0, 3, 1, 2)), 4)
        for block in model.blocks[-2:]:
            block.attn.proj.weight.zero_(), block.attn.proj.bias.zero_()
            block.mlp.fc2.weight.zero_(), block.mlp.fc2.bias.zero_()
        third = model(to_input(pixels.permute(0, 3, 1, 2)))  # the last two blocks add nothing now
    assert (found.cls.shape, found.patches.shape, found.rows) == ((36, 4, 48), (36, 16, 4 * 48), 4)
    for number, layer in enumerate(layers):
        np.testing.assert_allclose(found.cls[:, number], layer.cls_token, atol=1e-6)
        np.testing.assert_allclose(found.patches[..., 48 * number : 48 * (number + 1)], layer.patch_tokens, atol=2e-3)
    np.testing.assert_allclose(found.cls[:, 1], third.cls_token, atol=1e-5)
    np.testing.assert_allclose(found.mean_patch, layers[-1].patch_tokens.mean(1), atol=1e-6)

    monkeypatch.setattr(encoder, "encode", None)  # would raise
    kept = find_tokens(encoder, "w1", asked, tmp_path / "cache")
    assert all(np.array_equal(a, b) for a, b in zip(arrays(found), arrays(kept), strict=True))
    assert kept.device_seconds == found.device_seconds > 0  # of the pass, not of reading the cache
    with pytest.raises(TypeError):
        find_tokens(encoder, "w2", asked, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.part"))


def test_patches_of_the_descriptor_cost_nothing_where_nobody_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_set(tmp_path, list(tiles())[:3])
    encoder = DescriptorEncoder(4)
    dense = find_tokens(encoder, "d", request(tmp_path), tmp_path / "cache")
    assert dense.patches is not None
    monkeypatch.setattr(encoders, "describe_patches", None)  # would raise
    whole = find_tokens(encoder, "d", request(tmp_path, dense=False), tmp_path / "cache")
    assert whole.patches is None
    assert all(np.array_equal(a, b) for a, b in zip(arrays(dense)[:3], arrays(whole), strict=True))


def test_texture_is_pooled_of_networks_and_of_the_descriptor_alike(tmp_path: Path):
    write_set(tmp_path, list(tiles())[:3])
    textured, model = SIZE.model_copy(update={"pooling": "cls_texture"}), backbone()
    plain, asked = request(tmp_path, dense=False), request(tmp_path, dense=False, size=textured)
    pixels = torch.stack([asked.images[index] for index in range(len(asked.images))])
    with torch.inference_mode():
        expected = features(model, to_input(pixels.permute(0, 3, 1, 2)), textured)
    found = find_tokens(BackboneEncoder(model), "w1", asked, tmp_path / "cache")
    np.testing.assert_allclose(found.features, expected, atol=1e-5)
    whole = find_tokens(BackboneEncoder(model), "w1", plain, tmp_path / "cache")
    np.testing.assert_array_equal(whole.features, whole.cls[:, -1])
    assert whole.patches is found.patches is None
    descriptor = find_tokens(DescriptorEncoder(4), "d", asked, tmp_path / "cache")
    assert descriptor.features.shape[1] == 452 + 209
    np.testing.assert_allclose(np.linalg.norm(descriptor.features[:, 452:], axis=1), 2.5, rtol=1e-4)


def test_tokens_of_clips_are_means_or_side_by_side():
    cls = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    frames = Tokens(cls, np.array([[1.0], [3], [8]], np.float32), cls[:, -1], None)
    rows = np.array([[0, 2], [1, 1]])
    mean, joint = (module.of_clips(frames, rows, joint=joint) for joint in (False, True))
    assert mean.cls.tolist() == [[[4, 5], [6, 7]], [[4, 5], [6, 7]]]  # of 0 1 2 3 and 8 9 10 11
    assert mean.mean_patch.tolist() == [[4.5], [3]]
    assert joint.cls.tolist() == [[[0, 1, 8, 9], [2, 3, 10, 11]], [[4, 5, 4, 5], [6, 7, 6, 7]]]
    assert joint.features.shape == (2, 4)


def test_the_energy_of_a_pass_is_power_by_time():
    cost = pass_cost(1800.0, torch.device("cpu"), EnergyConfig(device_watts=400, pue=1.5, kg_co2e_per_kwh=0.5))
    assert (cost.energy_kwh, cost.co2e_kg) == (pytest.approx(0.3), pytest.approx(0.15))  # 400 W x 0.5 h x 1.5
    assert "0.3 kWh and 0.15 kg CO2e, not measured but estimated: 400 W for this time, PUE 1.5" in cost.line()
    unknown = pass_cost(1800.0, torch.device("cpu"), EnergyConfig())
    assert (unknown.energy_kwh, unknown.co2e_kg) == (None, None)
    assert "energy not known: nothing tells the power of this device" in unknown.line()


def _rank(rank: int, root: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=2)
    try:
        find_tokens(BackboneEncoder(backbone()), "w1", request(Path(root)), Path(root) / "two")
    finally:
        dist.destroy_process_group()


def test_two_ranks_share_the_images(tmp_path: Path):
    write_set(tmp_path, tiles())
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    one = find_tokens(BackboneEncoder(backbone()), "w1", request(tmp_path), tmp_path / "one")
    two = find_tokens(BackboneEncoder(backbone()), "w1", request(tmp_path), tmp_path / "two")
    for ours, theirs in zip(arrays(one), arrays(two), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert sorted(path.name for path in (tmp_path / "two").iterdir() if path.is_dir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir() if path.is_dir()
    )


def test_more_layers_than_there_are(tmp_path: Path):
    with pytest.raises(ValueError, match="count must be from 1 to the depth, 5, got 6"):
        backbone().last_layers(torch.zeros(1, 3, 32, 32), 6)
