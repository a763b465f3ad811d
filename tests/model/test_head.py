"""The projection head against numbers of the released code."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.model.config import HeadConfig
from components.model.head import ProjectionHead

REFERENCE = load_file(Path(__file__).parents[1] / "reference" / "dinov2.safetensors")
CONFIG = HeadConfig(num_prototypes=32, hidden_dim=24, bottleneck_dim=8)


def test_logits_equal_the_released_code():
    prefix = "head/state/"
    head = ProjectionHead(16, CONFIG)
    head.load_state_dict({k.removeprefix(prefix): v for k, v in REFERENCE.items() if k.startswith(prefix)})
    torch.testing.assert_close(head(REFERENCE["head/in"]), REFERENCE["head/out"], rtol=1e-5, atol=1e-6)


def test_logits_are_cosines_times_a_trainable_length():
    torch.manual_seed(0)
    head = ProjectionHead(16, CONFIG)
    tokens = torch.randn(5, 16)
    before = head(tokens)
    assert before.abs().max() <= 1
    with torch.no_grad():
        head.last_layer.weight_v *= 7  # direction only
        torch.testing.assert_close(head(tokens), before)
        head.last_layer.weight_g *= 2
        torch.testing.assert_close(head(tokens), 2 * before)
    head(tokens).square().sum().backward()
    assert head.last_layer.weight_g.grad.abs().sum() > 0


def test_prototypes_start_as_torchs_linear_layers_do():
    """As in the released code, whose own initial values are of the layers before."""
    torch.manual_seed(0)
    head = ProjectionHead(16, HeadConfig(num_prototypes=512, bottleneck_dim=64))
    prototypes = head.last_layer.weight_v
    assert prototypes.abs().max() <= 64**-0.5
    assert prototypes.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.02)
    assert head.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_one_layer_and_no_tokens():
    head = ProjectionHead(16, HeadConfig(num_prototypes=4, bottleneck_dim=8, num_layers=1))
    assert sorted(dict(head.named_parameters())) == [
        "last_layer.weight_g",
        "last_layer.weight_v",
        "mlp.0.bias",
        "mlp.0.weight",
    ]
    assert head(torch.zeros(0, 16)).shape == (0, 4)
