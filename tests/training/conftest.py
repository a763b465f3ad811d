"""A small curated set of real photographs, and a training small enough for unit tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.jobs import write_curated


@pytest.fixture(scope="session")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 tiles of a photograph in several shards, as curation writes them; read only."""
    folder = tmp_path_factory.mktemp("workspace") / "data" / "curated"
    write_curated(folder)
    return folder


@pytest.fixture
def workspace(tmp_path: Path, curated: Path) -> Path:
    """An empty workspace over the curated set."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "curated").symlink_to(curated)
    return tmp_path


@pytest.fixture
def tiny() -> Callable[..., dict[str, Any]]:
    """Values of a training of some milliseconds a step; keyword arguments replace whole keys."""

    def values(**changes: Any) -> dict[str, Any]:
        return {
            "steps": 6,
            "batch_size": 8,
            "precision": "float32",
            "checkpoint_every_steps": 2,
            "log_every_steps": 1,
            "stream": {"num_workers": 0, "window_shards": 2},
            "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
            "optimizer": {"base_lr": 0.01, "warmup_steps": 1, "freeze_last_layer_steps": 1, "layer_decay": 0.9},
            "teacher": {"temp_warmup_steps": 3},
        } | changes

    return values


@pytest.fixture
def backbone() -> dict[str, Any]:
    """Shape of a tiny vision transformer."""
    return {
        "patch_size": 8, "dim": 32, "depth": 2, "num_heads": 2, "ffn": "mlp", "num_registers": 1, "image_size": 32,
        "drop_path": 0.0,
    }  # fmt: skip


@pytest.fixture
def pretrain_values(tiny: Callable[..., dict[str, Any]], backbone: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """Values of a tiny PretrainConfig."""
    head = {"num_prototypes": 64, "hidden_dim": 32, "bottleneck_dim": 16}

    def values(**changes: Any) -> dict[str, Any]:
        return tiny(backbone=backbone | {"drop_path": 0.3}, dino_head=head, ibot_head=head) | changes

    return values


@pytest.fixture(autouse=True)
def _one_thread():
    """Small matrices gain nothing from threads, and other tests may be using the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
