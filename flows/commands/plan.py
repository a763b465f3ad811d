"""`pedigree plan`: list the stages that a run would compute, and why."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.table import Table
from rich.text import Text

from components.recipe import PARAMS_FILE, Recipe, load_recipe
from flows.commands.decorators import Answer, answer_console, command
from flows.git import head_commit
from flows.sources import SAMPLE, any_to_stay, choose

if TYPE_CHECKING:
    from flows.preview import Preview, Step

MAX_SHOWN = 6  # changes of a stage; --json has all
CHAMPIONS = "champions"
# What a run asks the registry for: which versions are the champions now.
RESOLVED = (
    ("evaluate", CHAMPIONS),
    ("distill", "teacher_weights"),
    ("embed", "embedder", "weights"),
    ("embed", "semantic", "weights"),
)


@command()
def plan(
    recipe: Annotated[str | None, typer.Option(help="A named recipe; default: params.yaml.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, such as distill.steps=50.")] = None,
) -> Answer:
    """List the stages that a run would compute, and why, compared with the last finished run of the model.

    Starts, computes and fetches nothing, and leaves the checkout unchanged. A stage is `unchanged`; `restored`,
    if an earlier run had the same inputs; `run`; or `after` others that compute its inputs again: it runs unless
    they come out equal. Results of other machines since the last run are not considered.

    Examples:
      pedigree plan

      pedigree plan --set distill.steps=50

      pedigree plan --json | jq '.stages[] | select(.outcome == "run")'
    """
    from flows.preview import open_preview

    checkout = Path.cwd()
    params = load_recipe(checkout, recipe, set_ or [])
    head_commit(checkout)
    exact, notes = exact_recipe(checkout, params)
    known = any_to_stay(checkout)
    if not known:
        notes.append(f"the pool is empty: `pedigree run` ingests the {SAMPLE} first")
    with open_preview(checkout, exact, choose(checkout, None) if known else []) as preview:
        pass
    steps = [dataclasses.asdict(step) for step in preview.steps]
    data = {"last_run": preview.last_run, "notes": notes, "stages": steps}
    return Answer(data, partial(_show, preview, notes))


def exact_recipe(checkout: Path, params: Recipe) -> tuple[Recipe, list[str]]:
    """Return the recipe with exact versions of today's champions, or of the last run's if no registry answers."""
    from components.core.mlflow_client import TrackingError, checked_client, server_uri
    from infra.local.supervisor import StackError, connect

    try:
        os.environ.update(connect(checkout, start=False))
        if server_uri():
            checked_client()
            from flows.registered import exact, open_registry

            return exact(params, open_registry()), []
    except (StackError, TrackingError):
        pass
    return _as_last_resolved(checkout, params)


def _as_last_resolved(checkout: Path, params: Recipe) -> tuple[Recipe, list[str]]:
    from flows.preview import last_run

    last = last_run(checkout, params.name)
    old = yaml.safe_load(last.read(PARAMS_FILE) or b"") if last else {}
    values = params.model_dump(mode="json", by_alias=True, exclude_unset=True)
    taken = [line for keys in RESOLVED if (line := _take(values, old, keys))]
    lines = [f"the registry does not answer; as in the last run: {', '.join(taken)}"] if taken else []
    return Recipe.model_validate(values), lines


def _take(values: Any, old: Any, keys: tuple[str, ...]) -> str | None:
    """Replace a missing version or an alias by the last run's exact version of that model; return what was taken."""
    *above, key = keys
    for name in above:
        values, old = (part.get(name) if isinstance(part, dict) else None for part in (values, old))
    if not isinstance(values, dict) or not isinstance(old, dict) or not old.get(key):
        return None
    given = values.get(key)
    same = str(old[key]).startswith(f"{str(given).partition('@')[0]}/") if "@" in str(given) else key == CHAMPIONS
    if not same or (key == CHAMPIONS and given):
        return None
    values[key] = old[key]
    return f"{'.'.join(keys)} {old[key]}"


def _show(preview: Preview, notes: list[str]) -> None:
    console = answer_console()
    console.print(f"compared with run {preview.last_run}" if preview.last_run else "no run has finished yet")
    for note in notes:
        console.print(f"note: {note}", markup=False)
    table = Table("stage", "", "why", box=None, pad_edge=False)
    for step in preview.steps:
        table.add_row(step.stage, step.outcome, Text(_why(step)))
    console.print(table, soft_wrap=False)
    counts = Counter(step.outcome for step in preview.steps)
    console.print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))


def _why(step: Step) -> str:
    lines = [f"{change.kind}: {change.what}" for change in step.changes[:MAX_SHOWN]]
    if len(step.changes) > MAX_SHOWN:
        lines.append(f"and {len(step.changes) - MAX_SHOWN} more")
    if step.after:
        lines.append(f"after {', '.join(step.after)}")
    return "; ".join(lines)
