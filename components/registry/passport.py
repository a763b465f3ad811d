"""The passport of a version: one HTML file with all that a person needs to decide on it, and to use it later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from components.core.charts import BLUE, new_figure, png
from components.core.metric_names import first_asked, is_count, is_setting
from components.core.metrics import Interval
from components.core.page import Cell, Picture, render
from components.lineage.audit_log import Entry
from components.lineage.champions import CHAMPION
from components.lineage.provenance import DataVersion
from components.registry.card import interval, standing, use
from components.registry.differences import Differences, Side, differences
from components.registry.documents.write import DOCUMENTS, KINDS
from components.registry.gates import FAILED, PASSED, gain
from components.registry.making import COSTS, Making, Training
from components.registry.publish import RegistryError
from components.registry.review import Review
from components.registry.standing import resolve

BASELINES = {"random": "random weights", "descriptor": "hand-made descriptor"}
LOAD = """import mlflow, pandas

model = mlflow.pyfunc.load_model("models:/{version}")
image = open("photo.jpg", "rb").read()
vectors = model.predict(pandas.DataFrame({{"image": [image]}}))  # float32 [1, {dim}]"""


def passport_now(found: Review, client: MlflowClient, root: Path) -> bytes:
    """The passport of a registered version as of now: today's gates, champion and decisions.

    Raises:
        RegistryError: it was registered without the record that a passport needs.
    """
    if found.making is None:
        raise RegistryError(f"{found.version}: was registered without the record that a passport needs; run again")
    here = Side.registered(resolve(client, found.version).tags, root)
    return render_passport(found, differences_from(found, here, client, root), found.decisions)


def differences_from(found: Review, here: Side, client: MlflowClient, root: Path) -> Differences | None:
    """What a version differs from what it is shown beside in; None: there is nothing."""
    if found.beside is None:
        return None
    return differences(here, Side.registered(resolve(client, found.beside.version).tags, root), root)


def render_passport(found: Review, differing: Differences | None, decisions: Sequence[Entry]) -> bytes:
    """The page.

    Args:
        found: the version, reviewed.
        differing: what it differs from what it is shown beside in.
        decisions: events on it.
    """
    making = found.making
    assert making is not None
    columns = _columns(found)
    address = found.version if "/" in found.version else f"{found.version}/NUMBER"  # MLflow gives it later
    return render(
        "components/registry/passport.html",
        title=f"Passport of {found.version}",
        verdict=f"{found.verdict[0].upper()}{found.verdict[1:]}",
        failed=found.failed,
        standing=standing(found),
        key=_key_figures(found),
        use=use(making).replace("`", ""),
        limits=list(_limits(found, making)),
        gates=[(gate.name, Cell(gate.state, mark=_mark(gate.state)), gate.text) for gate in found.gates],
        columns=["metric", *columns],
        scores=_scores(found, columns),
        beside=found.beside.version if found.beside else None,
        differences=differing,
        parameters=_parameters(differing),
        images=_images(differing),
        curves=Picture(_curves(making.trainings), "Loss by step") if making.trainings else None,
        trainings=[_training(training) for training in making.trainings],
        funnel=[(step, images, "") for step, images in making.curation.funnel],
        origins=sorted(making.curation.origins.items()),
        rejected=sorted(making.curation.rejected.items()),
        sources=making.sources,
        total=making.num_images,
        decisions=[_decision(entry) for entry in decisions],
        decided=f"The run was started by {' or '.join(found.facts.authors) or 'somebody unknown'}. Decisions that came "
        f"after this page was made are not on it; `pedigree review {address} --open` makes it anew.",
        folder=DOCUMENTS,
        documents=list(KINDS.items()),
        hashes=list(_hashes(found, making)),
        load=LOAD.format(version=address, dim=making.backbone["dim"]),
    )


def _columns(found: Review) -> dict[str, tuple[dict[str, float], dict[str, Interval]]]:
    """Metrics of the version and of what it was evaluated beside, each with what the version is above them."""
    columns: dict[str, tuple[dict[str, float], dict[str, Interval]]] = {"this version": (found.facts.metrics(), {})}
    if found.beside and found.beside.scores:
        columns[found.beside.version] = (dict(found.beside.scores), dict(found.beside.differences or {}))
    for name in found.facts.compared():
        if name != CHAMPION:  # that of today is `beside`
            scores = found.facts.metrics(name)
            above = {metric: found.facts.difference(name, metric) for metric in scores}
            told = BASELINES.get(name, f"parent {name}")
            columns[told] = (scores, {metric: difference for metric, difference in above.items() if difference})
    return columns


def _metrics(found: Review) -> list[str]:
    scores = found.facts.metrics()
    first = first_asked(scores)
    others = [metric for metric in scores if not (is_count(metric) or is_setting(metric) or metric in first)]
    return first + others


def _scores(found: Review, columns: dict[str, tuple[dict[str, float], dict[str, Interval]]]) -> list[list[Any]]:
    rows = []
    for metric in _metrics(found):
        row: list[Any] = [metric]
        for name, (scores, above) in columns.items():
            own = found.intervals.get(metric) if name == "this version" else None
            value = f"{scores[metric]:.4g}" if metric in scores else ""
            note = f"({own.low:.3f} to {own.high:.3f})" if own else ""
            row.append(_difference(value, metric, above[metric]) if metric in above else Cell(value, note))
        rows.append(row)
    return rows


def _difference(value: str, metric: str, above: Interval) -> Cell:
    """A value that the version is above or below."""
    gained = gain(metric, above)
    mark = "good" if gained.low > 0 else "bad" if gained.high < 0 else ""
    return Cell(value, f"difference {interval(above, '+')}", mark)


def _key_figures(found: Review) -> list[tuple[str, str, str]]:
    scores, shown = found.facts.metrics(), []
    for metric in first_asked(scores)[:3]:
        above = (found.beside.differences or {}).get(metric) if found.beside else None
        other = f"difference {interval(above, '+')}" if above else ""
        shown.append((metric, f"{scores[metric]:.4g}", other))
    shown.append(("weights", f"{found.facts.size_mib:.3g} MiB", f"{found.facts.latency_ms:.3g} ms an image"))
    return shown


def _limits(found: Review, making: Making) -> Iterator[str]:
    counts = {key: value for key, value in found.facts.metrics().items() if is_count(key)}
    told = ", ".join(f"{value:,.0f} {key.replace('num_', '')}" for key, value in counts.items())
    size = making.preprocessing.crop_size
    licenses = ", ".join(sorted({license_ for _, license_, _ in making.sources}))
    yield "It gives features to search, to group and to classify with. It names no classes and draws no boxes itself."
    yield f"It has seen the {making.num_images:,} images of the sources below. Of images unlike them expect less."
    yield f"It was measured at {size} x {size} pixels, on {told or 'images whose number is not recorded'}, by " + (
        f"{', '.join(_metrics(found))}. What is not in this list was not measured."
    )
    yield f"Its use is bound to the licenses of its training images: {licenses}."


def _parameters(differing: Differences | None) -> list[tuple[str, str, str]]:
    return differing.parameters if differing and not isinstance(differing.parameters, str) else []


def _images(differing: Differences | None) -> list[tuple[Any, ...]]:
    if differing is None or isinstance(differing.images, str):
        return []
    return [(i.source, i.license, i.before, i.added, i.removed, i.now) for i in differing.images]


def _training(training: Training) -> tuple[Any, ...]:
    costs = ("not known" if (cost := getattr(training, key)) is None else f"{cost:.3g}" for key in COSTS)
    loss = "" if training.loss is None else f"{training.loss:.4g}"
    return training.stage, training.steps, training.images_seen, loss, *costs


def _decision(entry: Entry) -> tuple[str, str, str, str]:
    details = entry.details
    why = [str(details.get("reason", "")), *(f"waived {g}: {r}" for g, r in details.get("waived", {}).items())]
    return f"{entry.time[:16].replace('T', ' ')} UTC", entry.actor, f"{entry.action} {entry.subject}", "; ".join(why)


def _hashes(found: Review, making: Making) -> Iterator[tuple[str, str]]:
    origin = making.origin
    yield "run", making.run
    yield "git commit", origin.commit + (" with uncommitted changes" if origin.dirty else "")
    yield "branch", origin.branch
    yield "stages of dvc.lock, SHA-256", origin.lock_sha256
    yield f"weights {origin.weights_path}, SHA-256", origin.weights_sha256
    yield f"weights {origin.weights_path}, DVC", origin.weights_dvc
    yield f"made from {making.parent[0]}, SHA-256", making.parent[1]
    for version in (origin.curated, *origin.pool, *origin.evaluation):
        yield from _data(version)
    yield "what the gates judge, SHA-256", found.facts.digest()


def _data(version: DataVersion) -> Iterator[tuple[str, str]]:
    yield f"{version.path}, DVC", version.dvc
    if version.manifest_sha256:
        yield f"{version.path}, manifest SHA-256", version.manifest_sha256


def _mark(state: str) -> str:
    return {PASSED: "good", FAILED: "bad"}.get(state, "")


def _curves(trainings: Sequence[Training]) -> bytes:
    """The loss of each training by step, side by side, as PNG."""
    figure = new_figure(10, 2.8)
    for axes, training in zip(figure.subplots(1, len(trainings), squeeze=False)[0], trainings, strict=True):
        axes.plot(*zip(*training.curve, strict=True), color=BLUE)
        axes.set_title(training.stage, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    return png(figure)
