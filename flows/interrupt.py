"""Ctrl-C and SIGTERM during a run: the running stage saves its state, then the flow ends in order.

Prefect installs a SIGTERM handler of its own while a flow runs, which raises in the main thread and leaves the stages'
threads running. A flow of ours therefore sets its handlers inside its body.
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

if TYPE_CHECKING:  # the command line does not wait for Prefect
    from prefect import State

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Interrupt:
    """What the signals of this process have asked for.

    Args:
        number: the first signal; None: there was none.
        deferred: stages run in threads, so that the handler stops their commands instead of raising.
    """

    number: int | None = None
    deferred: bool = False

    @property
    def reason(self) -> str:
        """For the messages of states and commits."""
        return "stopped by SIGTERM" if self.number == signal.SIGTERM else "stopped by Ctrl-C"

    @property
    def exit_code(self) -> int:
        """The shell's convention: 128 and the number of the signal."""
        return 128 + (self.number or signal.SIGINT)


current = Interrupt()
commands: set[subprocess.Popen[str]] = set()  # of the stages that run


def asked() -> bool:
    """Whether this process was told to stop."""
    return current.number is not None


@contextmanager
def handled() -> Iterator[Interrupt]:
    """Turn the first Ctrl-C or SIGTERM into `KeyboardInterrupt`, or stop the stages' commands where stages run.

    A second Ctrl-C ends the process at once; a second SIGTERM changes nothing, since a service manager may send it to
    each process of a group. Only the main thread can set handlers; elsewhere the block runs without.
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
    """Inside, a signal stops the stages' commands and raises nothing: the flow ends when its stages have ended."""
    current.deferred = True
    try:
        yield
    finally:
        current.deferred = False


def _on_signal(number: int, _frame: Any) -> None:
    if asked() and number == signal.SIGTERM:
        return
    if asked():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt
    current.number = number
    for process in list(commands):
        stop(process)
    if not current.deferred:
        raise KeyboardInterrupt


def stop(process: subprocess.Popen[str]) -> None:
    """Ask a stage's command, and all that it started, to save its state and end."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)


def end(interrupt: Interrupt) -> State[Any]:
    """The last state of an interrupted flow run that was started by hand or cancelled.

    A deployment's run that nobody cancelled goes on later: this call then ends the process, as Prefect does where it
    suspends a run, and a worker takes the run again.
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
        live.end(None, run, later)  # before another process begins it
        raise Pause(state=client.set_flow_run_state(run.id, later).state)
    return later  # Prefect is away
