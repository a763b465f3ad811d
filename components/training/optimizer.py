"""AdamW with learning rate and weight decay by parameter role (dinov2/utils/param_groups.py)."""

from __future__ import annotations

import inspect
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from components.core.distributed import full_tensor
from components.training.config import OptimizerConfig
from components.training.networks import Network
from components.training.schedules import StepValues

EMBEDDINGS = ("pos_embed", "patch_embed", "mask_token", "cls_token", "register_tokens")


@dataclass(frozen=True)
class ParameterRole:
    """Role of a parameter; parameters of one role form one optimizer group."""

    lr_factor: float
    decays: bool
    last_layer: bool
    backbone: bool = False


class EagerAdamW(torch.optim.AdamW):
    """AdamW without the decorators that disable torch.compile, which import the compiler at first use (4 s).

    It runs outside of all compiled blocks, where they have no effect; the results are equal.
    """

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def parameter_role(name: str, depth: int, config: OptimizerConfig) -> ParameterRole:
    """Return the role of the parameter `name` of a `Network` with `depth` blocks.

    Layers count from the embeddings (0) over the blocks (1 to depth) to the last norm and the heads (depth + 1), and
    the learning rate falls by `layer_decay` for each layer below the highest.
    """
    layer = depth + 1
    if name.startswith("backbone."):
        part = name.removeprefix("backbone.")
        if part.startswith(EMBEDDINGS):
            layer = 0
        elif part.startswith("blocks."):
            layer = int(part.split(".")[1]) + 1
    factor = config.layer_decay ** (depth + 1 - layer)
    if "patch_embed" in name:
        factor *= config.patch_embed_lr_factor
    decays = not (name.endswith("bias") or "norm" in name or "gamma" in name)
    return ParameterRole(factor, decays, last_layer="last_layer" in name, backbone=name.startswith("backbone."))


def build_optimizer(network: Network, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW with one group for each role; call `set_values` before each step."""
    groups: defaultdict[ParameterRole, list[Tensor]] = defaultdict(list)
    depth = len(network.backbone.blocks)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups[parameter_role(name, depth, config)].append(parameter)
    described = [{"params": parameters, "role": role} for role, parameters in groups.items()]
    return EagerAdamW(described, lr=0.0, betas=(config.beta1, config.beta2), fused=True)


def moments(optimizer: torch.optim.AdamW, parameter: Tensor) -> dict[str, Tensor]:
    """Return AdamW's state of a parameter; create it as zeros if no step was taken yet."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return state


def set_values(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """Set the learning rate and weight decay of every group for this step."""
    for group in optimizer.param_groups:
        role: ParameterRole = group["role"]
        lr = values.last_layer_lr if role.last_layer else values.lr
        group["lr"] = lr * role.lr_factor * (values.backbone_lr_factor if role.backbone else 1.0)
        group["weight_decay"] = values.weight_decay if role.decays else 0.0


def clip_gradients(network: nn.Module, max_norm: float | None) -> dict[str, Tensor]:
    """Clip the gradient norm of the backbone and of each head separately; return the norms before clipping.

    dinov2/train/train.py clips by sub-module, so that large gradients of a head do not shrink the backbone's.
    """
    norms: dict[str, Tensor] = {}
    for name, module in network.named_children():
        parameters = [p for p in module.parameters() if p.grad is not None]
        if max_norm is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        else:
            norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        norms[name] = full_tensor(norm)
    return norms
