"""OpenLineage 2.0.2 events of each stage, for catalogs that import them, such as Marquez or DataHub."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from components.registry.documents.graph import PREFIX, Graph, Step

NAMESPACE = "pedigree"
PRODUCER = f"{PREFIX}pipeline"
EVENT = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
FACETS = "https://openlineage.io/spec/facets"
VERSION = f"{FACETS}/1-0-1/DatasetVersionDatasetFacet.json#/$defs/DatasetVersionDatasetFacet"
JOB_TYPE = f"{FACETS}/2-0-4/JobTypeJobFacet.json#/$defs/JobTypeJobFacet"


def events(graph: Graph) -> list[dict[str, Any]]:
    """Return START and COMPLETE of each stage, in order; COMPLETE alone where the run did not compute it.

    A stage whose end was not recorded has the time of the commit.
    """
    return [event for step in graph.steps for event in _of_step(graph, step)]


def _of_step(graph: Graph, step: Step) -> Iterator[dict[str, Any]]:
    if step.started:
        yield _event(graph, step, "START", step.started)
    yield _event(graph, step, "COMPLETE", step.ended or graph.time)


def _event(graph: Graph, step: Step, kind: str, time: datetime.datetime) -> dict[str, Any]:
    run_id = uuid.uuid5(uuid.NAMESPACE_URL, f"{PREFIX}{graph.making.run}/{step.name}")
    job_type = {"processingType": "BATCH", "integration": "DVC", "jobType": "STAGE"}
    return {
        "eventType": kind,
        "eventTime": time.isoformat(),
        "producer": PRODUCER,
        "schemaURL": EVENT,
        "run": {"runId": str(run_id), "facets": {}},
        "job": {"namespace": NAMESPACE, "name": step.name, "facets": {"jobType": _facet(JOB_TYPE, job_type)}},
        "inputs": _datasets(step.inputs),
        "outputs": _datasets(step.outputs),
    }


def _datasets(paths: Mapping[str, str]) -> list[dict[str, Any]]:
    """Folders and files with their DVC ids as versions."""
    return [
        {"namespace": NAMESPACE, "name": path, "facets": {"version": _facet(VERSION, {"datasetVersion": dvc_id})}}
        for path, dvc_id in paths.items()
    ]


def _facet(schema: str, values: Mapping[str, str]) -> dict[str, str]:
    return {"_producer": PRODUCER, "_schemaURL": schema, **values}
