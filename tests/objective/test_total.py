"""The whole objective: term weights, layouts, edge cases, gradients."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from components.objective.config import ObjectiveConfig
from components.objective.koleo import koleo_loss
from components.objective.total import Objective, StudentOutput, TeacherLogits

REFERENCE = load_file(Path(__file__).parents[1] / "reference" / "dinov2.safetensors")
TEACHER = TeacherLogits(REFERENCE["dino/teacher_logits"], REFERENCE["ibot/teacher_logits"])
CLASS_TOKENS = torch.cat([REFERENCE["koleo/class_tokens"], REFERENCE["koleo/class_tokens"].flip(1)])


def student_logits():
    """Of class tokens, global crops first, and of masked patches."""
    crops = torch.cat([REFERENCE["dino/student_global_logits"], REFERENCE["dino/student_local_logits"]])
    return crops, REFERENCE["ibot/student_logits"].clone()


def masks():
    """The reference's 6 images are for DINO; its 11 patches are masked in the first 4 of the 12 global crops."""
    hidden = torch.zeros(12, 9, dtype=torch.bool)
    hidden[:4] = REFERENCE["ibot/masks"].bool()
    return hidden


def losses_of(config, logits, teacher=TEACHER, cls_tokens=CLASS_TOKENS, hidden=None, num_local=8):
    """The objective where prototypes are unit vectors, so that features are logits."""
    objective = Objective(config, *(len(rows[0]) if len(rows) else 32 for rows in logits))
    heads = objective.head_losses(objective.targets(teacher, 0.06), masks() if hidden is None else hidden, num_local)
    terms = [
        loss(rows, torch.eye(rows.shape[1]), torch.ones(rows.shape[1], 1))
        for loss, rows in zip((heads.dino, heads.ibot), logits, strict=True)
    ]
    return objective(StudentOutput(*terms, cls_tokens, torch.zeros(()))), objective


def test_terms_have_the_weights_of_the_released_code():
    losses, _ = losses_of(ObjectiveConfig(), student_logits())

    def close(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)

    # 18 pairs: 16 local, 2 global. The reference's iBOT loss is a mean over its 4 images, here over 12.
    close(losses.dino_local, REFERENCE["dino/loss_local_mean_over_16_pairs"][0] * 16 / 18)
    close(losses.dino_global, REFERENCE["dino/loss_global_mean_over_2_pairs"][0] * 2 / 18)
    close(losses.ibot, REFERENCE["ibot/loss_masked"][0] * 4 / 12)
    second = koleo_loss(CLASS_TOKENS[6:])
    close(losses.koleo, 0.1 * (REFERENCE["koleo/loss"][0] + second))
    close(losses.total, losses.dino_local + losses.dino_global + losses.ibot + losses.koleo)


def test_weights_scale_their_terms():
    plain, _ = losses_of(ObjectiveConfig(), student_logits())
    config = ObjectiveConfig(dino_weight=2.0, ibot_weight=3.0, koleo_weight=None)
    weighted, _ = losses_of(config, student_logits())
    torch.testing.assert_close(weighted.dino_local, 2 * plain.dino_local)
    torch.testing.assert_close(weighted.dino_global, 2 * plain.dino_global)
    torch.testing.assert_close(weighted.ibot, 3 * plain.ibot)
    assert weighted.koleo == 0


def test_a_koleo_weight_of_zero_is_refused():
    with pytest.raises(ValidationError, match="greater than 0; write null to train without KoLeo"):
        ObjectiveConfig(koleo_weight=0.0)


def test_softmax_centering_keeps_its_centers_in_the_state():
    assert Objective(ObjectiveConfig(), 32, 32).state_dict() == {}
    _, objective = losses_of(ObjectiveConfig(centering="softmax"), student_logits())
    state = objective.state_dict()
    assert sorted(state) == ["dino_centering.center", "ibot_centering.center"]
    torch.testing.assert_close(state["dino_centering.center"], 0.1 * TEACHER.global_cls.mean(0, keepdim=True))
    torch.testing.assert_close(state["ibot_centering.center"], 0.1 * TEACHER.masked_patches.mean(0, keepdim=True))


@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
def test_no_local_crops_and_nothing_masked(centering):
    crops = student_logits()[0][:12].clone().requires_grad_()
    teacher = replace(TEACHER, masked_patches=torch.zeros(0, 32))
    config = ObjectiveConfig(centering=centering)
    hidden = torch.zeros(12, 9, dtype=torch.bool)
    losses, _ = losses_of(config, (crops, torch.zeros(0, 32)), teacher, hidden=hidden, num_local=0)
    losses.total.backward()
    assert losses.dino_local == 0
    assert losses.ibot == 0
    assert torch.isfinite(losses.total)
    assert torch.isfinite(crops.grad).all()


def test_gradient_reaches_the_student_and_never_the_teacher():
    leaves = [*student_logits(), CLASS_TOKENS.clone()]
    frozen = [TEACHER.global_cls.clone(), TEACHER.masked_patches.clone()]
    for tensor in leaves + frozen:
        tensor.requires_grad_()
    losses_of(ObjectiveConfig(), leaves[:2], TeacherLogits(*frozen), leaves[2])[0].total.backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in leaves)
    assert all(tensor.grad is None for tensor in frozen)


@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
def test_untied_heads_may_have_other_numbers_of_prototypes(centering):
    crops, patches = student_logits()
    teacher = replace(TEACHER, masked_patches=TEACHER.masked_patches[:, :20])
    losses, _ = losses_of(ObjectiveConfig(centering=centering), (crops, patches[:, :20]), teacher)
    assert torch.isfinite(losses.total)


def test_non_finite_logits_reach_the_total():
    crops, patches = student_logits()
    crops[15, 3] = torch.inf
    assert not torch.isfinite(losses_of(ObjectiveConfig(), (crops, patches))[0].total)


@pytest.mark.parametrize(
    ("num_global", "rows", "message"),
    [
        (1, 12, "2 or more crops"),
        (5, 12, "12 rows for 5 crops"),
        (2, 10, "must agree on the number of global crops, got 12 and 10"),
    ],
)
def test_shapes_that_do_not_fit(num_global, rows, message):
    objective = Objective(ObjectiveConfig(), 32, 32)
    with pytest.raises(ValueError, match=message):
        objective.head_losses(objective.targets(TEACHER, 0.06), masks()[:rows], 8, num_global)
