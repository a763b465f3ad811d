"""A training that is told to go (SIGTERM, as a machine that is taken away sends it) is run again by Prefect."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from prefect import flow

from components.lineage.ledger import Outcome, Stage
from flows.stages import run_stage
from tests.training.conftest import backbone, curated, pretrain_values, tiny, workspace  # noqa: F401 - fixtures

pytestmark = pytest.mark.stack

TRAIN = """
import json, logging, os, signal, sys, threading, time
from pathlib import Path
import torch
from components.pretraining.config import PretrainConfig
from components.pretraining.stage import run

def take_away():
    while not list(Path().glob(".pedigree/checkpoints/*/step_4")):
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGTERM)

logging.basicConfig(level=logging.INFO, format="%(message)s")
torch.set_num_threads(1)
if not Path("told").exists():
    Path("told").touch()
    threading.Thread(target=take_away, daemon=True).start()
run(PretrainConfig.model_validate(json.loads(sys.argv[1])), Path(), seed=0)
"""


class Ledger:
    """Stands in for DVC: the stage is to be run, and what is recorded is noted."""

    def __init__(self) -> None:
        self.recorded: list[str] = []

    def take_up(self, name: str) -> Outcome:
        return Outcome.CHANGED

    def record(self, name: str) -> None:
        self.recorded.append(name)


def test_exit_75_after_sigterm_goes_on_from_the_checkpoint(stack, workspace, pretrain_values, monkeypatch):  # noqa: F811
    monkeypatch.setenv("PYTHONPATH", str(__file__).removesuffix("/tests/flows/test_preemption.py"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (workspace / "train.py").write_text(TRAIN)
    values = json.dumps(pretrain_values(steps=60, checkpoint_every_steps=4))
    stage = Stage("pretrain", f"{sys.executable} train.py '{values}'", (), ())
    ledger = Ledger()
    place: Any = SimpleNamespace(root=workspace, ledger=ledger, commit=lambda _: None)

    @flow
    def only_this() -> list[Any]:
        state = run_stage.with_options(retry_delay_seconds=0)(stage, place, return_state=True)
        return [state.result(), state.state_details.task_run_id]

    outcome, task_run = only_this()
    assert outcome == "ran"
    assert ledger.recorded == ["pretrain"]
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        assert client.read_task_run(task_run).run_count == 2
    assert (workspace / "models" / "pretrained" / "model.safetensors").exists()
