"""Exports: each form read back by code that is not ours where it is installed, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from skimage import data
from typer.testing import CliRunner

from components.core.config import ConfigError
from components.core.storage import sha256_file
from components.data.evalset import read_evalset
from components.evaluation.encoders import BackboneEncoder
from components.evaluation.external import load_external
from components.evaluation.features import EvaluationImages
from components.lineage.provenance import Tag
from components.model.config import Preprocessing, ViTConfig
from components.model.export import load_backbone
from components.model.preprocessing import center_crops, to_input
from components.model.published import published_tensors
from components.registry import export_names, exports
from components.registry.exports import FORMS, ExportError, export
from components.registry.named_weights import NamedWeights, find_weights
from flows.cli import app
from flows.commands.export import Form
from tests.evaluation.test_evaluation_stage import tiles, write_set
from tests.registry.conftest import telling_weights

SHAPES = {
    "registers": ViTConfig(patch_size=7, dim=32, depth=2, num_heads=2, num_registers=3, image_size=28),
    "offset": ViTConfig(
        patch_size=7, dim=32, depth=2, num_heads=2, num_registers=0, image_size=28, ffn="swiglu",
        interpolate_antialias=False, interpolate_offset=0.1,
    ),
}  # fmt: skip
RESOLUTION = 49


def make_weights(folder: Path, shape: ViTConfig) -> NamedWeights:
    telling_weights(folder, shape)
    return NamedWeights(str(folder), folder, Preprocessing(resize_size=32, crop_size=28), {"pedigree.digest": "d1"})


@pytest.fixture(params=SHAPES)
def named(request, tmp_path: Path) -> NamedWeights:
    return make_weights(tmp_path / "weights", SHAPES[request.param])


@pytest.fixture
def one(tmp_path: Path) -> NamedWeights:
    return make_weights(tmp_path / "weights", SHAPES["registers"])


def inputs(resolution: int) -> torch.Tensor:
    """Photographs, of which no export is checked on the last."""
    from PIL import Image

    photographs = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in ("coffee", "rocket", "retina")]
    crops = center_crops(photographs, Preprocessing(resize_size=32, crop_size=28).at(resolution))
    return to_input(torch.from_numpy(crops).permute(0, 3, 1, 2))


def test_the_command_names_every_form():
    assert get_args(Form) == get_args(exports.Format) == tuple(FORMS)


@pytest.mark.parametrize("form", ["safetensors", "dinov2", "timm", "transformers"])
def test_tensors_come_back_under_their_names(named, form, tmp_path: Path):
    done = export(named, form, tmp_path / "out" / f"x{FORMS[form].suffix}", RESOLUTION)
    assert (done.resolution, done.num_images, done.facts["pedigree.digest"]) == (RESOLUTION, 4, "d1")
    assert done.least_cosine > 0.99999
    assert done.largest_difference < 1e-4
    assert [path.name for path in (tmp_path / "out").iterdir()] == [done.path.name]
    if form == "dinov2":
        state = torch.load(done.path, weights_only=True)
        stated = state._metadata["pedigree"]
        own = published_tensors(done.path, load_backbone(named.folder).config.model_copy(update={"image_size": 49}))
        assert own.keys() == state.keys()
    else:
        with safe_open(done.path if done.path.is_file() else done.path / "model.safetensors", "pt") as file:
            stated, state = file.metadata(), dict.fromkeys(file.keys())
    assert stated["pedigree.digest"] == "d1"
    assert json.loads(stated["pedigree.backbone"])["image_size"] == RESOLUTION
    assert json.loads(stated["pedigree.preprocessing"])["crop_size"] == RESOLUTION
    assert (
        len(state)
        == done.num_tensors
        == len(load_backbone(named.folder).state_dict())
        - len(done.left_out)
        + (
            8
            if form == "transformers"
            else 0  # query, key and value are apart there: 2 more of weight and bias, 2 blocks
        )
    )


def test_any_size_keeps_the_trained_grid_where_none_is_asked_for(one, tmp_path: Path):
    done = export(one, "safetensors", tmp_path / "x.safetensors", None)
    assert done.resolution == 28
    for name, tensor in load_file(done.path).items():
        assert torch.equal(tensor, load_backbone(one.folder).state_dict()[name])


def test_onnx_gives_our_features_in_onnxruntime(named, tmp_path: Path):
    done = export(named, "onnx", tmp_path / "x.onnx", RESOLUTION)
    session = onnxruntime.InferenceSession(str(done.path))
    images = inputs(RESOLUTION)
    with torch.no_grad():
        own = load_backbone(named.folder)(images)  # resampled by ours as it goes, folded in the file
    for batch in (1, 3):
        cls_token, patch_tokens = session.run(["cls_token", "patch_tokens"], {"images": images[:batch].numpy()})
        np.testing.assert_allclose(cls_token, own.cls_token[:batch], rtol=0, atol=1e-4)
        np.testing.assert_allclose(patch_tokens, own.patch_tokens[:batch], rtol=0, atol=1e-4)
    stated = {item.key: item.value for item in onnx.load(done.path).metadata_props}
    assert stated["pedigree.digest"] == "d1"
    assert session.get_modelmeta().custom_metadata_map["pedigree.preprocessing"] == stated["pedigree.preprocessing"]
    assert [node.op_type for node in onnx.load(done.path).graph.node if node.op_type == "Resize"] == []
    write_set(tmp_path, list(tiles(3)))
    evalset = read_evalset(tmp_path / "data/evaluation/sample/0123456789ab")
    external = load_external(str(done.path), "onnx", evalset).model
    assert external.preprocessing == named.preprocessing.at(RESOLUTION)
    crops = EvaluationImages(evalset.images, external.preprocessing)
    pixels = torch.stack([crops[index] for index in range(len(crops))])
    theirs = external.encoder.encode(pixels)
    ours = BackboneEncoder(load_backbone(named.folder)).encode(pixels)
    torch.testing.assert_close(theirs.cls[:, 0], ours.cls[:, -1], rtol=0, atol=1e-4)
    torch.testing.assert_close(theirs.patches[0], ours.patches[-1], rtol=0, atol=1e-4)


def test_torch_export_gives_our_features(one, tmp_path: Path):
    done = export(one, "torch-export", tmp_path / "x.pt2", RESOLUTION)
    extra = {"pedigree.json": ""}
    program = torch.export.load(done.path, extra_files=extra).module()
    images = inputs(RESOLUTION)
    with torch.no_grad():
        own = load_backbone(one.folder)(images)
        for batch in (1, 3):
            cls_token, patch_tokens = program(images[:batch])
            torch.testing.assert_close(cls_token, own.cls_token[:batch], rtol=0, atol=1e-4)
            torch.testing.assert_close(patch_tokens, own.patch_tokens[:batch], rtol=0, atol=1e-4)
    assert json.loads(extra["pedigree.json"])["pedigree.digest"] == "d1"


def test_other_tokens_than_ours_are_refused_and_nothing_is_left(one, tmp_path: Path, monkeypatch):
    def swapped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = original(state)
        found["blocks.0.norm1.weight"], found["blocks.1.norm1.weight"] = (
            found["blocks.1.norm1.weight"],
            found["blocks.0.norm1.weight"],
        )
        return found

    def short(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in original(state).items() if name != "norm.bias"}

    original = export_names.to_timm
    for wrong, said in ((swapped, r"not written: cosine 0\.\d+ with ours"), (short, "first norm.bias is missing")):
        monkeypatch.setattr(export_names, "to_timm", wrong)
        with pytest.raises(ExportError, match=said):
            export(one, "timm", tmp_path / "out/x", None)
        assert list((tmp_path / "out").iterdir()) == []


def test_what_a_killed_export_left_is_replaced_and_what_is_there_is_kept(one, tmp_path: Path):
    left = tmp_path / ".x.pth.partial"
    left.mkdir()
    (left / "x.pth").write_bytes(b"half")
    export(one, "dinov2", tmp_path / "x.pth", None)
    assert not left.exists()
    with pytest.raises(ConfigError, match=r"x\.pth: is there already; remove it"):
        export(one, "dinov2", tmp_path / "x.pth", None)


@pytest.mark.parametrize("resolution", [0, -7, 30])
def test_a_resolution_that_patches_do_not_tile_is_refused(one, tmp_path: Path, resolution):
    with pytest.raises(
        ConfigError, match=re.escape(f"--resolution {resolution}: must be a multiple of the patch size, 7")
    ):
        export(one, "onnx", tmp_path / "x.onnx", resolution)


def test_command(one, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["export", "weights", "--format", "timm", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["path"], told["resolution"], told["left_out"]) == ("weights-timm", 28, ["mask_token"])
    assert told["facts"][Tag.WEIGHTS_SHA256] == sha256_file(Path("weights/model.safetensors"))
    assert told["facts"]["pedigree.passport"].startswith("none: from the weights folder weights")
    assert "nothing states how its images were scaled" in told["assumed"]
    shown = CliRunner().invoke(app, ["export", "weights", "--format", "transformers"])
    assert "cosine at least" in shown.stdout
    for arguments, said in (
        (["nowhere", "--format", "onnx"], "nowhere: no such folder; give NAME@ALIAS, NAME/NUMBER or a weights folder"),
        (["weights", "--format", "timm"], "weights-timm: is there already"),
    ):
        refused = CliRunner().invoke(app, ["export", *arguments])
        assert refused.exit_code == 2
        assert said in refused.stderr


@pytest.mark.stack
def test_a_registered_version_states_its_passport(finished, stack, tmp_path: Path, monkeypatch):
    name = f"{finished['name']}-candidates"
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["export", f"{name}/2", "--format", "safetensors", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["path"], told["assumed"]) == (f"{name}-2.safetensors", None)
    with safe_open(told["path"], "pt") as file:
        stated: dict[str, Any] = file.metadata()
    newer = finished["newer"]["teacher"]
    assert stated["pedigree.passport"] == f"models:/{name}/2"
    assert stated[Tag.DIGEST] == newer["digest"]
    assert stated[Tag.WEIGHTS_SHA256] == newer["weights_sha256"]
    assert find_weights(f"{name}/2", tmp_path).preprocessing == Preprocessing(resize_size=32, crop_size=28)
    missing = CliRunner().invoke(app, ["export", f"{name}@best", "--format", "timm"])
    assert missing.exit_code == 1
    assert len(missing.stderr.splitlines()) == 1
