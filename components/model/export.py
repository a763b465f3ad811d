"""Weights folders: `model.safetensors`, optional `heads.safetensors`, and a `config.json` that describes them.

Tensors are float32 under the parameter names of the published DINOv2 weights, so `model.safetensors` also loads into
the released DINOv2 code. `published.py` reads files from elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from components.core.config import Config, ConfigError, validate
from components.core.errors import PedigreeError
from components.core.storage import atomic_dir, write_json
from components.model.config import HeadConfig, ViTConfig
from components.model.head import ProjectionHead
from components.model.vit import VisionTransformer

FORMAT_VERSION = 1
BACKBONE_FILE = "model.safetensors"
HEADS_FILE = "heads.safetensors"
CONFIG_FILE = "config.json"


class WeightsError(PedigreeError):
    """A weights folder cannot be used; one line says what is wrong and what to do."""


class _HeadDescription(HeadConfig):
    in_dim: int = Field(ge=1, le=16384)


class _WeightsDescription(Config):
    """Content of `config.json`."""

    format_version: Literal[1]
    backbone: ViTConfig
    heads: dict[Literal["dino", "ibot"], _HeadDescription] | None = None
    provenance: dict[str, Any]

    @field_validator("backbone")
    @classmethod
    def _has_a_grid(cls, value: ViTConfig) -> ViTConfig:
        if value.image_size is None:
            raise ValueError("image_size: required, but not given")
        return value


def save_weights(
    folder: Path,
    backbone: VisionTransformer,
    heads: Mapping[str, ProjectionHead] | None,
    provenance: Mapping[str, Any],
) -> None:
    """Write a weights folder atomically; equal weights and provenance give equal bytes.

    Args:
        folder: replaced if it exists.
        backbone: saved in float32.
        heads: by name, `dino` and `ibot`; None writes no heads.
        provenance: JSON values that describe the origin of the weights; timestamps would make the bytes differ.

    Raises:
        WeightsError: a weight is NaN or infinite, or `provenance` is not JSON.
    """
    description: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "backbone": backbone.config.model_dump(),
        "provenance": dict(provenance),
    }
    states = {BACKBONE_FILE: to_dinov2(backbone)}
    if heads is not None:
        description["heads"] = {name: {"in_dim": h.in_dim, **h.config.model_dump()} for name, h in heads.items()}
        states[HEADS_FILE] = _plain_state(nn.ModuleDict(heads))
    validate(_WeightsDescription, description, str(folder / CONFIG_FILE))
    for name, state in states.items():
        check_finite(state, f"{folder / name}: not written", "training has diverged, export an earlier checkpoint")
    with atomic_dir(folder) as staging:
        for name, state in states.items():
            save_file(state, staging / name)
            (staging / name).chmod(0o644)  # save_file creates files with mode 0600
        try:
            write_json(staging / CONFIG_FILE, description)
        except (TypeError, ValueError) as error:
            raise WeightsError(f"{folder}: not written: provenance must be plain JSON values: {error}") from None


def load_backbone(folder: Path) -> VisionTransformer:
    """Read the backbone of a weights folder, in evaluation mode, on CPU, without changing the global random state.

    Raises:
        WeightsError: a file is missing or damaged, or the tensors are not those that `config.json` describes.
    """
    backbone, tensors = open_backbone(folder)
    backbone.to_empty(device="cpu").load_state_dict(tensors)
    return backbone


def open_backbone(folder: Path) -> tuple[VisionTransformer, dict[str, Tensor]]:
    """Return the backbone on the meta device, and its validated tensors, memory-mapped from the file.

    Mapped tensors use no process memory: the system reads pages on access, and may evict them.
    """
    description = _read_description(folder)
    with torch.device("meta"):
        backbone = VisionTransformer(description.backbone)
    return backbone.eval(), _tensors_of(backbone, folder / BACKBONE_FILE)


def open_heads(folder: Path) -> tuple[dict[str, ProjectionHead], dict[str, Tensor]]:
    """Return the projection heads by name (`dino`, `ibot`) on the meta device, and their validated tensors.

    Raises:
        WeightsError: the folder has no heads, or as for `load_backbone`.
    """
    description = _read_description(folder)
    if description.heads is None:
        raise WeightsError(f"{folder}: holds no projection heads; use weights that training wrote with heads")
    heads: dict[str, ProjectionHead] = {}
    with torch.device("meta"):
        for name, values in description.heads.items():
            config = HeadConfig(**values.model_dump(exclude={"in_dim"}))
            heads[name] = ProjectionHead(values.in_dim, config).eval()
    return heads, _tensors_of(nn.ModuleDict(heads), folder / HEADS_FILE)


def to_dinov2(backbone: VisionTransformer) -> dict[str, Tensor]:
    """Return a backbone's state under the published DINOv2 names, as float32 copies on CPU that share no memory."""
    return _plain_state(backbone)


def _plain_state(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in module.state_dict().items()
    }


def read_provenance(folder: Path) -> Mapping[str, Any]:
    """Return what a weights folder records of its origin.

    Raises:
        WeightsError: it is no weights folder.
    """
    return _read_description(folder).provenance


def _read_description(folder: Path) -> _WeightsDescription:
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise WeightsError(f"{path}: no such file; give a folder that training or `dvc pull` has filled") from None
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not valid JSON ({error}); restore the folder with `dvc checkout`") from None
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: expected a JSON object; restore the folder with `dvc checkout`")
    try:
        return validate(_WeightsDescription, values, str(path))
    except ConfigError as error:
        problems = str(error).replace(f"\n{path}: ", "; ")  # the path once
        raise WeightsError(f"{problems}; restore the folder with `dvc checkout` or export it again") from None


def _tensors_of(module: nn.Module, path: Path) -> dict[str, Tensor]:
    restore = "restore the folder with `dvc checkout` or export it again"
    try:
        state = load_file(path)
    except (FileNotFoundError, NotADirectoryError):
        raise WeightsError(f"{path}: no such file; {restore}") from None
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error}); {restore}") from None
    if problems := find_problems(module, state):
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise WeightsError(f"{path}: does not match {CONFIG_FILE} beside it: {shown}; {restore}")
    check_finite(state, str(path), restore)
    return state


def find_problems(module: nn.Module, state: Mapping[str, Tensor], *, exact: bool = True) -> list[str]:
    """List how the tensors differ from the module's in names, shapes and (if `exact`) being float32; sorted.

    The module is on the meta device, so that a config.json with absurd sizes allocates nothing.
    """
    expected = module.state_dict()
    problems = [f"{name} is missing" for name in expected.keys() - state.keys()]
    problems += [f"{name} is unknown" for name in state.keys() - expected.keys()]
    problems += [
        f"{name} is {state[name].dtype} {list(state[name].shape)}, expected torch.float32 {list(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape or (exact and state[name].dtype != torch.float32)
    ]
    return sorted(problems)


def check_finite(state: Mapping[str, Tensor], what: str, remedy: str) -> None:
    """Raise WeightsError if a tensor has a value that is NaN or infinite."""
    broken = sorted(name for name, tensor in state.items() if not torch.isfinite(tensor).all())
    if broken:
        raise WeightsError(f"{what}: NaN or infinite values in {len(broken)} tensors, first {broken[0]}; {remedy}")
