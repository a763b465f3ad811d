"""Our step without one of its techniques, for the ablation of the `step` benchmark."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from components.data.batch import Batch
from components.model import layers
from components.model.attention import Layout, fused_attention
from components.model.vit import VisionTransformer
from components.objective import centering
from components.objective.prototypes import PrototypeLoss
from components.objective.total import TeacherLogits, TeacherTargets
from components.training import step as step_module
from components.training.networks import Network
from components.training.step import TrainingStep


def _packing() -> AbstractContextManager[Any]:
    packed = VisionTransformer.forward_packed
    torch.set_autocast_cache_enabled(False)  # selective checkpointing counts the casts of a block's second pass
    return mock.patch.object(
        VisionTransformer, "forward_packed", lambda self, batches: [packed(self, [one])[0] for one in batches]
    )


def _attention() -> AbstractContextManager[Any]:
    return mock.patch.object(layers, "attend", fused_attention)


def _subset_drop_path() -> AbstractContextManager[Any]:
    def masked(tokens: Tensor, layout: Layout, branch: Callable[..., Tensor], drop_path: float) -> Tensor:
        added = branch(tokens, layout)
        if drop_path == 0:
            return tokens + added
        weights = [
            ((torch.rand(count, 1) >= drop_path) / (1 - drop_path)).expand(-1, n).flatten() for count, n in layout
        ]
        return tokens + added * torch.cat(weights)[:, None]

    return mock.patch.object(layers, "add_to_subset", masked)


def _pieces() -> AbstractContextManager[Any]:
    def whole(loss: PrototypeLoss, features: Tensor, weight_v: Tensor, weight_g: Tensor) -> Tensor:
        logits = features @ (weight_v * (weight_g / weight_v.norm(dim=1, keepdim=True))).T
        with torch.autocast("cpu", enabled=False):
            log_probs = (logits.float() / loss.student_temp).log_softmax(-1).unflatten(0, (-1, len(loss.weights)))
            parts = [
                -((term.target * log_probs[term.views]).sum(-1) * loss.weights).sum()
                for term in loss.terms(slice(None))
            ]
            return torch.stack(parts)

    chunks = mock.patch.dict(centering.CHUNK_BYTES, {"cpu": 2**40})
    chunks.start()
    return mock.patch.object(PrototypeLoss, "__call__", whole)


def _fused_adamw() -> AbstractContextManager[Any]:
    build = step_module.build_optimizer

    def unfused(*args: Any) -> torch.optim.AdamW:
        return torch.optim.AdamW([{**g, "fused": False, "foreach": True} for g in build(*args).param_groups])

    return mock.patch.object(step_module, "build_optimizer", unfused)


def _no_grad() -> AbstractContextManager[Any]:
    targets: Callable[..., TeacherLogits] = vars(Network.targets)["__wrapped__"]  # without its torch.no_grad

    def with_graph(teacher: Network, *args: Tensor) -> TeacherLogits:
        return targets(teacher.requires_grad_(), *args)

    return mock.patch.object(Network, "targets", with_graph)


class _AllTokens(TrainingStep):
    """The patch head and loss take every patch, as where nothing is masked; the student still sees masks."""

    def targets(self, batch: Batch, loss_masks: Tensor) -> TeacherLogits:
        return super().targets(batch, torch.ones_like(loss_masks))

    def loss(self, batch: Batch, loss_masks: Tensor, targets: TeacherTargets) -> Tensor:
        return super().loss(batch, torch.ones_like(loss_masks), targets)


_PATCHES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "packing": _packing,
    "product attention": _attention,
    "subset drop path": _subset_drop_path,
    "losses in pieces": _pieces,
    "fused AdamW": _fused_adamw,
    "teacher under no_grad": _no_grad,
}
ALL_TOKENS = "heads on needed tokens"
TECHNIQUES = [*_PATCHES, ALL_TOKENS]


def leave_out(technique: str) -> type[TrainingStep]:
    """Switch a technique off for the rest of this process; the kind of step to use."""
    if technique == ALL_TOKENS:
        return _AllTokens
    _PATCHES[technique]().__enter__()
    return TrainingStep
