"""The whole objective: term weights, layouts, edge cases, gradients."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.objective.config import ObjectiveConfig
from components.objective.koleo import koleo_loss
from components.objective.total import Objective, StudentLogits, TeacherLogits

REFERENCE = load_file(Path(__file__).parents[1] / "reference" / "dinov2.safetensors")


def reference_inputs():
    """The reference's 6 images for DINO; its 11 patches are masked in the first 4 of the 12 global crops."""
    student = StudentLogits(
        REFERENCE["dino/student_global_logits"].clone(),
        REFERENCE["dino/student_local_logits"].clone(),
        REFERENCE["ibot/student_logits"].clone(),
    )
    teacher = TeacherLogits(REFERENCE["dino/teacher_logits"], REFERENCE["ibot/teacher_logits"])
    cls_tokens = torch.cat([REFERENCE["koleo/class_tokens"], REFERENCE["koleo/class_tokens"].flip(1)])
    masks = torch.zeros(12, 9, dtype=torch.bool)
    masks[:4] = REFERENCE["ibot/masks"].bool()
    return student, teacher, cls_tokens, masks


def test_terms_have_the_weights_of_the_released_code():
    student, teacher, cls_tokens, masks = reference_inputs()
    losses = Objective(ObjectiveConfig(), 32, 32)(student, teacher, cls_tokens, masks, 0.06)

    def close(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)

    # 18 pairs: 16 local, 2 global. The reference's iBOT loss is a mean over its 4 images, here over 12.
    close(losses.dino_local, REFERENCE["dino/loss_local_mean_over_16_pairs"][0] * 16 / 18)
    close(losses.dino_global, REFERENCE["dino/loss_global_mean_over_2_pairs"][0] * 2 / 18)
    close(losses.ibot, REFERENCE["ibot/loss_masked"][0] * 4 / 12)
    second = koleo_loss(cls_tokens[6:])
    close(losses.koleo, 0.1 * (REFERENCE["koleo/loss"][0] + second))
    close(losses.total, losses.dino_local + losses.dino_global + losses.ibot + losses.koleo)


def test_weights_scale_their_terms():
    inputs = reference_inputs()
    plain = Objective(ObjectiveConfig(), 32, 32)(*inputs, 0.06)
    config = ObjectiveConfig(dino_weight=2.0, ibot_weight=3.0, koleo_weight=0.0)
    weighted = Objective(config, 32, 32)(*inputs, 0.06)
    torch.testing.assert_close(weighted.dino_local, 2 * plain.dino_local)
    torch.testing.assert_close(weighted.dino_global, 2 * plain.dino_global)
    torch.testing.assert_close(weighted.ibot, 3 * plain.ibot)
    assert weighted.koleo == 0


def test_softmax_centring_keeps_its_centres_in_the_state():
    student, teacher, cls_tokens, masks = reference_inputs()
    objective = Objective(ObjectiveConfig(centering="softmax"), 32, 32)
    assert Objective(ObjectiveConfig(), 32, 32).state_dict() == {}
    objective(student, teacher, cls_tokens, masks, 0.06)
    state = objective.state_dict()
    assert sorted(state) == ["dino_centering.center", "ibot_centering.center"]
    torch.testing.assert_close(state["dino_centering.center"], 0.1 * teacher.global_cls.mean(0, keepdim=True))
    torch.testing.assert_close(state["ibot_centering.center"], 0.1 * teacher.masked_patches.mean(0, keepdim=True))


@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
def test_no_local_crops_and_nothing_masked(centering):
    student, teacher, cls_tokens, masks = reference_inputs()
    student = StudentLogits(student.global_cls.requires_grad_(), torch.zeros(0, 32), torch.zeros(0, 32))
    teacher = replace(teacher, masked_patches=torch.zeros(0, 32))
    losses = Objective(ObjectiveConfig(centering=centering), 32, 32)(
        student, teacher, cls_tokens, torch.zeros_like(masks), 0.06
    )
    losses.total.backward()
    assert losses.dino_local == 0
    assert losses.ibot == 0
    assert torch.isfinite(losses.total)
    assert torch.isfinite(student.global_cls.grad).all()


def test_gradient_reaches_the_student_and_never_the_teacher():
    student, teacher, cls_tokens, masks = reference_inputs()
    leaves = [student.global_cls, student.local_cls, student.masked_patches, cls_tokens]
    frozen = [teacher.global_cls.clone(), teacher.masked_patches.clone()]
    for tensor in leaves + frozen:
        tensor.requires_grad_()
    Objective(ObjectiveConfig(), 32, 32)(student, TeacherLogits(*frozen), cls_tokens, masks, 0.06).total.backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in leaves)
    assert all(tensor.grad is None for tensor in frozen)


def test_untied_heads_may_have_other_numbers_of_prototypes():
    student, teacher, cls_tokens, masks = reference_inputs()
    student = replace(student, masked_patches=student.masked_patches[:, :20])
    teacher = replace(teacher, masked_patches=teacher.masked_patches[:, :20])
    for centering in ("sinkhorn", "softmax"):
        objective = Objective(ObjectiveConfig(centering=centering), 32, 20)
        assert torch.isfinite(objective(student, teacher, cls_tokens, masks, 0.06).total)


def test_bfloat16_logits_under_autocast_give_float32_terms():
    student, teacher, cls_tokens, masks = reference_inputs()
    half = StudentLogits(*(t.bfloat16() for t in (student.global_cls, student.local_cls, student.masked_patches)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = Objective(ObjectiveConfig(), 32, 32)(half, teacher, cls_tokens.bfloat16(), masks, 0.06)
    exact = Objective(ObjectiveConfig(), 32, 32)(
        StudentLogits(*(t.float() for t in (half.global_cls, half.local_cls, half.masked_patches))),
        teacher,
        cls_tokens.bfloat16().float(),
        masks,
        0.06,
    )
    assert losses == exact
    assert losses.total.dtype == torch.float32


def test_non_finite_logits_reach_the_total():
    student, teacher, cls_tokens, masks = reference_inputs()
    student.local_cls[3, 3] = torch.inf
    assert not torch.isfinite(Objective(ObjectiveConfig(), 32, 32)(student, teacher, cls_tokens, masks, 0.06).total)


@pytest.mark.parametrize(
    ("changes", "crops", "message"),
    [
        ({}, 1, "2 or more crops"),
        ({}, 5, "12 rows for 5 crops"),
        ({"local_cls": torch.zeros(7, 32)}, 2, "7 rows, not a multiple of 6 images"),
        ({"global_cls": torch.zeros(10, 32)}, 2, "must agree, got 10, 12, 12"),
    ],
)
def test_shapes_that_do_not_fit(changes, crops, message):
    student, teacher, cls_tokens, masks = reference_inputs()
    objective = Objective(ObjectiveConfig(), 32, 32)
    with pytest.raises(ValueError, match=message):
        objective(replace(student, **changes), teacher, cls_tokens, masks, 0.06, crops)
