from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from components.core.errors import DatasetError
from components.evaluation.pictures import retrieved_rows
from components.evaluation.protocols.retrieval import Query, answerable, average_precision, evaluate


def on_a_circle(degrees):
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def test_modes_with_junk_by_hand():
    # Row 0 is the query; the others are ranked by their angle: 1 to 6.
    features = on_a_circle([0, 10, 20, 30, 40, 50, 60])
    query = Query(0, easy=(2, 5), hard=(4,), junk=(1,))
    scores = evaluate(features, [query], np.arange(7))
    # Easy: 0, 1 and 4 go, leaving 2 3 5 6: positives at ranks 0 and 2: ((1 + 1) + (1/2 + 2/3)) / 2 / 2.
    assert scores.metrics["retrieval_map_easy"] == pytest.approx((2 + 7 / 6) / 4)
    # Medium: 0 and 1 go, leaving 2 3 4 5 6: ranks 0, 2 and 3: (2 + (1/2 + 2/3) + (2/3 + 3/4)) / 2 / 3.
    assert scores.metrics["retrieval_map_medium"] == pytest.approx((2 + 7 / 6 + 17 / 12) / 6)
    # Hard: 0, 1, 2 and 5 go, leaving 3 4 6: rank 1: (0/1 + 1/2) / 2.
    assert scores.metrics["retrieval_map_hard"] == pytest.approx(0.25)


def released_ap(ranked, positives, junk):
    """The released evaluation as a plain loop: walk down the list without junk."""
    found, precision, total = 0, 1.0, 0.0
    for place, row in enumerate([row for row in ranked if row not in junk]):
        if row in positives:
            found += 1
            total += (precision + found / (place + 1)) / 2 / len(positives)
        precision = found / (place + 1)
    return total


def test_equals_a_plain_loop_over_the_ranking():
    generator = np.random.default_rng(0)
    features = generator.standard_normal((80, 8)).astype(np.float16)
    queries = []
    for row in range(20):
        rows = generator.permutation(np.arange(20, 80))
        queries.append(Query(row, tuple(rows[:6]), tuple(rows[6:9]), tuple(rows[9:15])))
    scores = evaluate(features, queries, np.arange(20, 80))
    values = features.astype(float)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    for query, easy, hard in zip(
        queries, scores.by_image["retrieval_map_easy"], scores.by_image["retrieval_map_hard"], strict=True
    ):
        ranked = sorted(range(20, 80), key=lambda row: -(values[query.row] @ values[row]))
        assert easy == pytest.approx(released_ap(ranked, query.easy, {*query.hard, *query.junk}))
        assert hard == pytest.approx(released_ap(ranked, query.hard, {*query.easy, *query.junk}))


def test_differs_from_scikit_learn_by_the_trapezoid_alone():
    """scikit-learn counts the precision after each positive only; the other half is the precision before it."""
    ranks = np.array([0, 3, 4, 9])
    found = np.isin(np.arange(12), ranks)
    after = average_precision_score(found, -np.arange(12))
    before = np.mean([1, 1 / 3, 2 / 4, 3 / 9])
    assert average_precision(ranks) == pytest.approx((after + before) / 2)
    assert average_precision(np.arange(4)) == average_precision_score(np.arange(12) < 4, -np.arange(12)) == 1


def test_queries_without_positives_are_left_out_and_counted(caplog):
    features = on_a_circle([0, 10, 20, 90])
    queries = [Query(0, easy=(1,)), Query(3, hard=(2,)), Query(1, easy=(2,), hard=(3,))]
    scores = evaluate(features, queries, np.arange(4))
    assert [len(scores.by_image[f"retrieval_map_{mode}"]) for mode in ("easy", "medium", "hard")] == [2, 3, 2]
    assert answerable(queries, "hard") == [1, 2]
    assert "retrieval, easy: 1 of 3 queries without positives left out (such as the one of row 3)" in caplog.text
    assert all(np.isfinite(values).all() for values in scores.by_image.values())
    assert set(evaluate(features, queries[:1], np.arange(4)).metrics) == {"retrieval_map_easy", "retrieval_map_medium"}


def test_collapsed_features_find_positives_last():
    scores = evaluate(np.ones((5, 2)), [Query(0, easy=(1,))], np.arange(5))
    assert scores.metrics["retrieval_map_easy"] == pytest.approx((0 + 1 / 4) / 2)


def test_pictures_tell_what_was_to_be_found():
    pixels = [torch.full((2, 2, 3), number, dtype=torch.uint8) for number in range(5)]
    evalset, query = SimpleNamespace(gallery=np.arange(1, 5)), SimpleNamespace(index=0, easy=(3,), hard=(4,), junk=(1,))
    (row,) = retrieved_rows(evalset, pixels, on_a_circle([0, 10, 30, 20, 40]), [query])
    assert [image.getpixel((0, 0))[0] for image in (row.query, *row.images)] == [0, 1, 3, 2, 4]
    assert row.names == ["junk", "easy", "other", "hard"]
    assert row.right == [None, True, False, True]


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ([], "no queries"),
        ([Query(0, easy=(1,), junk=(1,))], "lists row 1 twice"),
        ([Query(0, easy=(0, 1))], "lists itself"),
        ([Query(0, hard=(7,))], "row 7, which is not in the gallery"),
    ],
)
def test_wrong_lists(queries, message):
    with pytest.raises(DatasetError, match=message):
        evaluate(np.ones((5, 2)), queries, np.arange(5))
