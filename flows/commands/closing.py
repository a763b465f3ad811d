"""The summary at the end of a run: outputs, scores, where to look, and the next command."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from components.core.layout import Layout
from components.core.mlflow_client import without_login
from flows.commands.decorators import Answer
from flows.verdict import verdicts

if TYPE_CHECKING:
    from flows.retrain import RunResult


def closing(result: RunResult, name: str) -> Answer:
    """Return the answer of `pedigree run`; `name` is the model's name."""
    from flows.published import metric_rows

    layout = Layout(result.folder)
    rows, registered = metric_rows(layout.reports), _registered(layout)
    data = {"run": result.run_id, "branch": result.branch, "commit": result.commit, "outcomes": result.outcomes,
            "metrics": rows, "registered": registered, "mlflow": result.mlflow_url}  # fmt: skip
    return Answer(data, partial(_show, result, name, rows, registered))


def _registered(layout: Layout) -> list[dict[str, Any]]:
    """Return the versions that the run registered, the teacher's first."""
    path = layout.result("register")
    made = json.loads(path.read_text()) if path.exists() else {}
    return [made[model] for model in sorted(made, key=lambda model: (model != "teacher", model))]


def _show(result: RunResult, name: str, rows: list[dict[str, str]], registered: Sequence[Mapping[str, Any]]) -> None:
    from flows.published import main_columns

    console = Console()
    columns = main_columns(rows)
    table = Table(*columns, title="Evaluation", title_justify="left")
    for row in rows:
        table.add_row(*(row.get(column, "") for column in columns))
    console.print(table)
    console.rule("Pedigree", style="green")
    for label, text in _lines(result, name, registered):
        # No box and no added line breaks, so that addresses and commands can be copied.
        console.print(Text.assemble((f"{label:<12}", "bold"), text), soft_wrap=True)


def _lines(result: RunResult, name: str, registered: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    reports = Layout(result.folder).reports
    made = [f"{model['name']}/{model['version']}" for model in registered]
    yield "Run", f"{result.run_id}, recorded as git branch {result.branch}"
    yield "Computed", ", ".join(result.computed) or "nothing: no input had changed, every stage is as recorded"
    yield from _under("Measured", [verdict.text for verdict in verdicts(reports)])
    yield "Registered", ", ".join(made) or "nothing"
    yield from _under(
        "Gates", [f"{version} {model['verdict']}" for version, model in zip(made, registered, strict=True)]
    )
    yield "Pictures", str(reports)
    yield "MLflow", result.mlflow_url or without_login(os.environ.get("MLFLOW_TRACKING_URI", ""))
    yield "Prefect", os.environ.get("PREFECT_API_URL", "").removesuffix("/api")
    yield "", ""
    yield from _under("Next", next_steps(registered, name))


def _under(label: str, lines: Sequence[str]) -> list[tuple[str, str]]:
    return [("" if number else label, line) for number, line in enumerate(lines)]


def next_steps(registered: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Return the next commands; they promote the teacher only if it passes its gates."""
    steps = [
        "what the two pages ask for:   pedigree status --credentials",
        f"where the weights came from:  pedigree trace {name}@latest",
        f"beside the champion, gates:   pedigree review {name}@latest",
        "stop the local services:      pedigree down",
    ]
    if registered and not registered[0]["failed_gates"]:
        steps.insert(3, f'make it the champion:         pedigree promote {name}@latest --reason "..."')
    return steps
