"""Intervals hold the truth as often as they say, also near 1 and on few images."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from components.core.intervals import accuracy_interval, clustered_interval, difference_interval, ratio_intervals
from components.core.metrics import bootstrap_interval

RUNS = 2_000


@pytest.mark.parametrize(("accuracy", "count"), [(0.98, 40), (0.9, 40), (0.5, 40), (0.02, 100), (0.99, 400)])
def test_coverage_of_an_accuracy(accuracy, count):
    drawn = np.random.default_rng(0).random((RUNS, count)) < accuracy
    by_sum = {total: accuracy_interval(np.arange(count) < total) for total in set(drawn.sum(axis=1))}
    held = [by_sum[row].low <= accuracy <= by_sum[row].high for row in drawn.sum(axis=1)]
    assert 0.92 <= np.mean(held) <= 0.99  # counts are whole numbers, so it is 0.95 on average


def test_coverage_of_a_percentile_bootstrap_near_one_on_few_images():
    """What this is not done by."""
    generator = np.random.default_rng(0)
    drawn = (generator.random((200, 40)) < 0.98).astype(float)
    intervals = [bootstrap_interval(row, generator, 200) for row in drawn]
    assert np.mean([interval.low <= 0.98 <= interval.high for interval in intervals]) < 0.65


@pytest.mark.parametrize(
    ("better", "worse", "count"), [(0.05, 0.0, 40), (0.02, 0.02, 40), (0.3, 0.1, 40), (0.9, 0.0, 40)]
)
def test_coverage_of_a_difference(better, worse, count):
    generator = np.random.default_rng(1)
    held = []
    for row in generator.random((600, count)):
        ours, theirs = row < better, (row >= better) & (row < better + worse)
        interval = difference_interval(ours.astype(float), theirs.astype(float), generator, 1)
        held.append(interval.low <= better - worse <= interval.high)
    assert np.mean(held) >= 0.93


def test_values_by_hand():
    """With z = 1.96: 10 of 10 miss z^2 / (n + z^2) of 1; 8 equal pairs reach 1.96 x sqrt(0.2 / 10) to each side."""
    ones, zeros = np.ones(10), np.zeros(10)
    assert accuracy_interval(ones).low == pytest.approx(10 / (10 + 1.96**2), abs=1e-4)
    assert accuracy_interval(ones).high == pytest.approx(1.0)
    assert accuracy_interval(zeros).low == pytest.approx(0.0)
    assert accuracy_interval(zeros).high == pytest.approx(1.96**2 / 13.8416, abs=1e-4)
    same = difference_interval(np.ones(8), np.ones(8), np.random.default_rng(0), 1)
    assert same.mean == 0.0
    assert (same.low, same.high) == pytest.approx((-1.96 * 0.02**0.5, 1.96 * 0.02**0.5), abs=1e-4)


def test_other_measures_are_resampled():
    precisions = 1 / np.arange(1, 41)
    interval = difference_interval(precisions, np.full(40, 0.1), np.random.default_rng(0), 400)
    assert interval == bootstrap_interval(precisions - 0.1, np.random.default_rng(0), 400)


def test_clusters_of_one_image_are_the_plain_bootstrap():
    values = np.random.default_rng(0).exponential(size=60)
    clustered = clustered_interval(values, np.arange(60), np.random.default_rng(1), 500)
    plain = bootstrap_interval(values, np.random.default_rng(1), 500)
    assert (clustered.mean, clustered.low, clustered.high) == pytest.approx((plain.mean, plain.low, plain.high))


def test_clusters_by_hand():
    """Of a photograph of three images and one of one, resamples have the means 0, 1/4 and 1."""
    values, clusters = np.array([0.0, 0.0, 0.0, 1.0]), np.array(["a", "a", "a", "b"])
    interval = clustered_interval(values, clusters, np.random.default_rng(0), 400)
    assert (interval.mean, interval.low, interval.high) == (0.25, 0, 1)


@pytest.mark.parametrize(("count", "lowest", "highest"), [(40, 0.90, 0.96), (5, 0.78, 0.89)])
def test_coverage_with_clusters(count, lowest, highest):
    """Near the nominal 95 % with 40 clusters, too narrow with 5; without clusters it is far from it."""
    generator, clustered, plain = np.random.default_rng(0), [], []
    for _ in range(400):
        clusters = np.repeat(np.arange(count), generator.integers(1, 9, size=count))
        values = generator.standard_normal(count)[clusters] + generator.standard_normal(len(clusters))
        intervals = clustered_interval(values, clusters, generator, 200), bootstrap_interval(values, generator, 200)
        for interval, held in zip(intervals, (clustered, plain), strict=True):
            held.append(interval.low <= 0 <= interval.high)
    assert lowest <= np.mean(clustered) <= highest
    assert np.mean(plain) < 0.78


@pytest.mark.parametrize(("count", "accuracy"), [(5, 0.5), (5, 0.98), (40, 0.9)])
def test_coverage_of_an_accuracy_with_clusters(count, accuracy):
    """Accuracies of photographs vary: independent images would be held 77 to 90 % of the time."""
    generator, clustered, plain = np.random.default_rng(0), [], []
    for _ in range(200):
        clusters = np.repeat(np.arange(count), generator.integers(1, 9, size=count))
        shares = generator.beta(2 * accuracy, 2 * (1 - accuracy), size=count)
        correct = (generator.random(len(clusters)) < shares[clusters]).astype(float)
        for interval, held in (
            (accuracy_interval(correct, clusters), clustered),
            (accuracy_interval(correct), plain),
        ):
            held.append(interval.low <= accuracy <= interval.high)
    assert np.mean(clustered) >= 0.91
    assert np.mean(plain) < 0.91


def test_accuracy_with_clusters_by_hand():
    """Five photographs with all parts right count as five images: 1 / (1 + t^2 / 5) with t = 2.776."""
    right = accuracy_interval(np.ones(20), np.repeat(np.arange(5), 4))
    assert (right.low, right.high) == (pytest.approx(1 / (1 + 2.7764**2 / 5), abs=1e-4), 1)
    # Half of ten photographs wrong as a whole: 9 images' worth, t = 2.262.
    half = accuracy_interval(np.repeat([0.0, 1.0], 30), np.repeat(np.arange(10), 6))
    squared = 2.2622**2 / 9
    expected = np.sqrt(squared / 4 + squared**2 / 4) / (1 + squared)
    assert (half.low, half.high) == pytest.approx((0.5 - expected, 0.5 + expected), abs=1e-4)


def test_differences_with_clusters():
    generator = np.random.default_rng(0)
    clusters = np.repeat(np.arange(12), 10)
    ours, theirs = (generator.random(120) < share for share in (0.9, 0.5))
    ours[clusters < 6], theirs[clusters < 6] = True, True
    values = ours.astype(float), theirs.astype(float)
    wide = difference_interval(*values, np.random.default_rng(1), 500, clusters)
    narrow = difference_interval(*values, generator, 1)
    assert wide.high - wide.low > 1.2 * (narrow.high - narrow.low)
    same = difference_interval(np.ones(120), np.ones(120), generator, 50, clusters)  # the bootstrap alone says 0 to 0
    assert (same.low, same.high) == pytest.approx((-1.96 * (2 / 122**2) ** 0.5, 1.96 * (2 / 122**2) ** 0.5), abs=1e-4)
    precisions = 1 / np.arange(1, 121), np.full(120, 0.1)
    found = difference_interval(*precisions, np.random.default_rng(2), 100, clusters)
    assert found == clustered_interval(precisions[0] - 0.1, clusters, np.random.default_rng(2), 100)


@pytest.mark.parametrize(
    ("clusters", "message"),
    [(np.zeros(3, int), "one cluster is not defined"), (np.arange(2), "3 values with 2 cluster")],
)
def test_clusters_that_say_nothing(clusters, message):
    with pytest.raises(ValueError, match=message):
        clustered_interval(np.ones(3), clusters, np.random.default_rng(0), 10)


def test_ratios_of_sums_have_scipys_paired_bootstrap():
    generator = np.random.default_rng(0)
    wholes = generator.integers(1, 50, (60, 2))
    parts = generator.binomial(wholes, [0.6, 0.1])
    found = ratio_intervals(parts, wholes, np.random.default_rng(2), 4000)
    for one, a, b in zip(found, parts.T, wholes.T, strict=True):
        expected = bootstrap(
            (a, b), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, method="percentile",
            n_resamples=4000, rng=np.random.default_rng(1),
        ).confidence_interval  # fmt: skip
        assert one.mean == pytest.approx(a.sum() / b.sum())
        assert [one.low, one.high] == pytest.approx([expected.low, expected.high], abs=0.004)
    pairs = np.arange(60) // 2
    grouped = ratio_intervals(parts, wholes, np.random.default_rng(3), 100, pairs)
    sums = (values.reshape(30, 2, 2).sum(axis=1) for values in (parts, wholes))
    assert grouped == ratio_intervals(*sums, np.random.default_rng(3), 100)


def test_a_ratio_of_one_image_has_no_interval():
    parts, wholes = np.array([[3, 3], [0, 1], [0, 0], [0, 0]]), np.array([[4, 4], [0, 4], [0, 0], [0, 0]])
    one, two = ratio_intervals(parts, wholes, np.random.default_rng(0), 200)
    assert one.mean == 0.75
    assert np.isnan([one.low, one.high]).all()
    assert (two.low, two.mean, two.high) == (0.25, 0.5, 0.75)  # resamples without the class do not count
