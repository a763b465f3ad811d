"""The gates: what must hold before a model takes the champion's place. Pure functions over evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.core.metric_names import lower_is_better
from components.core.metrics import Interval
from components.core.tracking import flatten_numbers
from components.registry.config import GatesConfig
from components.registry.facts import Facts

PASSED, FAILED, PENDING = "passed", "failed", "pending"
SECOND_PERSON = "second-person"
AS_A_USER = "`pedigree promote` with a login of their own to MLflow (MLFLOW_TRACKING_USERNAME)"


@dataclass(frozen=True)
class Gate:
    """One gate's outcome.

    Attributes:
        name: as it is waived.
        state: `passed`, `failed`, or `pending`: it can only be judged at the decision.
        text: what was found, with the figures.
    """

    name: str
    state: str
    text: str


@dataclass(frozen=True)
class Evidence:
    """What the gates judge.

    Attributes:
        facts: what was recorded of the model when it was registered.
        champion: the version whose place it would take, `NAME/3`; None: there is none.
        earlier: without a champion: the newest earlier candidate, beside which the model is shown.
        differences: the model minus the one or the other on the same test images, by metric; None: not comparable.
        incomparable: why not.
        unmatched: metrics of this model alone, as after a change of the evaluation.
        missing: what the trace of the model lacks; None: not traced yet.
        weights: what is wrong with the weights; None: they load and are finite.
        rejected: who rejected this version and why; None: nobody has.
        takedown: which takedown withdrew images that it may have learned; empty: none; None: not looked up yet.
        actor: who would promote it; None: not known yet.
        authenticated: MLflow has authenticated the actor; a name that was typed, or that git knows, may be anybody's.
    """

    facts: Facts
    champion: str | None = None
    earlier: str | None = None
    differences: Mapping[str, Interval] | None = None
    incomparable: str = ""
    unmatched: Sequence[str] = ()
    missing: Sequence[str] | None = None
    weights: str | None = None
    rejected: str | None = None
    takedown: str | None = None
    actor: str | None = None
    authenticated: bool = False


def judge(evidence: Evidence) -> list[Gate]:
    """All gates, in the order in which people ask."""
    found = [Gate(name, *gate(evidence, evidence.facts.gates)) for name, gate in GATES.items()]
    return [gate for gate in found if gate.text]


def failed(gates: Sequence[Gate]) -> list[Gate]:
    """Those that do not let the model pass."""
    return [gate for gate in gates if gate.state == FAILED]


def verdict(gates: Sequence[Gate]) -> str:
    """One line: `passes 9 gates`, or which fail."""
    bad, open_ = failed(gates), sum(gate.state == PENDING for gate in gates)
    later = f", {open_} at the decision" if open_ else ""
    if bad:
        return f"fails {len(bad)} of {len(gates)} gates: {', '.join(gate.name for gate in bad)}{later}"
    return f"passes {len(gates) - open_} of {len(gates)} gates{later}"


def champion(evidence: Evidence, config: GatesConfig) -> tuple[str, str]:
    """No metric is worse than the champion's by more than its tolerance with an interval that excludes no difference.

    Worse is below, or above where lower is better. An earlier candidate is told of, and is no reason to fail.
    """
    if evidence.champion is None:
        return PASSED, f"there is no other champion to compare with{_beside_earlier(evidence)}"
    if not evidence.differences:
        return FAILED, f"not compared with {evidence.champion}: {evidence.incomparable}"
    worse = {  # also where it is not a number
        metric: found
        for metric, found in evidence.differences.items()
        if not (gain(metric, found).mean >= -config.tolerance.get(metric, 0.0) or gain(metric, found).high >= 0)
    }
    unused = sorted(set(config.tolerance) - set(evidence.differences))
    notes = [("not measured of both", evidence.unmatched), ("a tolerance for nothing that was compared", unused)]
    noted = "".join(f"; {what}: {', '.join(metrics)}" for what, metrics in notes if metrics)
    if worse:
        return FAILED, f"worse than {evidence.champion}: {_listed(worse)}{noted}"
    return PASSED, f"not worse than {evidence.champion}: {_listed(evidence.differences)}{noted}"


def floors(evidence: Evidence, config: GatesConfig) -> tuple[str, str]:
    """No metric lies beyond its absolute limit, and each that has one is measured; others' are `random.knn_top1`."""
    values = flatten_numbers(evidence.facts.evaluation)
    told, wrong = [], False
    for limits, word, sign in ((config.floors, "at least", 1), (config.ceilings, "at most", -1)):
        for metric, limit in limits.items():
            value = values.get(metric)
            told.append(f"{metric} {_shown(value)}, {word} {limit:g}")
            wrong |= value is None or not sign * value >= sign * limit
    return (FAILED if wrong else PASSED), ", ".join(told) or "none is set"


def random_weights(evidence: Evidence, _: GatesConfig) -> tuple[str, str]:
    """The main measure is better than that of random weights of the same shape, by the whole interval."""
    metric = evidence.facts.main_metric()
    found = evidence.facts.difference("random", metric)
    if found is None:
        return FAILED, f"{metric} was not compared with random weights"
    told = f"{metric} minus that of random weights: {found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
    return (PASSED if gain(metric, found).low > 0 else FAILED), told


def data_checks(evidence: Evidence, _: GatesConfig) -> tuple[str, str]:
    """Great Expectations has passed every snapshot of the pool that was used, and the curated set."""
    passed, total = evidence.facts.snapshots_passed, evidence.facts.snapshots
    told = f"Great Expectations passed {passed} of {total} snapshots of the pool, and the curated set"
    return (PASSED if passed == total else FAILED), told


def decontaminated(evidence: Evidence, _: GatesConfig) -> tuple[str, str]:
    """Curation left out copies of the very evaluation images that the model was scored on."""
    facts = evidence.facts
    if unseen := sorted(set(facts.scored_on) - set(facts.decontaminated_against)):
        return FAILED, f"scored on {', '.join(unseen)}, whose copies curation did not look for"
    return PASSED, f"curation left out {facts.evaluation_copies} copies of the evaluation images"


def lineage(evidence: Evidence, _: GatesConfig) -> tuple[str, str]:
    """`pedigree trace` finds everything that the model was made from."""
    if evidence.missing is None:
        return PENDING, "traced at the decision"
    if evidence.missing:
        return FAILED, f"{len(evidence.missing)} things are missing, first: {evidence.missing[0]}"
    return PASSED, "complete and verified"


def weights(evidence: Evidence, _: GatesConfig) -> tuple[str, str]:
    """The weights load and are finite."""
    return (FAILED, evidence.weights) if evidence.weights else (PASSED, "load, and are finite")


def size(evidence: Evidence, config: GatesConfig) -> tuple[str, str]:
    """The weights are no larger than their budget."""
    return _budget(evidence.facts.size_mib, config.max_size_mib, "MiB")


def latency(evidence: Evidence, config: GatesConfig) -> tuple[str, str]:
    """One image takes no longer than its budget."""
    return _budget(evidence.facts.latency_ms, config.max_latency_ms, f"ms an image on {evidence.facts.machine}")


def not_rejected(evidence: Evidence, _: GatesConfig) -> tuple[str, str]:
    """Nobody has rejected the version."""
    return (FAILED, evidence.rejected) if evidence.rejected else (PASSED, "nobody has")


def takedown(evidence: Evidence, _: GatesConfig) -> tuple[str, str]:
    """No image that it may have learned was withdrawn; not listed before the decision."""
    if evidence.takedown is None:
        return PASSED, ""
    return (FAILED, evidence.takedown) if evidence.takedown else (PASSED, "none of its images was withdrawn")


def second_person(evidence: Evidence, config: GatesConfig) -> tuple[str, str]:
    """Whoever promotes the model is an authenticated user, and not who started its run."""
    authors = ", ".join(evidence.facts.authors)
    if not config.second_person:
        return PASSED, "not required"
    if evidence.actor is None:
        return PENDING, f"the run was started by {authors}; another person decides, by {AS_A_USER}"
    if not evidence.authenticated:
        return FAILED, f"{evidence.actor} is a name that was not authenticated; another person decides, by {AS_A_USER}"
    same = evidence.actor in evidence.facts.authors
    return (FAILED if same else PASSED), f"{evidence.actor} decides, the run was started by {authors}"


GATES: Mapping[str, Callable[[Evidence, GatesConfig], tuple[str, str]]] = {
    "champion": champion,
    "random": random_weights,
    "floors": floors,
    "data": data_checks,
    "decontamination": decontaminated,
    "lineage": lineage,
    "weights": weights,
    "size": size,
    "latency": latency,
    "rejection": not_rejected,
    "takedown": takedown,
    SECOND_PERSON: second_person,
}


def gain(metric: str, difference: Interval) -> Interval:
    """Return a difference so that what is better lies above 0."""
    if lower_is_better(metric):
        return Interval(-difference.mean, -difference.high, -difference.low)
    return difference


def _beside_earlier(evidence: Evidence) -> str:
    if evidence.earlier is None:
        return ""
    found = evidence.differences
    told = f"not compared: {evidence.incomparable}" if found is None else _listed(found)
    return f"; beside the last candidate {evidence.earlier}: {told}"


def _listed(differences: Mapping[str, Interval]) -> str:
    return ", ".join(f"{metric} {i.mean:+.3f} ({i.low:+.3f} to {i.high:+.3f})" for metric, i in differences.items())


def _budget(value: float, limit: float | None, unit: str) -> tuple[str, str]:
    told = f"{value:.3g} {unit}"
    if limit is None:
        return PASSED, f"{told}, no budget is set"
    return (PASSED if value <= limit else FAILED), f"{told}, at most {limit:g}"


def _shown(value: Any) -> str:
    return "not measured" if value is None else f"{value:.4g}"
