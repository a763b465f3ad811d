"""Documents in standard formats: valid by the library or schema of each, the same bytes each time, nothing private."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import boto3
import mlflow
import pytest
import typer
from mlflow import MlflowClient
from typer.testing import CliRunner

from components.core.config import ConfigError
from components.lineage.lock_file import RecordError, file_md5
from components.lineage.trace_tree import Node
from components.registry.documents.graph import Graph, public, read_graph
from components.registry.documents.registered import write_documents
from components.registry.documents.training_content import PERSON
from components.registry.documents.write import DOCUMENTS, KINDS, make_documents
from components.registry.making import Making
from flows.commands.decorators import command
from flows.commands.documents import documents
from tests.registry.conftest import git
from tests.registry.made_up import making, review

SHARDS = {"00000.tar": "a" * 64, "00001.tar": "b" * 64}
PRIVATE = ("/home", "ann@", "ann/", '"ann"', "s3cret", "token=")


def run_with_commits(root: Path) -> str:
    """A run of two stages, one of which took 90 s; returns the last commit."""
    git(root, "init", "-q")
    for subject in ("Run 20260102-030405-abcd", "curate: restored", "adapt: ran for 90 s"):
        git(root, "commit", "-q", "--allow-empty", "--date", "2026-01-02T03:04:05Z", "-m", subject)
    return subprocess.check_output(["git", "-C", str(root), "rev-parse", "HEAD"], text=True).strip()


def tree() -> Node:
    """A released version, as `trace` shows it, with what must not get out."""
    curated, pool, adapted = "6" * 32 + ".dir", "4" * 32 + ".dir", "2" * 32 + ".dir"
    params = {"adapt": {"weights": "/home/ann/my weights.pth", "uri": "s3://ann:s3cret@host/w?token=1", "steps": 20}}
    adapt = {"deps": {"data/curated": curated}, "outs": {"models/adapted": adapted}, "params": params}
    curate = {"deps": {"data/pool/photos/ab12": pool}, "outs": {"data/curated": curated}, "params": {"seed": 7}}
    brought = {"source": "/home/ann/photos", "ingested_by": "ann", "ingested_at": "2026-01-01T00:00:00Z"}
    children = [
        Node("stage", "adapt", {"command": "python -m components adapt --log /home/ann/log", **adapt}),
        Node("stage", "curate", {"command": "python -m components curate", **curate}),
        Node("stage", "code", {"command": "python -m components.lineage.code"}),
        Node("code", "1 paths", {"paths": {"components": "9" * 32}}),
        _data("curated", "data/curated", curated, {}),
        _data("pool", "data/pool/photos/ab12", pool, brought),
    ]
    commit = Node("commit", "c" * 40, {"author": "ann <ann@example.org>"}, children)
    parent = Node("parent", "/home/ann/models/pretrained", children=[Node("commit", "other")])
    candidate = Node("version", "tiny-candidates/1", children=[Node("run", "r", {"user": "ann"}), parent, commit])
    return Node("version", "tiny/1", {"aliases": ["champion"]}, [Node("event", "promote 1"), candidate])


def _data(kind: str, path: str, dvc_id: str, brought: dict[str, str]) -> Node:
    sources = [Node("source", "photos", {"license": "CC0-1.0", "images": 3})]
    sources += [Node("source", "museum", {"license": "as agreed by letter", "images": 1})]
    return Node(kind, path, {"dvc": dvc_id, "manifest_sha256": "5" * 64, **brought}, sources)


@pytest.fixture
def made(tmp_path: Path) -> Making:
    told = making()
    origin = told.origin.__class__(**{**vars(told.origin), "commit": run_with_commits(tmp_path)})
    return told.model_copy(
        update={"origin": origin, "shards": SHARDS, "parent": ("/home/ann/models/pretrained", "7" * 64)}
    )


@pytest.fixture
def graph(made: Making, tmp_path: Path) -> Graph:
    return read_graph("tiny-candidates", tree(), made, review().facts, tmp_path)


def text(graph: Graph, name: str) -> str:
    return make_documents(graph)[name].decode()


def document(graph: Graph, name: str) -> Any:
    return json.loads(text(graph, name))


def test_the_same_model_gives_the_same_bytes_and_nothing_private(graph: Graph, made: Making, tmp_path: Path):
    first = make_documents(graph)
    assert first.keys() == KINDS.keys()
    turned = tree()
    turned.children[1].children[2].children.reverse()  # sources and stages in another order
    stages = [node for node in turned.children[1].children[2].children if node.kind == "stage"]
    assert [stage.name for stage in stages] == ["code", "curate", "adapt"]
    again = make_documents(read_graph("tiny", tree(), made, review().facts, tmp_path))
    assert again == first
    for name, data in first.items():
        assert len(data) < 20_000, name
        for word in (*PRIVATE, str(tmp_path)):
            assert word not in data.decode(), name


def test_paths_and_logins_are_taken_out():
    assert public("/home/ann/my photos/w.pth") == "local:w.pth"
    assert public(["~/x/y", 3, None, {"a": "file:///home/ann/z"}]) == ["local:y", 3, None, {"a": "local:z"}]
    assert public("python a.py --w=/home/ann/w.pth '/srv/b c'") == "python a.py --w=local:w.pth 'local:b c'"
    assert public("s3://key:secret@host/a/b?sig=1#x") == "s3://host/a/b"
    assert public("models:/tiny/3") == "models:/tiny/3"
    assert public("data/pool/photos") == "data/pool/photos"


def test_croissant_is_valid_and_lists_every_file_with_its_hash(graph: Graph):
    import mlcroissant

    stated = document(graph, "croissant.json")
    dataset = mlcroissant.Dataset(jsonld=stated)
    assert not dataset.metadata.ctx.issues.errors
    assert not dataset.metadata.ctx.issues.warnings
    assert dataset.metadata.ctx.conforms_to.value.endswith("/1.1")
    files = {file.id: file.sha256 for file in dataset.metadata.file_objects}
    assert files == {"manifest.parquet": "5" * 64, **SHARDS}
    (records,) = dataset.metadata.record_sets
    assert {"images/image_id", "images/license", "images/similarity"} <= {field.id for field in records.fields}
    assert stated["license"] == ["CC0-1.0", "as agreed by letter"]
    assert stated["prov:wasDerivedFrom"][0]["@id"] == "urn:pedigree:data/pool/photos/ab12"


def test_cyclonedx_passes_the_schema_of_1_7_with_its_model_card(graph: Graph):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator = JsonStrictValidator(SchemaVersion.V1_7)
    assert validator.validate_str(text(graph, "bom.cdx.json")) is None
    bom = document(graph, "bom.cdx.json")
    model = bom["metadata"]["component"]
    assert model["hashes"] == [{"alg": "SHA-256", "content": "3" * 64}]
    assert {"type": "knn_top1", "value": "0.804"} in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert model["modelCard"]["modelParameters"]["outputs"] == [{"format": "float32 vector of 32"}]
    licenses = next(part for part in bom["components"] if part["name"] == "data/curated")["licenses"]
    assert licenses == [{"expression": "CC0-1.0"}, {"license": {"name": "as agreed by letter"}}]
    model["modelCard"]["modelParameters"]["approach"]["type"] = "by magic"
    assert validator.validate_str(json.dumps(bom)) is not None


def test_slsa_has_what_its_specification_requires(graph: Graph):
    """As https://slsa.dev/spec/v1.2/provenance and in-toto's Statement v1 say; no library here knows them."""
    stated = document(graph, "slsa.intoto.json")
    assert stated["_type"] == "https://in-toto.io/Statement/v1"
    assert stated["predicateType"] == "https://slsa.dev/provenance/v1"
    assert stated["subject"] == [{"name": "models/adapted/model.safetensors", "digest": {"sha256": "3" * 64}}]
    build, details = stated["predicate"]["buildDefinition"], stated["predicate"]["runDetails"]
    assert {"buildType", "externalParameters"} <= build.keys()
    assert details["builder"]["id"]
    for dependency in build["resolvedDependencies"]:
        assert dependency.keys() & {"uri", "digest", "content"}
        assert all(len(value) in (40, 64) for value in dependency.get("digest", {}).values())
    names = {dependency["name"]: dependency.get("digest") for dependency in build["resolvedDependencies"]}
    assert names["data/curated/manifest.parquet"] == {"sha256": "5" * 64}
    assert names["local:pretrained"] == {"sha256": "7" * 64}
    assert [step["name"] for step in build["internalParameters"]["steps"]] == ["curate", "adapt"]
    assert details["metadata"]["startedOn"] < details["metadata"]["finishedOn"]


def test_prov_is_read_and_written_again_by_its_library(graph: Graph):
    from prov.model import ProvDocument

    read = ProvDocument.deserialize(io.StringIO(text(graph, "prov.json")))
    again = ProvDocument.deserialize(io.StringIO(read.serialize(format="json")))
    assert read == again
    activities = [record for record in read.get_records() if record.get_type().localpart == "Activity"]
    assert {str(record.identifier) for record in activities} == {
        "pedigree:20260102-030405-abcd/curate", "pedigree:20260102-030405-abcd/adapt",
    }  # fmt: skip
    assert "wasDerivedFrom(pedigree:data/curated, pedigree:data/pool/photos/ab12" in read.get_provn()
    used = {
        entity for relation in document(graph, "prov.json")["used"].values() for entity in [relation["prov:entity"]]
    }
    assert used <= document(graph, "prov.json")["entity"].keys()


def test_openlineage_events_are_those_of_its_classes(graph: Graph):
    from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
    from openlineage.client.generated.dataset_version_dataset import DatasetVersionDatasetFacet
    from openlineage.client.generated.job_type_job import JobTypeJobFacet
    from openlineage.client.serde import Serde

    def versions(kind: type, datasets: list[dict[str, Any]], **empty: None) -> list[Any]:
        facet = {d["name"]: d["facets"]["version"]["datasetVersion"] for d in datasets}
        made = {n: DatasetVersionDatasetFacet(v, producer=producer) for n, v in facet.items()}
        return [kind(namespace="pedigree", name=name, facets={"version": made[name]}, **empty) for name in facet]

    events = [json.loads(line) for line in text(graph, "openlineage.jsonl").splitlines()]
    producer = events[0]["producer"]
    for event in events:
        kind = event["job"]["facets"]["jobType"]
        facet = JobTypeJobFacet(
            processingType=kind["processingType"], integration=kind["integration"], jobType=kind["jobType"],
            producer=producer,
        )  # fmt: skip
        theirs = RunEvent(
            eventTime=event["eventTime"],
            eventType=RunState[event["eventType"]],
            producer=producer,
            run=Run(runId=event["run"]["runId"], facets={}),
            job=Job(namespace=event["job"]["namespace"], name=event["job"]["name"], facets={"jobType": facet}),
            inputs=versions(InputDataset, event["inputs"], inputFacets=None),
            outputs=versions(OutputDataset, event["outputs"], outputFacets=None),
        )
        assert json.loads(Serde.to_json(theirs)) == event
    told = [(event["job"]["name"], event["eventType"]) for event in events]
    assert told == [("curate", "COMPLETE"), ("adapt", "START"), ("adapt", "COMPLETE")]
    assert events[1]["run"]["runId"] == events[2]["run"]["runId"] != events[0]["run"]["runId"]


def test_the_training_content_has_all_parts_and_marks_what_a_person_must_fill_in(graph: Graph):
    summary = text(graph, "training-content.md")
    parts = [line.split()[1].rstrip(".") for line in summary.splitlines() if line.startswith("##")]
    assert parts == ["1", "1.1", "1.2", "1.3", "2", "2.1", "2.2", "2.3", "2.4", "2.5", "2.6", "3", "3.1", "3.2", "3.3"]
    assert f"Name and contact: {PERSON}" in summary
    assert "| photos | CC0-1.0 | 3 |" in summary
    assert "less than 1 million images (4 images in training, of 4 collected)" in summary
    assert "Latest date of acquisition: 2026-01-01;" in summary
    assert f"`data/pool/photos/ab12`: files of the provider; {PERSON}, taken in on 2026-01-01" in summary
    assert "too_small: 2 images" in summary


def test_an_origin_of_which_too_little_is_known_is_refused(made: Making, tmp_path: Path):
    node = tree()
    curated = next(child for child in node.walk() if child.kind == "curated")
    curated.children, curated.missing = [], ["S3 does not answer"]
    with pytest.raises(RecordError, match=r"^commit \w{12}: stages or training set are not known: S3 does not answer$"):
        read_graph("tiny", node, made, review().facts, tmp_path)
    with pytest.raises(RecordError, match="not in the git repository here; fetch the branch of its run"):
        read_graph("tiny", tree(), making(), review().facts, tmp_path)


def store(root: Path, folder: str) -> None:
    """Put a folder into the bucket as DVC does."""
    client, bucket = boto3.client("s3"), os.environ["PEDIGREE_DATA_BUCKET"]
    files = sorted(path for path in (root / folder).rglob("*") if path.is_file())
    listing = [{"md5": file_md5(path), "relpath": path.relative_to(root / folder).as_posix()} for path in files]
    data = json.dumps(sorted(listing, key=lambda entry: entry["relpath"]), sort_keys=True).encode()
    objects = {hashlib.md5(data).hexdigest() + ".dir": data} | {file_md5(path): path.read_bytes() for path in files}
    for name, body in objects.items():
        client.put_object(Bucket=bucket, Key=f"files/md5/{name[:2]}/{name[2:]}", Body=body)


@pytest.mark.stack
def test_registered_documents_are_those_that_the_trace_gives(finished, tmp_path: Path, monkeypatch):
    root, name = finished["root"], f"{finished['name']}-candidates"
    for folder in ("data/curated", "data/pool/photos/ab12"):
        store(root, folder)
    found = write_documents(f"{name}/1", root, tmp_path / "out")
    assert found.differing == []
    assert {path.name for path in (tmp_path / "out").iterdir()} == KINDS.keys()
    version = MlflowClient().get_model_version(name, "1")
    kept = Path(mlflow.artifacts.download_artifacts(f"models:/{name}/1/artifacts/{DOCUMENTS}", dst_path=str(tmp_path)))
    shards = json.loads((kept / "croissant.json").read_text())["distribution"]
    shard = root / "data/curated" / shards[1]["name"]
    assert shards[1]["sha256"] == hashlib.sha256(shard.read_bytes()).hexdigest()
    assert (
        f"[documents](#/experiments/{MlflowClient().get_run(version.run_id).info.experiment_id}" in version.description
    )
    page = MlflowClient().download_artifacts(version.run_id, "passport.html", str(tmp_path))
    assert f'<a href="{DOCUMENTS}/bom.cdx.json">' in Path(page).read_text()
    monkeypatch.chdir(root)
    app = typer.Typer()
    app.command("documents")(command(checkout=False)(documents.__wrapped__))
    done = CliRunner().invoke(app, [f"{finished['name']}-small-candidates/1", "--out", str(tmp_path / "out"), "--json"])
    assert json.loads(done.stdout)["differing"] == []
    assert json.loads((tmp_path / "out/bom.cdx.json").read_text())["metadata"]["component"]["name"].endswith("-small")
    (tmp_path / "out/mine.txt").write_text("")
    with pytest.raises(ConfigError, match=r"holds mine\.txt, which is no document of these"):
        write_documents(f"{name}/1", root, tmp_path / "out")
