import subprocess
import sys

import pytest
import torch

from components.model.config import HeadConfig, ViTConfig
from components.model.head import ProjectionHead
from components.model.vit import VisionTransformer
from components.training.config import OptimizerConfig
from components.training.networks import Network
from components.training.optimizer import ParameterRole, build_optimizer, clip_gradients, parameter_role, set_values
from components.training.schedules import StepValues

CONFIG = OptimizerConfig(layer_decay=0.9, patch_embed_lr_factor=0.2)


def network() -> Network:
    vit = VisionTransformer(ViTConfig(patch_size=4, dim=8, depth=3, num_heads=2, image_size=8, num_registers=2))
    head = HeadConfig(num_prototypes=8, hidden_dim=8, bottleneck_dim=4)
    return Network(vit, {"dino": ProjectionHead(8, head), "ibot": ProjectionHead(8, head)})


@pytest.mark.parametrize(
    ("name", "role"),
    [  # dinov2/utils/param_groups.py for a backbone of 3 blocks
        ("backbone.cls_token", ParameterRole(0.9**4, decays=True, last_layer=False)),
        ("backbone.register_tokens", ParameterRole(0.9**4, decays=True, last_layer=False)),
        ("backbone.patch_embed.proj.weight", ParameterRole(0.9**4 * 0.2, decays=True, last_layer=False)),
        ("backbone.patch_embed.proj.bias", ParameterRole(0.9**4 * 0.2, decays=False, last_layer=False)),
        ("backbone.blocks.0.attn.qkv.weight", ParameterRole(0.9**3, decays=True, last_layer=False)),
        ("backbone.blocks.2.attn.qkv.bias", ParameterRole(0.9**1, decays=False, last_layer=False)),
        ("backbone.blocks.2.norm1.weight", ParameterRole(0.9**1, decays=False, last_layer=False)),
        ("backbone.blocks.1.ls2.gamma", ParameterRole(0.9**2, decays=False, last_layer=False)),
        ("backbone.norm.weight", ParameterRole(1.0, decays=False, last_layer=False)),
        ("dino_head.mlp.0.weight", ParameterRole(1.0, decays=True, last_layer=False)),
        ("ibot_head.last_layer.weight_v", ParameterRole(1.0, decays=True, last_layer=True)),
    ],
)
def test_roles(name, role):
    assert name in dict(network().named_parameters())
    found = parameter_role(name, 3, CONFIG)
    assert found.lr_factor == pytest.approx(role.lr_factor)
    assert (found.decays, found.last_layer) == (role.decays, role.last_layer)


def test_every_parameter_is_in_one_group_with_its_values():
    model = network()
    optimizer = build_optimizer(model, CONFIG)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    set_values(optimizer, StepValues(lr=0.5, last_layer_lr=0.0, weight_decay=0.3, ema_momentum=1, teacher_temp=1))
    values = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert values[id(model.dino_head.last_layer.weight_v)] == (0.0, 0.3)
    assert values[id(model.dino_head.mlp[0].bias)] == (0.5, 0.0)
    assert values[id(model.backbone.pos_embed)] == (pytest.approx(0.5 * 0.9**4), 0.3)


def test_clips_each_submodule_by_itself():
    model = network()
    for name, parameter in model.named_parameters():
        parameter.grad = torch.full_like(parameter, 10.0 if name.startswith("dino_head") else 1e-3)
    before = model.backbone.pos_embed.grad.clone()
    count = sum(p.numel() for p in model.dino_head.parameters())
    norms = clip_gradients(model, 3.0)
    assert float(norms["dino_head"]) == pytest.approx(10 * count**0.5, rel=1e-5)
    after = torch.cat([p.grad.flatten() for p in model.dino_head.parameters()]).norm()
    assert float(after) == pytest.approx(3.0, rel=1e-4)
    assert torch.equal(model.backbone.pos_embed.grad, before)  # a wild head does not slow the backbone
    assert float(clip_gradients(model, None)["dino_head"]) == pytest.approx(3.0, rel=1e-4)


STEPS = """
import sys
import torch
from components.model.config import ViTConfig
from components.model.vit import VisionTransformer
from components.training.optimizer import EagerAdamW

def weights(kind):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    optimizer = kind(net.parameters(), lr=0.01, betas=(0.9, 0.99), fused=True)
    for _ in range(5):
        net(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return list(net.parameters())

with torch.device("meta"):
    VisionTransformer(ViTConfig(patch_size=8, dim=16, depth=1, num_heads=1, image_size=16, num_registers=1))
ours = weights(EagerAdamW)
assert "torch._dynamo" not in sys.modules
assert all(torch.equal(*pair) for pair in zip(ours, weights(torch.optim.AdamW)))
"""


def test_a_step_is_adamws_and_loads_no_compiler():
    """In a process of its own: torch.compile, once loaded, stays."""
    subprocess.run([sys.executable, "-c", STEPS], check=True)
