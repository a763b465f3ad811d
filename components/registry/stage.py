"""The register stage: the adapted model and each student become candidates in the registry, with their passports."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pyarrow as pa
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from components.core.errors import DatasetError
from components.core.git import person
from components.core.layout import RELATIVE, Layout
from components.core.references import CANDIDATES, ModelReference
from components.core.stage_runs import stage_run
from components.core.storage import sha256_file
from components.core.tracking import log_input, tag_run
from components.core.user import user_name
from components.data.manifest import read_manifest
from components.data.shards import ShardReader
from components.lineage.anchors import set_anchor
from components.lineage.audit_anchors import anchor_model
from components.lineage.audit_chain import REGISTER, Head
from components.lineage.audit_log import Entry, Event, open_log
from components.lineage.dvc_remote import Remote
from components.lineage.lock_file import Record
from components.lineage.provenance import CURATED, DECISION_TAGS, WEIGHTS_FILE, Origin, Tag, collect_origin
from components.lineage.trace_data import workspace_tree
from components.model.export import read_provenance
from components.registry.card import render_card
from components.registry.config import RegisterConfig
from components.registry.differences import Side
from components.registry.documents.graph import read_graph
from components.registry.documents.write import DOCUMENTS, make_documents
from components.registry.making import Making, parameters, read_curation, read_shards, read_trainings, sources
from components.registry.measure import collect_facts
from components.registry.passport import differences_from, render_passport
from components.registry.publish import (
    PASSPORT,
    Candidate,
    RegistryError,
    one_line_errors,
    publish,
    registered,
    registry_client,
)
from components.registry.review import Review, review_at_registration
from components.registry.standing import address, resolve

log = logging.getLogger(__name__)

PAGES = {"passport": PASSPORT, "documents": DOCUMENTS}  # of each version's run, by what is written on their links
PRETRAINED, TEACHER = str(RELATIVE.weights("pretrained")), str(RELATIVE.weights("adapted"))


def run(config: RegisterConfig, root: Path, seed: int, name: str) -> dict[str, Any]:
    """Register `models/adapted` as NAME-candidates and each `models/students/S` as NAME-S-candidates.

    Returns:
        For `teacher` and each student: registered name, version, URI, digests, and the verdict of its gates.

    Raises:
        RegistryError: no server, or it refuses; weights or data that should be registered are missing.
        RecordError: the weights are not what `dvc.lock` records.
    """
    client = registry_client()
    if not os.environ.get("MLFLOW_RUN_ID"):  # called without components/cli.py, which opens the stage's run
        params = {"name": name, "seed": seed, **config.model_dump()}
        with stage_run("register", None, params, root):
            return run(config, root, seed, name)
    register = _Register(client, config, root, seed, name)
    with one_line_errors():
        pretrained = root / PRETRAINED / WEIGHTS_FILE
        teacher = register(name + CANDIDATES, TEACHER, "teacher", (PRETRAINED, _sha256(pretrained)))
        parent = (address(teacher), teacher.tags[Tag.WEIGHTS_SHA256])
        for folder in sorted(p for p in Layout(root).students.glob("[!.]*") if p.is_dir()):
            path = str(RELATIVE.students / folder.name)
            taught_by = teacher_of(client, root, folder) or parent
            register(f"{name}-{folder.name}{CANDIDATES}", path, folder.name, taught_by)
    return register.done


class _Register:
    """What the registrations of one run have in common."""

    def __init__(self, client: MlflowClient, config: RegisterConfig, root: Path, seed: int, name: str) -> None:
        self.client, self.config, self.root, self.seed, self.name = client, config, root, seed, name
        self.audit = open_log()
        try:
            self.curated = read_manifest(root / CURATED / "manifest.parquet")
        except DatasetError as error:
            raise RegistryError(f"the training set cannot be named: {error}") from None
        self.sources, self.inputs_logged = sources(self.curated), False
        self.shards = read_shards(root / CURATED, self.curated)
        self.done: dict[str, dict[str, Any]] = {}  # by model

    def __call__(self, name: str, path: str, item: str, parent: tuple[str, str]) -> ModelVersion:
        """Register one weights folder; `item` is its name among the evaluation reports."""
        _sha256(self.root / path / WEIGHTS_FILE)
        origin = collect_origin(self.root, path)
        if not self.inputs_logged:
            log_inputs(self.root, origin)
            self.inputs_logged = True
        facts = collect_facts(self.config, self.root, item, self.root / path)
        version = registered(self.client, name, origin.weights_sha256, facts)
        making, by_image = self._making(origin, parent), Layout(self.root).by_image(item)
        shown = address(version) if version else name
        reviewed = review_at_registration(facts, making, by_image, self.client, shown)
        events = self.audit.read(name) if self.audit else []  # before anything is registered: the log answers
        version = version or self._publish(reviewed, making, item)
        self._record(version, reviewed, origin, events)
        log.info("%s version %s: %s", name, version.version, reviewed.verdict)
        self.done[item] = _summary(version, reviewed)
        return version

    def _record(self, version: ModelVersion, reviewed: Review, origin: Origin, events: list[Entry]) -> None:
        """Write the event of a registration, also of one that a killed run left without it, and anchor it in MLflow."""
        subject, digest = address(version), version.tags[Tag.DIGEST]
        if self.audit is None or any((e.action, e.subject) == (REGISTER, subject) for e in events):
            return
        details = {
            "digest": digest,
            "weights_sha256": origin.weights_sha256,
            "commit": origin.commit,
            "branch": origin.branch,
            "anchor": version.tags.get(Tag.ANCHOR),
            "dvc_lock_sha256": origin.lock_sha256,
            "run": version.run_id,
            "verdict": reviewed.verdict,
            "gates": {gate.name: [gate.state, gate.text] for gate in reviewed.gates},
        }
        actor = person(self.root) or user_name()
        entry = self.audit.append(Event(version.name, REGISTER, subject, actor, details))
        anchor_model(self.client, version.name, version.name, Head(entry.sequence, entry.hash))

    def _making(self, origin: Origin, parent: tuple[str, str]) -> Making:
        weights = self.root / origin.weights_path
        return Making(
            origin=origin,
            run=origin.branch.removeprefix("runs/"),
            parent=parent,
            backbone=json.loads((weights / "config.json").read_text())["backbone"],
            preprocessing=self.config.preprocessing,
            seed=self.seed,
            trainings=read_trainings(self.root, origin.weights_path),
            curation=read_curation(self.root),
            sources=self.sources,
            shards=self.shards,
        )

    def _publish(self, reviewed: Review, making: Making, item: str) -> ModelVersion:
        """Register a new version under a run of its own, whose parameters and metrics are those of the model.

        MLflow compares two versions by the parameters of their runs.
        """
        origin, facts, record = making.origin, reviewed.facts, Record(self.root)
        given = {"name": self.name, **parameters(record, origin.weights_path)}
        with stage_run("register", item, given, self.root) as run:
            assert run.run_id is not None
            log_inputs(self.root, origin)
            here = Side(origin.tags(), record, self.curated)
            page = render_passport(reviewed, differences_from(reviewed, here, self.client, self.root), [])
            tree = workspace_tree(self.root, origin.tags())
            documents = make_documents(read_graph(reviewed.version, tree, making, facts, self.root))
            stated: dict[str, str] = {Tag.VERDICT: reviewed.verdict, Tag.SCORE: facts.score()}
            tag_run(stated)
            candidate = Candidate(
                name=reviewed.version,
                weights=self.root / origin.weights_path,
                origin=origin,
                tags={
                    Tag.PARENT: making.parent[0],
                    Tag.PARENT_SHA256: making.parent[1],
                    Tag.ANCHOR: set_anchor(self.root, making.run, origin.commit),
                    Tag.VALIDATION: f"passed for {facts.snapshots_passed} of {facts.snapshots} snapshots of the pool",
                    **stated,
                },
                card=render_card(reviewed, self._links(run.run_id, reviewed, page, documents)),
                passport=page,
                documents=documents,
                making=making,
                facts=facts,
                by_image=Layout(self.root).by_image(item),
                example=_smallest_image(self.curated, self.root / CURATED),
                preprocessing=self.config.preprocessing,
                with_heads=item == "teacher",
            )
            return publish(self.client, candidate, run.run_id)

    def _links(self, run_id: str, reviewed: Review, page: bytes, documents: Mapping[str, bytes]) -> dict[str, str]:
        """Put the pages among the run's artifacts, and return their places in MLflow's pages."""
        layout, run = Layout(self.root), self.client.get_run(run_id)
        experiment = f"#/experiments/{run.info.experiment_id}/runs"
        self.client.log_text(run_id, page.decode(), PASSPORT)
        for name, document in documents.items():
            self.client.log_text(run_id, document.decode(), f"{DOCUMENTS}/{name}")
        links = {name: f"{experiment}/{run_id}/artifacts/{path}" for name, path in PAGES.items()}
        reports = {"evaluation": layout.report("evaluate", reviewed.facts.model), "curation": layout.report("curate")}
        for name, folder in reports.items():
            if (report := folder / "report.html").is_file():
                self.client.log_artifact(run_id, str(report), name)
                links[name] = f"{experiment}/{run_id}/artifacts/{name}/{report.name}"
        links["run"] = f"{experiment}/{run.data.tags.get('mlflow.parentRunId', run_id)}"
        if reviewed.beside:
            other = resolve(self.client, reviewed.beside.version).run_id
            asked = urlencode({"runs": f'["{run_id}","{other}"]', "experiments": f'["{run.info.experiment_id}"]'})
            links[f"parameters beside {reviewed.beside.version}"] = f"#/compare-runs?{asked}"
        metric = reviewed.facts.main_metric()
        links[f"all versions by {metric}"] = f"{experiment}?{_sorted_by(metric, reviewed.facts.model)}"
        return links


def teacher_of(client: MlflowClient, root: Path, student: Path) -> tuple[str, str] | None:
    """Name and SHA-256 of the weights that taught a student, if they are not this run's `models/adapted`."""
    trained_with = read_provenance(student).get("config", {})
    teacher = trained_with.get("teacher_weights", TEACHER)
    if not isinstance(teacher, str) or teacher == TEACHER:
        return None
    if (taught_by := ModelReference.of_uri(teacher)) is None:
        return teacher, _sha256(root / teacher / WEIGHTS_FILE)
    return str(taught_by), taught_by.find(client).tags[Tag.WEIGHTS_SHA256]


def log_inputs(root: Path, origin: Origin) -> None:
    """Tell MLflow which data versions the open run's models come from."""
    remote = Remote(Record(root).remote_url())
    data = [("training", (origin.curated,)), ("pool", origin.pool), ("evaluation", origin.evaluation)]
    for context, found in data:
        for version in found:
            tags = {"sha256": version.manifest_sha256} if version.manifest_sha256 else {}
            log_input(version.path, version.dvc, remote.address(version.dvc), tags, context)


def _sorted_by(metric: str, model: str) -> str:
    """Query of MLflow's list of runs, which names each run's version; its lists of versions sort by time only."""
    name = f"attributes.run_name LIKE '%/register@{model}'"
    asked = {"searchFilter": name, "orderByKey": f"metrics.`{metric}`", "orderByAsc": "false"}
    return urlencode({"workflowType": "machine_learning", **asked})


def _summary(version: ModelVersion, reviewed: Review) -> dict[str, Any]:
    return {
        "name": version.name,
        "version": str(version.version),
        "uri": ModelReference.of_version(version).uri,
        "digest": version.tags[Tag.DIGEST],
        "weights_sha256": version.tags[Tag.WEIGHTS_SHA256],
        "verdict": reviewed.verdict,
        "failed_gates": [gate.name for gate in reviewed.failed],
        # Committed with the run: `pedigree verify` compares the registry with it. Of the files the digest is enough.
        "tags": {k: v for k, v in sorted(version.tags.items()) if k != Tag.FILES and k not in DECISION_TAGS},
    }


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise RegistryError(f"{path}: no such file; run the stage that makes it, for example `dvc repro`")
    return sha256_file(path)


def _smallest_image(curated: pa.Table, folder: Path) -> bytes:
    """The training image with the fewest bytes: the registered model's input example."""
    if not curated.num_rows:
        raise RegistryError(f"{folder}: the curated set is empty")
    row = curated.sort_by([("length", "ascending"), ("image_id", "ascending")]).slice(0, 1).to_pylist()[0]
    return ShardReader(folder).read(row["shard"], row["offset"], row["length"])
