"""Collect the facts of a model that is about to be registered: its reports, its record, its size and its speed."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from pathlib import Path
from statistics import median

import torch
from mlflow.exceptions import MlflowException

from components.core.git import try_git
from components.core.layout import RELATIVE, Layout
from components.core.mlflow_client import authenticated_user
from components.core.user import SHARED_LOGINS, user_name
from components.lineage.lock_file import Record
from components.lineage.provenance import POOL, WEIGHTS_FILE
from components.model.config import Preprocessing
from components.model.export import load_backbone
from components.model.pooling import features
from components.registry.config import GatesConfig, RegisterConfig
from components.registry.facts import Facts
from components.registry.publish import RegistryError

log = logging.getLogger(__name__)

SUMMARY = "summary.html"  # of a snapshot; ingest writes it once Great Expectations has passed all of it
TIMED, SECONDS = 20, 3.0  # images, at most


def collect_facts(config: RegisterConfig, root: Path, model: str, weights: Path) -> Facts:
    """Read what the run's reports and its record say of one model, and time it.

    Args:
        config: of the stage.
        root: the workspace.
        model: its name among the evaluations.
        weights: its folder.

    Raises:
        RegistryError: the model was not evaluated.
        RecordError: there is no `dvc.lock`.
        WeightsError: the weights do not load.
    """
    layout, record = Layout(root), Record(root)
    stages = record.stages()
    snapshots = record.tracked(POOL)
    curation = layout.result("curate")
    for path in (layout.result("evaluate", model), layout.by_image(model)):
        if not path.is_file():
            raise RegistryError(f"{path}: no such file; a candidate is registered with its evaluation: run `dvc repro`")
    copies = json.loads(curation.read_text()).get("evaluation_copies", {}) if curation.is_file() else {}
    return Facts(
        model=model,
        gates=config.gates.get(model, GatesConfig()),
        evaluation=json.loads(layout.result("evaluate", model).read_text()),
        champion=config.champions.get(model),
        scored_on=_read_by(stages, f"evaluate@{model}"),
        decontaminated_against=_read_by(stages, "embed"),
        evaluation_copies=sum(copies.values()),
        snapshots=len(snapshots),
        snapshots_passed=sum((root / path / SUMMARY).is_file() for path in snapshots),
        authors=_authors(root),
        size_mib=(weights / WEIGHTS_FILE).stat().st_size / 2**20,
        latency_ms=_latency_ms(weights, config.preprocessing),
        machine=f"{platform.machine()} with {os.cpu_count()} CPUs"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
    )


def _read_by(stages: dict[str, dict[str, list[dict[str, str]]]], stage: str) -> tuple[str, ...]:
    """DVC ids of the evaluation collections that a stage read."""
    deps = stages.get(stage, {}).get("deps", [])
    return tuple(dep["md5"] for dep in deps if Path(dep["path"]).is_relative_to(RELATIVE.evaluation))


def _authors(root: Path) -> tuple[str, ...]:
    """Who started the run: as git knows the person, as the machine does, and as MLflow does by a login of their own."""
    identity = [try_git(root, "config", key) for key in ("user.name", "user.email")]
    git = f"{identity[0]} <{identity[1]}>" if all(identity) else None
    try:
        login = authenticated_user()
    except MlflowException as error:
        said = str(error).splitlines()[0]
        log.warning("MLflow does not say who works here, so only git and the machine name the run's author: %s", said)
        login = None
    names = (git, user_name(), None if login in SHARED_LOGINS else login)
    return tuple(dict.fromkeys(name for name in names if name))


@torch.inference_mode()
def _latency_ms(weights: Path, preprocessing: Preprocessing) -> float:
    """Median time of one image to its feature, the first one not counted."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = load_backbone(weights).to(device)
    image = torch.zeros(1, 3, preprocessing.crop_size, preprocessing.crop_size, device=device)
    features(backbone, image, preprocessing)
    times: list[float] = []
    while len(times) < TIMED and sum(times) < SECONDS:
        begun = time.perf_counter()
        features(backbone, image, preprocessing).cpu()  # waits for the GPU
        times.append(time.perf_counter() - begun)
    return median(times) * 1000
