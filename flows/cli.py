"""The `pedigree` command: the front door."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from components.core.cluster import AddressOption, EngineOption, choose_engine
from components.core.config import ConfigError
from components.core.errors import (
    TRY_AGAIN,
    PedigreeError,
    defect,
    known,
    print_traceback,
    show_tracebacks,
    tracebacks_shown,
)
from components.core.layout import Layout
from components.core.mlflow_client import without_login
from components.core.text import one_line
from components.recipe import load_recipe
from flows import (
    advice,
    curate_command,
    interrupt,
    preflight,
    promote,
    seen_command,
    stack_commands,
    trace_commands,
    train_status,
)
from flows.commands import doctor, plan
from flows.commands import gc as gc_command
from flows.commands import runs as runs_command
from flows.commands import sources as sources_command
from flows.console import screen, shown
from flows.failure import prefect_is_away
from flows.git import head_commit
from flows.sources import SAMPLE, any_to_stay, choose, name_for
from flows.verdict import Verdict, verdicts
from infra.local import supervisor

if TYPE_CHECKING:
    from components.recipe import Recipe
    from flows.accept import Acceptance
    from flows.ingest import Ingested
    from flows.retrain import RunResult

NOT_STATED = "not-stated"
PREFECTS_OWN = ("Finished in state", "Beginning flow run", "Running hook", "Hook 'end'")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train DINOv2-style vision foundation models, and prove where every weight came from.",
)


def _version(asked: bool) -> None:
    if asked:
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


def _with_clear_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A command of any folder, whose errors are one line each."""

    @functools.wraps(command)
    def clear(*args: Any, **options: Any) -> None:
        with _clear_errors():
            command(*args, **options)

    return clear


def _in_the_checkout(command: Callable[..., None]) -> Callable[..., None]:
    """A command of Pedigree's own folder only; in another, `up` would start a stack that knows no flow."""

    @functools.wraps(command)
    def checked(*args: Any, **options: Any) -> None:
        _checkout()
        command(*args, **options)

    return _with_clear_errors(checked)


def _at_the_services(command: Callable[..., None]) -> Callable[..., None]:
    """A command that reads the registry, pointed at the services first."""

    @functools.wraps(command)
    def connected(*args: Any, **options: Any) -> None:
        os.environ.update(supervisor.connect(Path.cwd(), start=False))
        command(*args, **options)

    return _in_the_checkout(connected)


app.command("up")(_in_the_checkout(stack_commands.up))
app.command("status")(_in_the_checkout(stack_commands.status))
app.command("down")(_in_the_checkout(stack_commands.down))
app.command("env")(_in_the_checkout(stack_commands.env))
app.command("doctor")(_in_the_checkout(doctor.doctor))
app.command("promote")(_at_the_services(promote.promote))
app.command("trace")(_at_the_services(trace_commands.trace))
app.command("seen")(_at_the_services(seen_command.seen))
app.command("curate")(_with_clear_errors(curate_command.curate))
app.command("plan")(_in_the_checkout(plan.plan))
app.command("train-status")(_with_clear_errors(train_status.train_status))
app.command("gc")(_at_the_services(gc_command.gc))
app.command("runs")(_in_the_checkout(runs_command.runs))
sources_app = typer.Typer(no_args_is_help=True, help="List or remove what is in the pool.")
sources_app.command("list")(_in_the_checkout(sources_command.list_sources))
sources_app.command("remove")(_in_the_checkout(sources_command.remove))
app.add_typer(sources_app, name="sources")


@app.command()
def run(  # noqa: PLR0913, PLR0917 - the options of a command
    images: Annotated[
        Path | None, typer.Option(help="A folder of your own images, instead of the sample pool.")
    ] = None,
    license_: Annotated[str, typer.Option("--license", help="Licence of those images.")] = NOT_STATED,
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
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for programs.")] = False,
) -> None:
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
    with _clear_errors(), shown(quiet):
        choose_engine(engine, address)
        checkout = _checkout()
        accepted = _acceptance(accept, reason)
        params = load_recipe(checkout, recipe, set_ or [])  # a wrong parameter is told before anything starts
        if images is not None:
            _check_folder(images)
        elif name is not None:
            raise ConfigError(f"--name {name} names the source of --images: give the folder too")
        head_commit(checkout)
        early = images is None and not any(os.environ.get(n) for n in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"))
        if early:  # the local stack takes half a minute to start; a team's services answer at once
            _make_sample(checkout)
        _connect(checkout, beside=True)
        sources = _fill_pool(checkout, images, name, license_, made=early)
        given = {"--images": images, "--license": license_, "--name": name} if images else {}
        _check_run(checkout, params, sources, given, recipe)
        if accepted:
            accepted.record(checkout, plan.exact_recipe(checkout, params)[0], sources)
        from flows.retrain import retrain

        result = _finished(retrain, sources=sources, recipe=recipe, overrides=set_)
        if told := supervisor.unfinished(checkout):
            logging.getLogger(__name__).warning(told)
    _closing(result, params.name, as_json)


@app.command()
def ingest(  # noqa: PLR0913, PLR0917 - the options of a command
    source: Annotated[str, typer.Argument(help="Folder, s3://bucket/prefix, tar shards or Parquet with image bytes.")],
    name: Annotated[str, typer.Option(help="Name of the source in the pool: small letters, digits, hyphens.")],
    license_: Annotated[str, typer.Option("--license", help="Licence under which the images may be used.")],
    holdout: Annotated[float | None, typer.Option(help="Share held out for evaluation, such as 0.2.")] = None,
    evaluation: Annotated[bool, typer.Option(help="The whole source is an evaluation set.")] = False,
    max_pixels: Annotated[int | None, typer.Option(help="Largest image that is decoded; default 50 million.")] = None,
    retrain: Annotated[bool, typer.Option(help="Let new images start a retraining.")] = True,
    quiet: Annotated[bool, typer.Option(help="Show only warnings, errors and the result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for programs.")] = False,
) -> None:
    """Take a source of images into the pool: decode, validate, store, track with DVC, push to S3.

    What is in the pool already is not stored again. New images start a whole retraining through the deployment
    `retrain/on-new-images`, which is named at the end; `--no-retrain` starts none.

    Examples:
      pedigree ingest ~/photos --name photos --license CC-BY-4.0 --holdout 0.2

      pedigree ingest ~/photos --name photos --license CC-BY-4.0 --no-retrain

      pedigree ingest s3://bucket/shards/ --name crawl --license CC0-1.0
    """
    with _clear_errors(), shown(quiet, said_at_end="components.data.ingest"):
        checkout = _checkout()
        from components.data.ingest_config import IngestRequest

        limit = {} if max_pixels is None else {"max_pixels": max_pixels}
        request = IngestRequest.parse(
            source=source, name=name, license=license_, holdout=holdout, as_evaluation=evaluation, **limit
        )
        if "://" not in source and not Path(source).exists():
            raise ConfigError(f"{source}: no such file or folder; give a folder of images, tar shards or Parquet")
        head_commit(checkout)
        _connect(checkout)
        from flows.ingest import ingest as flow

        done = _finished(flow, request, announce=retrain)
    report = done.report
    if as_json:
        fields = ("seen", "stored", "held_out", "already_present", "rejected", "bytes_stored", "source_version")
        fields += ("ignored", "labels", "unlabelled")
        snapshots = {key: str(getattr(report, key) or "") or None for key in ("pool_snapshot", "evaluation_snapshot")}
        started = [asdict(each) for each in done.retraining]
        found = {key: getattr(report, key) for key in fields}
        _print_json({**found, "notes": report.notes, **snapshots, "retraining": started})
        return
    _print_ingested(done, name, retrain)


def _print_ingested(done: Ingested, name: str, retrain: bool) -> None:
    console, report = Console(), done.report
    for line in (f"{name}: {report}", *(f"  {note}" for note in report.notes)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for folder in (report.pool_snapshot, report.evaluation_snapshot):
        if folder is not None:
            console.print(f"  {folder}: look at {folder}/summary.html; `git add {folder}.*` keeps it in your history")
    for line in done.retraining if retrain else ["no retraining starts, now or by a later ingest (--no-retrain)"]:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


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


def _connect(checkout: Path, beside: bool = False) -> None:
    """Point this process at the services: a team's where the environment names them, else the local stack.

    Args:
        checkout: Pedigree's folder.
        beside: do not wait for what runs of deployments alone need.

    Raises:
        StackError: the local stack cannot start.
        StorageError: S3 does not answer; nothing has been read or written yet.
    """
    from components.core.storage import s3_client, s3_errors

    os.environ.update(supervisor.connect(checkout, beside=beside))
    bucket = os.environ["PEDIGREE_DATA_BUCKET"]
    with s3_errors(f"s3://{bucket}"):
        s3_client().list_objects_v2(Bucket=bucket, MaxKeys=1)


def _finished(flow: Any, *arguments: Any, **named: Any) -> Any:
    """Run a flow and return its result.

    Raises:
        PedigreeError: it failed; the message is the reason.
    """
    from httpx import HTTPError
    from prefect.exceptions import TerminationSignal

    try:
        state = flow(*arguments, **named, return_state=True)
    except TerminationSignal:  # SIGTERM before our handlers were set, or after
        raise KeyboardInterrupt from None
    except HTTPError as error:
        raise prefect_is_away(error) from error
    if state.is_cancelled():
        raise KeyboardInterrupt
    if not state.is_completed():
        error = state.result(raise_on_failure=False)
        raise error if isinstance(error, PedigreeError) else PedigreeError(state.message)
    return state.result()


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
            "files among them, and %d labelled images to evaluate on; look at them in %s",
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
        report = _finished(flow, request, announce=False).report
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
                _finished(flow, request, announce=False)
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


def _checkout() -> Path:
    """The checkout: the current folder."""
    checkout = Path.cwd()
    if not (checkout / "dvc.yaml").exists():
        raise ConfigError(f"no dvc.yaml in {checkout}: run this in Pedigree's own folder")
    return checkout


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turn every error into one clear line and an exit code; a defect shows its traceback before."""
    try:
        with interrupt.handled():
            yield
    except (typer.Exit, typer.Abort, BrokenPipeError):  # the last: of a reader such as `head`
        raise
    except Exception as error:
        raise typer.Exit(_tell(error)) from error
    except KeyboardInterrupt:
        stopped = interrupt.current
        text = f"{stopped.reason}; what was finished is kept, run again to go on"
        Console(stderr=True).print(text, style="yellow")
        raise typer.Exit(stopped.exit_code) from None


def _tell(error: Exception) -> int:
    """Say what went wrong, and return the exit code; it is 1 for a service too: only stages end with 75."""
    found = known(error)
    if found is None or tracebacks_shown():
        print_traceback(error)
    told = found or defect(error, "above")
    console = Console(stderr=True, soft_wrap=True)
    for line in str(told).splitlines() or [type(told).__name__]:
        console.print(f"error: {line}", style="red", markup=False, highlight=False)
    return PedigreeError.exit_code if told.exit_code == TRY_AGAIN else told.exit_code


def _closing(result: RunResult, name: str, as_json: bool) -> None:
    """Say what was made, how good it is, where to look and what to type next."""
    from flows.published import main_columns, metric_rows

    reports = Layout(result.folder).reports
    rows, found = metric_rows(reports), verdicts(reports)
    if as_json:
        _print_json(
            {"run": result.run_id, "branch": result.branch, "commit": result.commit, "outcomes": result.outcomes,
             "metrics": rows, "mlflow": result.mlflow_url}
        )  # fmt: skip
        return
    console = Console()
    table = Table(title="Evaluation", title_justify="left")
    columns = main_columns(rows)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(row.get(column, "") for column in columns))
    console.print(table)
    lines = [
        ("Run", f"{result.run_id}, recorded as git branch {result.branch}"),
        ("Computed", ", ".join(result.computed) or "nothing: no input had changed, every stage is as recorded"),
        *(("" if number else "Measured", verdict.text) for number, verdict in enumerate(found)),
        ("Registered", _registered(result.folder)),
        ("Pictures", str(reports)),
        ("MLflow", result.mlflow_url or without_login(os.environ.get("MLFLOW_TRACKING_URI", ""))),
        ("Prefect", os.environ.get("PREFECT_API_URL", "").removesuffix("/api")),
        ("", ""),
        *_next_steps(found, name),
    ]
    console.rule("Pedigree", style="green")
    for label, text in lines:  # no box and no line breaks of ours: addresses and commands are there to be copied
        console.print(Text.assemble((f"{label:<12}", "bold"), text), soft_wrap=True)


def _next_steps(found: list[Verdict], name: str) -> list[tuple[str, str]]:
    """What to type next; to promote the teacher only where nothing speaks against it."""
    objections = next((verdict.objections for verdict in found if verdict.model == "teacher"), ())
    promote = f'make it the champion:         pedigree promote {name}@latest --reason "..."'
    if objections:
        promote = f"not proposed as the champion: it is {' and '.join(objections)}"
    return [
        ("Next", "what the two pages ask for:   pedigree status --credentials"),
        ("", f"where the weights came from:  pedigree trace {name}-candidates@latest"),
        ("", promote),
        ("", "stop the local services:      pedigree down"),
    ]


def _registered(folder: Path) -> str:
    path = Layout(folder).result("register")
    versions = json.loads(path.read_text()) if path.exists() else {}
    return ", ".join(f"{version['name']} version {version['version']}" for version in versions.values()) or "nothing"


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


class _Plain(logging.Formatter):
    """Only the message of what a person, the data or a service can cause; Prefect's page has its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        return record.getMessage() if known(error) and not tracebacks_shown() else super().format(record)


def main() -> None:
    """Entry point of the `pedigree` command."""
    screen.setFormatter(_Plain())
    # Prefect's last word on each task and flow: what failed is told by the stage and by us, the rest only waited. And
    # its names for runs, which become ours, and its hooks.
    screen.addFilter(lambda record: not record.getMessage().startswith(PREFECTS_OWN))
    logging.basicConfig(level=logging.WARNING, handlers=[screen])
    for ours in ("components", "flows", "infra", "prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(ours).setLevel(logging.INFO)
    app()
