import pytest
import torch
from torch import Tensor

from components.model.config import HeadConfig, ViTConfig
from components.model.export import WeightsError, save_weights
from components.model.head import ProjectionHead
from components.model.vit import VisionTransformer
from components.objective.total import HeadLosses
from components.training.initial import load_network
from components.training.networks import Network, distillation, self_distillation


def network(seed: int, dim: int = 16) -> Network:
    torch.manual_seed(seed)
    shape = ViTConfig(patch_size=8, dim=dim, depth=2, num_heads=2, num_registers=1, image_size=16, drop_path=0.5)
    head = HeadConfig(num_prototypes=12, hidden_dim=8, bottleneck_dim=4)
    return Network(VisionTransformer(shape), {name: ProjectionHead(dim, head) for name in ("dino", "ibot")})


@pytest.fixture
def crops() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    masks = torch.tensor([[True, False, True, False], [False] * 4])
    return torch.randn(2, 3, 16, 16), torch.randn(3, 3, 8, 8), masks


def weighed(weights):
    """Head losses that are sums of logits with given weights [N, K], one a head."""

    def loss(rows):
        return lambda x, v, g: (x @ (v / v.norm(dim=1, keepdim=True) * g).T * rows).sum().unsqueeze(0)

    return HeadLosses(*map(loss, weights))  # pyright: ignore[reportArgumentType]


def test_student_sees_masked_global_crops_and_teacher_whole_ones(crops):
    global_crops, local_crops, masks = crops
    model = network(1).eval()
    seen, hidden = model.backbone(global_crops, masks), model.backbone(global_crops, masks).patch_tokens[0, [0, 2]]
    logits = (
        model.dino_head(torch.cat([seen.cls_token, model.backbone(local_crops).cls_token])),
        model.ibot_head(hidden),
    )
    weights = [torch.randn_like(rows) for rows in logits]
    output = model(global_crops, local_crops, masks, masks, weighed(weights))
    torch.testing.assert_close(output.cls_tokens, seen.cls_token)
    torch.testing.assert_close(output.dino, (logits[0] * weights[0]).sum().unsqueeze(0))
    torch.testing.assert_close(output.ibot, (logits[1] * weights[1]).sum().unsqueeze(0))
    whole = model.backbone(global_crops)
    targets = model.targets(global_crops, masks)
    torch.testing.assert_close(targets.global_cls, model.dino_head(whole.cls_token).detach())
    torch.testing.assert_close(targets.masked_patches, model.ibot_head(whole.patch_tokens[masks]).detach())
    assert not targets.global_cls.requires_grad


def test_no_local_crops_and_nothing_masked(crops):
    losses = weighed([torch.ones(2, 12), torch.ones(0, 12)])
    output = network(1)(crops[0], crops[1][:0], None, torch.zeros(2, 4, dtype=torch.bool), losses)
    assert output.dino != 0
    assert output.ibot == 0


def test_average_follows_the_student():
    networks = self_distillation(network(1))
    assert networks.teacher is networks.ema
    before = [p.clone() for p in networks.ema.parameters()]
    with torch.no_grad():
        for parameter in networks.student.parameters():
            parameter.add_(torch.randn_like(parameter))
    networks.ema.update_ema(networks.student, 0.75)
    for old, new, theirs in zip(before, networks.ema.parameters(), networks.student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * theirs)
        assert not new.requires_grad
    assert networks.student.training
    assert not networks.ema.training  # the teacher drops no paths


def test_distillation_keeps_teacher_and_average_apart():
    networks = distillation(network(1, dim=8), network(2))
    assert networks.teacher is not networks.ema
    assert networks.ema.backbone.config.dim == 8
    assert not any(p.requires_grad for p in networks.teacher.parameters())
    trained = {name for name, p in networks.student.named_parameters() if p.requires_grad}
    assert set(dict(networks.student.named_parameters())) - trained == {"backbone.mask_token"}


def test_heads_of_another_backbone_are_refused(tmp_path):
    mine, wide = network(1), network(1, dim=32)
    both = "{'dino': 16, 'ibot': 16}"
    for heads, found in ((wide.heads, "{'dino': 32, 'ibot': 32}"), ({"dino": mine.dino_head}, "{'dino': 16}")):
        save_weights(tmp_path / "weights", mine.backbone, heads, {})
        with pytest.raises(WeightsError, match=f"its heads take features of widths {found}, .* needs {both}; give a "):
            load_network(tmp_path / "weights")
