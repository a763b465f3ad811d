"""Weights folders: what comes back is what went in, and what is wrong is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.core.storage import sha256_dir
from components.model.config import HeadConfig, ViTConfig
from components.model.export import (
    WeightsError,
    load_backbone,
    open_heads,
    save_weights,
)
from components.model.head import ProjectionHead
from components.model.vit import VisionTransformer

VIT = ViTConfig(patch_size=8, dim=16, depth=2, num_heads=2, image_size=32, num_registers=2, drop_path=0.2)
HEAD = HeadConfig(num_prototypes=12, hidden_dim=10, bottleneck_dim=6)
PROVENANCE = {"stage": "pretrain", "seed": 3, "parent": None}


@pytest.fixture
def models():
    torch.manual_seed(0)
    heads = {"dino": ProjectionHead(16, HEAD), "ibot": ProjectionHead(16, HeadConfig(num_prototypes=5))}
    return VisionTransformer(VIT), heads


@pytest.fixture
def folder(tmp_path, models):
    save_weights(tmp_path / "weights", *models, PROVENANCE)
    return tmp_path / "weights"


def test_round_trip_is_bit_equal(folder, models):
    backbone, heads = models
    state = torch.get_rng_state()
    loaded, (loaded_heads, tensors) = load_backbone(folder), open_heads(folder)
    torch.nn.ModuleDict(loaded_heads).load_state_dict(tensors, assign=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.config == VIT
    assert not loaded.training
    assert sorted(loaded_heads) == ["dino", "ibot"]
    for original, copy in ((backbone, loaded), *((heads[name], loaded_heads[name]) for name in heads)):
        assert [name for name, _ in original.named_parameters()] == [name for name, _ in copy.named_parameters()]
        pairs = zip(original.parameters(), copy.parameters(), strict=True)
        assert all(torch.equal(a, b) and b.requires_grad for a, b in pairs)
    images = torch.randn(2, 3, 24, 40)
    backbone.eval()
    assert torch.equal(backbone(images).patch_tokens, loaded(images).patch_tokens)
    assert loaded_heads["ibot"].config.num_prototypes == 5


def test_loaded_weights_do_not_depend_on_the_file(folder):
    loaded = load_backbone(folder)
    before = loaded.pos_embed.detach().clone()
    path = folder / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)  # same inode
    assert torch.equal(loaded.pos_embed, before)


def test_equal_weights_are_equal_bytes(folder, tmp_path, models):
    save_weights(tmp_path / "again", *models, PROVENANCE)
    assert sha256_dir(tmp_path / "again") == sha256_dir(folder)
    save_weights(folder, models[0], None, PROVENANCE)  # replaces the folder whole
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_config_json_says_all(folder):
    described = json.loads((folder / "config.json").read_text())
    assert described["format_version"] == 1
    assert described["provenance"] == PROVENANCE
    assert ViTConfig(**described["backbone"]) == VIT
    assert described["heads"]["dino"] == {"in_dim": 16, **HEAD.model_dump()}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_half_precision_is_saved_as_float32(tmp_path, models):
    save_weights(tmp_path / "half", models[0].bfloat16(), None, {})
    assert load_backbone(tmp_path / "half").pos_embed.dtype == torch.float32


def _edit_config(folder, edit):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def _edit_weights(folder, edit):
    path = folder / "model.safetensors"
    state = load_file(path)
    state = {name: tensor.clone() for name, tensor in state.items()}
    edit(state)
    save_file(state, path)


HOSTILE = {
    "no folder": (shutil.rmtree, "config.json: no such file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: no such file"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "nothing in it": (
        lambda f: (f / "config.json").write_text("{}"),
        "format_version: required, but not given; backbone: required, but not given; provenance: required",
    ),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "other format": (
        lambda f: _edit_config(f, lambda c: c.update(format_version=2)),
        "format_version: Input should be 1",
    ),
    "unknown key": (lambda f: _edit_config(f, lambda c: c["backbone"].update(dims=3)), "backbone.dims: unknown key"),
    "wrong type": (lambda f: _edit_config(f, lambda c: c["backbone"].update(depth="x")), "backbone.depth"),
    "absurd size": (
        lambda f: _edit_config(f, lambda c: c["backbone"].update(dim=16384, num_heads=256, depth=256)),
        "does not match config.json",
    ),
    "no grid": (
        lambda f: _edit_config(f, lambda c: c["backbone"].pop("image_size")),
        "backbone: image_size: required, but not given",
    ),
    "other shape": (
        lambda f: _edit_config(f, lambda c: c["backbone"].update(image_size=64)),
        "pos_embed is torch.float32",
    ),
    "not safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"PK\3\4 a pickle"),
        "not a readable safetensors",
    ),
    "cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]),
        "not a readable safetensors",
    ),
    "a folder": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
        "not a readable safetensors",
    ),
    "missing tensor": (lambda f: _edit_weights(f, lambda s: s.pop("norm.bias")), "norm.bias is missing"),
    "unknown tensor": (lambda f: _edit_weights(f, lambda s: s.update(extra=torch.ones(1))), "extra is unknown"),
    "integers": (
        lambda f: _edit_weights(f, lambda s: s.update({"norm.bias": torch.ones(16, dtype=torch.int64)})),
        "norm.bias is torch.int64",
    ),
    "not finite": (lambda f: _edit_weights(f, lambda s: s["norm.bias"].fill_(torch.nan)), "NaN or infinite values"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folder_is_one_clear_line(folder, name):
    spoil, message = HOSTILE[name]
    spoil(folder)
    with pytest.raises(WeightsError) as caught:
        load_backbone(folder)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert "dvc" in str(caught.value)


def test_heads_missing(folder, models):
    (folder / "heads.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"heads\.safetensors: no such file"):
        open_heads(folder)
    save_weights(folder, models[0], None, {})
    with pytest.raises(WeightsError, match="holds no projection heads"):
        open_heads(folder)


def test_refuses_to_write_what_could_not_be_read(folder, models):
    before = sha256_dir(folder)
    with torch.no_grad():
        models[1]["ibot"].last_layer.weight_g[0] = torch.inf
    with pytest.raises(WeightsError, match=r"ibot\.last_layer\.weight_g; training has diverged"):
        save_weights(folder, *models, PROVENANCE)
    for provenance in ({"loss": float("nan")}, {"when": object()}):
        with pytest.raises(WeightsError, match="provenance must be plain JSON"):
            save_weights(folder, models[0], None, provenance)
    assert sha256_dir(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["weights"]
