"""A backbone's tensors and shape in the words of timm and transformers, and read back from these.

Of both, the counterparts of DINOv2 with and without registers: `vit_*_patch14[_reg4]_dinov2` of timm,
`Dinov2WithRegistersModel` and `Dinov2Model` of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from components.model.config import Preprocessing, ViTConfig
from components.model.layers import NORM_EPS
from components.model.preprocessing import IMAGENET_MEAN, IMAGENET_STD

BICUBIC = 3  # of Pillow, as transformers writes it
TIMM_SIZES = {384: "small", 768: "base", 1024: "large"}
TO_TIMM = ((".mlp.w12.", ".mlp.fc1."), (".mlp.w3.", ".mlp.fc2."))
# Only where the feed-forward is gated: both have names of their own for it.
TO_TRANSFORMERS = (
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("pos_embed", "embeddings.position_embeddings"),
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("register_tokens", "embeddings.register_tokens"),
    ("blocks.", "encoder.layer."),
    (".attn.proj.", ".attention.output.dense."),
    (".ls1.gamma", ".layer_scale1.lambda1"),
    (".ls2.gamma", ".layer_scale2.lambda1"),
    (".mlp.w12.", ".mlp.weights_in."),
    (".mlp.w3.", ".mlp.weights_out."),
)


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as timm's `VisionTransformer` has them; without the mask token, which only training uses.

    With registers, timm adds positions to patches alone: the class token's is added to it here.
    """
    found = {_renamed(name, TO_TIMM): tensor for name, tensor in state.items() if name != "mask_token"}
    if "register_tokens" in found:
        found["reg_token"] = found.pop("register_tokens")
        found["cls_token"] = found["cls_token"] + found["pos_embed"][:, :1]
        found["pos_embed"] = found["pos_embed"][:, 1:].contiguous()
    return found


def from_timm(found: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """`to_timm` back: equal in all that a forward pass without masks reads."""
    back = tuple((theirs, ours) for ours, theirs in TO_TIMM) if config.ffn == "swiglu" else ()
    state = {_renamed(name, back): tensor for name, tensor in found.items()}
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.zeros_like(state["cls_token"]), state["pos_embed"]], dim=1)
    return {**state, "mask_token": torch.zeros(1, config.dim)}


def timm_config(config: ViTConfig, preprocessing: Preprocessing) -> dict[str, Any]:
    """What `timm.create_model("local-dir:FOLDER", pretrained=True)` reads in `config.json`."""
    registers = "_reg4" if config.num_registers else ""
    size, gated = preprocessing.crop_size, config.ffn == "swiglu"
    architecture = "giant" if gated else TIMM_SIZES.get(config.dim, "small")
    return {
        "architecture": f"vit_{architecture}_patch14{registers}_dinov2",
        "num_classes": 0,
        "num_features": config.dim,
        "global_pool": "token",
        "model_args": {
            "img_size": size,
            "patch_size": config.patch_size,
            "embed_dim": config.dim,
            "depth": config.depth,
            "num_heads": config.num_heads,
            "mlp_ratio": _ratio(config),
            "init_values": config.layer_scale_init,
            **({"reg_tokens": config.num_registers} if config.num_registers else {}),
        },
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "interpolation": "bicubic",
            "crop_pct": size / preprocessing.resize_size,
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "see the model's card",
        },
    }


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as transformers has them; `components.model.published.from_dinov2` reads them back."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            block, kind = _renamed(name, TO_TRANSFORMERS).split(".attn.qkv.")
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"{block}.attention.attention.{part}.{kind}"] = rows.contiguous()
        else:
            renamed[
                "layernorm." + name.removeprefix("norm.")
                if name.startswith("norm.")
                else _renamed(name, TO_TRANSFORMERS)
            ] = tensor
    return renamed


def transformers_config(config: ViTConfig) -> dict[str, Any]:
    """What `Dinov2WithRegistersModel.from_pretrained` (`Dinov2Model` without registers) reads in `config.json`."""
    registers = config.num_registers > 0
    return {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "mlp_ratio": int(config.ffn_ratio),
        "hidden_act": "gelu",
        "use_swiglu_ffn": config.ffn == "swiglu",
        "layer_norm_eps": NORM_EPS,
        "layerscale_value": config.layer_scale_init,
        "qkv_bias": True,
        "drop_path_rate": 0.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        **({"num_register_tokens": config.num_registers} if registers else {}),
        "torch_dtype": "float32",
    }


def transformers_preprocessor(preprocessing: Preprocessing) -> dict[str, Any]:
    """What `AutoImageProcessor.from_pretrained` reads in `preprocessor_config.json`."""
    size = preprocessing.crop_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": preprocessing.resize_size},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }


def _renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for ours, theirs in pairs:
        # A name that begins a tensor's must stand at its beginning.
        if name.startswith(ours) or (ours.startswith(".") and ours in name):
            name = name.replace(ours, theirs, 1)
    return name


def _ratio(config: ViTConfig) -> float:
    """The `mlp_ratio` from which timm computes the units of the first layer; of a gated one they are both halves."""
    hidden = int(config.dim * config.ffn_ratio)
    hidden = 2 * ((int(hidden * 2 / 3) + 7) // 8 * 8) if config.ffn == "swiglu" else hidden
    ratio = hidden / config.dim
    return ratio if int(config.dim * ratio) == hidden else (hidden + 0.5) / config.dim  # it cuts off decimals
