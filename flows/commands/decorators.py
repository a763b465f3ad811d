"""What all commands of `pedigree` share: their folder, the services, clear errors, and `--json`."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from components.core.config import ConfigError
from components.core.errors import TRY_AGAIN, PedigreeError, defect, known, print_traceback, tracebacks_shown
from components.core.layout import Layout
from components.core.user import TRAINER
from flows import interrupt
from infra.local import supervisor

_JSON = inspect.Parameter(
    "as_json",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs.")],
)

MAX_LINE = 2000  # characters


@dataclass(frozen=True)
class Answer:
    """What a command has found out.

    Attributes:
        data: printed as JSON with `--json`.
        show: prints it for a person, without `--json`.
        problems: lines for stderr, after the answer.
        exit_code: of the command.
    """

    data: Any
    show: Callable[[], None]
    problems: Sequence[str] = ()
    exit_code: int = 0


def answer_console() -> Console:
    """Where an answer is printed: lines stay whole, a table fits the terminal; print it with `soft_wrap=False`."""
    return Console(width=None if sys.stdout.isatty() else MAX_LINE, soft_wrap=True, highlight=False)


def command(
    checkout: bool = True, services: bool = False, role: str = TRAINER
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Make a function a command: its errors are one line each, and its `Answer` has the option `--json`.

    Args:
        checkout: it works in Pedigree's own folder only.
        services: point it at the services first, without starting them.
        role: in which it uses them, where the user has set no login.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        @functools.wraps(function)
        def whole(*arguments: Any, as_json: bool = False, **options: Any) -> None:
            with _clear_errors():
                if checkout:
                    _check_folder(Path.cwd())
                if services:
                    os.environ.update(supervisor.connect(Path.cwd(), start=False, role=role))
                answer = function(*arguments, **options)
                if isinstance(answer, Answer):
                    _give(answer, as_json)

        if function.__annotations__["return"] == Answer.__name__:
            _add_option(whole, function)
        return whole

    return decorate


def _add_option(whole: Callable[..., None], function: Callable[..., Any]) -> None:
    """Give a command the option `--json`, where typer looks for options."""
    signature = inspect.signature(function, eval_str=True)
    parameters = [*signature.parameters.values(), _JSON]
    whole.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportFunctionMemberAccess]
    whole.__annotations__ = {**function.__annotations__, _JSON.name: _JSON.annotation}


def _give(answer: Answer, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(answer.data, indent=2, default=str) + "\n")
    else:
        answer.show()
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    for line in answer.problems:
        errors.print(line, style="red", markup=False)
    if answer.exit_code:
        raise typer.Exit(answer.exit_code)


def _check_folder(folder: Path) -> None:
    """Refuse a folder that is not Pedigree's; in another, `up` would start a stack that knows no flow."""
    if not Layout(folder).pipeline.exists():
        raise ConfigError(f"no dvc.yaml in {folder}: run this in Pedigree's own folder")


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turn every error into one clear line and an exit code; a defect shows its traceback before."""
    try:
        with interrupt.handled():
            yield
    except (typer.Exit, typer.Abort, BrokenPipeError):  # the last: of a reader such as `head`
        raise
    except Exception as error:
        raise typer.Exit(_tell(error)) from error
    except KeyboardInterrupt:
        stopped = interrupt.current
        text = f"{stopped.reason}; what was finished is kept, run again to go on"
        Console(stderr=True).print(text, style="yellow")
        raise typer.Exit(stopped.exit_code) from None


def _tell(error: Exception) -> int:
    """Say what went wrong, and return the exit code; it is 1 for a service too: only stages end with 75."""
    found = known(error)
    if found is None or tracebacks_shown():
        print_traceback(error)
    shown = found or defect(error, "above")
    console = Console(stderr=True, soft_wrap=True)
    for line in str(shown).splitlines() or [type(shown).__name__]:
        console.print(f"error: {line}", style="red", markup=False, highlight=False)
    return PedigreeError.exit_code if shown.exit_code == TRY_AGAIN else shown.exit_code
