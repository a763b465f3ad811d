"""Judgments of the claims' scorecard, on values made up so that the right judgment is known."""

from __future__ import annotations

import numpy as np

from tests.benchmarks.claims import CURATED, DESCRIPTOR, MEASURES, RANDOM, UNCURATED, findings, markdown

BY_METRIC = {one.metric: one for one in MEASURES}


def judged(metric: str, differences: tuple[float, ...], other: str = RANDOM) -> list[tuple[str, bool | None]]:
    """Judgments where ours is better by these differences, one for each seed, on 400 images."""
    noise = np.random.default_rng(0).normal(0, 0.1, 400)
    by_seed = [{CURATED: 0.5 + noise + difference, other: 0.5 - noise} for difference in differences]
    return [(one.claim, one.holds) for one in findings({BY_METRIC[metric]: by_seed})]


def test_a_claim_holds_where_images_and_all_seeds_agree() -> None:
    accuracy, error = "retrieval_map_medium", "depth_rmse"
    assert judged(accuracy, (0.1, 0.2, 0.05)) == [("Frozen features beat random weights", True)]
    assert judged(accuracy, (-0.1, -0.2, -0.05)) == [("Frozen features beat random weights", False)]
    assert judged(accuracy, (0.2, 0.2, -0.05))[0][1] is None, "one seed disagrees"
    assert judged(accuracy, (0.01, 0.01, 0.01))[0][1] is None, "the interval of the images includes zero"
    assert judged(error, (-0.1, -0.2, -0.05))[0][1] is True, "a lower error is better"


def test_only_claims_whose_two_models_were_measured_are_judged() -> None:
    assert judged("knn_top1", (0.1, 0.1), DESCRIPTOR)[0][0].endswith("histograms of colors and edges, pooled alike")
    assert judged("knn_top1", (0.1, 0.1), UNCURATED)[0][0].startswith("Curated images")
    assert len(judged("knn_top1", (0.1, 0.1), UNCURATED)) == 1


def test_the_table_names_what_does_not_hold() -> None:
    values = {BY_METRIC["retrieval_map_medium"]: [{CURATED: np.array([0.2, 0.4]), RANDOM: np.array([0.5, 0.4])}]}
    assert markdown(findings(values)).endswith(
        "| Frozen features beat random weights | retrieval | 0.300 | 0.450 | -0.150 (-0.300 to +0.000) | -0.150 | "
        "**not shown** |\n"
    )
