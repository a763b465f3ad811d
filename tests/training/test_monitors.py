import math

import pytest
import torch

from components.training.monitors import target_entropy


def test_target_entropy():
    assert target_entropy(torch.ones(6, 32), 0.05) == pytest.approx(math.log(32))
    assert target_entropy(torch.eye(32) * 1e3, 0.05) == pytest.approx(0.0, abs=1e-6)
