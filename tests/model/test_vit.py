"""The backbone against numbers of the released DINOv2 code, and what holds for any ViT."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from components.model import attention
from components.model.attention import attend, fused_attention, varlen_attention
from components.model.config import ViTConfig
from components.model.layers import add_to_subset
from components.model.published import from_dinov2
from components.model.vit import VisionTransformer

REFERENCE = load_file(Path(__file__).parents[1] / "reference" / "dinov2.safetensors")
SMALL = ViTConfig(dim=32, depth=3, num_heads=2, image_size=70)
MODELS = {
    "vit_mlp_reg4": SMALL,
    "vit_swiglu_noreg": ViTConfig(
        **(SMALL.model_dump() | {"ffn": "swiglu", "num_registers": 0})
        | {"interpolate_antialias": False, "interpolate_offset": 0.1}
    ),
}


def reference_model(name: str) -> VisionTransformer:
    prefix = f"{name}/state/"
    state = {key.removeprefix(prefix): value for key, value in REFERENCE.items() if key.startswith(prefix)}
    model = VisionTransformer(MODELS[name]).eval()
    model.load_state_dict(from_dinov2(state))
    return model


@pytest.mark.parametrize("size", ["70x70", "98x98", "56x112"])
@pytest.mark.parametrize("name", MODELS)
def test_features_equal_the_released_code(name, size):
    model = reference_model(name)
    image, mask = REFERENCE[f"{name}/image_{size}"], REFERENCE[f"{name}/mask_{size}"].bool()

    def check(actual, key):
        torch.testing.assert_close(actual, REFERENCE[f"{name}/{key}_{size}"], rtol=0, atol=1e-4)

    with torch.no_grad():
        plain, masked = model(image), model(image, mask)
    check(plain.cls_token, "cls")
    check(plain.patch_tokens, "patches")
    check(masked.cls_token, "masked_cls")
    check(masked.patch_tokens, "masked_patches")
    if model.config.num_registers:
        check(plain.register_tokens, "registers")
    else:
        assert plain.register_tokens.shape == (2, 0, 32)


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ({"dim": 384, "depth": 12, "num_heads": 6, "num_registers": 0}, 22_056_576),  # hub dinov2_vits14
        ({"dim": 768, "depth": 12, "num_heads": 12, "num_registers": 0}, 86_580_480),  # hub dinov2_vitb14
        ({"num_registers": 0}, 304_368_640),  # hub dinov2_vitl14
        ({"dim": 1536, "depth": 40, "num_heads": 24, "num_registers": 0, "ffn": "swiglu"}, 1_136_480_768),  # vitg14
    ],
)
def test_parameter_counts_of_the_published_sizes(shape, parameters):
    with torch.device("meta"):
        model = VisionTransformer(ViTConfig(**shape, image_size=518))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_masked_patches_do_not_reach_the_tokens():
    model = reference_model("vit_mlp_reg4")
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, 70, 70, generator=generator)
    other = image.clone()
    other[:, :, :14, 14:28] += 5.0  # second patch of the first row
    mask = torch.zeros(1, 25, dtype=torch.bool)
    mask[0, 1] = True
    with torch.no_grad():
        assert torch.equal(model(image, mask).patch_tokens, model(other, mask).patch_tokens)
        assert not torch.equal(model(image).patch_tokens, model(other).patch_tokens)


def test_non_square_position_embedding_follows_height_then_width():
    # The stored grid holds its row number in every channel; resampled, rows differ and columns do not.
    model = VisionTransformer(SMALL)
    with torch.no_grad():
        model.pos_embed[0, 1:] = torch.arange(5.0).repeat_interleave(5)[:, None].expand(25, 32)
    grid = model._position_embedding(4, 8)[0, 1:].reshape(4, 8, 32)
    assert torch.allclose(grid, grid[:, :1].expand_as(grid), atol=1e-5)
    assert (grid[1:, 0, 0] > grid[:-1, 0, 0]).all()
    assert torch.equal(model._position_embedding(5, 5), model.pos_embed)


@pytest.mark.parametrize("shape", [(1, 3, 70, 75), (1, 3, 13, 14), (1, 3, 0, 14)])
def test_image_side_that_patches_do_not_tile(shape):
    with pytest.raises(ValueError, match="multiples of the patch size 14"):
        VisionTransformer(SMALL)(torch.zeros(shape))


def test_wrong_shapes_are_named():
    model = VisionTransformer(SMALL)
    images = torch.zeros(2, 3, 28, 28)
    with pytest.raises(ValueError, match=r"masks must be \[2, 4\]"):
        model(images, torch.zeros(2, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="batch, 3, height, width"):
        model(images[:, :1])


def test_initial_values():
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(dim=128, depth=2, num_heads=2, image_size=224))
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[1].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert 0 < model.cls_token.abs().max() < 1e-5
    assert 0 < model.register_tokens.abs().max() < 1e-5
    assert not model.mask_token.any()
    assert not model.blocks[0].attn.qkv.bias.any()
    assert (model.blocks[0].ls1.gamma == 1e-5).all()


def test_gradient_reaches_every_parameter():
    model = VisionTransformer(SMALL)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[0, 0] = True
    output = model(torch.randn(2, 3, 28, 28), mask)
    (output.cls_token.sum() + output.patch_tokens.square().sum() + output.register_tokens.sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_subset_stochastic_depth_is_unbiased_in_each_group():
    torch.manual_seed(0)
    layout = ((5, 2), (1, 3), (2, 1))
    tokens = torch.randn(15, 3)
    seen = []

    def branch(rows, part):
        seen.append((part, len(rows)))
        return 2 * rows

    draws = torch.stack([add_to_subset(tokens, layout, branch, 0.4) for _ in range(4000)])
    assert set(seen) == {(((3, 2), (1, 3), (1, 1)), 10)}  # floor(5 * 0.6), at least 1, floor(2 * 0.6)
    # A sequence gets 0 or 5/3 (2 in the last group) of its branch, the mean's standard error is below 1.6 % of that.
    torch.testing.assert_close(draws.mean(0), 3 * tokens, rtol=0.06, atol=1e-3)
    change = (draws[0] - tokens)[:10].view(5, 2, 3).flatten(1).abs().sum(1)
    assert (change > 0).sum() == 3  # whole sequences
    assert torch.equal(add_to_subset(tokens, layout, branch, 0.0), 3 * tokens)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed_inputs():
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(3, 25, dtype=torch.bool)
    mask[0, 3:9] = True
    return torch.randn(3, 3, 70, 70, generator=generator), mask, torch.randn(5, 3, 28, 42, generator=generator)


def loss_of(large, small):
    return sum(x.square().mean() for out in (large, small) for x in (out.cls_token, out.patch_tokens.cos()))


@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_unpacked_and_its_gradient(name):
    model = reference_model(name)
    images, mask, small = packed_inputs()
    apart = [model(images, mask), model(small)]
    packed = model.forward_packed([(images, mask), (small, None)])
    for one, other in zip(apart, packed, strict=True):
        for part in ("cls_token", "register_tokens", "patch_tokens"):
            torch.testing.assert_close(getattr(other, part), getattr(one, part), rtol=1e-5, atol=1e-5)
    expected, actual = gradients(model, loss_of(*apart)), gradients(model, loss_of(*packed))
    assert len(expected) == len(dict(model.named_parameters()))
    for key, gradient in expected.items():
        torch.testing.assert_close(actual[key], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_changes_no_bit(mode, dtype):
    config = ViTConfig(**(SMALL.model_dump() | {"drop_path": 0.4, "layer_scale_init": 1.0}))
    torch.manual_seed(0)
    model = VisionTransformer(config)
    images, mask, small = packed_inputs()

    def run(checkpointing):
        model.checkpoint_activations(checkpointing)
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            outputs = model.forward_packed([(images, mask), (small, None)])
        return gradients(model, loss_of(*outputs))

    plain, again = run("none"), run(mode)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_attention_by_products_equals_the_fused_kernel(monkeypatch):
    monkeypatch.setattr(attention, "SCORES_BYTES", 2**14)  # 2**14 / (21 * 21 * 2 * 2): nine sequences at a time
    generator = torch.Generator().manual_seed(0)
    layout, half = ((13, 21), (4, 6)), torch.randn(13 * 21 + 24, 3 * 32, generator=generator).bfloat16()
    upstream = torch.randn(len(half), 32, generator=generator)
    results = []
    for qkv in (half.clone(), half.float()):
        qkv.requires_grad_()
        mixed = attend(qkv, layout, num_heads=2)
        mixed.backward(upstream.to(mixed.dtype))
        results.append((mixed.float(), qkv.grad.float()))
    for products, fused in zip(*results, strict=True):  # bfloat16 has 8 bits
        assert (products - fused).norm() < 0.01 * fused.norm()
        torch.testing.assert_close(products, fused, rtol=0.05, atol=0.05)


def test_one_call_for_all_sizes_equals_a_call_for_each():
    """Only FlashAttention's kernel, for NVIDIA's cards, is written out here; the way to it and back is torch's."""

    def mix(query, key, value, starts):
        mixed = [
            torch.softmax(q.transpose(0, 1) @ k.permute(1, 2, 0) / 4, -1) @ v.transpose(0, 1)  # [heads, length, 16]
            for q, k, v in zip(*(part.tensor_split(starts[1:-1].tolist()) for part in (query, key, value)), strict=True)
        ]
        return torch.cat([part.transpose(0, 1) for part in mixed])

    def forward(query, key, value, starts, *rest, **more):
        assert rest[1:3] == (21, 21)  # the longest
        empty = query.new_empty(0)
        return mix(query, key, value, starts), query.new_empty(2, len(query)), empty, empty, empty

    def backward(upstream, query, key, value, *rest, **more):
        return torch.func.vjp(lambda *parts: mix(*parts, rest[2]), query, key, value)[1](upstream)

    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("_flash_attention_forward", forward, "CPU")
    kernels.impl("_flash_attention_backward", backward, "CPU")
    layout = ((3, 21), (4, 6))
    qkv, upstream = torch.randn(3 * 21 + 24, 3 * 32, requires_grad=True), torch.randn(3 * 21 + 24, 32)
    results = []
    for attention_of in (varlen_attention, fused_attention):
        mixed = attention_of(qkv, layout, num_heads=2)
        results.append((mixed, *torch.autograd.grad(mixed, qkv, upstream)))
    torch.testing.assert_close(*results)


def test_stochastic_depth_only_in_training():
    config = ViTConfig(**(SMALL.model_dump() | {"drop_path": 0.5, "layer_scale_init": 1.0}))
    torch.manual_seed(0)
    model = VisionTransformer(config)
    images = torch.randn(4, 3, 28, 28)
    with torch.no_grad():
        assert not torch.equal(model(images).cls_token, model(images).cls_token)
        model.eval()
        assert torch.equal(model(images).cls_token, model(images).cls_token)


def test_runs_under_bfloat16_autocast():
    config = ViTConfig(**(SMALL.model_dump() | {"drop_path": 0.5}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = VisionTransformer(config)(torch.randn(4, 3, 42, 28))
    assert torch.isfinite(output.patch_tokens).all()
    assert output.patch_tokens.shape == (4, 6, 32)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"dim": 30, "num_heads": 4}, "multiple of num_heads"), ({"image_size": 500}, "multiple of patch_size")],
)
def test_config_whose_shapes_do_not_divide(values, message):
    with pytest.raises(ValidationError, match=message):
        ViTConfig(**values)
