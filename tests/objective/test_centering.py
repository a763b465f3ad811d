"""Teacher targets: reference numbers, invariants, and one rank against two."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from components.objective.centering import CHUNK_BYTES, SoftmaxCentering, sinkhorn_knopp

REFERENCE = load_file(Path(__file__).parents[1] / "reference" / "dinov2.safetensors")


def test_sinkhorn_equals_the_released_code():
    for module in ("dino", "ibot"):
        probs = sinkhorn_knopp(REFERENCE[f"{module}/teacher_logits"], 0.06, 3).rows()
        torch.testing.assert_close(probs, REFERENCE[f"{module}/teacher_probs_sinkhorn_temp0.06"], rtol=1e-5, atol=1e-7)


def test_sinkhorn_by_hand():
    # exp(logits) = [[1, 1], [1, 3]]; one iteration: columns / [2, 4] = [[1/2, 1/4], [1/2, 3/4]]; rows / [3/4, 5/4].
    probs = sinkhorn_knopp(torch.tensor([[1.0, 1.0], [1.0, 3.0]]).log(), 1.0, 1).rows()
    torch.testing.assert_close(probs, torch.tensor([[2 / 3, 1 / 3], [2 / 5, 3 / 5]]))


def test_sinkhorn_rows_sum_to_one_and_prototypes_balance():
    logits = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) + torch.linspace(-2, 2, 16)
    probs = sinkhorn_knopp(logits, 0.5, 50).rows()
    torch.testing.assert_close(probs.sum(1), torch.ones(64))
    torch.testing.assert_close(probs.sum(0), torch.full((16,), 4.0), rtol=1e-3, atol=0)
    skewed = torch.softmax(logits / 0.5, dim=1).sum(0)
    assert skewed.max() > 10 * skewed.min()


@pytest.mark.parametrize("scale", [1.0, 10.0, 1e4])
def test_sinkhorn_stays_finite_where_the_exponential_would_overflow(scale):
    probs = sinkhorn_knopp(scale * torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), 0.04, 3).rows()
    torch.testing.assert_close(probs.sum(1), torch.ones(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinkhorn_in_pieces_is_the_plain_algorithm(monkeypatch, dtype):
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * 40 * 3)  # three rows at a time
    logits = torch.randn(10, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain = torch.exp(logits.double() / 0.1)
    for _ in range(3):
        plain /= plain.sum(0)
        plain /= plain.sum(1, keepdim=True)
    targets = sinkhorn_knopp(logits, 0.1, 3)
    torch.testing.assert_close(targets.rows().double(), plain, rtol=1e-5, atol=1e-8)
    assert torch.equal(targets.by_crop(2).rows(slice(1, 3)), torch.stack([targets.rows()[1:3], targets.rows()[6:8]]))


def test_sinkhorn_does_not_hide_non_finite_logits():
    logits = torch.zeros(4, 3)
    logits[1, 1] = torch.nan
    assert sinkhorn_knopp(logits, 0.04).rows().isnan().any()


def test_sinkhorn_in_bfloat16_autocast_is_float32():
    logits = REFERENCE["dino/teacher_logits"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sinkhorn_knopp(logits, 0.06).rows()
    assert inside.dtype == torch.float32
    assert torch.equal(inside, sinkhorn_knopp(logits, 0.06).rows())


def test_softmax_centering_equals_the_released_code():
    centering = SoftmaxCentering(32, 0.9)
    centering.center.copy_(REFERENCE["dino/center"])
    probs = centering(REFERENCE["dino/teacher_logits"], 0.06).rows()
    torch.testing.assert_close(probs, REFERENCE["dino/teacher_probs_softmax_center_temp0.06"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(centering.center, REFERENCE["dino/center_after_update"], rtol=1e-5, atol=1e-7)


def test_center_moves_in_training_only_and_not_without_rows():
    centering = SoftmaxCentering(2, 0.9)
    centering(torch.tensor([[1.0, 3.0], [3.0, 5.0]]), 0.04)
    torch.testing.assert_close(centering.center, torch.tensor([[0.2, 0.4]]))
    assert centering(torch.zeros(0, 2), 0.04).rows().shape == (0, 2)
    centering.eval()(torch.ones(1, 2), 0.04)
    torch.testing.assert_close(centering.center, torch.tensor([[0.2, 0.4]]))


def _targets_of_slice(logits):
    centering = SoftmaxCentering(logits.shape[1], 0.9)
    centering(logits, 0.06)
    return sinkhorn_knopp(logits, 0.06).rows(), centering.center


def _two_ranks(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    logits = REFERENCE["ibot/teacher_logits"]
    results = {}
    for cut in (4, 11):  # 4 and 7 rows; then one rank without any masked patch
        probs, center = _targets_of_slice((logits[:cut], logits[cut:])[rank])
        results[cut] = probs.tolist(), center.tolist()
    probs = sinkhorn_knopp(logits[:0], 0.06).rows()
    torch.save((results, probs.shape[0]), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # the children import this module by its name
    mp.spawn(_two_ranks, args=(str(tmp_path),), nprocs=2)
    (first, empty), (second, _) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    probs, center = _targets_of_slice(REFERENCE["ibot/teacher_logits"])
    for cut in (4, 11):
        torch.testing.assert_close(torch.tensor(first[cut][0] + second[cut][0]), probs, rtol=1e-5, atol=1e-7)
        for rank in (first, second):
            torch.testing.assert_close(torch.tensor(rank[cut][1]), center, rtol=1e-5, atol=1e-7)
    assert empty == 0
