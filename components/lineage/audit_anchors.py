"""Anchors of the audit log outside its bucket: the last event of a chain, in closing commits of runs and in MLflow.

Whoever may bypass the bucket's locks can cut off the end of a chain, and what is left is whole. An anchor that lies
beyond the end, or has another hash, shows it. In a commit it is a trailer `Audit-Head: CHAIN SEQUENCE HASH`; in MLflow
a tag of the experiment (the platform's chain) or of the registered model (its own chain).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.core.git import try_git
from components.core.mlflow_client import reported
from components.lineage.audit_chain import Entry, Head

TRAILER = "Audit-Head"
TAG = "pedigree.audit_head"
MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
PAGE = 200
_TEXT = re.compile(r"(?P<chain>\S+) (?P<sequence>\d+) (?P<hash>[0-9a-f]{64})")


@dataclass(frozen=True)
class Anchor:
    """The last event of a chain at some time, as `where` says."""

    where: str
    chain: str
    sequence: int
    hash: str

    def fault(self, entries: Sequence[Entry]) -> str | None:
        """Say how it contradicts the chain's events; None if it does not."""
        known = {entry.sequence: entry.hash for entry in entries}
        if self.sequence > (last := max(known, default=0)):
            return f"missing: {self.where} anchors it, but the chain ends with event {last}"
        if known.get(self.sequence, self.hash) != self.hash:
            return f"replaced: {self.where} anchors the hash {self.hash[:12]}"
        return None


def anchor_text(chain: str, head: Head) -> str:
    """Return a head as it stands in a trailer or tag."""
    return f"{chain} {head.sequence} {head.hash}"


def git_anchors(root: Path) -> list[Anchor]:
    """Return the anchors in all commits of a repository, those of its remotes' branches too; none outside of one."""
    form = f"--format=%H%x1f%(trailers:key={TRAILER},valueonly,separator=%x1f)"
    found = []
    for line in (try_git(root, "log", "--all", f"--grep=^{TRAILER}: ", form) or "").splitlines():
        commit, *texts = line.split("\x1f")
        found += [anchor for text in texts if (anchor := _parse(f"commit {commit[:12]}", text))]
    return found


def mlflow_anchors(client: Any) -> list[Anchor]:
    """Return the anchors in the tags of MLflow's experiments and registered models.

    Raises:
        TrackingError: MLflow does not answer.
    """
    with reported():
        holders = [(f"experiment {one.name}", one.tags) for one in _pages(client.search_experiments)]
        holders += [(f"registered model {one.name}", one.tags) for one in _pages(client.search_registered_models)]
    found = [_parse(f"MLflow's {where}", tags[TAG]) for where, tags in holders if TAG in tags]
    return [anchor for anchor in found if anchor]


def anchor_model(client: Any, model: str, chain: str, head: Head) -> None:
    """Tag a registered model with the head of a chain; no-op if MLflow does not have the model (yet)."""
    from mlflow.exceptions import MlflowException

    try:
        client.set_registered_model_tag(model, TAG, anchor_text(chain, head))
    except MlflowException as error:
        if error.error_code not in MISSING:
            raise


def anchor_experiment(client: Any, experiment: str, chain: str, head: Head) -> None:
    """Tag an experiment with the head of a chain; no-op if MLflow does not have it.

    Raises:
        TrackingError: MLflow does not answer.
    """
    with reported():
        if found := client.get_experiment_by_name(experiment):
            client.set_experiment_tag(found.experiment_id, TAG, anchor_text(chain, head))


def _parse(where: str, text: str) -> Anchor | None:
    found = _TEXT.fullmatch(text.strip())
    return Anchor(where, found["chain"], int(found["sequence"]), found["hash"]) if found else None


def _pages(search: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(max_results=PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
