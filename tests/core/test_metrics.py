import numpy as np
import pytest

from components.core.metrics import bootstrap_interval, effective_rank, feature_std, top1_accuracy


def test_accuracy_counts_every_image_the_same():
    assert top1_accuracy(np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])) == 0.75
    with pytest.raises(ValueError, match="no images"):
        top1_accuracy(np.array([], int), np.array([], int))


def test_effective_rank_of_equal_directions_is_their_number():
    # Columns 0 to 2 are orthogonal, of mean 0 and of the same length; column 3 is a constant.
    features = np.array([[1, 1, 1, 7], [1, -1, -1, 7], [-1, 1, -1, 7], [-1, -1, 1, 7]], np.float32)
    assert effective_rank(features) == pytest.approx(3.0)


def test_effective_rank_by_hand():
    # Singular values 3 and 1: shares 3/4 and 1/4.
    features = np.array([[3, 0], [-3, 0], [0, 1], [0, -1]]) / np.sqrt(2)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert effective_rank(features) == pytest.approx(np.exp(entropy))


def test_effective_rank_of_collapsed_features_is_zero():
    assert effective_rank(np.full((50, 8), 0.1, np.float32)) == 0.0


def test_feature_std_is_one_on_the_sphere_and_zero_when_collapsed():
    spread = np.random.default_rng(0).standard_normal((20_000, 16))
    assert feature_std(spread) == pytest.approx(1.0, abs=0.01)
    assert feature_std(5 * spread) == pytest.approx(feature_std(spread))
    assert feature_std(np.full((10, 4), 0.3)) == pytest.approx(0.0, abs=1e-12)


def test_bootstrap_interval_agrees_with_the_normal_one():
    values = np.random.default_rng(1).normal(0.2, 1.0, 2500)
    interval = bootstrap_interval(values, np.random.default_rng(2), num_resamples=4000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.004)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.004)


def test_bootstrap_interval_equals_a_plain_loop():
    values = np.array([1.0, 0.0, -1.0, 1.0, 0.0])
    interval = bootstrap_interval(values, np.random.default_rng(3), num_resamples=200)
    picks = np.random.default_rng(3).integers(0, 5, size=(200, 5))
    means = sorted(sum(values[i] for i in row) / 5 for row in picks)
    assert (interval.low, interval.high) == pytest.approx((np.percentile(means, 2.5), np.percentile(means, 97.5)))
