"""Backbones from elsewhere: the usual forms of files load, and for others the line names the cause."""

import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from components.model.config import ViTConfig
from components.model.export import WeightsError, to_dinov2
from components.model.published import check_sha256, from_dinov2, published_tensors
from components.model.vit import VisionTransformer

VIT = ViTConfig(patch_size=8, dim=16, depth=2, num_heads=2, image_size=32, num_registers=2, drop_path=0.2)


def drawn(**changes) -> VisionTransformer:
    """A backbone in which no two parameters are alike, so that a swapped one shows."""
    torch.manual_seed(0)
    backbone = VisionTransformer(ViTConfig(**VIT.model_dump() | changes)).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return backbone


@pytest.fixture
def state() -> dict[str, Tensor]:
    return to_dinov2(drawn())


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def chunked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {re.sub(r"^blocks\.(\d)", r"blocks.\1.\1", name): tensor for name, tensor in state.items()}


HEAD = {"dino_head.mlp.0.bias": torch.zeros(3)}
PTH_FORMS = {
    "plain": lambda state: state,
    "teacher": lambda state: {"teacher": prefixed(state, "backbone.") | HEAD, "iteration": 9},
    "model": lambda state: {"model": prefixed(state, "teacher.backbone."), "optimizer": {}, "iteration": 9},
    "model with student": lambda state: {
        "model": prefixed(state, "teacher.backbone.") | {f"student.backbone.{n}": 0 * t for n, t in state.items()},
        "step": torch.tensor(9),
    },
    "state_dict": lambda state: {"state_dict": prefixed(state, "backbone.") | HEAD, "epoch": 3},
    "nested": lambda state: {"state_dict": {"model": prefixed(chunked(state), "module.backbone.")}},
}  # fmt: skip


@pytest.mark.parametrize("form", PTH_FORMS)
def test_forms_of_checkpoints_load(tmp_path, state, form):
    torch.save(PTH_FORMS[form](state), tmp_path / "weights.pth")
    tensors = published_tensors(tmp_path / "weights.pth", VIT)
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in state)


def test_safetensors_and_half_precision_load(tmp_path, state):
    half = {name: tensor.half() for name, tensor in state.items()}
    for name, given in {"a": state, "b": chunked(state), "c": prefixed(state, "backbone.") | HEAD, "d": half}.items():
        save_file(given, tmp_path / f"{name}.safetensors")
        tensors = published_tensors(tmp_path / f"{name}.safetensors", VIT)
        for key, expected in state.items():
            tolerance = 1e-3 if name == "d" else 0.0
            torch.testing.assert_close(tensors[key].float(), expected, rtol=tolerance, atol=tolerance)


def in_transformers(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The same tensors in the names of transformers' Dinov2Model, written by hand."""
    hub = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.mask_token": state["mask_token"],
        "embeddings.position_embeddings": state["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    if "register_tokens" in state:
        hub["embeddings.register_tokens"] = state["register_tokens"]
    for i in range(depth):
        ours, theirs = f"blocks.{i}", f"encoder.layer.{i}"
        for kind in ("weight", "bias"):
            whole = state[f"{ours}.attn.qkv.{kind}"]
            dim = len(whole) // 3
            hub[f"{theirs}.attention.attention.query.{kind}"] = whole[:dim].clone()
            hub[f"{theirs}.attention.attention.key.{kind}"] = whole[dim : 2 * dim].clone()
            hub[f"{theirs}.attention.attention.value.{kind}"] = whole[2 * dim :].clone()
            hub[f"{theirs}.attention.output.dense.{kind}"] = state[f"{ours}.attn.proj.{kind}"]
            hub[f"{theirs}.norm1.{kind}"] = state[f"{ours}.norm1.{kind}"]
            hub[f"{theirs}.norm2.{kind}"] = state[f"{ours}.norm2.{kind}"]
            if f"{ours}.mlp.w12.{kind}" in state:
                hub[f"{theirs}.mlp.weights_in.{kind}"] = state[f"{ours}.mlp.w12.{kind}"]
                hub[f"{theirs}.mlp.weights_out.{kind}"] = state[f"{ours}.mlp.w3.{kind}"]
            else:
                hub[f"{theirs}.mlp.fc1.{kind}"] = state[f"{ours}.mlp.fc1.{kind}"]
                hub[f"{theirs}.mlp.fc2.{kind}"] = state[f"{ours}.mlp.fc2.{kind}"]
        hub[f"{theirs}.layer_scale1.lambda1"] = state[f"{ours}.ls1.gamma"]
        hub[f"{theirs}.layer_scale2.lambda1"] = state[f"{ours}.ls2.gamma"]
    return hub


def forward_of_transformers(hub: dict[str, Tensor], images: Tensor, heads: int, depth: int) -> Tensor:
    """Class tokens as `modeling_dinov2.py` computes them from tensors of its names, [B, D]."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ hub[f"{name}.weight"].T + hub[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], hub[f"{name}.weight"], hub[f"{name}.bias"], eps=1e-6)

    kernel = hub["embeddings.patch_embeddings.projection.weight"]
    patches = F.conv2d(images, kernel, hub["embeddings.patch_embeddings.projection.bias"], stride=kernel.shape[-1])
    batch = len(images)
    x = torch.cat([hub["embeddings.cls_token"].expand(batch, -1, -1), patches.flatten(2).transpose(1, 2)], 1)
    x = x + hub["embeddings.position_embeddings"]
    if "embeddings.register_tokens" in hub:
        x = torch.cat([x[:, :1], hub["embeddings.register_tokens"].expand(batch, -1, -1), x[:, 1:]], 1)
    for i in range(depth):
        layer = f"encoder.layer.{i}"
        inner = norm(x, f"{layer}.norm1")
        q, k, v = (
            linear(inner, f"{layer}.attention.attention.{part}").unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )  # [B, heads, N, D / heads]
        attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        context = (attention @ v).transpose(1, 2).flatten(2)
        x = x + linear(context, f"{layer}.attention.output.dense") * hub[f"{layer}.layer_scale1.lambda1"]
        inner = norm(x, f"{layer}.norm2")
        if f"{layer}.mlp.weights_in.weight" in hub:
            gate, value = linear(inner, f"{layer}.mlp.weights_in").chunk(2, -1)
            inner = linear(F.silu(gate) * value, f"{layer}.mlp.weights_out")
        else:
            inner = linear(F.gelu(linear(inner, f"{layer}.mlp.fc1")), f"{layer}.mlp.fc2")
        x = x + inner * hub[f"{layer}.layer_scale2.lambda1"]
    return norm(x, "layernorm")[:, 0]


@pytest.mark.parametrize("changes", [{}, {"ffn": "swiglu", "num_registers": 0}])
@pytest.mark.parametrize("prefix", ["", "dinov2."])
def test_names_of_transformers_give_the_features_of_transformers(tmp_path, changes, prefix):
    backbone = drawn(**changes)
    hub = in_transformers(to_dinov2(backbone), VIT.depth)
    images = torch.randn(2, 3, VIT.image_size, VIT.image_size)
    expected = forward_of_transformers(hub, images, VIT.num_heads, VIT.depth)
    save_file(prefixed(hub, prefix) | {"classifier.weight": torch.zeros(2, 2)}, tmp_path / "hub.safetensors")
    if not prefix:
        save_file(hub, tmp_path / "hub.safetensors")
    loaded = VisionTransformer(backbone.config).eval()
    loaded.load_state_dict(published_tensors(tmp_path / "hub.safetensors", backbone.config))
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).cls_token, expected, rtol=0, atol=1e-5)


def test_a_part_of_a_file_of_transformers_is_named_so(tmp_path, state):
    hub = in_transformers(state, VIT.depth)
    save_file({name: t for name, t in hub.items() if not name.endswith("bias")}, tmp_path / "hub.safetensors")
    message = r"bias is missing; .* more \(its names are those of transformers, translated\); it lacks tensors of"
    with pytest.raises(WeightsError, match=message):
        published_tensors(tmp_path / "hub.safetensors", VIT)
    del hub["encoder.layer.1.attention.attention.key.bias"]
    save_file(hub, tmp_path / "hub.safetensors")
    with pytest.raises(WeightsError, match=r"names of transformers, but no key for blocks\.1\.attn\.qkv\.bias"):
        published_tensors(tmp_path / "hub.safetensors", VIT)


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"image_size": 56}, "set `image_size: 56` in `backbone` to take these weights, or give others"),
        ({"num_registers": 0}, "set `num_registers: 0` in"),
        ({"num_registers": 4}, "set `num_registers: 4` in"),
        ({"depth": 3}, "set `depth: 3` in"),
        ({"patch_size": 4}, "set `patch_size: 4` in"),
        ({"ffn": "swiglu"}, "set `ffn: swiglu` in"),
        ({"ffn_ratio": 2.0}, "set `ffn_ratio: 2.0` in"),
        ({"dim": 32, "image_size": 16}, "set `dim: 32`, `image_size: 16` and `num_heads` (dim / 64 in the published"),
    ],
)
def test_another_shape_is_named_by_key_and_value(tmp_path, changes, remedy):
    save_file(to_dinov2(drawn(**changes)), tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError) as caught:
        published_tensors(tmp_path / "weights.safetensors", VIT)
    assert remedy in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_values_that_are_not_finite_are_named_and_ask_for_another_file(tmp_path, state):
    state["norm.weight"][3] = torch.nan
    save_file(state, tmp_path / "weights.safetensors")
    message = "NaN or infinite values in 1 tensors, first norm.weight; .*; give another file"
    with pytest.raises(WeightsError, match=message):
        published_tensors(tmp_path / "weights.safetensors", VIT)
    with pytest.raises(WeightsError, match=r"its SHA-256 is [0-9a-f]{64}, not 00 as configured"):
        check_sha256(tmp_path / "weights.safetensors", "00")


class _Program:
    def __reduce__(self):
        return (exec, ("raise SystemExit('run from a pickle')",))


def test_a_pickle_that_is_a_program_is_not_run(tmp_path):
    torch.save({"teacher": _Program()}, tmp_path / "weights.pth")
    message = r"weights\.pth: not readable as weights: not a \.pth file of tensors alone$"
    with pytest.raises(WeightsError, match=message):
        published_tensors(tmp_path / "weights.pth", VIT)
    (tmp_path / "weights.pth").write_text("<html>404</html>")
    with pytest.raises(WeightsError, match=message):
        published_tensors(tmp_path / "weights.pth", VIT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "not readable as weights: holds list, not tensors by name"),
        ({"teacher": 3}, "not readable as weights: holds no tensors by name, .*; its keys: 'teacher'"),
        ({1: torch.zeros(3)}, "not readable as weights: holds no tensors by name, .*; its keys: 1"),
        (
            {"net": {"a": torch.zeros(3)}},
            "holds no tensors by name, at the top or .*; its keys: 'net'",
        ),
        ({"a": torch.zeros(3)}, "a is unknown; .*; it lacks tensors of a DINOv2 backbone, or holds others; give"),
        ({f"{n}.cls_token": torch.zeros(3) for n in "ab"}, "holds 2 backbones, under `a.`, `b.`; give a file with one"),
    ],
)
def test_files_that_hold_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=rf"weights\.pth: .*{message}"):
        published_tensors(tmp_path / "weights.pth", VIT)


def test_chunks_that_hold_one_name_twice_are_refused():
    with pytest.raises(WeightsError, match=r"blocks\.0\.a once chunk numbers"):
        from_dinov2({"blocks.0.0.a": torch.ones(1), "blocks.1.0.a": torch.ones(1)})
