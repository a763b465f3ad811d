"""Operations by formula against torch's own count, and energy against the paper's."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from components.data.config import CropConfig, MaskingConfig
from components.model.config import HeadConfig, ViTConfig
from components.model.head import ProjectionHead
from components.model.vit import VisionTransformer
from components.training.config import EnergyConfig
from components.training.cost import CostMeter, training_flops
from components.training.networks import Network, distillation, self_distillation

CPU = torch.device("cpu")
CROPS = CropConfig(global_size=32, local_size=16, num_local=3)
HEADS = {
    "dino": HeadConfig(num_prototypes=96, hidden_dim=24, bottleneck_dim=8),
    "ibot": HeadConfig(num_prototypes=64, hidden_dim=16, bottleneck_dim=8),
}


def network(ffn: str, dim: int, drop_path: float = 0.0) -> Network:
    shape = {"patch_size": 8, "dim": dim, "depth": 2, "num_heads": 2, "num_registers": 1, "image_size": 32, "ffn": ffn}
    config = ViTConfig.model_validate(shape | {"drop_path": drop_path})
    return Network(VisionTransformer(config), {name: ProjectionHead(dim, head) for name, head in HEADS.items()})


def counted(student: Network, teacher: Network, patches: int) -> float:
    """One image through plain forwards and a backward, as torch counts it; `patches` of each global crop's are read."""
    large, small = torch.randn(2, 3, 32, 32), torch.randn(3, 3, 16, 16)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        teacher.targets(large, torch.arange(16).expand(2, -1) < patches)
        seen = [student.backbone(crops) for crops in (large, small)]
        dino = student.dino_head(torch.cat([output.cls_token for output in seen]))
        ibot = student.ibot_head(seen[0].patch_tokens[:, :patches].flatten(0, 1))
        (dino.sum() + ibot.sum()).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_operations_of_pretraining_and_distillation(ffn):
    networks = self_distillation(network(ffn, 32))
    masking = MaskingConfig(mask_probability=0.5, mask_ratio_min=0.25, mask_ratio_max=0.75)  # 4 of 16 on average
    assert training_flops(networks, CROPS, masking) == counted(networks.student, networks.teacher, 4)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        networks.teacher.backbone(torch.randn(2, 3, 64, 64))  # as a Gram teacher sees the crops, at twice their size
    gram = training_flops(networks, CROPS, masking, gram_scale=2) - training_flops(networks, CROPS, masking)
    assert gram == counter.get_total_flops()
    networks = distillation(network("mlp", 16), network(ffn, 32))
    alone = counted(networks.student, networks.teacher, 16)
    assert training_flops(networks, CROPS, None) == alone


def test_what_stochastic_depth_leaves_out_is_not_counted():
    masking = MaskingConfig()
    whole, dropped = (self_distillation(network("mlp", 32, drop_path)) for drop_path in (0.0, 0.25))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for crops in (torch.randn(2, 3, 32, 32), torch.randn(3, 3, 16, 16)):
            tokens = whole.student.backbone(crops)
            (tokens.cls_token.sum() + tokens.patch_tokens.sum()).backward()
    patches = 2 * 16 + 3 * 4
    blocks = counter.get_total_flops() - 2 * patches * 2 * (3 * 8**2) * 32  # less the embedding, there and back
    saved = training_flops(whole, CROPS, masking) - training_flops(dropped, CROPS, masking)
    assert saved == pytest.approx(0.25 * blocks)


def test_energy_of_the_giant_is_the_papers():
    """22,016 hours of an A100 (400 W): 9.7 MWh and 3.7 t (arXiv:2304.07193, Table 14)."""
    costs = CostMeter(CPU, 8, EnergyConfig(device_watts=400)).so_far(22_016 * 3600 / 8)
    assert costs["energy_kwh"] == pytest.approx(9_700, rel=0.01)
    assert costs["co2e_kg"] == pytest.approx(3_700, rel=0.01)
    assert costs["gpu_hours"] is None
    assert set(CostMeter(CPU, 8, EnergyConfig()).so_far(60.0).values()) == {None}  # nothing is known of a CPU
