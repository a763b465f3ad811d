"""The model card: a version's passport as markdown, short enough to be read before a decision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from components.core.tracking import flatten_numbers
from components.lineage.origin import DataVersion, Origin

MAX_METRICS = 40


@dataclass(frozen=True)
class CardFacts:
    """What the card tells.

    Attributes:
        name: registered model.
        origin: where the weights come from.
        parent: the weights that training started from or was taught by, and their SHA-256.
        backbone: the `backbone` section of the weights' config.json.
        curated: manifest of the training set.
        validation: outcome of the data checks.
        evaluation: nested results of the evaluation stage.
        resolution: pixels a side when the caller gives none.
        seed: of the run.
    """

    name: str
    origin: Origin
    parent: tuple[str, str]
    backbone: Mapping[str, Any]
    curated: pa.Table
    validation: str
    evaluation: Mapping[str, Any]
    resolution: int
    seed: int


def render_card(facts: CardFacts) -> str:
    """The card as markdown."""
    origin, backbone = facts.origin, facts.backbone
    shape = f"dim {backbone['dim']}, depth {backbone['depth']}, patch {backbone['patch_size']}"
    parts = [
        f"# {facts.name}",
        f"Vision transformer ({shape}, {backbone['num_registers']} registers). Takes encoded images (column `image`, "
        f"bytes), gives their class tokens, float32 [n, {backbone['dim']}]; scale them to unit length before taking "
        f"cosines. Any resolution that is a multiple of {backbone['patch_size']}; {facts.resolution} unless the "
        "parameter `resolution` says otherwise.",
        "## Origin",
        _table(
            ("", ""),
            [
                ("git commit", f"`{origin.commit}`" + (" with uncommitted changes" if origin.dirty else "")),
                ("branch", f"`{origin.branch}`"),
                ("dvc.lock (SHA-256 of its stages)", f"`{origin.lock_sha256}`"),
                ("weights", f"`{origin.weights_path}`, DVC `{origin.weights_dvc}`"),
                ("weights SHA-256", f"`{origin.weights_sha256}`"),
                ("made from", f"`{facts.parent[0]}`, SHA-256 `{facts.parent[1]}`"),
                ("seed", str(facts.seed)),
            ],
        ),
        "## Data",
        f"Data checks: {facts.validation}.",
        _table(("version", "DVC id", "manifest SHA-256"), [_row(v) for v in (origin.curated, *origin.pool)]),
        f"Trained on {facts.curated.num_rows} images:",
        _table(("source", "licence", "images"), sources(facts.curated)),
        "## Evaluation",
        _evaluation(facts.evaluation),
        "Measured on: "
        + (", ".join(f"`{v.path}` (DVC `{v.dvc}`)" for v in origin.evaluation) or "no tracked set")
        + ".",
    ]
    return "\n\n".join(parts) + "\n"


def sources(manifest: pa.Table) -> list[tuple[str, str, str]]:
    """(source, licence, number of images), by source."""
    counts = manifest.group_by(["source", "license"]).aggregate([("image_id", "count")]).to_pylist()
    return sorted((row["source"], row["license"], str(row["image_id_count"])) for row in counts)


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    metrics = flatten_numbers(evaluation)
    if not metrics:
        return "Not evaluated."
    shown = [(f"`{key}`", f"{value:.4g}") for key, value in sorted(metrics.items())[:MAX_METRICS]]
    more = f"\n\nAnd {len(metrics) - MAX_METRICS} more in MLflow." if len(metrics) > MAX_METRICS else ""
    return _table(("metric", "value"), shown) + more


def _row(version: DataVersion) -> tuple[str, str, str]:
    return f"`{version.path}`", f"`{version.dvc}`", f"`{version.manifest_sha256 or 'not known'}`"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
