"""What a training costs: floating-point operations of an image by formula, hours of devices, energy and CO2e."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from components.data.config import CropConfig, MaskingConfig
from components.data.crops import NUM_GLOBAL
from components.model.config import HeadConfig, ViTConfig
from components.training.config import EnergyConfig
from components.training.networks import Network, Networks

BACKWARD = 2  # each product of the forward pass has two in the backward pass


@dataclass(frozen=True)
class Accelerator:
    """What its maker says of a GPU: dense bfloat16 operations a second, and the power it may draw, in watts."""

    flops: float
    watts: float


# By what `torch.cuda.get_device_name` begins with; the first that fits. Data sheets of NVIDIA.
ACCELERATORS = {
    "NVIDIA H200": Accelerator(989e12, 700),
    "NVIDIA H100 PCIe": Accelerator(756e12, 350),
    "NVIDIA H100 80GB HBM3": Accelerator(989e12, 700),
    "NVIDIA A100-SXM4": Accelerator(312e12, 400),
    "NVIDIA A100-PCIE-40GB": Accelerator(312e12, 250),
    "NVIDIA A100 80GB PCIe": Accelerator(312e12, 300),
    "NVIDIA L40S": Accelerator(362e12, 350),
    "NVIDIA L4": Accelerator(121e12, 72),
}


def accelerator(device: torch.device) -> Accelerator | None:
    """What is known of this device; None for CPUs and for GPUs that are not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((known for start, known in ACCELERATORS.items() if name.startswith(start)), None)


def backbone_flops(config: ViTConfig, image_size: int) -> float:
    """Operations of one image's forward pass: a multiplication and an addition for each weight and token.

    Linear layers, the patch embedding and attention's two products; norms, activations and softmax are left out.
    """
    patches = (image_size // config.patch_size) ** 2
    tokens, dim = 1 + config.num_registers + patches, config.dim
    hidden = int(dim * config.ffn_ratio)
    feed_forward = 2 * dim * hidden
    if config.ffn == "swiglu":
        feed_forward = 3 * dim * ((int(hidden * 2 / 3) + 7) // 8 * 8)
    block = 2 * tokens * (4 * dim**2 + feed_forward) + 4 * tokens**2 * dim
    return config.depth * block + embedding_flops(config, image_size)


def embedding_flops(config: ViTConfig, image_size: int) -> float:
    """The part of `backbone_flops` that makes tokens of patches."""
    return 2.0 * (image_size // config.patch_size) ** 2 * 3 * config.patch_size**2 * config.dim


def head_flops(in_dim: int, config: HeadConfig) -> float:
    """Operations of one token's forward pass through a projection head, prototypes included."""
    widths = [in_dim, *[config.hidden_dim] * (config.num_layers - 1), config.bottleneck_dim, config.num_prototypes]
    return 2.0 * sum(before * after for before, after in pairwise(widths))


def training_flops(
    networks: Networks, crops: CropConfig, masking: MaskingConfig | None, gram_scale: int | None = None
) -> float:
    """Operations that one image costs in training: its crops through the student and back, and through the teacher.

    With an `gram_scale`, a Gram teacher too sees the global crops, made so many times as large.

    What stochastic depth leaves out is not counted, nor what activation checkpointing makes again: by the usual
    definition of model FLOPs utilization (arXiv 2204.02311, appendix B) that is no useful work.
    """
    student, patches = networks.student.backbone.config, _patches(networks, crops, masking)
    kinds = [(NUM_GLOBAL, crops.global_size), (crops.num_local, crops.local_size)]
    total = NUM_GLOBAL * backbone_flops(networks.teacher.backbone.config, crops.global_size)
    total += _heads(networks.teacher, NUM_GLOBAL, patches)
    if gram_scale is not None:
        total += NUM_GLOBAL * backbone_flops(networks.teacher.backbone.config, gram_scale * crops.global_size)
    for count, size in kinds:
        embedding = embedding_flops(student, size)
        blocks = (backbone_flops(student, size) - embedding) * (1 - student.drop_path)
        total += count * ((1 + BACKWARD) * blocks + 2 * embedding)  # no gradient of the pixels
    return total + (1 + BACKWARD) * _heads(networks.student, NUM_GLOBAL + crops.num_local, patches)


def _patches(networks: Networks, crops: CropConfig, masking: MaskingConfig | None) -> float:
    """Patches of an image that enter the patch loss, on average."""
    patches = NUM_GLOBAL * (crops.global_size // networks.student.backbone.config.patch_size) ** 2
    if masking is None:
        return patches
    return patches * masking.mask_probability * (masking.mask_ratio_min + masking.mask_ratio_max) / 2


def _heads(network: Network, class_tokens: float, patch_tokens: float) -> float:
    flops = [head_flops(head.in_dim, head.config) for head in (network.dino_head, network.ibot_head)]
    return class_tokens * flops[0] + patch_tokens * flops[1]


class CostMeter:
    """Hours, energy and CO2e of a run so far: power of a device x hours x PUE x carbon intensity (METHOD 6.1).

    Energy and CO2e are None where no power is known: on a CPU without `device_watts`.
    """

    def __init__(self, device: torch.device, num_devices: int, config: EnergyConfig) -> None:
        known = accelerator(device)
        self._watts = config.device_watts or (known.watts if known else None)
        self._gpu, self._count, self._config = device.type == "cuda", num_devices, config

    def so_far(self, seconds: float) -> dict[str, float | None]:
        """Costs of a run that has trained for so long, in seconds of wall clock."""
        hours = seconds * self._count / 3600
        energy = None if self._watts is None else self._watts * hours / 1000 * self._config.pue
        return {
            "gpu_hours": hours if self._gpu else None,
            "energy_kwh": energy,
            "co2e_kg": None if energy is None else energy * self._config.kg_co2e_per_kwh,
        }
