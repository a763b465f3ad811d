from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from components.curation.config import CurationError, DescriptorConfig, ModelConfig, OnnxConfig, TorchScriptConfig
from components.curation.embedders import load, normalized_pixels, resolve

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class MeanColor(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))


class PerPixel(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images * 2


def script(module: torch.nn.Module, path) -> None:
    torch.jit.save(torch.jit.script(module), str(path))


def mean_color_onnx(path, height: int | str = "height") -> None:
    shape = ["batch", 3, height, "width"]
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["images", "axes"], ["embeddings"], keepdims=0)],
        "mean-color",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, str(path))


def expected_mean_color(photo, size: int) -> np.ndarray:
    pixels = torch.from_numpy(np.asarray(photo.resize((size, size), 2)).copy()).double() / 255  # 2 is bilinear
    return ((pixels.mean(dim=(0, 1)) - MEAN) / STD).numpy()


@pytest.mark.parametrize(("config", "write"), [(TorchScriptConfig, None), (OnnxConfig, mean_color_onnx)])
def test_a_file_from_outside_sees_normalized_pixels(tmp_path, photos, config, write):
    path = tmp_path / "model.file"
    write(path) if write else script(MeanColor(), path)
    embed = load(resolve(config(path="model.file", size=64), tmp_path))
    expected = [expected_mean_color(photo, 64) for photo in photos[:3]]
    np.testing.assert_allclose(embed(photos[:3]), expected, atol=1e-5)


def test_short_side_keeps_the_ratio_and_runs_images_one_by_one(tmp_path, photos):
    script(MeanColor(), tmp_path / "m.pt")
    embedder = resolve(TorchScriptConfig(path="m.pt", resize="short_side", size=288), tmp_path)
    assert embedder.batch_size == 1
    assert normalized_pixels(photos[0].crop((0, 0, 160, 80)), "short_side", 288).shape == (3, 288, 576)
    assert normalized_pixels(photos[0].crop((0, 0, 80, 160)), "square", 320).shape == (3, 320, 320)


def test_our_own_weights_give_class_tokens(tmp_path, photos):
    from components.model.config import Preprocessing, ViTConfig
    from components.model.export import load_backbone, save_weights
    from components.model.vit import VisionTransformer

    torch.manual_seed(0)
    save_weights(tmp_path / "w", VisionTransformer(ViTConfig(dim=24, depth=2, num_heads=2, image_size=28)), None, {})
    embed = load(resolve(ModelConfig(weights="w", preprocessing=Preprocessing(resize_size=32, crop_size=28)), tmp_path))
    middles = [photo.resize((32, 32), 3).crop((2, 2, 30, 30)) for photo in photos[:2]]  # 3 is bicubic; all are squares
    batch = torch.from_numpy(np.stack([normalized_pixels(middle, "square", 28) for middle in middles]))
    with torch.no_grad():
        expected = load_backbone(tmp_path / "w")(batch).cls_token
    np.testing.assert_allclose(embed(photos[:2]), expected.numpy(), atol=1e-5)


def test_the_digest_names_bytes_and_parameters_and_not_places(tmp_path):
    script(MeanColor(), tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes((tmp_path / "a.pt").read_bytes())
    script(PerPixel(), tmp_path / "c.pt")

    def digest(**values) -> str:
        return resolve(TorchScriptConfig(**values), tmp_path).digest

    assert digest(path="a.pt") == digest(path="b.pt")
    different = {digest(path="a.pt"), digest(path="c.pt"), digest(path="a.pt", size=288)}
    assert len(different | {resolve(DescriptorConfig(), tmp_path).digest}) == 4


@pytest.mark.parametrize("config", [TorchScriptConfig(path="x"), OnnxConfig(path="x"), ModelConfig(weights="x")])
def test_a_missing_file_is_named(tmp_path, config):
    with pytest.raises(CurationError, match=r"embed\.embedder\.(path|weights): .*x: no"):
        resolve(config, tmp_path)


@pytest.mark.parametrize("config", [TorchScriptConfig(path="x"), OnnxConfig(path="x")])
def test_a_file_of_another_kind_is_refused(tmp_path, config):
    (tmp_path / "x").write_bytes(b"not a model")
    with pytest.raises(CurationError, match="x: not a"):
        load(resolve(config, tmp_path))


def test_outputs_that_are_no_embeddings_are_refused(tmp_path, photos):
    script(PerPixel(), tmp_path / "m.pt")
    embed = load(resolve(TorchScriptConfig(path="m.pt", size=32), tmp_path))
    with pytest.raises(CurationError, match=r"gave shape \[2, 3, 32, 32\] for 2 images; expected \[2, D\]"):
        embed(photos[:2])


def test_a_size_that_the_file_does_not_take_is_named(tmp_path, photos):
    mean_color_onnx(tmp_path / "m.onnx", height=64)
    embed = load(resolve(OnnxConfig(path="m.onnx", size=32), tmp_path))
    with pytest.raises(CurationError, match=r"cannot take images of shape \[1, 3, 32, 32\].*see `size`"):
        embed(photos[:1])
