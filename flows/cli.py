"""The `pedigree` command: the front door."""

from __future__ import annotations

import logging
import sys
from importlib import metadata
from typing import Annotated

import typer

from components.core import torch_environment
from components.core.errors import known, show_tracebacks, tracebacks_shown
from flows.commands import (
    audit,
    curate,
    diff,
    doctor,
    documents,
    down,
    embed,
    env,
    evalset,
    evaluate,
    export,
    gc,
    history,
    ingest,
    plan,
    promote,
    reproduce,
    review,
    run,
    runs,
    seen,
    sources,
    status,
    takedown,
    trace,
    train_status,
    up,
    verify,
    where_used,
)
from flows.console import screen

PREFECTS_OWN = ("Finished in state", "Beginning flow run", "Running hook", "Hook 'end'")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train DINOv2-style vision foundation models, and prove where every weight came from.",
)


def _version(show: bool) -> None:
    if show:
        sys.stdout.write(f"pedigree {metadata.version('pedigree')}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the traceback of every error, not of defects only.")
    ] = False,
) -> None:
    show_tracebacks(traceback)


app.command("run")(run.run)
app.command("ingest")(ingest.ingest)
app.command("up")(up.up)
app.command("status")(status.status)
app.command("down")(down.down)
app.command("env")(env.env)
app.command("doctor")(doctor.doctor)
app.command("review")(review.review)
app.command("promote")(promote.promote)
app.command("reject")(promote.reject)
app.command("rollback")(promote.rollback)
app.command("history")(history.history)
app.command("trace")(trace.trace)
app.command("verify")(verify.verify)
app.command("documents")(documents.documents)
app.command("reproduce")(reproduce.reproduce)
app.command("seen")(seen.seen)
app.command("diff")(diff.diff)
app.command("where-used")(where_used.where_used)
app.command("takedown")(takedown.takedown)
app.command("curate")(curate.curate)
app.command("export")(export.export)
app.command("embed")(embed.embed)
app.command("evaluate")(evaluate.evaluate)
app.command("plan")(plan.plan)
app.command("train-status")(train_status.train_status)
app.command("gc")(gc.gc)
app.command("runs")(runs.runs)
sources_app = typer.Typer(no_args_is_help=True, help="List or remove what is in the pool.")
sources_app.command("list")(sources.list_sources)
sources_app.command("remove")(sources.remove)
app.add_typer(sources_app, name="sources")
evalset_app = typer.Typer(no_args_is_help=True, help="Add, list or check evaluation sets.")
evalset_app.command("add")(evalset.add)
evalset_app.command("list")(evalset.list_sets)
evalset_app.command("check")(evalset.check)
evalset_app.command("sample")(evalset.sample)
app.add_typer(evalset_app, name="evalset")
audit_app = typer.Typer(no_args_is_help=True, help="Read, check and export the audit log.")
audit_app.command("log")(audit.log)
audit_app.command("verify")(audit.verify)
audit_app.command("export")(audit.export)
app.add_typer(audit_app, name="audit")


class _Plain(logging.Formatter):
    """Show only the message of an expected error; Prefect's page has its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        return record.getMessage() if known(error) and not tracebacks_shown() else super().format(record)


def main() -> None:
    """Entry point of the `pedigree` command."""
    torch_environment.prepare()
    screen.setFormatter(_Plain())
    # Hide Prefect's messages on ends of tasks and flows, which the stages and this command report themselves, and those
    # on its run names and hooks.
    screen.addFilter(lambda record: not record.getMessage().startswith(PREFECTS_OWN))
    logging.basicConfig(level=logging.WARNING, handlers=[screen])
    for ours in ("components", "flows", "infra", "prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(ours).setLevel(logging.INFO)
    app()
