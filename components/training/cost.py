"""Cost of a training: floating-point operations per image by formula, device hours, energy and CO2e."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from components.data.config import CropConfig, MaskingConfig
from components.data.crops import NUM_GLOBAL
from components.model.config import HeadConfig, ViTConfig
from components.training.config import EnergyConfig
from components.training.networks import Network, Networks

BACKWARD = 2  # the backward pass has two products for each one of the forward pass


@dataclass(frozen=True)
class Accelerator:
    """Data sheet of a GPU: dense bfloat16 operations per second, and maximum power in watts."""

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
    """Return the data sheet of a device; None for CPUs and unknown GPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((known for start, known in ACCELERATORS.items() if name.startswith(start)), None)


def backbone_flops(config: ViTConfig, image_size: int) -> float:
    """Return the operations of one image's forward pass, counting multiplications and additions.

    Counted are linear layers, the patch embedding and attention's two products, not norms, activations and softmax.
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
    """Return the part of `backbone_flops` for the patch embedding."""
    return 2.0 * (image_size // config.patch_size) ** 2 * 3 * config.patch_size**2 * config.dim


def head_flops(in_dim: int, config: HeadConfig) -> float:
    """Return the operations of one token's forward pass through a projection head, including prototypes."""
    widths = [in_dim, *[config.hidden_dim] * (config.num_layers - 1), config.bottleneck_dim, config.num_prototypes]
    return 2.0 * sum(before * after for before, after in pairwise(widths))


def training_flops(
    networks: Networks, crops: CropConfig, masking: MaskingConfig | None, gram_scale: int | None = None
) -> float:
    """Return the operations per image in training: student forward and backward, and teacher forward.

    With `gram_scale`, a Gram teacher also encodes the global crops, enlarged by this factor.

    Branches dropped by stochastic depth and recomputation by activation checkpointing are not counted, following the
    usual definition of model FLOPs utilization (arXiv 2204.02311, appendix B).
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
        total += count * ((1 + BACKWARD) * blocks + 2 * embedding)  # pixels need no gradient
    return total + (1 + BACKWARD) * _heads(networks.student, NUM_GLOBAL + crops.num_local, patches)


def _patches(networks: Networks, crops: CropConfig, masking: MaskingConfig | None) -> float:
    """Return the average number of an image's patches in the patch loss."""
    patches = NUM_GLOBAL * (crops.global_size // networks.student.backbone.config.patch_size) ** 2
    if masking is None:
        return patches
    return patches * masking.mask_probability * (masking.mask_ratio_min + masking.mask_ratio_max) / 2


def _heads(network: Network, class_tokens: float, patch_tokens: float) -> float:
    flops = [head_flops(head.in_dim, head.config) for head in (network.dino_head, network.ibot_head)]
    return class_tokens * flops[0] + patch_tokens * flops[1]


class CostMeter:
    """Compute hours, energy and CO2e of a run: device power x hours x PUE x carbon intensity (METHOD 6.1).

    Energy and CO2e are None if the power is unknown: on a CPU without `device_watts`.
    """

    def __init__(self, device: torch.device, num_devices: int, config: EnergyConfig) -> None:
        known = accelerator(device)
        self._watts = config.device_watts or (known.watts if known else None)
        self._gpu, self._count, self._config = device.type == "cuda", num_devices, config

    def so_far(self, seconds: float) -> dict[str, float | None]:
        """Return the costs after `seconds` of wall-clock training time."""
        hours = seconds * self._count / 3600
        energy = None if self._watts is None else self._watts * hours / 1000 * self._config.pue
        return {
            "gpu_hours": hours if self._gpu else None,
            "energy_kwh": energy,
            "co2e_kg": None if energy is None else energy * self._config.kg_co2e_per_kwh,
        }
