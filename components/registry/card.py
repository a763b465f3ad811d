"""The model card: a version's passport as markdown, short enough to be read before a decision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from components.lineage.provenance import DataVersion, Origin
from components.model.config import Preprocessing

SERVE = "mlflow models serve --model-uri models:/{name}@latest --env-manager local --port 5050"
# In a pipe: an argument may have 128 KiB. curl leaves out the line breaks of base64.
ASK = (
    r"""echo "{\"instances\": [\"$(base64 photo.jpg)\"]}" | """
    'curl -H "Content-Type: application/json" -d @- http://127.0.0.1:5050/invocations'
)


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
        preprocessing: of the images, as evaluated.
        seed: of the run.
    """

    name: str
    origin: Origin
    parent: tuple[str, str]
    backbone: Mapping[str, Any]
    curated: pa.Table
    validation: str
    evaluation: Mapping[str, Any]
    preprocessing: Preprocessing
    seed: int


def render_card(facts: CardFacts) -> str:
    """The card as markdown."""
    origin, backbone, size = facts.origin, facts.backbone, facts.preprocessing
    shape = f"dim {backbone['dim']}, depth {backbone['depth']}, patch {backbone['patch_size']}"
    parts = [
        f"# {facts.name}",
        f"Vision transformer ({shape}, {backbone['num_registers']} registers). Takes encoded images (column `image`, "
        "bytes, or their base64 text over HTTP; transparency is laid over white, as in training), gives their class "
        f"tokens, float32 [n, {backbone['dim']}]; scale them to unit length before taking "
        f"cosines. It scales the shorter side of an image to {size.resize_size} pixels and takes the {size.crop_size} "
        "pixel square in the middle, as the evaluation below did; the parameter `resolution` sets another square, a "
        f"multiple of {backbone['patch_size']}, of the same part of the image.",
        "## Use",
        f"```sh\n{SERVE.format(name=facts.name)}\n{ASK}\n```",
        "Or `inputs`, `dataframe_records`, `dataframe_split`; beside it `params`. Status 400 comes with the bad row "
        "and the reason.",
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
        _table(("", ""), [_row(v) for v in (origin.curated, *origin.pool)]),
        f"Trained on {facts.curated.num_rows} images:",
        _table(("source", "license", "images"), sources(facts.curated)),
        "## Evaluation",
        _evaluation(facts.evaluation),
        "Measured on: "
        + (", ".join(f"`{v.path}` (DVC `{v.dvc}`)" for v in origin.evaluation) or "no tracked set")
        + ".",
    ]
    return "\n\n".join(parts) + "\n"


def sources(manifest: pa.Table) -> list[tuple[str, str, str]]:
    """(source, license, number of images), by source."""
    counts = manifest.group_by(["source", "license"]).aggregate([("image_id", "count")]).to_pylist()
    return sorted((row["source"], row["license"], str(row["image_id_count"])) for row in counts)


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    """A row for each metric: the model's value, those of what it was compared with, and what it is above them."""
    compared = {name: values for name, values in evaluation.items() if isinstance(values, Mapping)}
    columns = {
        "this model": evaluation,
        **dict(sorted(compared.items(), key=lambda item: item[0].startswith("minus_"))),
    }
    numbers = [key for values in columns.values() for key, value in values.items() if isinstance(value, int | float)]
    if not numbers:
        return "Not evaluated."
    rows = [(f"`{key}`", *(_shown(values.get(key)) for values in columns.values())) for key in dict.fromkeys(numbers)]
    return _table(("metric", *(name.replace("_", " ") for name in columns)), rows)


def _shown(value: Any) -> str:
    match value:
        case {"mean": mean, "low": low, "high": high}:  # an interval, 95 %
            return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
        case int() | float():
            return f"{value:.4g}"
    return ""


def _row(version: DataVersion) -> tuple[str, str]:
    return f"`{version.path}`", f"DVC `{version.dvc}`, manifest SHA-256 `{version.manifest_sha256 or 'not known'}`"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
