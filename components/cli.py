"""`python -m components STAGE [ITEM]`: run one stage in the current folder, as `dvc.yaml` does.

Reads `params.yaml`, writes the stage's outputs and `reports/STAGE[/ITEM]/result.json`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from components.core.cluster import Engine, choose_engine
from components.core.config import ConfigError
from components.core.errors import (
    OutOfMemoryError,
    defect,
    error_message,
    known,
    print_traceback,
    show_tracebacks,
    tracebacks_shown,
)
from components.core.layout import Layout
from components.core.log_levels import ERROR, LevelFormatter
from components.core.machine import MACHINE, describe_machine
from components.core.stage_runs import stage_run, where_logged
from components.core.storage import recover_dirs, write_json
from components.recipe import Recipe, load_recipe
from components.stages import FORGET, PREPARE_STREAM, STAGES, load, memory_advice

NAMED_STAGES = ("distill", "register")  # they log or register by the model's name
TRAINING_STAGES = ("pretrain", "adapt", "distill")
REPRODUCED_STAGES = ("curate", *TRAINING_STAGES)  # their results name the machine, on which their bits may depend

# Of each command that works on shards, here and in `flows`.
EngineOption = Annotated[Engine | None, typer.Option("--engine", help="Where shards are worked on; default: loky.")]
AddressOption = Annotated[str | None, typer.Option("--address", help="HOST:PORT of a running Ray cluster.")]

log = logging.getLogger("components")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _function(stage: str) -> Callable[..., dict[str, Any]]:
    """Import and return the function of a stage."""
    if stage not in STAGES:
        raise ConfigError(f"unknown stage {stage!r}; known stages: {', '.join(STAGES)}")
    return load(STAGES[stage][0])


def _extra(recipe: Recipe, stage: str, item: str | None) -> dict[str, str]:
    """Return the stage's additional argument: the evaluated model, or the registered name."""
    if stage == "evaluate":
        allowed = list(recipe.evaluate.models)
        if item not in allowed:
            raise ConfigError(f"stage {stage!r} needs one of {allowed}, but {item!r} was given")
        return {"model": item}
    if item is not None:
        raise ConfigError(f"stage {stage!r} takes no item, but {item!r} was given")
    return {"name": recipe.name} if stage in NAMED_STAGES else {}


def _seed(seed: int) -> None:
    """Seed the global generators once; our own code uses local generators."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries that draw from the global state
    if torch := sys.modules.get("torch"):  # imported with the stage's function if it needs torch
        torch.manual_seed(seed)


@app.command()
def run(
    stage: str,
    item: str | None = typer.Argument(None, help="which model, of evaluate"),
    engine: EngineOption = None,
    address: AddressOption = None,
    traceback: bool = typer.Option(default=False, help="Show the traceback of every error, not of defects only."),
) -> None:
    """Run one stage in the current folder.

    Examples: `python -m components pretrain`, `python -m components evaluate small`,
    `python -m components curate --engine ray --address 10.0.0.7:6379`.
    """
    show_tracebacks(traceback)
    choose_engine(engine, address)
    root = Path.cwd()
    recipe = load_recipe(root, None)
    layout = Layout(root)
    # A killed stage may have renamed a folder that this one reads.
    for folder in (layout.data, layout.models, layout.report("distill"), layout.report("evaluate")):
        recover_dirs(folder)
    extra, function = _extra(recipe, stage, item), _function(stage)
    _seed(recipe.seed)
    if stage in TRAINING_STAGES:
        load(PREPARE_STREAM)(root)
    section = recipe.registration() if stage == "register" else getattr(recipe, stage)
    params = {"name": recipe.name, "seed": recipe.seed, **section.model_dump(mode="json")}
    first_rank = int(os.environ.get("RANK", "0")) == 0
    if not first_rank:  # under torchrun only rank 0 reports
        function(section, root, recipe.seed, **extra)
        return
    with stage_run(stage, item, params, root) as tracked:
        result = function(section, root, recipe.seed, **extra)
        if stage in REPRODUCED_STAGES:
            result = {**result, MACHINE: describe_machine()}
        write_json(layout.result(stage, item), result)
        # MLflow already has a training's last row, as the end of each curve.
        tracked.log_result(_without_last(result))
    if "run_key" in result:  # a training; results of students stay cached for later runs
        load(FORGET)(root, result["run_key"])


def _without_last(result: Mapping[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in result.items() if key != "last"}
    return {key: _without_last(value) if isinstance(value, Mapping) else value for key, value in own.items()}


def main() -> None:
    """Run a stage; convert errors into one line and an exit code, after the traceback of a defect."""
    lines = logging.StreamHandler()
    lines.setFormatter(LevelFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[lines])
    log.setLevel(logging.INFO)
    logging.captureWarnings(capture=True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    try:
        app(standalone_mode=True)
    except Exception as error:
        sys.exit(_report_error(error))


def _report_error(error: Exception) -> int:
    """Log an error and return its exit code."""
    found = known(error)
    shown = found or defect(error, where_logged(error))
    message = error_message(shown)
    if isinstance(found, OutOfMemoryError):
        message = f"{message}; {memory_advice(sys.argv)}"
    if not _logged_by_another_rank(message):
        if found is None or tracebacks_shown():
            print_traceback(error)
        for line in message.splitlines():
            log.error("%s%s", ERROR, line)
    return shown.exit_code


def _logged_by_another_rank(text: str) -> bool:
    """Return whether another rank of this machine logged the same text, by a marker file in torchrun's folder."""
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if own is None:
        return False
    try:
        Path(own).parents[1].joinpath(f"said.{hashlib.sha256(text.encode()).hexdigest()}").touch(exist_ok=False)
    except FileExistsError:
        return True
    except OSError:
        pass
    return False
