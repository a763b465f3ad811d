"""W3C PROV as PROV-JSON: what each stage used and made, and what was derived from what."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from components.registry.documents.graph import PREFIX, Graph, Step

AGENT = "pedigree:pipeline"


def prov(graph: Graph) -> dict[str, Any]:
    """State the whole graph; a name is one version of a folder, or one stage of the run."""
    steps, code, weights = graph.steps, f"pedigree:git/{graph.making.origin.commit}", f"pedigree:{graph.weights}"
    used = [(_activity(graph, s), entity) for s in steps for entity in (*map(_entity, s.inputs), code)]
    made = [(_entity(path), _activity(graph, s)) for s in steps for path in s.outputs]
    derived = [
        *((_entity(graph.curated.path), _entity(pool.path)) for pool in graph.pool),
        *((weights, other) for other in map(_entity, (graph.curated.path, graph.parent[0], _folder(graph)))),
    ]
    agent = {"prov:type": {"$": "prov:SoftwareAgent", "type": "prov:QUALIFIED_NAME"}}
    return {
        "prefix": {"pedigree": PREFIX},
        "entity": _entities(graph, code, weights),
        "activity": {_activity(graph, step): _times(step) for step in steps},
        "agent": {AGENT: agent},
        "used": _relations("u", "prov:activity", "prov:entity", used),
        "wasGeneratedBy": _relations("g", "prov:entity", "prov:activity", made),
        "wasAssociatedWith": _relations(
            "a", "prov:activity", "prov:agent", [(_activity(graph, s), AGENT) for s in steps]
        ),
        "wasDerivedFrom": _relations("d", "prov:generatedEntity", "prov:usedEntity", derived),
    }


def _entities(graph: Graph, code: str, weights: str) -> dict[str, dict[str, str]]:
    origin, found = graph.making.origin, {}
    stated: list[tuple[str, dict[str, str]]] = [
        *((_entity(path), {"pedigree:dvc": dvc_id}) for step in graph.steps for path, dvc_id in step.inputs.items()),
        *((_entity(path), {"pedigree:dvc": dvc_id}) for step in graph.steps for path, dvc_id in step.outputs.items()),
        *((_entity(d.path), {"pedigree:dvc": d.dvc}) for d in graph.data),
        *((_entity(d.path), {"pedigree:manifest_sha256": d.sha256}) for d in graph.data if d.sha256),
        (_entity(_folder(graph)), {"pedigree:dvc": origin.weights_dvc}),
        (code, {"pedigree:git_commit": origin.commit, "pedigree:branch": origin.branch}),
        (_entity(graph.parent[0]), {"pedigree:sha256": graph.parent[1]}),
        (weights, {"prov:label": graph.name, "pedigree:sha256": origin.weights_sha256}),
    ]
    for name, facts in stated:
        found.setdefault(name, {}).update(facts)
    return found


def _folder(graph: Graph) -> str:
    return graph.making.origin.weights_path


def _entity(path: str) -> str:
    return f"pedigree:{path}"


def _activity(graph: Graph, step: Step) -> str:
    return f"pedigree:{graph.making.run}/{step.name}"


def _times(step: Step) -> dict[str, Any]:
    found: dict[str, Any] = {"prov:label": step.name, "pedigree:command": step.command}
    if step.started:
        found["prov:startTime"] = step.started.isoformat()
    if step.ended:
        found["prov:endTime"] = step.ended.isoformat()
    return found


def _relations(kind: str, one: str, other: str, pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, str]]:
    """Return relations as PROV-JSON wants them, under blank names."""
    return {f"_:{kind}{number}": {one: a, other: b} for number, (a, b) in enumerate(pairs)}
