from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from components.curation.cluster import cluster
from components.curation.sample import allocate, balanced_cap, balanced_sample


def brute_force_cap(sizes: list[int], target: int) -> int:
    return max(c for c in range(max(sizes) + 1) if sum(min(c, s) for s in sizes) <= target)


def test_k_means_finds_separate_blobs():
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((6, 16)) * 10
    truth = np.repeat(np.arange(6), [40, 30, 20, 10, 5, 1])
    labels = cluster((centres[truth] + generator.standard_normal((106, 16)) * 0.1).astype(np.float32), 6, 20, seed=3)
    assert len({(a, b) for a, b in zip(truth.tolist(), labels.tolist(), strict=True)}) == 6
    assert len(set(labels.tolist())) == 6


def test_k_means_is_the_same_for_any_thread_count(unit_vectors):
    vectors = unit_vectors(3000, 32, 4)
    with threadpool_limits(1):
        one = cluster(vectors, 20, 10, seed=0)
    with threadpool_limits(2):
        two = cluster(vectors, 20, 10, seed=0)
    np.testing.assert_array_equal(one, two)
    assert (one != cluster(vectors, 20, 10, seed=1)).any()


def test_no_more_clusters_than_images(unit_vectors):
    assert sorted(cluster(unit_vectors(3, 8, 0), 50, 5, seed=0).tolist()) == [0, 1, 2]


def test_cap_by_hand():
    # min(c, s) of 10, 4, 1 sums to 3, 5, 7, 9, 10 for c = 1 .. 5
    sizes = np.array([10, 4, 1])
    assert [balanced_cap(sizes, target) for target in (2, 3, 4, 7, 8, 9, 10, 11)] == [0, 1, 1, 3, 3, 4, 5, 6]


@pytest.mark.parametrize("seed", range(20))
def test_cap_equals_brute_force(seed):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(0, 40, 12)
    target = int(generator.integers(0, sizes.sum()))
    assert balanced_cap(sizes, target) == brute_force_cap(sizes.tolist(), target)
    counts = allocate(sizes, target, generator)
    cap = balanced_cap(sizes, target)
    assert counts.sum() == target
    assert ((counts == np.minimum(sizes, cap)) | ((counts == cap + 1) & (sizes > cap))).all()


def test_the_remainder_goes_one_each_to_larger_clusters():
    # cap 3 gives 3 + 3 + 1 = 7 of 8: one of the two larger clusters gets a fourth.
    counts = {tuple(allocate(np.array([10, 4, 1]), 8, np.random.default_rng(s)).tolist()) for s in range(20)}
    assert counts == {(4, 3, 1), (3, 4, 1)}


def test_a_target_above_all_takes_all():
    assert balanced_sample(np.array([0, 0, 1]), 5, np.random.default_rng(0)).tolist() == [0, 1, 2]


def test_members_are_distinct_and_of_their_cluster():
    labels = np.random.default_rng(1).integers(0, 7, 500)
    chosen = balanced_sample(labels, 70, np.random.default_rng(2))
    assert len(np.unique(chosen)) == 70
    assert (np.diff(chosen) > 0).all()
    np.testing.assert_array_equal(np.bincount(labels[chosen]), [10] * 7)
    np.testing.assert_array_equal(chosen, balanced_sample(labels, 70, np.random.default_rng(2)))
