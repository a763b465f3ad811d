"""Trace anything that has an id: a registered model, a run, a commit, a data version or an image.

A model or a commit leads down to its sources. Data and images lead up as well: to the runs and the models they are in.
"""

from __future__ import annotations

from pathlib import Path

from components.core.config import ConfigError
from components.core.git import try_git
from components.core.references import DATA_ID, IMAGE_ID, RUN_ID, URI, ModelReference
from components.core.storage import sha256_file
from components.lineage.image_index import Query
from components.lineage.lock_file import Record, RecordError
from components.lineage.runs import BRANCHES, find_runs, registered
from components.lineage.trace import trace
from components.lineage.trace_data import DataTrace, LockTrace
from components.lineage.trace_tree import Node, Trace
from components.lineage.where_used import ModelUse, Search, Use, draws

FORMS = "NAME@ALIAS, NAME/NUMBER, a run id, a commit, a DVC id, an image id or an image file"


def trace_target(target: str, root: Path) -> Trace:
    """Find out what a thing was made from, and of data and images what they went into.

    Args:
        target: any of `FORMS`.
        root: a clone of the repository with all branches.

    Raises:
        ConfigError: none of these forms, or nothing of that name.
        RecordError: as of `trace`.
        TrackingError: MLflow does not answer.
    """
    name = target.removeprefix("runs/")
    if Path(target).is_file():
        return Trace(target, _image(sha256_file(Path(target)), root))
    if IMAGE_ID.fullmatch(target):
        return Trace(target, _image(target, root))
    if DATA_ID.fullmatch(target):
        return Trace(target, _data(f"{target.removesuffix('.dir')}.dir", root))
    if RUN_ID.fullmatch(name):
        return Trace(target, _pipeline(name, root))
    if ModelReference.parse(target.removeprefix(URI)):
        return trace(target, root)
    if commit := try_git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{target}^{{commit}}"):
        return Trace(target, _commit(commit, root))
    raise ConfigError(f"{target!r}: nothing to trace; give {FORMS}")


def _pipeline(run_id: str, root: Path) -> Node:
    """A run: its end, the versions that it registered, and its last commit with stages and data."""
    run = next((run for run in find_runs(root) if run.id == run_id and run.commits), None)
    if run is None:
        if tip := _remote_tip(run_id, root):
            return Node("pipeline", run_id, {"branch": tip[0]}, [_commit(tip[1], root)])
        raise ConfigError(f"{run_id}: no branch runs/{run_id} in {root}; fetch it, or see `pedigree runs`")
    facts = {"state": run.state, "branch": run.branch, "reason": run.reason, "computed": run.computed}
    node = Node("pipeline", run_id, {key: value for key, value in facts.items() if value})
    for version in registered(root, run):
        node.children.append(Node("version", f"{version['name']}/{version['version']}", {"registered_by": run_id}))
    node.children.append(_commit(run.tip, root))
    return node


def _remote_tip(run_id: str, root: Path) -> tuple[str, str] | None:
    """Return branch and last commit of a run that only a remote branch has, as in an auditor's clone."""
    branch = BRANCHES.removeprefix("refs/heads/") + run_id
    found = try_git(root, "for-each-ref", "--format=%(refname:lstrip=2) %(objectname)", f"refs/remotes/*/{branch}")
    name, _, commit = (found or "").partition("\n")[0].partition(" ")
    return (name, commit) if commit else None


def _commit(commit: str, root: Path) -> Node:
    node = Node("commit", commit)
    author, date, subject = (try_git(root, "show", "-s", "--format=%an <%ae>%n%aI%n%s", commit) or "\n\n").split("\n")
    node.facts |= {"author": author, "date": date, "subject": subject}
    try:
        node.children += LockTrace(Record(root, commit), None, set()).nodes()
    except RecordError as error:
        node.missing.append(str(error))
    return node


def _data(dvc_id: str, root: Path) -> Node:
    """A data version: its contents, and the runs and models that have it."""
    search = Search(root)
    found = [data for data in search.data if data.dvc == dvc_id]
    if not found:
        raise ConfigError(f"{dvc_id}: no commit here and no registered version names such data")
    data = found[0]
    node = Node(data.kind, data.path, {"dvc": data.dvc}, missing=list(search.unknown))
    holders = search.holders(data)
    node.facts |= {"recorded_by": holders.commits[:1], "branches": holders.branches}
    contents = DataTrace(Record(root, holders.commits[0] if holders.commits else None), set())
    if data.kind != "curated":
        contents.add_provenance(node)
    contents.add_contents(node)
    node.children += [_model(model, {}) for model in search.models_of([data])]
    return node


def _image(image_id: str, root: Path) -> Node:
    """An image: the data versions that have it or left it out, and the models that may have learned from it."""
    search = Search(root)
    uses = search.find(Query(frozenset([image_id])))
    if not uses.data:
        raise ConfigError(f"image {image_id}: in none of {uses.searched} data versions; `pedigree where-used FILE` "
                          "offers near copies")  # fmt: skip
    drawn, unknown = draws(uses, root)
    node = Node("image", image_id, missing=[*uses.unknown, *unknown])
    node.children += [_use(use) for use in uses.data]
    for model in uses.models:
        told = {
            draw.weights: f"drawn {draw.draws} times" + (f", step {draw.first} to {draw.last}" if draw.first else "")
            for draw in drawn.get(model.reference, ())
        }
        node.children.append(_model(model, told))
    return node


def _use(use: Use) -> Node:
    row = use.rows.to_pylist()[0]
    facts = {
        "dvc": use.data.dvc,
        "in": row["kept"],
        "reason": row["reason"],
        "detail": row["detail"],
        "source": row["source"],
        "source_uri": row["source_uri"],
        "license": row["license"],
        "other": row["other"],
        "similarity": row["similarity"],
        "runs": use.runs,
    }
    return Node(use.data.kind, use.data.path, {key: value for key, value in facts.items() if value not in (None, "")})


def _model(model: ModelUse, drawn: dict[str, str]) -> Node:
    facts = {
        "aliases": list(model.aliases),
        "relation": list(model.relations),
        "learned_from": list(model.teachers),
        "draws": drawn,
    }
    return Node("version", model.reference, {key: value for key, value in facts.items() if value})
