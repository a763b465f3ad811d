"""`python -m components STAGE [ITEM]`: what a stage is given, what it leaves, and its exit codes."""

from __future__ import annotations

import inspect
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from components import cli
from components.core.config import ConfigError
from components.core.errors import EngineError, PedigreeError, error_message
from components.core.mlflow_client import TrackingError
from components.core.storage import MissingInStorageError, StorageError

PROJECT = Path(__file__).parents[2]
STAGES = ("embed", "curate", "pretrain", "adapt", "distill", "evaluate", "register")
ITEMS = {"distill": {"name": "pedigree"}, "evaluate": {"model": "teacher"}, "register": {"name": "pedigree"}}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A workspace with the default parameters, where no server is named; the current folder."""
    shutil.copy(PROJECT / "params.yaml", tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def components(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "components", *arguments],
        cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_under_our_torchrun_the_code_is_the_ranks_and_what_all_of_them_say_is_said_once(folder):
    ranks = ["-m", "components.training.torchrun", "--standalone", "--nproc-per-node=2", "-m", "components"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *ranks, "train"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("error: unknown stage 'train'") == 1


def main(monkeypatch, function: Any, *arguments: str) -> int | str | None:
    """Exit code of the command with `function` in place of the stage's."""
    monkeypatch.setattr(cli, "_function", lambda _stage: function)
    monkeypatch.setattr(sys, "argv", ["components", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "error: unknown stage 'trian'; known stages: embed, curate, pretrain, adapt, distill, evaluate, "),
        (["pretrain", "small"], "error: stage 'pretrain' takes no item, but 'small' was given"),
        (["distill", "small"], "error: stage 'distill' takes no item, but 'small' was given"),
        (["evaluate"], "error: stage 'evaluate' needs one of ['teacher', 'small'], but None was given"),
        (["evaluate", "big"], "error: stage 'evaluate' needs one of ['teacher', 'small'], but 'big' was given"),
    ],
)
def test_a_stage_or_item_that_is_not_known(folder, arguments, told):
    done = components(folder, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(told)
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["params.yaml"]


def test_the_whole_recipe_is_checked_whatever_the_stage(folder):
    values = yaml.safe_load((folder / "params.yaml").read_text())
    values["distill"]["stepps"] = 5
    values["evaluate"]["batch_size"] = -1
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    done = components(folder, "embed")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[0] == "error: params.yaml: distill.stepps: unknown key; did you mean 'steps'?"
    assert lines[1].startswith("error: params.yaml: evaluate.batch_size: ")
    assert len(lines) == 2
    (folder / "params.yaml").unlink()
    assert components(folder, "embed").stderr == f"error: {folder}/params.yaml: no such file\n"


def test_a_stage_without_its_inputs_fails_in_one_line_and_writes_nothing(folder):
    done = components(folder, "curate")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {folder}/data/pool: no pool yet; add images first")
    assert "Traceback" not in done.stderr
    assert not list(folder.rglob("result.json"))


def test_a_server_that_does_not_answer_is_worth_another_try(folder):
    with socket.socket() as server:  # a port that nothing listens on
        server.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        done = components(folder, "curate", MLFLOW_TRACKING_URI=address)
    assert done.returncode == os.EX_TEMPFAIL == 75
    assert address in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


STAGE_PROGRAM = "runpy.run_module('components', run_name='__main__')"
COMMAND_PROGRAM = "importlib.import_module('flows.cli').main()"


@pytest.mark.parametrize("program", [STAGE_PROGRAM, COMMAND_PROGRAM])
def test_threads_that_wait_leave_their_core_to_others(folder, program: str):
    """As torch's OpenMP itself says when it starts: a thread that waits spins 0 times. What a user sets stays."""
    code = f"import contextlib, importlib, runpy\nwith contextlib.suppress(SystemExit): {program}\nimport torch"
    for own, spins in (({}, "0"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        start = [sys.executable, "-c", code, "--help"]
        env = {**os.environ, "OMP_DISPLAY_ENV": "verbose", **own}
        said = subprocess.run(start, cwd=folder, env=env, capture_output=True, text=True, check=True).stderr
        assert set(re.findall(r"GOMP_SPINCOUNT = '(\w+)'", said)) == {spins}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("one\ntwo"), 2),
        (StorageError("one\ntwo"), 75),
        (MissingInStorageError("one\ntwo"), 1),
        (TrackingError("one\ntwo"), 75),
        (EngineError("one\ntwo"), 1),
    ],
)
def test_exit_codes(folder, monkeypatch, caplog, capsys, error, code):
    def function(*_arguments: Any) -> dict[str, Any]:
        raise error

    assert main(monkeypatch, function, "pretrain") == code
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        "error: one", "error: two",
    ]  # fmt: skip
    assert not (folder / "reports").exists()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (np.exceptions.AxisError("axis 3"), 70, "a defect of Pedigree: AxisError: axis 3; traceback: in the log"),
        (FileNotFoundError(2, "No such file", "a"), 70, "a defect of Pedigree: FileNotFoundError: [Errno 2] No such "),
        (RuntimeError(), 70, "a defect of Pedigree: RuntimeError; traceback: in the log"),
        (OSError(28, "No space left on device", "a"), 1, "[Errno 28] No space left on device: 'a'"),
        (PermissionError(13, "Permission denied", "a"), 1, "[Errno 13] Permission denied: 'a'"),
        (PermissionError(1, "Operation not permitted"), 70, "a defect of Pedigree: PermissionError: [Errno 1] "),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            1,
            "CUDA out of memory. Tried; lower pretrain",
        ),
        (MemoryError(), 1, "out of memory: MemoryError; lower pretrain.batch_size or pretrain.stream.num_workers, or "),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            1,
            "out of memory: DataLoader worker (pid 7) is killed by signal: Killed.; lower pretrain.batch_size",
        ),
    ],
)
@pytest.mark.usefixtures("folder")
def test_defects_show_where_they_arose_and_what_the_machine_does_is_a_line(
    monkeypatch, caplog, capsys, error, code, told
):
    def function(*_arguments: Any) -> dict[str, Any]:
        raise error

    assert main(monkeypatch, function, "pretrain") == code
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert line.startswith(f"error: {told}")
    assert ("Traceback" in capsys.readouterr().err) == (code == 70)


def test_memory_that_torch_cannot_allocate_says_what_to_lower(folder, monkeypatch, caplog):
    assert main(monkeypatch, lambda *_, **__: torch.empty(10**16), "evaluate", "teacher") == 1
    said = caplog.records[-1].getMessage()
    assert "DefaultCPUAllocator: can't allocate memory" in said
    assert said.endswith("; lower evaluate.batch_size or evaluate.num_workers")


def test_the_traceback_of_a_known_error_is_shown_when_asked_for(folder, monkeypatch, caplog, capsys):
    def function(*_arguments: Any) -> dict[str, Any]:
        raise PedigreeError("wrong") from KeyError("cause")

    monkeypatch.setenv("PEDIGREE_TRACEBACK", "")  # so that it is put back
    monkeypatch.delenv("PEDIGREE_TRACEBACK")
    assert main(monkeypatch, function, "pretrain", "--traceback") == 1
    said = capsys.readouterr().err
    assert "KeyError: 'cause'" in said
    assert "PedigreeError: wrong" in said
    assert caplog.records[-1].getMessage() == "error: wrong"


def test_of_a_loaders_worker_only_its_own_words_are_said():
    def broken(_: int) -> None:
        raise PedigreeError("shard 3 is damaged")

    loader = torch.utils.data.DataLoader(
        range(1),  # type: ignore[arg-type]
        num_workers=1, collate_fn=broken, multiprocessing_context="fork",
    )  # fmt: skip
    with pytest.raises(PedigreeError) as caught:
        next(iter(loader))
    assert "Traceback" in str(caught.value)
    assert error_message(caught.value) == "shard 3 is damaged"


def test_a_stage_finds_what_a_killed_one_had_moved_away(folder, monkeypatch):
    moved = folder / "models" / ".pretrained.abcd_123"
    (moved / "old").mkdir(parents=True)
    (moved / "new").mkdir()
    (moved / "lock").touch()

    found: list[str] = []

    def function(_section: Any, root: Path, _seed: int) -> dict[str, Any]:
        found.extend(path.name for path in (root / "models").iterdir())
        raise PedigreeError

    assert main(monkeypatch, function, "adapt") == 1
    assert found == ["pretrained"]


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_is_given_and_what_it_leaves(folder, monkeypatch, stage):
    given = {}

    def function(config: Any, root: Path, seed: int, **extra: str) -> dict[str, Any]:
        draws = random.random(), float(np.random.rand()), float(torch.rand(1))  # noqa: NPY002
        given.update(config=config, root=root, seed=seed, extra=extra, draws=draws)
        return {"loss": 1.5, "images": {"pool": 3}}

    item = list(ITEMS[stage].values()) if stage == "evaluate" else []
    assert main(monkeypatch, function, stage, *item) == 0
    first = dict(given)
    assert type(given["config"]).__name__ == f"{stage.title()}Config"
    assert (given["root"], given["seed"], given["extra"]) == (folder, 0, ITEMS.get(stage, {}))
    result = folder.joinpath("reports", stage, *item, "result.json")
    written = json.loads(result.read_text())
    machine = written.pop("machine", {})
    assert ("torch" in machine and machine["threads"] >= 1) == (stage in cli.REPRODUCED_STAGES)
    assert written == {"loss": 1.5, "images": {"pool": 3}}
    assert main(monkeypatch, function, stage, *item) == 0
    assert given["draws"] == first["draws"]  # seeded


def test_only_the_first_rank_reports(folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    ran = []
    assert main(monkeypatch, lambda *_: ran.append(True), "pretrain") == 0
    assert ran == [True]
    assert not (folder / "reports").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_function_of_the_agreed_form(stage):
    expected = ["config", "root", "seed", *ITEMS.get(stage, {})]
    assert list(inspect.signature(cli._function(stage)).parameters) == expected


def test_dvc_yaml_calls_every_stage():
    pipeline = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]
    code = pipeline.pop("code")
    assert tuple(pipeline) == tuple(cli.STAGES) == STAGES
    assert [path for out in code["outs"] for path in out] == [f"reports/code/{stage}.txt" for stage in STAGES]
    for stage, entry in pipeline.items():
        assert [d for d in (entry.get("do") or entry)["deps"] if "code" in d] == [f"reports/code/{stage}.txt"]
        command = (entry.get("do") or entry)["cmd"]
        assert command == f"python -m components {stage}" + (" ${key}" if "do" in entry else "")


def test_the_engine_is_chosen_for_the_stage_and_what_it_starts(folder, monkeypatch):
    seen: list[str | None] = []

    def stage(*_: Any, **__: Any) -> dict[str, Any]:
        seen.append(os.environ.get("RAY_ADDRESS"))
        return {}

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    options = (["--engine", "ray", "--address", "10.0.0.7:6379"], ["--engine", "ray"], [], ["--engine", "loky"])
    assert [main(monkeypatch, stage, "embed", *chosen) for chosen in options] == [0] * 4
    assert seen == ["10.0.0.7:6379", "10.0.0.7:6379", "10.0.0.7:6379", None]
    assert main(monkeypatch, stage, "embed", "--engine", "loky", "--address", "10.0.0.7:6379") == 2
    assert main(monkeypatch, stage, "embed", "--engine", "ray") == 2
    assert len(seen) == 4
