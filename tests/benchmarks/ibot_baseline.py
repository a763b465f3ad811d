"""A training step written plainly, as iBOT's code does it: the other side of the `step` benchmark.

The same networks and the same objective as ours (softmax centering), but: one forward pass for each resolution,
attention as two eager matrix products, stochastic depth by masks, float32, the patch head on all tokens of the global
crops, every loss written as its formula, AdamW and the moving average one parameter after another.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from components.data.batch import Batch
from components.model.layers import Block
from components.model.vit import VisionTransformer
from components.objective.koleo import koleo_loss
from components.training.config import TrainingConfig
from components.training.networks import Network, Networks
from components.training.schedules import StepValues

CROPS = 2


def encode(backbone: VisionTransformer, images: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Class tokens [B, D] and patch tokens [B, P, D] of images of one size."""
    tokens = backbone._embed(images, masks)
    for block in backbone.blocks:
        assert isinstance(block, Block)
        tokens = tokens + _drop(block.ls1(_attend(block, block.norm1(tokens))), block)
        tokens = tokens + _drop(block.ls2(block.mlp(block.norm2(tokens))), block)
    normed = backbone.norm(tokens)
    return normed[:, 0], normed[:, 1 + backbone.config.num_registers :]


def _attend(block: Block, tokens: Tensor) -> Tensor:
    batch, length, dim = tokens.shape
    heads = block.attn.num_heads
    query, key, value = block.attn.qkv(tokens).view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    scores = (query @ key.transpose(-2, -1)) * (dim // heads) ** -0.5
    mixed = scores.softmax(dim=-1) @ value
    return block.attn.proj(mixed.transpose(1, 2).reshape(batch, length, dim))


def _drop(branch: Tensor, block: Block) -> Tensor:
    if not block.training or not block.drop_path:
        return branch
    kept = torch.rand(len(branch), 1, 1) >= block.drop_path
    return branch * kept / (1 - block.drop_path)


@dataclass
class PlainStep:
    """Trains `networks` (self-distillation) as `TrainingStep` does."""

    networks: Networks
    config: TrainingConfig
    optimizer: torch.optim.AdamW = field(init=False)
    center: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        """Make the optimizer and the centers."""
        self.optimizer = torch.optim.AdamW(self.networks.student.parameters(), foreach=False)
        student = self.networks.student
        self.center = {name: torch.zeros(head.config.num_prototypes) for name, head in student.heads.items()}

    def __call__(self, batch: Batch, values: StepValues) -> Tensor:
        """One step; returns the loss."""
        loss = self._loss(batch, values.teacher_temp)
        loss.backward()
        student, teacher = self.networks.student, self.networks.teacher
        for module in student.children():
            torch.nn.utils.clip_grad_norm_(module.parameters(), 3.0)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = values.lr, values.weight_decay
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for own, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                own.mul_(values.ema_momentum).add_(theirs * (1 - values.ema_momentum))
        return loss.detach()

    def _loss(self, batch: Batch, teacher_temp: float) -> Tensor:
        student, teacher, masks = self.networks.student, self.networks.teacher, batch.masks
        assert masks is not None
        with torch.no_grad():
            cls, patches = self._targets(teacher, batch.global_crops, teacher_temp)
        seen_cls, seen_patches = encode(student.backbone, batch.global_crops, masks)
        local_cls, _ = encode(student.backbone, batch.local_crops, None)
        num_local = CROPS * len(batch.local_crops) // len(batch.global_crops)
        crops = student.dino_head(seen_cls).chunk(CROPS) + student.dino_head(local_cls).chunk(num_local)
        hidden = student.ibot_head(seen_patches).chunk(CROPS)
        dino = ibot = torch.zeros(())
        for t in range(CROPS):
            for s, logits in enumerate(crops):
                if s != t:
                    dino = dino - (cls[t] * torch.log_softmax(logits / 0.1, dim=-1)).sum(dim=-1).mean()
            each = -(patches[t] * torch.log_softmax(hidden[t] / 0.1, dim=-1)).sum(dim=-1)  # [B, P]
            mask = masks.chunk(CROPS)[t]
            ibot = ibot + ((each * mask).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)).mean()
        koleo = torch.stack([koleo_loss(tokens) for tokens in seen_cls.chunk(CROPS)]).sum()
        return dino / (CROPS * (CROPS - 1 + num_local)) + ibot / CROPS + 0.1 * koleo

    def _targets(self, teacher: Network, images: Tensor, temp: float) -> list[tuple[Tensor, ...]]:
        targets = []
        for name, tokens in zip(("dino", "ibot"), encode(teacher.backbone, images, None), strict=True):
            logits, center = teacher.heads[name](tokens), self.center[name]
            targets.append(torch.softmax((logits - center) / temp, dim=-1).chunk(CROPS))
            self.center[name] = center * 0.9 + logits.mean(dim=tuple(range(logits.ndim - 1))) * 0.1
        return targets
