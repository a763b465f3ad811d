"""The commands of the local stack: `pedigree up`, `status`, `down` and `env`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flows import live
from infra.local import supervisor
from infra.local.site import Site, StackError

COLOURS = {"healthy": "green", "unhealthy": "yellow", "dead": "red", "stopped": "dim"}


@contextmanager
def _interruptible() -> Iterator[None]:
    """End with 130 at Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt as error:
        Console(stderr=True).print("interrupted: what had been started is stopped again", style="yellow")
        raise typer.Exit(130) from error


def up() -> None:
    """Start the local stack, or what is missing of it."""
    console = Console(stderr=True, soft_wrap=True)
    with _interruptible(), console.status("starting the local stack (about 10 seconds the first time)"):
        supervisor.up(Path.cwd(), report=lambda line: console.print(line, markup=False, highlight=False))
    status()


def status(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list, for programs.")] = False,
    credentials: Annotated[bool, typer.Option("--credentials", help="Show what the web pages ask for.")] = False,
) -> None:
    """Show each service: state, address, process and log. Ends with 1 unless all are healthy."""
    with _interruptible():
        found = supervisor.status(Path.cwd())
        if as_json:
            sys.stdout.write(json.dumps([service.as_dict() for service in found], indent=2) + "\n")
        else:
            _show(found)
        if credentials:
            _show_credentials(Site.load(Path.cwd()))
    if any(service.state != "healthy" for service in found):
        raise typer.Exit(1)


def down() -> None:
    """Stop every process of the local stack; its data stays in .pedigree."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with _interruptible():
        for line in live.stop_running(Path.cwd()):
            console.print(line, markup=False)
        stopped = supervisor.down(Path.cwd())
    console.print(f"stopped {', '.join(stopped)}" if stopped else "nothing was running")


def env() -> None:
    """Print `export` lines, secrets included: eval "$(pedigree env)"."""
    with _interruptible():
        variables = supervisor.environment(Path.cwd())
    sys.stdout.write("".join(f"export {name}={_quoted(value)}\n" for name, value in variables.items()))


def _quoted(value: str) -> str:
    """The value in single quotes, whatever it holds."""
    quoted = shlex.quote(value)
    return quoted if quoted.startswith("'") else f"'{quoted}'"


def _show(found: list[supervisor.Status]) -> None:
    """Print the table of services."""
    table = Table("service", "state", "address", "pid", "log", box=None, pad_edge=False)
    for service in found:
        state = f"[{COLOURS[service.state]}]{service.state}[/]"
        log = Path(service.log)
        shown = log.relative_to(Path.cwd()) if log.is_relative_to(Path.cwd()) else log
        table.add_row(service.service, state, service.url, str(service.pid or ""), str(shown))
    console = Console(soft_wrap=True)
    console.print(table)
    for service in found:
        if service.detail:
            console.print(f"{service.service}: {service.detail}", markup=False, highlight=False)


def _show_credentials(site: Site) -> None:
    """Print what a person types into the web pages of MLflow and Prefect."""
    keys = site.credentials
    if not keys:
        raise StackError("there are no credentials yet: start the stack with `pedigree up`")
    console = Console(soft_wrap=True)
    for line in (
        f"MLflow   user {keys['MLFLOW_TRACKING_USERNAME']}  password {keys['MLFLOW_TRACKING_PASSWORD']}",
        f"Prefect  {keys['PREFECT_API_AUTH_STRING']}",
        f"S3       access key {keys['AWS_ACCESS_KEY_ID']}  secret key {keys['AWS_SECRET_ACCESS_KEY']}",
    ):
        console.print(line, markup=False, highlight=False)
