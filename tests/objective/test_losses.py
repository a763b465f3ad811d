"""DINO, iBOT and KoLeo against numbers of the released code and values worked by hand."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.objective.centering import CHUNK_BYTES, Targets
from components.objective.dino import dino_loss
from components.objective.ibot import ibot_loss
from components.objective.koleo import koleo_loss
from components.objective.prototypes import LOGITS_BYTES

REFERENCE = load_file(Path(__file__).parents[1] / "reference" / "dinov2.safetensors")
TEACHER_PROBS = REFERENCE["dino/teacher_probs_sinkhorn_temp0.06"].reshape(2, 6, 32)


def as_targets(probs):
    """Targets whose probabilities are the given ones."""
    return Targets(probs.log(), 1.0, torch.zeros(probs.shape[-1]), torch.zeros(()), -torch.inf)


def of_logits(loss, logits):
    """The loss of given logits [..., K]: features are the logits, prototypes the unit vectors."""
    count = logits.shape[-1]
    return loss(logits.reshape(-1, count), torch.eye(count), torch.ones(count, 1))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


def test_dino_equals_the_released_code():
    crops = torch.cat([REFERENCE["dino/student_global_logits"], REFERENCE["dino/student_local_logits"]])
    local, swapped = of_logits(dino_loss(as_targets(TEACHER_PROBS), 1.0, 0.1), crops)
    close(local / 16, REFERENCE["dino/loss_local_mean_over_16_pairs"][0])
    close(swapped / 2, REFERENCE["dino/loss_global_mean_over_2_pairs"][0])


def test_dino_by_hand():
    # One image, two prototypes; local logits 0.1 ln 3 and 0 at temperature 0.1: probabilities 3/4 and 1/4.
    student = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.1 * math.log(3), 0.0]])
    teacher = torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]])
    expected = -0.5 * math.log(3 / 4) - 0.5 * math.log(1 / 4) - math.log(3 / 4)
    local, swapped = of_logits(dino_loss(as_targets(teacher), 3.0, 0.1), student).tolist()
    assert local == pytest.approx(3 * expected, rel=1e-6)
    assert swapped == pytest.approx(3 * 2 * math.log(2), rel=1e-6)


def test_logits_may_be_larger_than_an_exponential_can_take():
    # At temperature 0.1 they are 200 apart: of a half each, the half at the lower one costs 100.
    student = torch.tensor([[0.0, 0.0], [0.0, 0.0], [20.0, 0.0]])
    local, _ = of_logits(dino_loss(as_targets(torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]])), 1.0, 0.1), student)
    assert local.item() == pytest.approx(100.0)


@pytest.mark.parametrize(("piece", "product"), [(1, 3), (2, 1), (2, 4), (100, 100)])
def test_terms_and_gradients_are_those_of_plain_loops(piece, product, monkeypatch):
    """Three global and two local crops, four images, five prototypes; so many images in a piece and in a product."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", piece * 5 * 5 * 4)
    monkeypatch.setitem(LOGITS_BYTES, "cpu", product * 5 * 5 * 4)
    generator = torch.Generator().manual_seed(0)
    features, weight_v, weight_g = (
        torch.randn(*shape, generator=generator) for shape in ((20, 3), (5, 3), (5, 1))
    )  # the length of a prototype may be any number
    probs = torch.rand(3, 4, 5, generator=generator).softmax(-1)
    leaves = [features, weight_v, weight_g]
    for leaf in leaves:
        leaf.requires_grad_()

    def gradients(total):
        total.backward()
        values = [leaf.grad.clone() for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return values

    prototypes = weight_v / weight_v.norm(dim=1, keepdim=True) * weight_g
    log_probs = (features @ prototypes.T / 0.1).log_softmax(-1).view(5, 4, 5)
    pairs = [(s, t) for s in range(5) for t in range(3) if s != t]
    each = {(s, t): -0.5 * (probs[t] * log_probs[s]).sum(-1).mean() for s, t in pairs}
    local, swapped = (sum(v for (s, _), v in each.items() if (s >= 3) == is_local) for is_local in (True, False))
    expected = gradients(2 * (local + swapped))
    terms = dino_loss(as_targets(probs), 0.5, 0.1)(*leaves)
    close(terms.detach(), torch.stack([local, swapped]).detach())
    for actual, value in zip(gradients(2 * terms.sum()), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-4, atol=1e-6)


def test_bfloat16_rounds_logits_and_their_gradients_only():
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(32, 16, generator=generator), dim=1)
    weight_v, weight_g = torch.randn(64, 16, generator=generator), torch.ones(64, 1)
    loss = dino_loss(as_targets(torch.rand(2, 8, 64, generator=generator).softmax(-1)), 1.0, 0.1)
    results = []
    for half in (False, True):
        leaves = [leaf.clone().requires_grad_() for leaf in (features, weight_v, weight_g)]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            terms = loss(*leaves)
        terms.sum().backward()
        assert terms.dtype == torch.float32
        results.append([terms.detach(), *(leaf.grad for leaf in leaves)])
    for whole, rounded in zip(*results, strict=True):
        assert 0 < (whole - rounded).norm() < 0.01 * whole.norm()


def test_ibot_equals_the_released_code():
    targets = as_targets(REFERENCE["ibot/teacher_probs_sinkhorn_temp0.06"])
    loss = ibot_loss(targets, REFERENCE["ibot/masks"].bool(), 1.0, 0.1)
    close(of_logits(loss, REFERENCE["ibot/student_logits"])[0], REFERENCE["ibot/loss_masked"][0])


def test_ibot_by_hand():
    # Image 0 has two masked patches, image 1 none, image 2 one: uniform student, so every patch costs ln 4.
    masks = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 1]], dtype=torch.bool)
    loss = ibot_loss(as_targets(torch.eye(4)[:3] + 1e-30), masks, 1.0, 0.1)
    assert of_logits(loss, torch.zeros(3, 4)).item() == pytest.approx(2 * math.log(4) / 3, rel=1e-6)


def test_ibot_rows_must_fit_the_masks():
    with pytest.raises(ValueError, match="masks have 2 true entries, but the teacher has 3"):
        ibot_loss(as_targets(torch.ones(3, 4)), torch.tensor([[True, True, False]]), 1.0, 0.1)


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


def test_koleo_pushes_neighbors_apart_and_survives_duplicates():
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
    # The dot product is -1, with which the released code blanks the diagonal: the neighbor is still the other one.
    assert koleo_loss(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).item() == pytest.approx(-math.log(2), rel=1e-6)


def test_koleo_needs_a_neighbor():
    with pytest.raises(ValueError, match="at least 2 images per rank, got 1"):
        koleo_loss(torch.ones(1, 4))


def test_koleo_is_float32_inside_autocast():
    tokens = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = koleo_loss(tokens)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, koleo_loss(tokens))
