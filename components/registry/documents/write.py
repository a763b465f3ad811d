"""The documents of a model in standard formats, made from one graph."""

from __future__ import annotations

import json
from typing import Any

from components.registry.documents.croissant import croissant
from components.registry.documents.cyclonedx import cyclonedx
from components.registry.documents.graph import Graph
from components.registry.documents.openlineage import events
from components.registry.documents.slsa import slsa
from components.registry.documents.training_content import training_content
from components.registry.documents.w3c_prov import prov

DOCUMENTS = "documents"  # folder among the model's artifacts
KINDS = {  # what each file is
    "croissant.json": "Croissant 1.1: the training set",
    "bom.cdx.json": "CycloneDX 1.7 ML-BOM: the model, its card and its data",
    "slsa.intoto.json": "SLSA provenance v1, an in-toto statement: how the weights were built",
    "prov.json": "W3C PROV: what was made from what",
    "openlineage.jsonl": "OpenLineage: events of each stage",
    "training-content.md": "summary of training content, Article 53(1)(d) AI Act",
}


def make_documents(graph: Graph) -> dict[str, bytes]:
    """Return the bytes of each document, by the file names of `KINDS`."""
    return {
        "croissant.json": _json(croissant(graph)),
        "bom.cdx.json": _json(cyclonedx(graph)),
        "slsa.intoto.json": _json(slsa(graph)),
        "prov.json": _json(prov(graph)),
        "openlineage.jsonl": b"".join(_line(event) for event in events(graph)),
        "training-content.md": training_content(graph).encode(),
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _line(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()
