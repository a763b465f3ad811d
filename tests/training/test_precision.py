"""Precision `auto`: what this machine has, on record, and told where a run was begun in another one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from components.core.config import validate
from components.pretraining import stage as pretraining
from components.pretraining.config import PretrainConfig
from components.training.checkpoint import Checkpoints
from components.training.precision import has_bfloat16, resolve_precision
from tests.training.jobs import make_job, train_job


def provenance(workspace: Path) -> dict[str, object]:
    return json.loads((workspace / "models/pretrained/config.json").read_text())["provenance"]


def test_the_cpu_is_asked():
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert flags
    known = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}
    assert has_bfloat16(torch.device("cpu")) == bool(known & set(flags[1].split()))


def test_what_was_taken_is_in_the_runs_key_and_provenance(workspace, pretrain_values):
    taken = resolve_precision(validate(PretrainConfig, pretrain_values(precision="auto"), "test"), "pretrain").precision
    assert taken == ("bfloat16" if has_bfloat16(torch.device("cpu")) else "float32")
    keys = []
    for precision in ("auto", taken):
        pretraining.run(
            validate(PretrainConfig, pretrain_values(steps=4, precision=precision), "test"), workspace, seed=0
        )
        made = provenance(workspace)
        assert made["config"]["precision"] == taken
        keys.append(made["run_key"])
    assert keys[0] == keys[1]


def test_a_run_begun_in_the_other_precision_is_told_of(workspace, curated, pretrain_values, caplog):
    values = {name: pretrain_values(steps=4, precision=name) for name in ("bfloat16", "float32")}
    begun = validate(PretrainConfig, values["bfloat16"], "test")
    pretraining.run(begun, workspace, seed=0)
    key = provenance(workspace)["run_key"]
    train_job(make_job(values["bfloat16"], curated), Checkpoints(workspace / ".pedigree/checkpoints" / str(key)))
    assert "starts anew" not in caplog.text
    pretraining.run(validate(PretrainConfig, values["float32"], "test"), workspace, seed=0)
    told = "starts anew in float32, although step 4 of 4 is done in bfloat16"
    assert f"pretrain: {told}; to go on from there, stop it and set pretrain.precision=bfloat16" in caplog.text
    assert provenance(workspace)["config"]["precision"] == "float32"
    with pytest.raises(AssertionError, match="not resolved"):
        _ = validate(PretrainConfig, pretrain_values(precision="auto"), "test").bfloat16
