"""What a run shows in Prefect's pages: tables, pictures, links. A view for people; the record is git, DVC, MLflow."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from components.core import stage_runs
from components.core.layout import RELATIVE, Layout
from components.core.metric_names import first_asked
from flows.workspace import Workspace

PICTURES = (
    ("sample-kept", RELATIVE.report("curate") / "kept.jpg", "A sample of the curated set"),
    ("sample-removed", RELATIVE.report("curate") / "removed.jpg", "Images that curation removed, and why"),
    ("training-crops", RELATIVE.report("pretrain") / "crops.jpg", "Crops as the student sees them"),
)


def create_artifacts(workspace: Workspace, mlflow_run: str | None) -> None:
    """Make the artifacts of whatever the run has finished, whether or not all of it went well."""
    layout = Layout(workspace.root)
    reports, curation = layout.reports, layout.report("curate")
    if (funnel := curation / "funnel.csv").exists():
        with funnel.open(newline="") as file:
            create_table_artifact(list(csv.DictReader(file)), key="funnel", description="From pool to curated set")
    if rows := metric_rows(reports):
        create_table_artifact(rows, key="metrics", description="Each model beside its champion and its baselines")
        columns = main_columns(rows)
        lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        stage_runs.describe_run(
            mlflow_run, f"{table}\n\nThe stages are the child runs; git has it all as `{workspace.branch}`."
        )
        score(layout, mlflow_run, rows)
    pictures = [*PICTURES]
    for path in sorted(reports.glob("evaluate/*/pca.jpg")):
        pictures.append((f"pca-{path.parent.name}", path.relative_to(workspace.root), "PCA of patch features"))
    for key, name, title in pictures:
        if (path := workspace.root / name).exists():
            data = base64.b64encode(path.read_bytes()).decode()
            create_markdown_artifact(
                f"### {title}\n\n![{title}](data:image/jpeg;base64,{data})", key=key, description=title
            )
    if url := stage_runs.run_url(mlflow_run):
        create_link_artifact(url, "MLflow run", key="mlflow", description="Parameters, metrics, files, data inputs")
    if (page := curation / "report.html").exists():
        caption = "Why each image is in the curated set or out of it; also among the files of the stage's MLflow run"
        create_markdown_artifact(f"`{page.resolve()}`", key="curation-report", description=caption)
    docs = layout.data_docs / "curated" / "index.html"
    if docs.exists():
        caption = "Data Docs of Great Expectations; they need the internet. The curation report has the same gates"
        create_markdown_artifact(f"`{docs.resolve()}`", key="data-docs", description=caption)


def score(layout: Layout, mlflow_run: str | None, rows: list[dict[str, Any]]) -> None:
    """Give the run in MLflow's list what it is sorted and chosen by: each model's measures, score and verdict."""
    from components.lineage.provenance import Tag  # here, because it loads pyarrow

    own = {row["model"]: row for row in rows if row["model"] == row["evaluation"]}
    registered = _read(layout.result("register")) or {}
    metrics = {f"{model}.{key}": float(row[key]) for model, row in own.items() for key in first_asked(row)}
    metrics |= {f"{model}.failed_gates": float(len(made["failed_gates"])) for model, made in registered.items()}
    scores = {model: f"{key} {row[key]}" for model, row in own.items() for key in first_asked(row)[:1]}
    verdicts = {model: f"{made['name']}/{made['version']} {made['verdict']}" for model, made in registered.items()}
    told = {Tag.SCORE: scores, Tag.VERDICT: verdicts}
    stage_runs.score_run(mlflow_run, metrics, {key: _listed(texts) for key, texts in told.items() if texts})


def _listed(texts: dict[str, str]) -> str:
    """One line, the teacher first, so that a list sorts by it."""
    return "; ".join(
        f"{model}: {texts[model]}" for model in sorted(texts, key=lambda model: (model != "teacher", model))
    )


def metric_rows(reports: Path) -> list[dict[str, Any]]:
    """One row for each evaluated model and each it was compared with: the measures people ask for first."""
    rows = []
    for path in sorted(reports.glob("evaluate/*/result.json")):
        result, model = _read(path) or {}, path.parent.name
        compared = {name: values for name, values in result.items() if isinstance(values, dict)}
        for name, values in [(model, result), *compared.items()]:
            numbers = {key: f"{value:.4g}" for key, value in values.items() if isinstance(value, int | float)}
            if not name.startswith("minus_"):
                first = {key: numbers[key] for key in first_asked(numbers)}
                rows.append({"evaluation": model, "model": name, **first, **numbers})
    return rows


def main_columns(rows: list[dict[str, Any]]) -> list[str]:
    """Columns of a table that fits a page: which model, and the measures of which any row has a value."""
    return ["evaluation", "model", *first_asked({key: None for row in rows for key in row})]


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None
