"""Weights that a person names, a version of a registered model or a weights folder, with what is known of them."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from mlflow.entities.model_registry import ModelVersion

from components.core.config import ConfigError
from components.core.mlflow_client import reported, server_uri
from components.core.references import URI, ModelReference
from components.core.registered_weights import download_weights
from components.core.storage import sha256_file
from components.lineage.provenance import WEIGHTS_FILE, Tag
from components.model.config import Preprocessing, ViTConfig
from components.registry.publish import RegistryError, registry_client

MAX_RESOLUTION = 8192  # pixels
PASSPORT, MODEL_FILE = "pedigree.passport", "MLmodel"
STATED = (Tag.DIGEST, Tag.WEIGHTS_SHA256, Tag.COMMIT, Tag.CANDIDATE, Tag.AUDIT)


@dataclass(frozen=True)
class NamedWeights:
    """Weights on this machine.

    Attributes:
        name: `pedigree/3`, or the folder.
        folder: with model.safetensors and config.json.
        preprocessing: as evaluated; None where nothing states it.
        facts: of their origin, for files that are made from them.
    """

    name: str
    folder: Path
    preprocessing: Preprocessing | None = None
    facts: Mapping[str, str] = field(default_factory=dict)

    def preprocessing_at(self, resolution: int | None, backbone: ViTConfig) -> Preprocessing:
        """How images are scaled and cut.

        Args:
            resolution: pixels a side of the square that is cut from the middle; None takes it as evaluated.
            backbone: its position grid gives the resolution where no evaluation is known.

        Raises:
            ConfigError: a resolution that patches do not tile, or that is too large.
        """
        patch = backbone.patch_size
        if resolution is not None and not (patch <= resolution <= MAX_RESOLUTION and resolution % patch == 0):
            allowed = f"must be a multiple of the patch size, {patch}, and at most {MAX_RESOLUTION}"
            raise ConfigError(f"--resolution {resolution}: {allowed}")
        if self.preprocessing is None:
            return Preprocessing().at(resolution or backbone.image_size or patch)
        return self.preprocessing if resolution is None else self.preprocessing.at(resolution)

    @property
    def assumed(self) -> str:
        """What had to be assumed, as a line; empty where all is known."""
        if self.preprocessing is not None:
            return ""
        return (
            f"{self.name}: nothing states how its images were scaled; as in DINOv2, an eighth of each side is cut off, "
            "unless a set asks for places in the image, and features are class tokens"
        )


def is_reference(text: str) -> bool:
    """Whether a person means a registered model; a folder of such a name is given as ./NAME."""
    return ModelReference.parse(text.removeprefix(URI)) is not None


def find_weights(given: str, root: Path) -> NamedWeights:
    """Find weights by `NAME@ALIAS`, `NAME/NUMBER` or their folder; registered ones are downloaded and checked.

    Raises:
        ConfigError: neither a reference nor a weights folder.
        RegistryError: MLflow is not named, or the version's files are not those that were registered.
        TrackingError: MLflow does not answer, has no such version, or its bytes are not what was registered.
    """
    asked = ModelReference.parse(given.removeprefix(URI))
    if asked is not None:
        return _registered(asked, root)
    folder = Path(given)
    if not (folder / WEIGHTS_FILE).is_file():
        what = f"no {WEIGHTS_FILE} in there" if folder.is_dir() else "no such folder"
        raise ConfigError(f"{given}: {what}; give NAME@ALIAS, NAME/NUMBER or a weights folder")
    facts = {PASSPORT: f"none: from the weights folder {folder.resolve().name}, which no registry knows"}
    return NamedWeights(given, folder, None, facts | {str(Tag.WEIGHTS_SHA256): sha256_file(folder / WEIGHTS_FILE)})


def _registered(asked: ModelReference, root: Path) -> NamedWeights:
    client = registry_client()
    with reported():
        version = asked.find(client)
    exact = ModelReference.of_version(version)  # an alias may move meanwhile
    folder = download_weights(exact.uri, root)
    facts = {PASSPORT: exact.uri, **{str(tag): version.tags[tag] for tag in STATED if tag in version.tags}}
    return NamedWeights(str(exact), folder, _preprocessing(exact, version), facts)


def _preprocessing(exact: ModelReference, version: ModelVersion) -> Preprocessing | None:
    """As evaluated, of the model's checked description; None where it is not a model of ours."""
    from mlflow.artifacts import download_artifacts

    with tempfile.TemporaryDirectory() as temporary, reported():
        path = download_artifacts(f"{exact.uri}/{MODEL_FILE}", dst_path=temporary, tracking_uri=server_uri())
        data = Path(path).read_bytes()
    stated = json.loads(version.tags.get(Tag.FILES, "{}")).get(MODEL_FILE)
    if stated and stated != hashlib.sha256(data).hexdigest():
        raise RegistryError(f"{exact}: its {MODEL_FILE} is not the file that was registered; do not use it")
    config = yaml.safe_load(data)["flavors"]["python_function"].get("config") or {}
    return Preprocessing.model_validate(config["preprocessing"]) if "preprocessing" in config else None
