"""Student, teacher and EMA networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from components.core.distributed import local_shard
from components.model.head import ProjectionHead
from components.model.vit import VisionTransformer, ViTOutput
from components.objective.total import HeadLosses, StudentOutput, TeacherLogits

Values = Callable[[], Iterator[tuple[str, Tensor]]]  # iterates over full tensors by parameter name


class Network(nn.Module):
    """A backbone with one head for class tokens and another for patch tokens (untied: arXiv:2304.07193, sec. 4).

    Attributes:
        initial: source of its values while it is on the meta device; copies share it.
    """

    def __init__(self, backbone: VisionTransformer, heads: Mapping[str, ProjectionHead]) -> None:
        super().__init__()
        self.backbone = backbone
        self.dino_head = heads["dino"]
        self.ibot_head = heads["ibot"]
        self.initial: Values | None = None

    @property
    def heads(self) -> dict[str, ProjectionHead]:
        """The heads by the names under which they are saved."""
        return {"dino": self.dino_head, "ibot": self.ibot_head}

    def forward(
        self,
        global_crops: Tensor,
        local_crops: Tensor,
        input_masks: Tensor | None,
        loss_masks: Tensor,
        losses: HeadLosses,
    ) -> StudentOutput:
        """Run the student on masked global crops and local crops in one pass, up to its heads' losses.

        Args:
            global_crops: [G*B, 3, H, W].
            local_crops: [L*B, 3, h, w]; may have no rows.
            input_masks: [G*B, P] bool, patches hidden from the student; None: no masking.
            loss_masks: [G*B, P] bool, the M patches that enter the patch loss.
            losses: evaluated by the heads.
        """
        batches = [(global_crops, input_masks), (local_crops, None)]
        encoded = self.backbone.forward_packed(batches if len(local_crops) else batches[:1])
        dino = self.dino_head(torch.cat([crops.cls_token for crops in encoded]), losses.dino)  # of [(G+L)*B, D]
        ibot = self.ibot_head(encoded[0].patch_tokens[loss_masks], losses.ibot)  # of [M, D]
        gram = losses.gram(encoded[0].patch_tokens) if losses.gram else None
        return StudentOutput(dino, ibot, encoded[0].cls_token, cls_patch_cosine(encoded[0]), gram)

    @torch.no_grad()
    def targets(self, global_crops: Tensor, loss_masks: Tensor) -> TeacherLogits:
        """Run the teacher on unmasked global crops.

        Args:
            global_crops: [G*B, 3, H, W].
            loss_masks: [G*B, P] bool, the M patches whose logits are returned.
        """
        encoded = self.backbone(global_crops)
        return TeacherLogits(self.dino_head(encoded.cls_token), self.ibot_head(encoded.patch_tokens[loss_masks]))

    @torch.no_grad()
    def class_tokens(self, images: Tensor) -> Tensor:
        """Return the class tokens of images: [N, 3, H, W] to [N, D]."""
        return self.backbone(images).cls_token

    @torch.no_grad()
    def patch_tokens(self, images: Tensor) -> Tensor:
        """Return the patch tokens of images: [N, 3, H, W] to [N, P, D]."""
        return self.backbone(images).patch_tokens

    @torch.no_grad()
    def update_ema(self, student: Network, momentum: float) -> None:
        """Set every parameter to momentum * own + (1 - momentum) * the student's."""
        own = [local_shard(parameter) for parameter in self.parameters()]  # both are sharded the same way
        theirs = [local_shard(parameter) for parameter in student.parameters()]
        torch._foreach_lerp_(own, theirs, 1.0 - momentum)  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def cls_patch_cosine(encoded: ViTOutput) -> Tensor:
    """Return the mean cosine between class and patch tokens, [] float32; it rises as dense features degrade.

    DINOv3 monitors it (arXiv:2508.10104, sec. 4).
    """
    cls_token, patches = encoded.cls_token.detach(), encoded.patch_tokens.detach()
    products = torch.einsum("bd,bpd->bp", cls_token, patches).float()
    lengths = [torch.linalg.vector_norm(tokens, dim=-1, dtype=torch.float32) for tokens in (cls_token, patches)]
    return (products / (lengths[0].unsqueeze(1) * lengths[1]).clamp(min=1e-12)).mean()


@dataclass(frozen=True)
class Networks:
    """The networks of one run. In self-distillation `teacher` and `ema` are the same network.

    Attributes:
        student: trained by gradient.
        teacher: computes the targets.
        ema: moving average of the student, which is exported.
        gram_teacher: snapshot of `ema` for Gram anchoring; None without it.
    """

    student: Network
    teacher: Network
    ema: Network
    gram_teacher: Network | None = None

    def distinct(self) -> list[Network]:
        """Return each network once."""
        named = (self.student, self.teacher, self.ema, self.gram_teacher)
        return list({id(network): network for network in named if network is not None}.values())


def self_distillation(student: Network, *, with_gram_teacher: bool = False) -> Networks:
    """Return networks for self-distillation: the teacher is the student's EMA, initially its copy."""
    ema = _frozen(copy.deepcopy(student))
    gram_teacher = copy.deepcopy(ema) if with_gram_teacher else None
    return Networks(student.train(), teacher=ema, ema=ema, gram_teacher=gram_teacher)


def distillation(student: Network, teacher: Network) -> Networks:
    """Return networks for distillation from a frozen teacher; the EMA is exported (arXiv:2304.07193, sec. 5)."""
    # Without masking the mask token never has a gradient, for which a parallel wrapper would wait.
    student.backbone.mask_token.requires_grad_(False)
    return Networks(student.train(), teacher=_frozen(teacher), ema=_frozen(copy.deepcopy(student)))


def _frozen(network: Network) -> Network:
    return network.eval().requires_grad_(False)
