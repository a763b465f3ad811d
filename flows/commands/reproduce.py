"""`pedigree reproduce`: whether stages of a run give the recorded bytes again."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.decorators import Answer, answer_console, command
from flows.console import shown

if TYPE_CHECKING:
    from flows.reproduce import Reproduction

MAX_SHOWN = 5


@command(services=True)
def reproduce(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Id of a run, or the version that it registered.")],
    stage: Annotated[
        str | None, typer.Option(help="Only this one, such as pretrain; default: curation and all trainings.")
    ] = None,
) -> Answer:
    """Run stages of a run again from their recorded inputs, and compare the outputs file by file.

    Works in a worktree at the run's commit, without this machine's caches of
    results, and leaves nothing behind; the quickest stage comes first. Reports
    (metrics, plots, pages) are compared too, but hold times and do not decide.
    Exits with 1 if an output differs, and says why that may be.

    Examples:
      pedigree reproduce 20261130-020405-ab12

      pedigree reproduce pedigree@champion --stage pretrain

      pedigree reproduce 20261130-020405-ab12 --stage curate --json
    """
    from flows.reproduce import choose_stages, find_recorded
    from flows.reproduce import reproduce as again

    record = find_recorded(run, Path.cwd())
    with shown():
        found = list(again(record, choose_stages(record, stage), Path.cwd()))
    data = {
        "commit": record.revision,
        "equal": all(each.equal for each in found),
        "stages": [{**dataclasses.asdict(each), "equal": each.equal} for each in found],
    }
    return Answer(data, partial(_show, data["commit"], found), list(_problems(found)), int(not data["equal"]))


def _show(commit: str, found: list[Reproduction]) -> None:
    console = answer_console()
    console.print(f"commit {commit}", markup=False)
    for each in found:
        state = "[green]equal[/]" if each.equal else "[red]differs[/]"
        console.print(f"{each.stage}: {state}, ran for {each.seconds:.0f} s")
        for output in each.outputs:
            console.print(f"  {output.path}: {_state(output)}", markup=False)


def _state(output: Any) -> str:
    if not output.differing:
        return "equal"
    return "differs; a report, which may hold times" if output.report else f"{len(output.differing)} files differ"


def _problems(found: list[Reproduction]) -> list[str]:
    lines = []
    for each in (each for each in found if not each.equal):
        files = [path for output in each.outputs if not output.report for path in output.differing]
        lines += [f"differs: {path}" for path in files[:MAX_SHOWN]]
        if len(files) > MAX_SHOWN:
            lines.append(f"and {len(files) - MAX_SHOWN} more files of {each.stage}")
        lines += [f"{each.stage}: {reason}" for reason in each.reasons]
    return lines
