"""The model card: the text of a version in MLflow, short enough to be read there before a decision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from components.core.metric_names import first_asked
from components.core.metrics import Interval
from components.core.model_files import SIGNATURE
from components.core.references import CANDIDATES
from components.registry.making import Making
from components.registry.review import Review

SHOWN = 3  # measures
BASELINE = "random"

SERVE = "mlflow models serve --model-uri models:/{name}@latest --env-manager local --port 5050"
# In a pipe: an argument may have 128 KiB. curl leaves out the line breaks of base64.
ASK = (
    r"""echo "{\"instances\": [\"$(base64 photo.jpg)\"]}" | """
    'curl -H "Content-Type: application/json" -d @- http://127.0.0.1:5050/invocations'
)


def render_card(found: Review, links: Mapping[str, str]) -> str:
    """The card as markdown. It has no tables: MLflow sets their columns without a space between them.

    Args:
        found: the version, reviewed.
        links: addresses by what is written on the link.
    """
    making, released = found.making, found.version.partition("/")[0].removesuffix(CANDIDATES)
    assert making is not None
    images = ", ".join(f"{source} ({license_}) {count:,}" for source, license_, count in making.sources)
    parts = [
        f"**{found.version} {found.verdict}.** {standing(found)}",
        "\n".join(f"- {line}" for line in _measures(found)),
        "In brackets: 95 % intervals; differences are of the same test images.",
        f"Training steps: {making.steps or 'not known, no report of a training was in the workspace'}. Training set: "
        f"{making.num_images:,} images; {images}.",
        " · ".join(f"[{text}]({address})" for text, address in links.items()),
        "## Use",
        use(making),
        f"```sh\n{SERVE.format(name=found.version.partition('/')[0])}\n{ASK}\n```",
        "Or `inputs`, `dataframe_records`, `dataframe_split`; beside it `params`. Status 400 comes with the bad row "
        "and the reason.",
        "MLflow runs the code that lies beside the weights when it loads them. Verify a released copy first, by "
        f"`pedigree verify {released}@champion`, or without Pedigree, in "
        f"the folder of the copy, by `model_signing verify key . --signature {SIGNATURE} --public_key KEY` with the "
        "public key of those who release.",
        "## Origin",
        f"Commit `{making.origin.commit}`{' with uncommitted changes' if making.origin.dirty else ''}, branch "
        f"`{making.origin.branch}`. Weights `{making.origin.weights_path}`, SHA-256 `{making.origin.weights_sha256}`, "
        f"made from `{making.parent[0]}`, SHA-256 `{making.parent[1]}`. The passport names the data and all else.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def standing(found: Review) -> str:
    """One sentence: what the version is shown beside."""
    first = "It is the first champion" if found.reigns else "There is no champion yet"
    if found.beside is None:
        return f"{first}, and there is no earlier candidate."
    if found.champion is None:
        told = f"{first}; it is shown beside the last candidate before it"
    else:
        told = f"It is {'the champion, ' if found.reigns else ''}shown beside the champion{' before' * found.reigns}"
    why = f", but not compared: {found.beside.incomparable}" if found.beside.incomparable else ""
    how = f" (evaluated with {found.beside.otherwise})" if found.beside.otherwise else ""
    return f"{told}, {found.beside.version}{how}{why}."


def use(making: Making) -> str:
    """What goes into the model and what comes out."""
    backbone, size = making.backbone, making.preprocessing
    shape = f"dim {backbone['dim']}, depth {backbone['depth']}, patch {backbone['patch_size']}"
    return (
        f"Vision transformer ({shape}, {backbone['num_registers']} registers). Takes encoded images (column `image`, "
        f"bytes, or their base64 text over HTTP; transparency is laid over white, as in training), gives their "
        f"{size.pooled}, float32 [n, {making.feature_dim}]; scale these to unit length before taking "
        f"cosines. It scales the shorter side of an image to {size.resize_size} pixels and takes the {size.crop_size} "
        "pixel square in the middle, as the evaluation did; the parameter `resolution` sets another square, a "
        f"multiple of {backbone['patch_size']}, of the same part of the image."
    )


def interval(found: Interval, sign: str = "") -> str:
    """`0.804 (0.750 to 0.848)`; with the sign `+`, of a difference."""
    return f"{found.mean:{sign}.3f} ({found.low:{sign}.3f} to {found.high:{sign}.3f})"


def _measures(found: Review) -> Iterator[str]:
    """The first measures that were taken, each beside the other version and random weights."""
    scores, baseline = found.facts.metrics(), found.facts.metrics(BASELINE)
    for metric in first_asked(scores)[:SHOWN]:
        own = found.intervals.get(metric)
        told = [f"`{metric}` {interval(own) if own else f'{scores[metric]:.3f}'}"]
        if found.beside and metric in found.beside.scores:
            difference = (found.beside.differences or {}).get(metric)
            told.append(_beside(found.beside.version, found.beside.scores[metric], difference))
        if metric in baseline:
            told.append(_beside("random weights", baseline[metric], found.facts.difference(BASELINE, metric)))
        yield "; ".join(told)


def _beside(name: str, value: float, difference: Interval | None) -> str:
    return f"{name} {value:.3f}" + (f", difference {interval(difference, '+')}" if difference else "")
