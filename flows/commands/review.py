"""`pedigree review`: a version beside the champion and its gates; without a version, what waits for a decision."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from components.core.errors import ServiceError
from components.core.layout import Layout
from components.core.metric_names import is_count, is_setting
from components.core.user import REVIEWER
from flows.commands.decorators import Answer, answer_console, command

if TYPE_CHECKING:
    from components.registry.review import Review

STYLES = {"passed": "green", "failed": "bold red", "pending": "yellow"}


@command(services=True, role=REVIEWER)
def review(
    reference: Annotated[
        str | None, typer.Argument(metavar="[VERSION]", help="NAME@latest, NAME-candidates/NUMBER or NAME/NUMBER.")
    ] = None,
    open_: Annotated[
        bool, typer.Option("--open", help="Make its passport as of now, and open it in a browser.")
    ] = False,
) -> Answer:
    """Show a version beside the champion, and whether it passes the gates. Decides nothing.

    Without a version: the newest candidate of each model that nobody has
    decided on. The exit code is 1 where a gate fails.

    Examples:
      pedigree review

      pedigree review pedigree@latest --open

      pedigree review pedigree-candidates/3 --json
    """
    from components.registry import review as reviews
    from components.registry.publish import one_line_errors, registry_client

    with one_line_errors():
        client = registry_client()
        if reference is None:
            return _waiting(client)
        found = reviews.review_reference(client, reference, Path.cwd())
        passport = _write_passport(found, Path.cwd()) if open_ else None
    page = reviews.page_url(found.version)
    if passport:
        typer.launch(passport)
    data = {**dataclasses.asdict(found), "verdict": found.verdict, "page": page, "passport": passport}
    data["facts"], data["making"] = (m.model_dump(mode="json") if m else None for m in (found.facts, found.making))
    return Answer(data, partial(_show, found, page, passport), exit_code=1 if found.failed else 0)


def _waiting(client: Any) -> Answer:
    """The candidates that nobody has decided on, with Prefect's requests, where these are known."""
    from components.registry.review import undecided
    from flows.decisions import open_requests

    try:
        urls, problems = open_requests(), []
    except ServiceError as error:
        urls, problems = {}, [str(error)]
    unknown = problems[0] if problems else None
    rows = [
        {**dataclasses.asdict(found), "request": urls.get(found.version), "request_unknown": unknown}
        for found in undecided(client)
    ]
    return Answer(rows, partial(_show_waiting, rows), problems)


def _write_passport(found: Review, root: Path) -> str:
    """Write the passport as of now, and return its path."""
    from components.core.storage import write_bytes
    from components.registry.passport import passport_now
    from components.registry.publish import registry_client

    path = Layout(root).state / "passports" / f"{found.version.replace('/', '-')}.html"
    write_bytes(path, passport_now(found, registry_client(), root))
    return str(path)


def _show_waiting(rows: list[dict[str, Any]]) -> None:
    console = answer_console()
    if not rows:
        console.print("no candidate waits for a decision")
        return
    table = Table("candidate", "made", "score", "gates at registration", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row["version"], row["made"], row["score"], Text(row["verdict"]))
    console.print(table, soft_wrap=False)
    for row in rows:
        if row["request"]:
            console.print(f"decide on {row['version']} in Prefect's page: {row['request']}", markup=False)
    console.print(f"look at one:  pedigree review {rows[0]['version']}", markup=False)


def _show(found: Review, page: str, passport: str | None) -> None:
    from components.registry.card import standing

    console = answer_console()
    console.print(f"[bold]{found.version}[/]  {standing(found)}")
    console.print(Text(found.verdict, "bold red" if found.failed else "bold green"))
    gates = Table("gate", "", "found", box=None, pad_edge=False)
    for gate in found.gates:
        gates.add_row(gate.name, Text(gate.state, STYLES[gate.state]), Text(gate.text))
    console.print(gates, soft_wrap=False)
    console.print(_scores(found), soft_wrap=False)
    for line in found.unexplained:
        console.print(f"not explained by any audit event: {line}", style="red", markup=False)
    console.print(f"page      {page}", markup=False)
    if passport:
        console.print(f"passport  {passport}", markup=False)
    console.print(f"approve   pedigree promote {found.version} --reason TEXT", markup=False)
    console.print(f"reject    pedigree reject {found.version} --reason TEXT", markup=False)


def _scores(found: Review) -> Table:
    """Metrics of the version and of what it is shown beside, and the difference of the two."""
    other = "champion" if found.champion else "earlier candidate"
    columns = {"this version": found.facts.metrics(), other: dict(found.beside.scores) if found.beside else {}}
    columns |= {name: found.facts.metrics(name) for name in found.facts.compared() if name != "champion"}
    columns = {name: values for name, values in columns.items() if values}
    table = Table("metric", *columns, f"minus {other}", box=None, pad_edge=False)
    for metric in columns["this version"]:
        if is_count(metric) or is_setting(metric):
            continue
        values = (columns[name].get(metric) for name in columns)
        difference = ((found.beside and found.beside.differences) or {}).get(metric)
        told = f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})" if difference else ""
        table.add_row(metric, *("" if value is None else f"{value:.4g}" for value in values), told)
    return table
