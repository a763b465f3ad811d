"""`pedigree run`: the whole main job."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.cli import AddressOption, EngineOption
from components.core.cluster import choose_engine
from components.core.config import ConfigError
from components.core.layout import Layout
from components.core.text import one_line
from components.recipe import load_recipe
from flows import advice, preflight
from flows.commands.closing import closing
from flows.commands.decorators import Answer, command
from flows.commands.plan import exact_recipe
from flows.commands.starting import connect, finished
from flows.console import shown
from flows.git import head_commit
from flows.sources import SAMPLE, any_to_stay, choose, name_for
from infra.local import supervisor

if TYPE_CHECKING:
    from components.recipe import Recipe
    from flows.accept import Acceptance
    from flows.retrain import RunResult

NOT_STATED = "not-stated"


@command()
def run(  # noqa: PLR0913, PLR0917 - the options of a command
    images: Annotated[
        Path | None, typer.Option(help="A folder of your own images, instead of the sample pool.")
    ] = None,
    license_: Annotated[str, typer.Option("--license", help="License of those images.")] = NOT_STATED,
    name: Annotated[
        str | None, typer.Option(help="Name of those images as a source; default: the folder's name.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="A named recipe; default: params.yaml.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, such as distill.steps=50.")] = None,
    engine: EngineOption = None,
    address: AddressOption = None,
    accept: Annotated[
        list[str] | None,
        typer.Option(metavar="STAGE", help="Only its code changed, and in nothing that matters: keep its outputs."),
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Why; required with --accept, kept in the audit log.")] = None,
    quiet: Annotated[bool, typer.Option(help="Show only warnings, errors and the result.")] = False,
) -> Answer:
    """Run the whole main job: ingest, curate, pretrain, adapt, distill, evaluate, register.

    Only what changed since an earlier run is computed. With --images exactly what the folder holds now is used, by this
    run alone; `pedigree ingest` takes images in to stay.

    Examples:
      pedigree run

      pedigree run --images ~/photos --license CC-BY-4.0

      pedigree run --recipe tiny-cpu --set pretrain.optimizer.base_lr=2e-3

      pedigree run --engine ray --address 10.0.0.7:6379

      pedigree run --accept pretrain --reason "only a log line changed"
    """
    checkout = Path.cwd()
    with shown(quiet):
        choose_engine(engine, address)
        accepted = _acceptance(accept, reason)
        params = load_recipe(checkout, recipe, set_ or [])  # a wrong parameter is told before anything starts
        if name is not None and images is None:
            raise ConfigError(f"--name {name} names the source of --images: give the folder too")
        sources = _bring_images(checkout, images, name, license_)
        given = {"--images": images, "--license": license_, "--name": name} if images else {}
        _check_run(checkout, params, sources, given, recipe)
        if accepted:
            accepted.record(checkout, exact_recipe(checkout, params)[0], sources)
        result = _retrain(checkout, sources, recipe, set_)
    return closing(result, params.name)


def _retrain(checkout: Path, sources: list[str] | None, recipe: str | None, overrides: list[str] | None) -> RunResult:
    from flows.retrain import retrain

    result = finished(retrain, sources=sources, recipe=recipe, overrides=overrides)
    if told := supervisor.unfinished(checkout):
        logging.getLogger(__name__).warning(told)
    return result


def _bring_images(checkout: Path, images: Path | None, name: str | None, license_: str) -> list[str] | None:
    """Start the services and fill the pool; returns what the run shall use, None: all."""
    if images is not None:
        _check_folder(images)
    head_commit(checkout)
    early = images is None and not any(os.environ.get(n) for n in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"))
    if early:  # the local stack takes half a minute to start; a team's services answer at once
        _make_sample(checkout)
    connect(checkout, beside=True)
    return _fill_pool(checkout, images, name, license_, made=early)


def _check_run(
    checkout: Path, params: Recipe, sources: list[str] | None, given: dict[str, Any], recipe: str | None
) -> None:
    """Refuse a run that cannot succeed, and say which recipe would fit better; `given` are its options with values."""
    used = choose(checkout, sources)
    preflight.check(checkout, params, used)
    words = [word for key, value in given.items() if value for word in (key, str(value))]
    advice.advise(checkout, params, used, ["pedigree", "run", *words], recipe)


def _acceptance(stages: list[str] | None, reason: str | None) -> Acceptance | None:
    if not stages and reason is None:
        return None
    from flows.accept import Acceptance

    return Acceptance.parse(stages or [], reason)


def _make_sample(checkout: Path) -> None:
    """Make the sample's images where the pool is empty: seconds, before the services have started."""
    from flows.pool_lock import pool_held

    with pool_held(SAMPLE, logging.getLogger(__name__)):  # another run may be reading them
        if any_to_stay(checkout):
            return
        from components.data.sample_pool import PHOTOGRAPHS, build_sample_pool

        folder = Layout(checkout).state / SAMPLE
        build_sample_pool(folder)
        counts = [sum(path.is_file() for path in (folder / part).rglob("*")) for part in ("pool", "evaluation")]
        logging.getLogger(__name__).info(
            "the pool is empty, so the run takes the sample: %d files, tiles of %d photographs with copies and broken "
            "files among them, and %d labeled images to evaluate on; look at them in %s",
            *(counts[0], len(PHOTOGRAPHS), counts[1], folder),
        )


def _fill_pool(checkout: Path, images: Path | None, name: str | None, license_: str, made: bool) -> list[str] | None:
    """Ingest the user's folder, or the sample where the pool is empty; returns what the run shall use, None: all.

    Args:
        checkout: Pedigree's folder.
        images: the user's folder.
        name: of the source that it becomes; None: after the folder.
        license_: of its images.
        made: whether the sample's images are made.
    """
    from components.data.ingest_config import IngestRequest
    from flows.ingest import ingest as flow
    from flows.pool_lock import pool_held

    if images is not None:
        name = name or name_for(checkout, images)
        request = IngestRequest.parse(source=str(images), name=name, license=license_, holdout=0.2, one_run=True)
        report = finished(flow, request, announce=False).report
        if not any(folder.is_relative_to(request.pool) for folder in report.holds):
            held = report.held_out + report.already_present
            told = f"no image is left for training, all {held} are held out for evaluation"
            raise ConfigError(f"IMAGES: {images}: {told}; give more images")
        return [f"{folder.parent.name}/{folder.name}" for folder in report.holds]
    with pool_held(SAMPLE, logging.getLogger(__name__)):  # while it is made another run must not make it too
        if not any_to_stay(checkout):
            from components.data.sample_pool import SAMPLE_LICENSE

            if not made:
                _make_sample(checkout)
            folder = Layout(checkout).state / SAMPLE
            for part, as_evaluation in (("evaluation", True), ("pool", False)):
                request = IngestRequest.parse(
                    source=str(folder / part), name=SAMPLE, license=SAMPLE_LICENSE, as_evaluation=as_evaluation
                )
                finished(flow, request, announce=False)
    return None


def _check_folder(images: Path) -> None:
    if not images.exists():
        raise ConfigError(f"IMAGES: {images} does not exist; give a folder of images")
    if not images.is_dir():
        raise ConfigError(f"IMAGES: {images} is a file; give the folder that holds the images")
    unreadable: list[OSError] = []
    if not any(names for _, _, names in os.walk(images, onerror=unreadable.append, followlinks=True)):
        if unreadable:
            example = f"{one_line(str(unreadable[0].filename))}: {unreadable[0].strerror}"
            raise ConfigError(
                f"IMAGES: {len(unreadable)} folders cannot be read, such as {example}; make them readable"
            )
        raise ConfigError(f"IMAGES: {images} holds no files; give a folder of images")
