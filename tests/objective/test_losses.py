"""DINO, iBOT and KoLeo against numbers of the released code and values worked by hand."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.objective.dino import dino_loss
from components.objective.ibot import ibot_loss
from components.objective.koleo import koleo_loss

REFERENCE = load_file(Path(__file__).parents[1] / "reference" / "dinov2.safetensors")
TEACHER_PROBS = REFERENCE["dino/teacher_probs_sinkhorn_temp0.06"].reshape(2, 6, 32)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


def test_dino_local_equals_the_released_code():
    local = REFERENCE["dino/student_local_logits"].reshape(8, 6, 32)
    close(dino_loss(local, TEACHER_PROBS, 0.1) / 16, REFERENCE["dino/loss_local_mean_over_16_pairs"][0])


def test_dino_global_equals_the_released_code():
    student = REFERENCE["dino/student_global_logits"].reshape(2, 6, 32)
    loss = dino_loss(student, TEACHER_PROBS, 0.1, skip_same_crop=True) / 2
    close(loss, REFERENCE["dino/loss_global_mean_over_2_pairs"][0])


def test_dino_by_hand():
    # One image, two prototypes; student logits 0.1 ln 3 and 0 at temperature 0.1: probabilities 3/4 and 1/4.
    student = torch.tensor([[[0.1 * math.log(3), 0.0]]])
    teacher = torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]])
    expected = -0.5 * math.log(3 / 4) - 0.5 * math.log(1 / 4) - math.log(3 / 4)
    assert dino_loss(student, teacher, 0.1).item() == pytest.approx(expected, rel=1e-6)


def test_dino_three_crops_is_the_plain_double_loop():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 4, 5, generator=generator)
    teacher = torch.rand(3, 4, 5, generator=generator).softmax(-1)
    pairs = [(s, t) for s in range(3) for t in range(3) if s != t]
    loop = sum(-(teacher[t] * (student[s] / 0.1).log_softmax(-1)).sum(-1).mean() for s, t in pairs)
    close(dino_loss(student, teacher, 0.1, skip_same_crop=True), loop)


def test_ibot_equals_the_released_code():
    loss = ibot_loss(
        REFERENCE["ibot/student_logits"],
        REFERENCE["ibot/teacher_probs_sinkhorn_temp0.06"],
        REFERENCE["ibot/masks"].bool(),
        0.1,
    )
    close(loss, REFERENCE["ibot/loss_masked"][0])


def test_ibot_by_hand():
    # Image 0 has two masked patches, image 1 none, image 2 one: uniform student, so every patch costs ln 4.
    masks = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 1]], dtype=torch.bool)
    loss = ibot_loss(torch.zeros(3, 4), torch.eye(4)[:3], masks, 0.1)
    assert loss.item() == pytest.approx(2 * math.log(4) / 3, rel=1e-6)


def test_ibot_rows_must_fit_the_masks():
    with pytest.raises(ValueError, match="masks have 2 true entries, but there are 3 student"):
        ibot_loss(torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor([[True, True, False]]), 0.1)


def test_koleo_value_and_gradient_equal_the_released_code():
    tokens = REFERENCE["koleo/class_tokens"].clone().requires_grad_()
    loss = koleo_loss(tokens)
    loss.backward()
    close(loss, REFERENCE["koleo/loss"][0])
    torch.testing.assert_close(tokens.grad, REFERENCE["koleo/grad"], rtol=1e-4, atol=1e-6)


def test_koleo_by_hand():
    # Three unit vectors at 0, 60 and 180 degrees; lengths do not matter. Distances to the nearest: 1, 1, sqrt 3.
    angles = torch.tensor([0.0, math.pi / 3, math.pi])
    tokens = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[1.0], [2.0], [5.0]])
    assert koleo_loss(tokens).item() == pytest.approx(-math.log(math.sqrt(3)) / 3, abs=1e-6)


def test_koleo_pushes_neighbours_apart_and_survives_duplicates():
    tokens = torch.tensor([[1.0, 0.0], [1.0, 0.1]], requires_grad=True)
    before = koleo_loss(tokens)
    (gradient,) = torch.autograd.grad(before, tokens)
    assert koleo_loss(tokens - 1e-3 * gradient) < before
    duplicates = torch.ones(3, 4, requires_grad=True)
    loss = koleo_loss(duplicates)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(duplicates.grad).all()


def test_koleo_opposite_pair():
    # The dot product is -1, with which the released code blanks the diagonal: the neighbour is still the other one.
    assert koleo_loss(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).item() == pytest.approx(-math.log(2), rel=1e-6)


def test_koleo_needs_a_neighbour():
    with pytest.raises(ValueError, match="at least 2 images per rank, got 1"):
        koleo_loss(torch.ones(1, 4))


def test_float32_inside_autocast():
    generator = torch.Generator().manual_seed(0)
    student, tokens = torch.randn(2, 4, 32, generator=generator), torch.randn(4, 8, generator=generator)
    teacher = torch.randn(2, 4, 32, generator=generator).softmax(-1)
    masks = torch.ones(2, 2, dtype=torch.bool)

    def losses():
        return [
            dino_loss(student, teacher, 0.1),
            ibot_loss(student[0], teacher[0], masks, 0.1),
            koleo_loss(tokens),
        ]

    outside = losses()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = losses()
    assert all(value.dtype == torch.float32 for value in inside)
    assert inside == outside
