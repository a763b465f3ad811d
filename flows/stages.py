"""Run one stage as a Prefect task: restore its outputs, or run its command, record it in the ledger, and commit."""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from components.core.errors import DEFECT, PedigreeError, ServiceError
from components.core.log_levels import ERROR, read_level
from components.core.progress import CHECKPOINT_LINE, ProgressLine
from components.lineage.ledger import LedgerUnreachableError, Outcome, Stage
from components.stages import memory_advice
from flows import interrupt
from flows.console import DETAIL, board
from flows.progress import progress_artifact
from flows.workspace import Workspace

STOP_SECONDS = 30.0
_PR_SET_PDEATHSIG = 1
_recording = threading.Lock()  # what a stage records is committed before the next one records, under its own name
Logger = logging.Logger | logging.LoggerAdapter[Any]
WORTH_A_RETRY = (os.EX_TEMPFAIL, -signal.SIGTERM)


class StageFailedError(PedigreeError):
    """A stage's command failed; the message is its last error line, the exit code is 70 for a defect."""


class StageUnreachableError(StageFailedError, ServiceError):
    """A stage could not reach the storage or a service, or was terminated; a retry may succeed."""


def worth_a_retry(_task: Any, _run: Any, state: Any) -> bool:
    """Return whether to retry: after storage and service errors, not after a wrong parameter or a defect."""
    error = state.result(raise_on_failure=False)
    return not interrupt.requested() and isinstance(error, StageUnreachableError | LedgerUnreachableError)


# Of every task that talks to the storage or to a service.
RETRIES: dict[str, Any] = {"retries": 3, "retry_delay_seconds": [2, 10, 30], "retry_condition_fn": worth_a_retry}


@task(task_run_name="{stage.name}", persist_result=False, cache_policy=NO_CACHE, **RETRIES)
def run_stage(stage: Stage, workspace: Workspace) -> str:
    """Bring one stage's outputs into place; return the outcome `unchanged`, `restored` or `ran`."""
    if interrupt.requested():
        raise StageFailedError(f"{stage.name}: not started, the run was interrupted")
    with board.working(stage.name, "looking for earlier outputs"):
        return _bring(stage, workspace)


def _bring(stage: Stage, workspace: Workspace) -> str:
    logger = get_run_logger()
    with _recording:
        outcome = workspace.ledger.take_up(stage.name)
        if outcome is not Outcome.CHANGED:
            workspace.ledger.push(stage.name)  # an earlier run may have stopped before pushing
            workspace.commit(f"{stage.name}: {outcome.value}")
    if outcome is not Outcome.CHANGED:
        logger.info("%s: %s, not computed again", stage.name, outcome.value)
        return outcome.value
    logger.info("%s: %s", stage.name, stage.command, extra=DETAIL)
    begun = time.monotonic()
    board.doing(stage.name, "starting")
    with progress_artifact(stage.name) as show:
        stream(stage.command, workspace.root, partial(hand_on, stage.name, logger, show))
    board.doing(stage.name, "storing its outputs")
    with _recording:
        workspace.ledger.record(stage.name)
        workspace.commit(f"{stage.name}: ran for {time.monotonic() - begun:.0f} s")
    logger.info("%s: done in %.0f s", stage.name, time.monotonic() - begun)
    return "ran"


def hand_on(name: str, logger: Logger, show: Callable[[float], None], text: str) -> None:
    """Update the displays from a stage's progress line, and log it at intervals; log any other line."""
    if progress := ProgressLine.parse(text):
        show(100.0 * progress.done / max(progress.total, 1))
        if board.move(name, progress):
            what = "" if progress.what == name else f"{progress.what} "
            logger.info("%s: %s%s", name, what, progress.figures, extra=DETAIL)
        return
    level, said = read_level(text)
    # The live display shows progress, and the end of the run shows why a stage failed.
    extra = DETAIL if text.startswith((ERROR, CHECKPOINT_LINE.partition("%")[0])) else None
    logger.log(level, "%s: %s", name, said.removeprefix(f"{name}: "), extra=extra)


def stream(command: str, root: Path, line_out: Callable[[str], None]) -> None:
    """Run a command line in `root` and pass on its lines; it is killed if this process ends.

    Raises:
        StageUnreachableError: it exited with 75 (retry), or was ended by SIGTERM, as on a preempted machine.
        StageFailedError: it exited with any other code except 0.
    """
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", "")))
    process = subprocess.Popen(
        shlex.split(command), cwd=root, env={**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True, preexec_fn=_die_with_parent,  # noqa: PLW1509 - one prctl call, safe after fork
    )  # fmt: skip
    assert process.stdout is not None
    interrupt.commands.add(process)
    if interrupt.requested():  # the signal came while the command was being started
        interrupt.stop(process)
    last: deque[str] = deque(maxlen=20)
    try:
        for line in process.stdout:
            last.append(line.rstrip())
            line_out(line.rstrip())
        code = process.wait()
    finally:
        _end_group(process)
        interrupt.commands.discard(process)
    if code:
        said = [line for line in last if line.startswith(ERROR)] or [line for line in last if line][-1:]
        reason = "; ".join(line.removeprefix(ERROR) for line in said) or "no output"
        kind = StageUnreachableError if code in WORTH_A_RETRY else StageFailedError
        ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
        if code == -signal.SIGKILL:
            reason += f"; the system kills so where memory runs out: {memory_advice(command.split())}"
        error = kind(f"`{command}` failed ({ended}): {reason}")
        error.exit_code = DEFECT if code == DEFECT else kind.exit_code
        raise error


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_group(process: subprocess.Popen[str]) -> None:
    """Stop the command's session: first by SIGTERM, so that training can save its state, then by SIGKILL."""
    for number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 5.0)):
        if process.poll() is not None:
            break
        os.killpg(process.pid, number)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    if process.stdout is not None:
        process.stdout.close()
