"""Each gate by itself, on evidence that is made by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from components.core.intervals import accuracy_interval, difference_interval
from components.core.metrics import Interval
from components.registry.card import standing
from components.registry.config import GatesConfig
from components.registry.facts import RESAMPLES, Facts, own_intervals, paired_differences
from components.registry.gates import FAILED, GATES, PASSED, PENDING, Evidence, Gate, failed, judge, verdict
from components.registry.promote import _check_gates
from components.registry.publish import RegistryError
from components.registry.review import _beside, _Record
from tests.registry.made_up import making, review

ABOVE, BELOW, UNCLEAR = Interval(0.1, 0.05, 0.15), Interval(-0.1, -0.15, -0.05), Interval(-0.02, -0.06, 0.02)

SCORED = {"knn_top1": 0.8, "linear_top1": 0.9, "minus_random": {"knn_top1": dataclasses.asdict(ABOVE)}}


def facts(**changes: object) -> Facts:
    values: dict[str, object] = {
        "model": "teacher",
        "gates": GatesConfig(),
        "evaluation": SCORED,
        "champion": None,
        "scored_on": ("a.dir",),
        "decontaminated_against": ("a.dir", "b.dir"),
        "evaluation_copies": 3,
        "snapshots": 2,
        "snapshots_passed": 2,
        "authors": ("Ann <ann@example.org>", "ann"),
        "size_mib": 3.5,
        "latency_ms": 12.0,
        "machine": "x86_64 with 2 CPUs",
    }
    return Facts.model_validate(values | changes)


GOOD = Evidence(facts(), missing=(), takedown="")


def state(name: str, evidence: Evidence) -> str:
    return next(gate.state for gate in judge(evidence) if gate.name == name)


def test_a_good_model_without_a_champion_passes_all():
    gates = judge(GOOD)
    assert [gate.name for gate in gates] == list(GATES)
    assert {gate.state for gate in gates} == {PASSED}
    assert verdict(gates) == f"passes {len(GATES)} of {len(GATES)} gates"


@pytest.mark.parametrize(
    ("difference", "tolerance", "expected"),
    [(ABOVE, 0, PASSED), (UNCLEAR, 0, PASSED), (BELOW, 0, FAILED), (BELOW, 0.09, FAILED), (BELOW, 0.11, PASSED)],
)
def test_champion_is_not_undercut_beyond_the_tolerance_and_the_interval(difference, tolerance, expected):
    changed = facts(gates=GatesConfig(tolerance={"knn_top1": tolerance}))
    evidence = Evidence(changed, champion="tiny/3", differences={"linear_top1": ABOVE, "knn_top1": difference})
    assert state("champion", evidence) == expected


@pytest.mark.parametrize(("metric", "expected"), [("roads/depth_rmse", FAILED), ("roads/depth_delta1", PASSED)])
def test_more_error_than_the_champion_fails(metric, expected):
    assert state("champion", Evidence(facts(), champion="tiny/3", differences={metric: ABOVE})) == expected


@pytest.mark.parametrize(("limit", "expected"), [(0.3, PASSED), (0.2, FAILED)])
def test_a_ceiling_limits_what_is_better_lower(limit, expected):
    floors = {"roads/depth_delta1": 0.5, "slices.light=west.gap": 0.7}  # the second is a group's accuracy
    gates = GatesConfig(ceilings={"roads/depth_rmse": limit, "slices.light.gap": 0.2}, floors=floors)
    scored = {**SCORED, "roads/depth_rmse": 0.25, "slices.light.gap": 0.1, "slices.light=west.gap": 0.7}
    scored |= {"roads/depth_delta1": 0.5}
    assert state("floors", Evidence(facts(gates=gates, evaluation=scored))) == expected
    with pytest.raises(ValueError, match=r"floors: of roads/depth_rmse lower is better; .* under ceilings"):
        GatesConfig(floors={"roads/depth_rmse": limit})
    with pytest.raises(ValueError, match=r"ceilings: of knn_top1 higher is better; .* under floors"):
        GatesConfig(ceilings={"knn_top1": limit})


@pytest.mark.parametrize(
    ("tolerance", "unmatched", "said"),
    [
        ({"knn_top1": 0.1}, (), ""),
        ({"knn_topl": 0.1}, (), "; a tolerance for nothing that was compared: knn_topl"),
        ({}, ("worst_slice",), "; not measured of both: worst_slice"),
    ],
)
def test_what_was_not_compared_is_told(tolerance, unmatched, said):
    evidence = Evidence(facts(gates=GatesConfig(tolerance=tolerance)), "tiny/3", differences={"knn_top1": UNCLEAR})
    (gate, *_) = judge(dataclasses.replace(evidence, unmatched=unmatched))
    assert (gate.state, gate.text) == (PASSED, f"not worse than tiny/3: knn_top1 -0.020 (-0.060 to +0.020){said}")


@pytest.mark.parametrize("found", [{}, {"knn_top1": Interval(float("nan"), float("nan"), float("nan"))}])
def test_no_number_beside_the_champion_is_not_a_pass(found):
    assert state("champion", Evidence(facts(), champion="tiny/3", differences=found)) == FAILED


@pytest.mark.parametrize(
    ("champion", "told"), [(("knn", "worst"), "worst was measured of tiny/3 only"), (("knn",), "")]
)
def test_metrics_that_one_evaluation_alone_has(champion, told):
    rows = [(image, *row) for image in "ab" for row in (("teacher", "knn"), *(("champion", m) for m in champion))]
    rows += [(image, "teacher", "robust") for image in "ab"]
    columns = dict(zip(("image_id", "model", "metric"), map(list, zip(*rows, strict=True)), strict=True))
    record = _Record(facts(champion="models:/tiny/3"), pa.table({**columns, "value": [1.0] * len(rows)}), None)
    beside = _beside(record, "tiny/3")
    assert beside is not None
    assert beside.incomparable.startswith(told)
    assert bool(beside.differences) == (not told)
    assert list(beside.unmatched) == ([] if told else ["robust"])


def test_a_version_whose_features_were_pooled_otherwise_is_named_as_such(monkeypatch):
    table = pa.table({"image_id": ["a"], "model": ["teacher"], "metric": ["knn"], "value": [1.0]})
    textured = making().preprocessing.model_copy(update={"pooling": "cls_texture"})
    records = [
        _Record(facts(), table, made) for made in (making(), making().model_copy(update={"preprocessing": textured}))
    ]
    monkeypatch.setattr("components.registry.review._read", lambda version: records[0])
    said = [_beside(record, "tiny/2") for record in records]
    assert [one and one.otherwise for one in said] == ["", "pooling cls, not cls_texture"]
    shown = standing(review(beside="tiny/2"))
    assert standing(dataclasses.replace(review(beside="tiny/2"), beside=said[1])) == (
        shown.replace("tiny/2.", "tiny/2 (evaluated with pooling cls, not cls_texture).")
    )


def test_a_champion_that_cannot_be_compared_is_told():
    (gate, *_) = judge(Evidence(facts(), champion="tiny/3", incomparable="the two were scored on different images"))
    assert (gate.state, gate.text) == (FAILED, "not compared with tiny/3: the two were scored on different images")


def test_without_a_champion_the_last_candidate_is_shown_and_stops_nobody():
    beside = Evidence(facts(), earlier="tiny-candidates/2", differences={"knn_top1": BELOW})
    (gate, *_) = judge(beside)
    told = "; beside the last candidate tiny-candidates/2: knn_top1 -0.100 (-0.150 to -0.050)"
    assert (gate.state, gate.text) == (PASSED, f"there is no other champion to compare with{told}")
    (gate, *_) = judge(dataclasses.replace(beside, differences=None, incomparable="scored on different images"))
    assert gate.text.endswith("tiny-candidates/2: not compared: scored on different images")


def test_intervals_are_wilsons_of_accuracies_and_the_bootstraps_of_others():
    ids = [f"{i:03}" for i in range(50)] * 2
    values = [*([1.0] * 40 + [0.0] * 10), *np.linspace(0.1, 1, 50)]
    found = own_intervals(pa.table({"image_id": ids, "metric": ["a"] * 50 + ["b"] * 50, "value": values}))
    assert found["a"] == accuracy_interval(np.array(values[:50]))
    assert found["b"].mean == pytest.approx(0.55)
    assert (round(found["b"].low, 1), round(found["b"].high, 1)) == (0.5, 0.6)


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("random", {"evaluation": {"knn_top1": 0.8, "minus_random": {"knn_top1": vars(UNCLEAR)}}}, "-0.020"),
        ("random", {"evaluation": {"knn_top1": 0.8}}, "knn_top1 was not compared with random weights"),
        ("floors", {"gates": GatesConfig(floors={"knn_top1": 0.81})}, "knn_top1 0.8, at least 0.81"),
        ("floors", {"gates": GatesConfig(floors={"worst_slice": 0.1})}, "worst_slice not measured, at least 0.1"),
        (
            "floors",
            {"gates": GatesConfig(floors={"slices.worst": 0.5}), "evaluation": {**SCORED, "slices": {"worst": 0.4}}},
            "slices.worst 0.4, at least 0.5",
        ),
        ("data", {"snapshots_passed": 1}, "1 of 2 snapshots"),
        ("decontamination", {"scored_on": ("a.dir", "c.dir")}, "scored on c.dir"),
        ("size", {"gates": GatesConfig(max_size_mib=3)}, "3.5 MiB, at most 3"),
        ("latency", {"gates": GatesConfig(max_latency_ms=10)}, "12 ms an image on x86_64 with 2 CPUs, at most 10"),
    ],
)  # fmt: skip
def test_each_gate_fails_alone(name, changes, text):
    gates = judge(Evidence(facts(**changes), missing=(), takedown=""))
    assert [gate.name for gate in failed(gates)] == [name]
    assert text in failed(gates)[0].text
    assert verdict(gates) == f"fails 1 of {len(GATES)} gates: {name}"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lineage", {"missing": ("run 7: deleted", "pool x: gone")}),
        ("weights", {"weights": "NaN in blocks.0"}),
        ("rejection", {"rejected": "Ann rejected it"}),
        ("takedown", {"takedown": "w-0123456789ab on 2026-11-30 (trained on it): consent withdrawn"}),
    ],
)
def test_what_is_found_at_the_decision_fails_its_gate(name, change):
    assert [gate.name for gate in failed(judge(dataclasses.replace(GOOD, **change)))] == [name]


def test_before_the_decision_lineage_is_pending_and_takedowns_are_not_listed():
    gates = judge(Evidence(facts()))
    assert [gate.name for gate in gates if gate.state == PENDING] == ["lineage"]
    assert {gate.name for gate in gates} == set(GATES) - {"takedown"}
    assert verdict(gates) == f"passes {len(gates) - 1} of {len(gates)} gates, 1 at the decision"


@pytest.mark.parametrize(
    ("actor", "authenticated", "expected"),
    [(None, False, PENDING), ("ann", True, FAILED), ("Ann <ann@example.org>", False, FAILED), ("bob", True, PASSED)],
)
def test_a_second_person_decides_where_one_is_asked_for(actor, authenticated, expected):
    asked = facts(gates=GatesConfig(second_person=True))
    assert state("second-person", Evidence(asked, missing=(), actor=actor, authenticated=authenticated)) == expected
    assert state("second-person", dataclasses.replace(GOOD, actor="ann")) == PASSED  # not asked for
    typed = judge(Evidence(asked, missing=(), actor="Bob"))[-1]
    said = "Bob is a name that was not authenticated; another person decides, by `pedigree promote` with a login"
    assert (typed.state, typed.text.startswith(said)) == (FAILED, True)


def test_only_an_authenticated_person_waives_the_second_one():
    found, waived = review(gates=[Gate("second-person", FAILED, "is the same")]), {"second-person": "urgent"}
    with pytest.raises(RegistryError, match="the gate second-person is waived by an authenticated person only"):
        _check_gates(found, waived, authenticated=False)
    _check_gates(found, waived, authenticated=True)


def test_pairs_are_made_by_image_and_only_of_the_same_images():
    generator = np.random.default_rng(0)
    ids, ours, theirs = [f"{i:03}" for i in range(60)], *(generator.integers(0, 2, (2, 60)).astype(float))
    order = generator.permutation(60)

    def table(names: list[str], values: np.ndarray) -> pa.Table:
        return pa.table({"image_id": names, "metric": ["knn_top1"] * len(names), "value": values})

    shuffled = table([ids[i] for i in order], theirs[order])
    expected = difference_interval(ours, theirs, generator, 1)
    assert paired_differences(table(ids, ours), shuffled) == {"knn_top1": expected}
    assert paired_differences(table(ids, ours), shuffled.slice(1)) is None


def test_images_of_one_photograph_widen_the_intervals_of_the_registry():
    generator = np.random.default_rng(0)
    photographs = np.repeat([f"photo-{n}" for n in range(12)], 5)
    ours, theirs = (np.repeat(generator.integers(0, 2, 12), 5).astype(float) for _ in range(2))
    plain = pa.table({"image_id": [f"{i:03}" for i in range(60)], "metric": ["knn_top1"] * 60, "value": ours})
    other = plain.set_column(2, "value", pa.array(theirs))
    ours_of, theirs_of = (table.append_column("cluster", pa.array(photographs)) for table in (plain, other))
    assert own_intervals(ours_of) == {"knn_top1": accuracy_interval(ours, photographs)}
    found = paired_differences(ours_of, theirs_of)
    assert found == {"knn_top1": difference_interval(ours, theirs, np.random.default_rng(0), RESAMPLES, photographs)}
    (narrow,) = paired_differences(plain, other).values()
    assert found["knn_top1"].high - found["knn_top1"].low > narrow.high - narrow.low


def test_the_same_weights_and_scores_are_the_same_candidate_beside_another_champion():
    one = facts()
    beside = {**one.evaluation, "champion": {"knn_top1": 0.7}, "minus_champion": {}}
    assert facts(evaluation=beside, champion="models:/tiny/2", latency_ms=1.0, authors=()).digest() == one.digest()
    assert facts(evaluation={**one.evaluation, "knn_top1": 0.81}).digest() != one.digest()
    assert facts(gates=GatesConfig(max_size_mib=5)).digest() != one.digest()
