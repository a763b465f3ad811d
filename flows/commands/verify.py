"""`pedigree verify`: whether registered versions, and all that they were made from, are still what they were."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.core.config import ConfigError
from components.core.errors import ServiceError
from flows.commands.decorators import Answer, answer_console, command

if TYPE_CHECKING:
    from components.lineage.verify import Verification


@command(services=True)
def verify(
    target: Annotated[
        str | None,
        typer.Argument(metavar="[NAME@ALIAS|NAME/NUMBER]", help="A released model or a candidate; without it, all."),
    ] = None,
    sample: Annotated[
        float | None, typer.Option(help="Share of the bytes of shards to read, 0 to 1; 0.1 and at least 1 GiB else.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Read all bytes, also those that an interrupted check has read.")
    ] = False,
) -> Answer:
    """Verify a registered model from its bytes: files, signature, data, code, reports, MLflow's runs and decisions.

    Without a model, every released version, every alias and the whole audit log. All that is small is read whole, of
    the shards of images a sample. An interrupted check goes on where it was. Each fault is one line with its path or
    address. Exits with 1 if there is one, with 75 if a service does not answer.

    Examples:
      pedigree verify pedigree@champion

      pedigree verify pedigree/3 --full

      pedigree verify --json | jq .faults
    """
    from components.lineage.verify import SAMPLE, Extent
    from components.lineage.verify import verify as verification

    if sample is not None and (full or not 0 <= sample <= 1):
        raise ConfigError(f"--sample {sample:g}: give a share from 0 to 1, without --full, which reads everything")
    share = 1.0 if full else SAMPLE if sample is None else sample
    try:
        found = verification(target, Path.cwd(), Extent(share, anew=full))
    except ServiceError as error:
        told = f"error: {error}; nothing is known to differ, run again to go on"
        return Answer({"holds": None, "error": str(error)}, lambda: None, [told], exit_code=error.exit_code)
    return Answer(found.as_dict(), partial(_show, found), found.faults, exit_code=int(not found.holds))


def _show(found: Verification) -> None:
    for line in found.summary():
        answer_console().print(line, markup=False)
