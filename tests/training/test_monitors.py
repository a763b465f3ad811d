import math

import numpy as np
import pytest
import torch

from components.training.monitors import effective_rank, feature_std, target_entropy


def test_feature_std():
    generator = torch.Generator().manual_seed(0)
    assert feature_std(torch.randn(4_000, 64, generator=generator)) == pytest.approx(1.0, abs=0.01)
    assert feature_std(torch.ones(10, 64)) == pytest.approx(0.0, abs=1e-6)


def test_effective_rank_of_known_singular_values():
    singular = np.array([4.0, 2.0, 1.0, 1.0])
    # Columns orthonormal and of zero mean, so that centring changes nothing.
    left = np.linalg.qr(np.c_[np.ones(20), np.random.default_rng(0).normal(size=(20, 4))])[0][:, 1:]
    probs = singular / singular.sum()
    expected = math.exp(-(probs * np.log(probs)).sum())
    assert effective_rank(torch.from_numpy(left * singular)) == pytest.approx(expected, rel=1e-5)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1.0)


def test_target_entropy():
    assert target_entropy(torch.ones(6, 32), 0.05) == pytest.approx(math.log(32))
    assert target_entropy(torch.eye(32) * 1e3, 0.05) == pytest.approx(0.0, abs=1e-6)
