"""Croissant 1.1 of the training set: shards and manifest with SHA-256, its columns, licenses and provenance."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from components.data.manifest import CURATED_SCHEMA, MANIFEST
from components.registry.documents.graph import PREFIX, Data, Graph

CURATE = "curate"
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "name": {"@container": "@language"},
    "parentField": "cr:parentField",
    "path": "cr:path",
    "prov": "http://www.w3.org/ns/prov#",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}


def croissant(graph: Graph) -> dict[str, Any]:
    """Describe the training set; paths are those of the commit after `dvc pull data/curated`."""
    curated, shards = graph.curated, graph.making.shards
    listed = (
        "" if shards else " Its shards are not listed: their SHA-256 was not recorded; the manifest has each image's."
    )
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": f"{graph.name} training set",
        "description": f"{curated.num_images:,} images that trained {graph.name} in run {graph.making.run}, chosen "
        f"from {sum(pool.num_images for pool in graph.pool):,} images of {len(graph.pool)} snapshots. Paths are those "
        f"of git commit {graph.making.origin.commit} after `dvc pull {curated.path}`.{listed}",
        "url": f"hash://sha256/{curated.sha256}",
        "version": f"1.0.0+{curated.dvc}",
        "datePublished": graph.time.date().isoformat(),
        "creator": {"@type": "sc:Organization", "name": "operator of the pipeline, not recorded"},
        "citeAs": f"{graph.name} training set, DVC {curated.dvc}, manifest SHA-256 {curated.sha256}",
        "license": curated.licenses,
        "distribution": [
            _file(curated, MANIFEST, curated.sha256, "application/vnd.apache.parquet"),
            *(_file(curated, name, sha256, "application/x-tar") for name, sha256 in sorted(shards.items())),
        ],
        "recordSet": [_records()],
        "prov:wasDerivedFrom": [_entity(pool) for pool in graph.pool],
        "prov:wasGeneratedBy": _activity(graph),
        "rai:dataCollection": "; ".join(f"{s} ({lic}): {n:,} images" for s, lic, n in curated.images),
        "rai:dataPreprocessingProtocol": [
            f"{step}: {left:,} images left" for step, left in graph.making.curation.funnel
        ],
    }


def _file(data: Data, name: str, sha256: str | None, kind: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": f"{data.path}/{name}",
        "encodingFormat": kind,
        "sha256": sha256,
    }


def _records() -> dict[str, Any]:
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"images/{field.name}",
            "name": field.name,
            "dataType": _data_type(field.type),
            "source": {"fileObject": {"@id": MANIFEST}, "extract": {"column": field.name}},
        }
        for field in CURATED_SCHEMA
    ]
    return {
        "@type": "cr:RecordSet",
        "@id": "images",
        "name": "images",
        "description": "One record an image: SHA-256, place in a shard, source, license, and why it was chosen.",
        "key": {"@id": "images/image_id"},
        "field": fields,
    }


def _data_type(kind: pa.DataType) -> str:
    if pa.types.is_integer(kind):
        return "sc:Integer"
    return "sc:Float" if pa.types.is_floating(kind) else "sc:Text"


def _entity(data: Data) -> dict[str, Any]:
    return {
        "@id": f"{PREFIX}{data.path}",
        "@type": "prov:Entity",
        "prov:label": f"{data.path}, DVC {data.dvc}, manifest SHA-256 {data.sha256}",
    }


def _activity(graph: Graph) -> dict[str, Any]:
    found: dict[str, Any] = {
        "@id": f"{PREFIX}{graph.making.run}/{CURATE}",
        "@type": "prov:Activity",
        "prov:label": CURATE,
    }
    step = next((step for step in graph.steps if step.name == CURATE), None)
    if step and step.started and step.ended:
        found |= {"prov:startedAtTime": step.started.isoformat(), "prov:endedAtTime": step.ended.isoformat()}
    return found
