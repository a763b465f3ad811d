"""Where an image is used: a git repository of two runs, with its data on the real S3 and its models in real MLflow."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from components.core.git import git
from components.core.layout import Layout
from components.core.storage import s3_client
from components.data.manifest import (
    CURATED_SCHEMA,
    MANIFEST,
    POOL_SCHEMA,
    QUARANTINE_SCHEMA,
    REJECTED,
    REJECTED_SCHEMA,
    read_manifest,
    write_manifest,
    write_table,
)
from components.data.shards import ShardReader
from components.data.stream import ImageStream
from components.lineage import where_used
from components.lineage.data_diff import compare, find_side
from components.lineage.image_index import FOLDER, Query
from components.lineage.provenance import Tag, collect_origin
from components.lineage.where_used import EVALUATED, POOLED, TRAINED, Search, Uses, draws, find
from flows.cli import app
from tests.data.test_stream import write_set
from tests.lineage.test_seen import ADAPTED, PRETRAINED, STREAM, TRAININGS, push, write_weights

pytestmark = pytest.mark.stack

POOL, EVALUATION, CURATED = "data/pool/photos/ab12", "data/evaluation/photos/ab12", "data/curated"
ONE, TWO = (
    "20260101-000000-aaaa",
    "20260102-000000-bbbb",
)  # of run one the image is in the curated set, of two it is not


@dataclass
class Case:
    root: Path
    prefix: str
    name: str
    image: str
    test_image: str
    file: Path
    curated: list[str]  # DVC ids, of run one and two
    drawn: dict[str, list[int]]  # steps with the image, by weights of run one


@pytest.fixture(scope="module")
def case(stack, tmp_path_factory) -> Case:
    root, prefix = tmp_path_factory.mktemp("used"), f"used-{uuid.uuid4().hex[:10]}"
    name = prefix.replace("used", "where")
    git(root, "init", "--quiet", "--initial-branch", "main")
    for key, value in (("user.name", "Tess"), ("user.email", "t@example.org")):
        git(root, "config", key, value)
    url = f"s3://{os.environ['PEDIGREE_DATA_BUCKET']}/{prefix}"
    (root / ".dvc").mkdir()
    (root / ".dvc/config").write_text(f"[core]\nremote = s\n['remote \"s\"']\nurl = {url}\n")
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / ".gitignore").write_text("/data/*/*/*/\n/data/curated\n/models\n/.pedigree\n")
    rows = read_manifest(write_set(root / CURATED) / MANIFEST)
    image, test_image = rows["image_id"][8].as_py(), "e" * 64
    stored = ShardReader(root / CURATED).read(*[rows[key][8].as_py() for key in ("shard", "offset", "length")])
    file = tmp_path_factory.mktemp("photo") / "photo.jpg"
    file.write_bytes(stored)
    _ingest(root, prefix, rows, test_image)
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "Pool")
    drawn, curated = {}, []
    for run in (ONE, TWO):
        git(root, "checkout", "--quiet", "-b", f"runs/{run}", "main")
        curated.append(_run(root, prefix, run, rows, image))
        if run == ONE:
            drawn = {path: _steps(root, path, image) for path in (ADAPTED, PRETRAINED)}
            tags = collect_origin(root, ADAPTED).tags()
            _register(f"{name}-candidates", tags | {Tag.PARENT: PRETRAINED, Tag.PARENT_SHA256: "0"})
            sha256 = tags[Tag.WEIGHTS_SHA256]
        else:
            tags = collect_origin(root, ADAPTED).tags()
            _register(
                f"{name}-small-candidates", tags | {Tag.PARENT: f"{name}-candidates/1", Tag.PARENT_SHA256: sha256}
            )
    git(root, "checkout", "--quiet", "main")
    for folder in ("data/curated", "models", POOL, EVALUATION):
        shutil.rmtree(root / folder)
    return Case(root, prefix, name, image, test_image, file, curated, drawn)


def _ingest(root: Path, prefix: str, rows: pa.Table, test_image: str) -> None:
    """The pool and the evaluation set, as `dvc add` and ingest leave them; of the pool one file was refused."""
    known = rows.select(POOL_SCHEMA.names).to_pylist()
    for number, row in enumerate(known):
        row |= {
            "source": "photos",
            "source_uri": f"beach/{number}.jpg",
            "license": "CC0-1.0" if number else "CC-BY-4.0",
        }
    refused = {"source_uri": "beach/icon.gif", "source": "photos", "reason": "animated", "detail": "2 frames"}
    refused["image_id"] = "a" * 64
    tested = known[0] | {"image_id": test_image, "source_uri": "beach/test.jpg", "split": "test"}
    for folder, images in ((POOL, known), (EVALUATION, [tested])):
        write_manifest(pa.Table.from_pylist(images, POOL_SCHEMA), root / folder / MANIFEST)
        quarantine = pa.Table.from_pylist([refused] if folder == POOL else [], QUARANTINE_SCHEMA)
        write_table(quarantine, QUARANTINE_SCHEMA, root / folder / REJECTED)
        md5 = push(root, folder, prefix)["md5"]
        (root / f"{folder}.dvc").write_text(yaml.safe_dump({"outs": [{"md5": md5, "path": "ab12", "hash": "md5"}]}))
        told = {"source": "/in/photos", "source_version": "v1", "ingested_at": "2026-01-02T00:00:00Z"}
        (root / f"{folder}.provenance.json").write_text(json.dumps(told | {"ingested_by": "ina"}))


def _run(root: Path, prefix: str, run: str, rows: pa.Table, image: str) -> str:
    """The commits of a run that curated and trained; returns the DVC id of its curated set."""
    git(root, "commit", "--quiet", "--allow-empty", "--message", f"Run {run}")
    out = []
    if run == TWO:
        kept = [row for row in rows.to_pylist() if row["image_id"] != image]
        out = [{"image_id": image, "source": "photos", "source_uri": "beach/8.jpg", "reason": "near_duplicate",
                "duplicate_of": kept[0]["image_id"], "similarity": 0.75, "detail": "of a group of 2"}]  # fmt: skip
        write_manifest(pa.Table.from_pylist(kept, CURATED_SCHEMA), root / CURATED / MANIFEST)
    write_table(pa.Table.from_pylist(out, REJECTED_SCHEMA), REJECTED_SCHEMA, root / CURATED / REJECTED)
    digest = ImageStream(root / CURATED, STREAM, 0).digest
    write_weights(root, PRETRAINED, digest, init=None)
    write_weights(root, ADAPTED, digest)
    (root / ADAPTED / "model.safetensors").write_bytes(run.encode())
    outs = {path: push(root, path, prefix) for path in (CURATED, ADAPTED, PRETRAINED)}
    stages = {
        "curate": {"outs": [outs[CURATED]]},
        "pretrain": {"deps": [outs[CURATED]], "outs": [outs[PRETRAINED]]},
        "adapt": {"deps": [outs[CURATED], outs[PRETRAINED]], "outs": [outs[ADAPTED]]},
    }
    for done in ("curate", "pretrain", "adapt"):
        known = {name: stages[name] for name in stages if list(stages).index(name) <= list(stages).index(done)}
        (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": known}))
        git(root, "add", "dvc.lock")
        git(root, "commit", "--quiet", "--message", f"{done}: ran for 0 s")
    return outs[CURATED]["md5"]


def _steps(root: Path, path: str, image: str) -> list[int]:
    steps, size, seed = TRAININGS[path]
    stream = ImageStream(root / CURATED, STREAM, seed)
    return [at // size + 1 for at in range(steps * size) if stream.image(at).image_id == image]


def _register(name: str, tags: dict[str, str]) -> None:
    client = MlflowClient()
    client.create_registered_model(name)
    client.create_model_version(name, "s3://elsewhere/m", tags=tags)


def of_kind(uses: Uses, kind: str) -> dict[str, Any]:
    return {use.data.dvc: use for use in uses.data if use.data.kind == kind}


def test_an_image_leads_to_data_runs_models_and_steps(case: Case):
    uses = find(case.root, Query(frozenset([case.image])))
    (pool,) = of_kind(uses, "pool").values()
    assert (pool.data.path, pool.kept.num_rows, pool.runs) == (POOL, 1, [ONE, TWO])
    assert pool.rows.to_pylist()[0]["source_uri"] == "beach/8.jpg"
    assert where_used.brought(case.root, pool)["ingested_by"] == "ina"
    curated = of_kind(uses, "curated")
    kept, left = (curated[dvc] for dvc in case.curated)
    assert (kept.runs, left.runs) == ([ONE], [TWO])
    assert [(row["kept"], row["reason"]) for row in kept.rows.to_pylist()] == [(True, "balanced")]
    (row,) = left.rows.to_pylist()
    assert (row["kept"], row["reason"], row["similarity"], left.kept.num_rows) == (False, "near_duplicate", 0.75, 0)
    tip = git(case.root, "rev-parse", f"runs/{ONE}")
    assert kept.commits[-1] == tip
    assert len(kept.commits) == 3
    assert not of_kind(uses, "evaluation")
    teacher, student = (m for m in uses.models if m.reference.startswith(case.name))
    assert (teacher.reference, teacher.relations, teacher.teachers) == (
        f"{case.name}-candidates/1", (TRAINED, POOLED), ())  # fmt: skip
    assert (student.relations, student.teachers) == ((POOLED,), (f"{case.name}-candidates/1",))
    found, unknown = draws(uses, case.root)
    assert unknown == []
    for draw in found[teacher.reference]:
        steps = case.drawn[draw.weights]
        assert (draw.draws, draw.first, draw.last) == (len(steps), steps[0], steps[-1])
    assert [draw.weights for draw in found[teacher.reference]] == [ADAPTED, PRETRAINED]


def test_an_evaluation_image_and_a_refused_file(case: Case):
    uses = find(case.root, Query(frozenset([case.test_image])))
    assert [use.data.kind for use in uses.data] == ["evaluation"]
    assert all(m.relations == (EVALUATED,) and not m.learned for m in uses.models if m.reference.startswith(case.name))
    refused = find(case.root, Query(frozenset(["a" * 64])))
    assert [row["detail"] for use in refused.data for row in use.left_out.to_pylist()] == ["2 frames"]
    assert not refused.models


def test_a_source_a_license_a_uri_and_the_beginning_of_an_id(case: Case):
    search = Search(case.root)
    source, license_ = search.query("photos"), search.query("CC-BY-4.0")
    assert (source, license_) == (Query(source="photos"), Query(license="CC-BY-4.0"))
    (pool,) = of_kind(search.find(source), "pool").values()
    assert (pool.kept.num_rows, pool.left_out.num_rows) == (40, 1)
    assert [use.kept.num_rows for use in search.find(license_).data] == [1, 1]  # the evaluation set has one too
    assert search.query("8.jpg") == Query(uri="8.jpg")
    assert case.image in search.find(Query(uri="8.jpg")).image_ids
    assert search.find(Query(uri="beach/8.jpg")).image_ids == [case.image]
    assert search.query(case.image[:10]) == search.query(str(case.file)) == Query(frozenset([case.image]))
    assert search.find(Query(frozenset(["0" * 64]))).data == []


def test_a_version_that_is_stored_nowhere_is_a_fault_only_while_a_branch_has_it(case: Case):
    query, lost = Query(frozenset([case.image])), "c" * 32 + ".dir"
    tip, file = git(case.root, "rev-parse", "HEAD"), (case.root / POOL).with_name("cd34.dvc")
    try:
        file.write_text(yaml.safe_dump({"outs": [{"md5": lost, "path": "cd34", "hash": "md5"}]}))
        git(case.root, "add", str(file))
        git(case.root, "commit", "--quiet", "--message", "A pool that was never pushed")
        held = find(case.root, query)
        git(case.root, "rm", "--quiet", str(file))
        git(case.root, "commit", "--quiet", "--message", "Without it")
        left = find(case.root, query)
    finally:
        git(case.root, "reset", "--quiet", "--hard", tip)
    assert [len([line for line in lines if lost in line]) for lines in (held.unknown, held.given_up)] == [1, 0]
    assert [len([line for line in lines if lost in line]) for lines in (left.unknown, left.given_up)] == [0, 1]


def test_the_index_answers_without_the_manifests_and_is_made_again(case: Case):
    query = Query(frozenset([case.image]))
    before = find(case.root, query)
    bucket, client = os.environ["PEDIGREE_DATA_BUCKET"], s3_client()
    md5 = case.curated[0]
    key = f"{case.prefix}/files/md5/{md5[:2]}/{md5[2:]}"
    body = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    client.delete_object(Bucket=bucket, Key=key)
    try:
        assert find(case.root, query).data[0].rows.equals(before.data[0].rows)
        index = Layout(case.root).cache(FOLDER)
        (index / f"{md5.removesuffix('.dir')}.parquet").write_bytes(b"damaged")
        (line,) = [line for line in find(case.root, query).unknown if md5 in line]
        assert f"{CURATED} ({md5}): not searched: s3://{bucket}/{key}: no such object" in line
        client.put_object(Bucket=bucket, Key=key, Body=body[:-1] + b" ")
        (line,) = [line for line in find(case.root, query).unknown if md5 in line]
        assert "its bytes have another md5" in line
    finally:
        client.put_object(Bucket=bucket, Key=key, Body=body)
    shutil.rmtree(index)
    again = find(case.root, query)
    assert [use.data for use in again.data] == [use.data for use in before.data]


def test_two_data_versions_are_compared(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one, two = (find_side(name, case.root, pool=False) for name in (ONE, f"{case.curated[1]}"))
    found = compare(one, two, case.root)
    assert (found.images, found.added, found.removed, found.changed) == ((40, 39), [], [case.image], 0)
    assert found.changes == [("in: balanced", "out: near_duplicate", 1)]
    assert [(s.value, s.before, s.after, s.share) for s in found.shifts["source"]] == [("a", 40, 39, 0.0)]
    back = compare(two, one, case.root)
    assert (back.added, back.removed) == ([case.image], [])
    assert compare(one, one, case.root).changes == []
    pool = find_side(f"runs/{ONE}", case.root, pool=True)
    assert [data.path for data in pool.data] == [POOL]
    assert compare(one, pool, case.root).changes[-1][:2] != ("in: balanced", "in: balanced")
    monkeypatch.chdir(case.root)
    page = tmp_path / "diff.html"
    done = CliRunner().invoke(app, ["diff", ONE, TWO, "--html", str(page)])
    assert done.exit_code == 0, done.output
    assert "40 -> 39 images: 0 added, 1 removed, 0 for another reason" in done.stdout
    assert page.read_text().count("data:image/jpeg;base64,") == 1
    told = json.loads(CliRunner().invoke(app, ["diff", ONE, TWO, "--json"]).stdout)
    assert told["removed"] == [case.image]
    for wrong, message in [
        ("nothing", "no data version"),
        ("main", "has no curated set"),
        ("0" * 32, "no commit here"),
    ]:
        refused = CliRunner().invoke(app, ["diff", ONE, wrong])
        assert (refused.exit_code, message in refused.stderr) == (2, True), refused.stderr


def test_command(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(case.root)
    monkeypatch.setenv("COLUMNS", "80")

    def where_used(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["where-used", *arguments])

    told = json.loads(where_used(str(case.file), "--json").stdout)
    assert told["image_ids"] == [case.image]
    assert {item["kind"]: item["reasons"] for item in told["data"] if item["dvc"] != case.curated[1]} == {
        "pool": {"in: stored": 1}, "curated": {"in: balanced": 1}}  # fmt: skip
    shown = where_used(case.image[:12]).stdout
    for text in ("in 1 pool snapshots", "ingested 2026-01-02 by ina from /in/photos", "out: near_duplicate"):
        assert text in shown
    steps = case.drawn[PRETRAINED]
    assert f"{PRETRAINED}: drawn {len(steps)} times, step {steps[0]} to {steps[-1]} of 6" in shown
    (tmp_path / "notes.jpg").write_text("no image")
    refused = where_used(str(tmp_path / "notes.jpg"))
    assert refused.exit_code == 2
    assert "notes.jpg: not an image that Pedigree can read" in refused.stderr
    shutil.copy(case.file, tmp_path / "saved.jpg")
    with (tmp_path / "saved.jpg").open("ab") as file:
        file.write(b" ")
    assert where_used(str(tmp_path / "saved.jpg")).stdout.splitlines()[1:] == [
        "near copies were not looked for: no run here keeps embeddings"
    ]
