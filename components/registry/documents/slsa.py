"""SLSA provenance v1 as an in-toto statement: stages are the build, data are its dependencies, weights its subject."""

from __future__ import annotations

from typing import Any

from components.core.layout import RELATIVE
from components.registry.documents.graph import PREFIX, Data, Graph, Step


def slsa(graph: Graph) -> dict[str, Any]:
    """State how the weights were built."""
    origin = graph.making.origin
    run = {
        "invocationId": graph.making.run,
        "startedOn": min((step.started for step in graph.steps if step.started), default=graph.time).isoformat(),
        "finishedOn": max((step.ended for step in graph.steps if step.ended), default=graph.time).isoformat(),
    }
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": graph.weights, "digest": {"sha256": origin.weights_sha256}}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": f"{PREFIX}dvc-pipeline:v1",
                "externalParameters": {
                    "pipeline": str(RELATIVE.pipeline),
                    "parameters": {step.name: step.parameters for step in graph.steps},
                },
                "internalParameters": {
                    "dvcLockSha256": origin.lock_sha256,
                    "uncommittedChanges": origin.dirty,
                    "steps": [_step(step) for step in graph.steps],
                },
                "resolvedDependencies": [
                    {"name": "code", "uri": f"git+{PREFIX}{origin.branch}", "digest": {"gitCommit": origin.commit}},
                    *(_data(data) for data in graph.data),
                    {"name": graph.parent[0], "digest": {"sha256": graph.parent[1]}},
                ],
            },
            "runDetails": {
                "builder": {"id": f"{PREFIX}pipeline", "version": {"code": origin.commit}},
                "metadata": run,
            },
        },
    }


def _step(step: Step) -> dict[str, Any]:
    return {
        "name": step.name,
        "command": step.command,
        "inputs": step.inputs,
        "outputs": step.outputs,
        "finishedOn": step.ended.isoformat() if step.ended else None,
    }


def _data(data: Data) -> dict[str, Any]:
    """A data folder by its manifest, which has the SHA-256 of every image."""
    digest = {"digest": {"sha256": data.sha256}} if data.sha256 else {}
    return {
        "name": f"{data.path}/manifest.parquet",
        "uri": f"{PREFIX}{data.path}",
        **digest,
        "annotations": {"dvc": data.dvc, "images": data.num_images, "licenses": data.licenses},
    }
