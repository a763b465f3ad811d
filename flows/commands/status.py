"""`pedigree status`: show the services of the local stack."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flows.commands.decorators import Answer, command
from infra.local import supervisor
from infra.local.site import Site, StackError

COLORS = {"healthy": "green", "unhealthy": "yellow", "dead": "red", "stopped": "dim"}


@command()
def status(
    credentials: Annotated[
        bool, typer.Option("--credentials", help="Show what the web pages ask for; not with --json.")
    ] = False,
) -> Answer:
    """Show each service: state, address, process and log. Exits with 1 unless all are healthy."""
    found = supervisor.status(Path.cwd())
    sick = any(service.state != "healthy" for service in found)
    return Answer([service.as_dict() for service in found], partial(_show, found, credentials), exit_code=int(sick))


def _show(found: list[supervisor.Status], credentials: bool) -> None:
    table = Table("service", "state", "address", "pid", "log", box=None, pad_edge=False)
    for service in found:
        state = f"[{COLORS[service.state]}]{service.state}[/]"
        log = Path(service.log)
        shown = log.relative_to(Path.cwd()) if log.is_relative_to(Path.cwd()) else log
        table.add_row(service.service, state, service.url, str(service.pid or ""), str(shown))
    console = Console(soft_wrap=True)
    console.print(table)
    for service in found:
        if service.detail:
            console.print(f"{service.service}: {service.detail}", markup=False, highlight=False)
    if credentials:
        _show_credentials(Site.load(Path.cwd()))


def _show_credentials(site: Site) -> None:
    """Print the credentials for the web pages of MLflow and Prefect."""
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
