"""CycloneDX 1.7 ML-BOM: the model with its card, and the data that it was made from."""

from __future__ import annotations

import uuid
from typing import Any

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from components.registry.documents.graph import PREFIX, Data, Graph
from components.registry.making import Training

MODEL, PARENT = "model", "parent"
FINE_TUNING = ("adapt", "distill")
BESIDE = {"model-card": "../passport.html", "attestation": "slsa.intoto.json", "evidence": "croissant.json"}


def cyclonedx(graph: Graph) -> dict[str, Any]:
    """State the model's parts; it has no list of Python packages, which requirements.txt beside the model has."""
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.7.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.7",
        "version": 1,
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, PREFIX + graph.making.origin.weights_sha256)}",
        "metadata": {"timestamp": graph.time.isoformat(), "component": _model(graph)},
        "components": [_data(data) for data in graph.data],
        "dependencies": [
            {"ref": MODEL, "dependsOn": [graph.curated.path]},
            {"ref": graph.curated.path, "dependsOn": [pool.path for pool in graph.pool]},
        ],
    }


def _model(graph: Graph) -> dict[str, Any]:
    origin = graph.making.origin
    return {
        "type": "machine-learning-model",
        "bom-ref": MODEL,
        "name": graph.name,
        "version": graph.making.run,
        "description": "Vision foundation model: image features, trained without labels.",
        "hashes": _sha256(origin.weights_sha256),
        "pedigree": {
            "ancestors": [
                {
                    "type": "machine-learning-model",
                    "bom-ref": PARENT,
                    "name": graph.parent[0],
                    "hashes": _sha256(graph.parent[1]),
                }
            ],
            "commits": [{"uid": origin.commit}],
        },
        "externalReferences": [{"type": kind, "url": url} for kind, url in BESIDE.items()],
        "modelCard": _card(graph),
        "properties": [{"name": "pedigree:dvc", "value": origin.weights_dvc}],
    }


def _card(graph: Graph) -> dict[str, Any]:
    making, metrics = graph.making, graph.facts.metrics()
    shape = making.backbone
    return {
        "modelParameters": {
            "approach": {"type": "self-supervised"},
            "task": "image-feature-extraction",
            "architectureFamily": "vision transformer",
            "modelArchitecture": f"dim {shape['dim']}, depth {shape['depth']}, patch {shape['patch_size']}",
            "datasets": [{"ref": graph.curated.path}],
            "inputs": [{"format": f"image, {making.preprocessing.crop_size} pixels a side"}],
            "outputs": [{"format": f"float32 vector of {making.feature_dim}"}],
        },
        "quantitativeAnalysis": {
            "performanceMetrics": [{"type": name, "value": f"{value:.6g}"} for name, value in sorted(metrics.items())]
        },
        "considerations": {
            "useCases": ["Search, grouping and classification of images by their features."],
            "technicalLimitations": [
                f"Trained on the {making.num_images:,} images of its sources; expect less of images unlike them.",
                "Names no classes and draws no boxes itself.",
            ],
            "environmentalConsiderations": {
                "energyConsumptions": [_energy(t, t.energy_kwh) for t in making.trainings if t.energy_kwh is not None],
                "properties": [
                    {"name": f"pedigree:{t.stage}:energy", "value": "not measured"}
                    for t in making.trainings
                    if t.energy_kwh is None
                ],
            },
        },
    }


def _energy(training: Training, kwh: float) -> dict[str, Any]:
    """CycloneDX asks who provided the energy, which nobody has recorded."""
    energy = {"value": kwh, "unit": "kWh"}
    co2e = {"value": training.co2e_kg / 1000, "unit": "tCO2eq"} if training.co2e_kg is not None else None
    return {
        "activity": "fine-tuning" if training.stage in FINE_TUNING else "training",
        "energyProviders": [
            {"organization": {"name": "not recorded"}, "energySource": "unknown", "energyProvided": energy}
        ],
        "activityEnergyCost": energy,
        **({"co2CostEquivalent": co2e} if co2e else {}),
    }


def _data(data: Data) -> dict[str, Any]:
    images = "; ".join(f"{source} ({license_}): {count:,}" for source, license_, count in data.images) or "not known"
    return {
        "type": "data",
        "bom-ref": data.path,
        "name": data.path,
        "version": data.dvc,
        **({"hashes": _sha256(data.sha256)} if data.sha256 else {}),
        "licenses": [_license(name) for name in data.licenses],
        "data": [
            {
                "type": "dataset",
                "name": data.path,
                "description": f"{data.num_images:,} images; sources: {images}. The hash is of the manifest.",
            }
        ],
    }


def _license(name: str) -> dict[str, Any]:
    try:
        return {"expression": canonicalize_license_expression(name)}
    except InvalidLicenseExpression:
        return {"license": {"name": name}}


def _sha256(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]
