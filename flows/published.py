"""What a run shows in Prefect's pages: tables, pictures, links. A view for people; the record is git, DVC, MLflow."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from components.core import tracking
from flows.workspace import Workspace

PICTURES = (
    ("sample-kept", "reports/curate/kept.jpg", "A sample of the curated set"),
    ("sample-removed", "reports/curate/removed.jpg", "Images that curation removed, and why"),
    ("training-crops", "reports/pretrain/crops.jpg", "Crops as the student sees them"),
)


def publish(workspace: Workspace, mlflow_run: str | None) -> None:
    """Make the artifacts of whatever the run has finished, whether or not all of it went well."""
    reports = workspace.root / "reports"
    if (funnel := reports / "curate" / "funnel.csv").exists():
        with funnel.open(newline="") as file:
            create_table_artifact(list(csv.DictReader(file)), key="funnel", description="From pool to curated set")
    if rows := metric_rows(reports):
        create_table_artifact(rows, key="metrics", description="Each model beside its champion and its baselines")
    pictures = [*PICTURES]
    for path in sorted(reports.glob("evaluate/*/pca.jpg")):
        pictures.append((f"pca-{path.parent.name}", str(path.relative_to(workspace.root)), "PCA of patch features"))
    for key, name, title in pictures:
        if (path := workspace.root / name).exists():
            data = base64.b64encode(path.read_bytes()).decode()
            create_markdown_artifact(f"### {title}\n\n![{title}](data:image/jpeg;base64,{data})", key=key)
    if url := tracking.run_url(mlflow_run):
        create_link_artifact(url, "MLflow run", key="mlflow", description="Parameters, metrics, files, data inputs")
    if (page := reports / "curate" / "report.html").exists():
        told = "Why each image is in the curated set or out of it; also among the files of the stage's MLflow run"
        create_link_artifact(page.resolve().as_uri(), "Curation report", key="curation-report", description=told)
    docs = workspace.root / ".pedigree" / "data-docs" / "curated" / "index.html"
    if docs.exists():
        create_link_artifact(docs.resolve().as_uri(), "Data Docs", key="data-docs", description="Great Expectations")


def metric_rows(reports: Path) -> list[dict[str, Any]]:
    """One row for each evaluated model and each it was compared with: the measures people ask for first."""
    rows = []
    for path in sorted(reports.glob("evaluate/*/result.json")):
        result, model = _read(path) or {}, path.parent.name
        compared = {name: values for name, values in result.items() if isinstance(values, dict)}
        for name, values in [(model, result), *compared.items()]:
            numbers = {key: f"{value:.4g}" for key, value in values.items() if isinstance(value, int | float)}
            if not name.startswith("minus_"):
                rows.append({"evaluation": model, "model": name, **numbers})
    return rows


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None
