"""Read published DINOv2 backbones from the file formats in circulation, and translate their parameter names.

Pickled code is never executed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from components.core.config import ConfigError, validate
from components.core.storage import sha256_file
from components.model.config import ViTConfig
from components.model.export import WeightsError, check_finite, find_problems
from components.model.vit import VisionTransformer

logger = logging.getLogger(__name__)

WRAPPERS = ("teacher", "model", "state_dict")  # keys that hold a checkpoint's tensors, in order of preference
MAX_DEPTH = 3
# transformers' Dinov2Model and Dinov2WithRegistersModel (convert_dinov2_to_hf.py has the same pairs).
TRANSFORMERS = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"^layernorm\.", "norm."),
)
SPLIT_QKV = re.compile(r"^(blocks\.\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)$")


def check_sha256(path: Path, expected: str) -> None:
    """Raise WeightsError unless the file exists and has this SHA-256."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; give a .safetensors or .pth file, or a weights folder")
    if (found := sha256_file(path)) != expected:
        raise WeightsError(f"{path}: its SHA-256 is {found}, not {expected} as configured")


def published_tensors(path: Path, config: ViTConfig) -> dict[str, Tensor]:
    """Read the tensors of a backbone of this shape under DINOv2's names, memory-mapped, in the file's precision.

    Pickled code of a .pth file is not executed; from a training checkpoint the teacher is read.

    Raises:
        WeightsError: not readable, or of another shape; the message names values of `config` that fit.
    """
    try:
        state = load_file(path) if path.suffix == ".safetensors" else _read_pth(path)
        renamed = from_dinov2(state)
    except (SafetensorError, OSError, TypeError) as error:
        raise WeightsError(f"{path}: not readable as weights: {error}") from None
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    tensors = {name: t if t.is_floating_point() else t.float() for name, t in renamed.items()}
    if problems := _problems(tensors, config):
        remedy = _remedy(tensors, config)
        names = " (its names are those of transformers, translated)" if _is_transformers(state) else ""
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise WeightsError(f"{path}: not the backbone that is configured: {shown}{names}; {remedy}")
    check_finite(tensors, str(path), "the file is damaged or its training had diverged; give another file")
    return tensors


def from_dinov2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a published DINOv2 state into the parameter names of `VisionTransformer`.

    Accepts hub weights (`blocks.7.norm1.weight`), training checkpoints with chunked blocks (`blocks.1.7.norm1.weight`;
    the second number is the block's own), the names of transformers, and any prefix of these (`backbone.`,
    `teacher.backbone.`, `module.`); tensors outside of the backbone, such as heads, are dropped.

    Raises:
        WeightsError: two names collide, or there are several backbones and not exactly one teacher.
    """
    prefix = _prefix(state)
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if prefix:
        left = len(state) - len(inside)
        logger.info("weights: tensors under `%s` are taken; %d others are left out", prefix, left)
    if _is_transformers(inside):
        return _from_transformers(inside)
    renamed: dict[str, Tensor] = {}
    for name, tensor in inside.items():
        short = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
        if short in renamed:
            raise WeightsError(f"two tensors of the given state are named {short} once chunk numbers are dropped")
        renamed[short] = tensor
    return renamed


def _prefix(state: Mapping[str, Tensor]) -> str:
    """Return the prefix of the backbone's parameter names."""
    found = [re.fullmatch(r"(|.*?\.)(?:embeddings\.)?cls_token", name) for name in state]
    prefixes = sorted({match[1] for match in found if match})
    teachers = [prefix for prefix in prefixes if "teacher" in prefix.split(".")]
    if len(prefixes) > 1 and len(teachers) != 1:
        shown = ", ".join(f"`{prefix}`" for prefix in prefixes)
        raise WeightsError(f"holds {len(prefixes)} backbones, under {shown}; give a file with one, or with a teacher")
    return (teachers or prefixes or [""])[0]


def _is_transformers(state: Mapping[str, Tensor]) -> bool:
    return any(re.search(r"(^|\.)embeddings\.cls_token$", name) for name in state)


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    split: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        short = name
        for pattern, replacement in TRANSFORMERS:
            short = re.sub(pattern, replacement, short)
        if match := SPLIT_QKV.match(short):
            split.setdefault(f"{match[1]}.attn.qkv.{match[3]}", {})[match[2]] = tensor
        else:
            renamed[short] = tensor
    for name, parts in split.items():
        if missing := [part for part in ("query", "key", "value") if part not in parts]:
            raise WeightsError(f"names of transformers, but no {' and '.join(missing)} for {name}; give a whole file")
        renamed[name] = torch.cat([parts["query"], parts["key"], parts["value"]])  # [3 D, D] or [3 D]
    return renamed


def _read_pth(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(
            path, map_location="cpu", weights_only=True, mmap=is_zipfile(path)
        )  # no zip before torch 1.6
    except Exception:  # of any type on damaged files; for pickled code torch's message advises to execute it
        raise TypeError("not a .pth file of tensors alone") from None
    for _ in range(MAX_DEPTH):
        found = _unwrapped(found)
    if not isinstance(found, dict):
        raise TypeError(f"holds {type(found).__name__}, not tensors by name")
    state = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not state:
        keys = ", ".join(repr(key)[:40] for key in list(found)[:8]) or "none"
        where = "at the top or under `teacher`, `model` or `state_dict`"
        raise TypeError(f"holds no tensors by name, {where}; its keys: {keys}")
    return state


def _unwrapped(found: Any) -> Any:
    """Return the dictionary that holds a checkpoint's tensors."""
    key = next((key for key in WRAPPERS if isinstance(found, dict) and isinstance(found.get(key), dict)), None)
    if key is None:
        return found
    logger.info("weights: what the file holds under `%s` is taken", key)
    return found[key]


def _problems(tensors: Mapping[str, Tensor], config: ViTConfig) -> list[str]:
    with torch.device("meta"):
        backbone = VisionTransformer(config)
    return find_problems(backbone, tensors, exact=False)


def _remedy(tensors: Mapping[str, Tensor], config: ViTConfig) -> str:
    """Advise which config values fit the tensors, if they are those of a backbone."""
    found = _shape_of(tensors)
    differing = {key: value for key, value in found.items() if value != getattr(config, key)}
    try:
        fitting = validate(ViTConfig, config.model_dump() | differing, "backbone")
    except ConfigError:
        return "give other weights"
    if not differing or _problems(tensors, fitting):
        return "it lacks tensors of a DINOv2 backbone, or holds others; give another file"
    keys = ", ".join(f"`{key}: {value}`" for key, value in differing.items())
    heads = " and `num_heads` (dim / 64 in the published models)" if "dim" in differing else ""
    return f"set {keys}{heads} in `backbone` to take these weights, or give others"


def _shape_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infer keys of `ViTConfig` from the tensors."""
    found: dict[str, Any] = {"num_registers": 0, "ffn": "mlp"}
    blocks = [int(match[1]) for match in (re.match(r"blocks\.(\d+)\.", name) for name in tensors) if match]
    found |= {"depth": max(blocks) + 1} if blocks else {}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    match shapes.get("patch_embed.proj.weight"):
        case (dim, 3, patch, _):
            found |= {"dim": dim, "patch_size": patch}
    match shapes.get("register_tokens"):
        case (1, registers, _):
            found["num_registers"] = registers
    match shapes.get("pos_embed"):
        case (1, tokens, _) if "patch_size" in found:
            found["image_size"] = round((tokens - 1) ** 0.5) * found["patch_size"]
    match shapes.get("blocks.0.mlp.fc1.weight"):
        case (hidden, dim) if dim:
            found["ffn_ratio"] = hidden / dim
    if "blocks.0.mlp.w12.weight" in shapes:
        found["ffn"] = "swiglu"
    return found
