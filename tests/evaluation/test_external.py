"""Models of other programs: what is read of them and of the files beside them, and what is refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from onnx import TensorProto, helper, save_model
from torch import nn

from components.core.config import ConfigError
from components.data.evalset import read_evalset
from components.evaluation.external import External, _feature_and_patches, external_kind, load_external
from components.evaluation.external_scaling import PREPROCESSOR_FILE, beside
from components.model.config import Preprocessing
from tests.benchmarks.served import libraries
from tests.evaluation.test_evaluation_stage import tiles, write_set

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def evalset(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("set")
    write_set(root, list(tiles(3)))
    return read_evalset(root / "data/evaluation/sample/0123456789ab")


def load(path: Path, evalset) -> External:
    kind = external_kind(str(path))
    assert kind is not None
    return load_external(str(path), kind, evalset)


def write_onnx(path: Path, shape: list[int | str], elements: int = TensorProto.FLOAT, count: int = 1) -> Path:
    """A file that gives the mean of each channel."""
    inputs = [helper.make_tensor_value_info(f"x{n}", elements, shape) for n in range(count)]
    node = helper.make_node("ReduceMean", ["x0"], ["y"], axes=[2, 3], keepdims=0)
    output = helper.make_tensor_value_info("y", elements, None)
    graph = helper.make_graph([node], "means", inputs, [output])
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_tokens_are_told_apart_by_their_number():
    tokens = torch.arange(2 * 21 * 5.0).view(2, 21, 5)
    feature, (patches,) = _feature_and_patches([tokens], 32, "m")  # 16 patches tile 32 pixels
    assert torch.equal(feature, tokens[:, 0])
    assert torch.equal(patches, tokens[:, 5:])
    feature, (patches,) = _feature_and_patches([tokens[:, :16]], 32, "m")  # no class token
    assert torch.equal(feature, tokens[:, :16].mean(dim=1))
    assert patches.shape[1] == 16
    feature, (patches,) = _feature_and_patches([tokens[:, 0], tokens[:, 1:10]], 7, "m")
    assert (feature.shape, patches.shape) == ((2, 5), (2, 9, 5))
    assert _feature_and_patches([tokens[:, 0], tokens[:, 1:9]], 32, "m")[1] == ()  # 8 fill no square
    assert _feature_and_patches([tokens], 31, "m")[1] == ()  # 31 is a prime
    with pytest.raises(ConfigError, match=r"m: gives \[2, 21, 5, 1\]; a feature"):
        _feature_and_patches([tokens[..., None]], 32, "m")


@pytest.mark.parametrize(
    ("stated", "sizes", "told"),
    [
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, (256, 224), 0),
        ({"size": {"height": 96, "width": 96}, "resample": 2}, (96, 96), 2),  # squeezed, and not bicubic
        ({"size": 256, "crop_size": 224, "do_center_crop": False}, (256, 256), 0),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875, "do_center_crop": True}, (256, 224), 0),
    ],
)
def test_the_scaling_of_transformers(tmp_path: Path, stated: dict, sizes: tuple[int, int], told: int):
    colors = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3], "unknown": [None]}
    (tmp_path / PREPROCESSOR_FILE).write_text(json.dumps(stated | colors))
    found = beside(tmp_path, "m")
    assert found.preprocessing == Preprocessing(resize_size=sizes[0], crop_size=sizes[1])
    assert (found.mean, found.std, len(found.facts)) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3), told)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "holds list, expected a JSON object"),
        ("{", "not readable as JSON"),
        ('{"size": {"height": 3, "width": 4}}', "3x4 pixels; only square images"),
        ('{"image_std": [1, 0, 1]}', "image_std.1: Input should be greater than 0"),
        ('{"size": 1e9}', "size"),
        ('{"size": 8192, "crop_pct": 0.01}', "resize_size: Input should be less than or equal to 16384"),
        ('{"do_normalize": false}', "neither size nor crop_size"),
    ],
)
def test_a_wrong_scaling_is_one_line(tmp_path: Path, text: str, message: str):
    (tmp_path / PREPROCESSOR_FILE).write_text(text)
    with pytest.raises(ConfigError) as told:
        beside(tmp_path, "m")
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_a_feature_without_patch_tokens_is_normalized_as_stated(tmp_path: Path, evalset):
    path = write_onnx(tmp_path / "means.onnx", ["B", 3, 8, 8])
    (tmp_path / PREPROCESSOR_FILE).write_text('{"size": 99, "image_mean": [0, 0, 0.5], "image_std": [1, 1, 2]}')
    found = load(path, evalset)
    assert found.model.preprocessing == Preprocessing(resize_size=8, crop_size=8)  # the file takes no other
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    images[1] = 255
    encoded = found.model.encoder.encode(images)
    torch.testing.assert_close(encoded.cls[:, 0], torch.tensor([[0, 0, -0.25], [1, 1, 0.25]]))
    assert encoded.patches == ()
    assert any("gives no patch tokens: segmentation and depth are not measured" in fact for fact in found.facts)
    assert found.model.encoder.untrained(0) is None


def test_a_traced_network_is_a_program_and_its_tokens_are_told(tmp_path: Path, evalset):
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 6, 8, 8)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            patches = self.patch(images).flatten(2).transpose(1, 2)
            return torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1)

    torch.jit.trace(Tokens(), torch.zeros(1, 3, 32, 32)).save(tmp_path / "net.pt")
    found = load(tmp_path / "net.pt", evalset)
    assert found.model.preprocessing == Preprocessing()
    assert f"{tmp_path}/net.pt: a TorchScript file is a program, and ran with your rights" in found.facts
    assert f"{tmp_path}/net.pt: 785 tokens, taken as 1 others and 28 x 28 patch tokens" in found.facts
    assert any("nothing states how its images are scaled" in fact for fact in found.facts)
    assert found.model.encoder.encode_black(32).rows(32) == 4


def test_what_is_no_such_model_is_one_line(tmp_path: Path, evalset):
    def refused(path: Path) -> str:
        with pytest.raises(ConfigError) as told:
            load(path, evalset)
        assert "\n" not in str(told.value)
        return str(told.value)

    torch.save({"weight": torch.zeros(2)}, tmp_path / "state.pt")
    assert "no TorchScript program; pickled weights are not read" in refused(tmp_path / "state.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state.pth")
    assert "no model that can be evaluated; give a weights folder, a folder that" in refused(tmp_path / "state.pth")
    (tmp_path / "broken.onnx").write_bytes(b"onnx")
    assert "not a model that can be loaded" in refused(tmp_path / "broken.onnx")
    wrong = (["B", 8, 8, 3],), (["B", 3, 8, 9],), ([4, 3, 8, 8],)
    others = (["B", 3, 8, 8], TensorProto.FLOAT16), (["B", 3, 8, 8], TensorProto.FLOAT, 2)
    for number, given in enumerate((*wrong, *others)):
        told = refused(write_onnx(tmp_path / f"{number}.onnx", *given))
        assert "allowed is one, float32 [B, 3, S, S]" in told
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "dinov2"}')
    assert refused(folder).startswith(f"{folder}: needs transformers, which cannot be imported (No module named")
    (folder / "config.json").write_text('{"architecture": "vit_small_patch14_dinov2"}')
    assert refused(folder).endswith("pip install timm")
    assert external_kind(str(tmp_path / "nowhere")) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_the_same_scores_as_in_its_library(kind: str, tmp_path: Path):
    """A DINOv2 model with random weights, other sizes and other colors, in an environment with both libraries."""
    command = [str(libraries().absolute()), "-m", "tests.evaluation.in_library", kind, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ours"] == found["theirs"]
    assert max(found["feature"], found["mean_patch"]) < 1e-4
    assert found["models"] == [str(tmp_path / kind), "random", "descriptor"]
    left_out = "2 tensors are not used: head.bias, head.weight"
    assert any(left_out in fact for fact in found["facts"]) == (kind == "timm")
    expected = {
        "timm": ["lack 1 tensors", "has no architecture 'hf-hub:", "model_args must shape the network only"],
        "transformers": ["lack 1 tensors", "can be loaded: The repository", "can be loaded: Validation error"],
    }
    for part, message in zip(expected[kind], found["refused"], strict=True):
        assert part in message
        assert "\n" not in message
