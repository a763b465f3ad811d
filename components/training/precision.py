"""Resolve the precision `auto` by the hardware."""

from __future__ import annotations

import logging
from typing import TypeVar

import torch

from components.core.distributed import all_reduce_sum, rank
from components.core.tracking import tag_run
from components.training.config import TrainingConfig
from components.training.parallelize import training_device

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=TrainingConfig)


def resolve_precision(config: ConfigT, stage: str) -> ConfigT:
    """Return the configuration with `auto` replaced by what all ranks support in hardware; every rank must call.

    The resolved value is part of the run key and provenance, and a tag in MLflow. DVC records `auto`.

    Args:
        config: of a stage.
        stage: its name, for the log.
    """
    device = training_device()
    if config.precision == "auto":
        lacking = float(not has_bfloat16(device))
        bfloat16 = not all_reduce_sum(torch.tensor(lacking, device=device))
        config = config.model_copy(update={"precision": "bfloat16" if bfloat16 else "float32"})
        if rank() == 0:
            found = "has" if bfloat16 else "does not have"
            logger.info("%s: precision is %s: %s %s bfloat16", stage, config.precision, device.type.upper(), found)
    tag_run({"pedigree.precision": config.precision})
    return config


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the device supports bfloat16 in hardware; emulation is several times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))  # x86, then ARM
