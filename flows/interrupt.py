"""Handle Ctrl-C and SIGTERM during a run: the running stage saves its state, then the flow ends.

While a flow runs, Prefect's own SIGTERM handler raises in the main thread and leaves the stages' threads running.
Therefore our flows set their handlers inside the flow body.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

if TYPE_CHECKING:  # importing Prefect is slow
    from prefect import State

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Interrupt:
    """Signals received by this process.

    Args:
        number: the first signal; None if there was none.
        deferred: the handler stops the commands of stages, which run in threads, instead of raising.
    """

    number: int | None = None
    deferred: bool = False

    @property
    def reason(self) -> str:
        """Reason for messages of states and commits."""
        return "stopped by SIGTERM" if self.number == signal.SIGTERM else "stopped by Ctrl-C"

    @property
    def exit_code(self) -> int:
        """Exit code by the shell's convention: 128 plus the signal number."""
        return 128 + (self.number or signal.SIGINT)


current = Interrupt()
commands: set[subprocess.Popen[str]] = set()  # of the stages that run


def requested() -> bool:
    """Return whether this process has received a signal."""
    return current.number is not None


@contextmanager
def handled() -> Iterator[Interrupt]:
    """Turn the first Ctrl-C or SIGTERM into `KeyboardInterrupt`, or stop the commands of running stages.

    A second Ctrl-C ends the process at once; a second SIGTERM is ignored, because a service manager may send it to each
    process of a group. Only the main thread can set handlers; other threads run the block without.
    """
    global current  # noqa: PLW0603 - signals are of the process
    if threading.current_thread() is not threading.main_thread():
        yield current
        return
    nested = any(signal.getsignal(number) is _on_signal for number in SIGNALS)
    if not nested:
        current = Interrupt()
    before: dict[int, Any] = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    try:
        yield current
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside the block a signal stops the stages' commands without raising; the flow ends after its stages."""
    current.deferred = True
    try:
        yield
    finally:
        current.deferred = False


def _on_signal(number: int, _frame: Any) -> None:
    if requested() and number == signal.SIGTERM:
        return
    if requested():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt
    current.number = number
    for process in list(commands):
        stop(process)
    if not current.deferred:
        raise KeyboardInterrupt


def stop(process: subprocess.Popen[str]) -> None:
    """Send SIGTERM to a stage's command and its children, so that they save their state and exit."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)


def end(interrupt: Interrupt) -> State[Any]:
    """Return the final state of an interrupted flow run that was started by hand or cancelled.

    An uncancelled run of a deployment continues later: this call then ends the process, as Prefect does to suspend a
    run, and a worker starts the run again.
    """
    from httpx import HTTPError
    from prefect.client.orchestration import get_client
    from prefect.exceptions import Pause
    from prefect.runtime import deployment, flow_run
    from prefect.states import AwaitingRetry, Cancelled

    from flows import live

    message = f"{interrupt.reason}; what was finished is kept"
    if deployment.id is None:
        return Cancelled(message=message)
    later = AwaitingRetry(message=f"{message}; a worker starts it again")
    with suppress(HTTPError), get_client(sync_client=True) as client:
        run = client.read_flow_run(UUID(flow_run.id))
        if run.state is not None and run.state.is_cancelling():
            return Cancelled(message="cancelled; what was finished is kept")
        live.end(None, run, later)  # before another process starts the run
        raise Pause(state=client.set_flow_run_state(run.id, later).state)
    return later  # Prefect does not answer
