from __future__ import annotations

import numpy as np
import pytest

from components.curation.cluster import Hierarchy
from components.curation.sample import allocate, balanced_cap, balanced_sample


def hierarchy(*labels: list[int]) -> Hierarchy:
    """Of labels, level by level; the number of clusters of a level is how many labels the next one has."""
    counts = [len(above) for above in labels[1:]] + [max(labels[-1]) + 1]
    return Hierarchy([np.array(level) for level in labels], [np.zeros((count, 2), np.float32) for count in counts])


def brute_force_cap(sizes: list[int], target: int) -> int:
    return max(c for c in range(max(sizes) + 1) if sum(min(c, s) for s in sizes) <= target)


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


def test_two_levels_by_hand():
    # Clusters of 10, 1, 2, 2, 0 points below two of 11 and 4. Flat, a target of 8 gives 3 (cap 3), 1, 2, 2; from the
    # top down, cap 4 gives 4 + 4, then 3 + 1 and 2 + 2. A target of 13: flat 8, 1, 2, 2; top down 9 + 4, the same.
    # A target of 4: flat 1, 1, 1, 1; top down 2 + 2, then 1 + 1 and 1 + 1. Of 6: flat 2 or 1 more; top down 3 + 3.
    points = [0] * 10 + [1] + [2] * 2 + [3] * 2
    tree = hierarchy(points, [0, 0, 1, 1, 1])

    def counts(target: int) -> list[int]:
        chosen = balanced_sample(tree, target, np.random.default_rng(0))
        return np.bincount(np.array(points)[chosen], minlength=5).tolist()

    assert counts(4) == [1, 1, 1, 1, 0]
    assert counts(6) in ([2, 1, 2, 1, 0], [2, 1, 1, 2, 0])
    assert counts(8) == [3, 1, 2, 2, 0]
    assert counts(13) == [8, 1, 2, 2, 0]


def test_levels_change_what_is_taken():
    # Ten small clusters below one node, one below the other: flat they get 10 of 11 parts, top down one of two.
    points = np.repeat(np.arange(11), 20).tolist()
    flat = balanced_sample(hierarchy(points), 22, np.random.default_rng(0))
    tree = balanced_sample(hierarchy(points, [0] * 10 + [1]), 22, np.random.default_rng(0))
    assert (flat < 200).sum() == 20
    assert (tree < 200).sum() == 11


@pytest.mark.parametrize("seed", range(6))
def test_three_levels_equal_brute_force(seed):
    generator = np.random.default_rng(seed)
    levels = [generator.zipf(1.3, 600) % 40, generator.integers(0, 9, 40), generator.integers(0, 3, 9)]
    tree = hierarchy(*[level.tolist() for level in levels])
    target = int(generator.integers(1, 700))
    chosen = balanced_sample(tree, target, np.random.default_rng(seed))
    assert len(chosen) == min(target, 600)
    assert (np.diff(chosen) > 0).all()
    np.testing.assert_array_equal(chosen, balanced_sample(tree, target, np.random.default_rng(seed)))

    ancestors = [levels[0], levels[1][levels[0]], levels[2][levels[1][levels[0]]], np.zeros(600, int)]
    for level in (1, 2, 3):  # at each node, the children's counts are a brute-force cap, some of them with one more
        for node in set(ancestors[level]):
            inside = ancestors[level] == node
            size = np.bincount(ancestors[level - 1][inside])
            taken = np.bincount(ancestors[level - 1][chosen[inside[chosen]]], minlength=len(size))
            if taken.sum() == size.sum():
                continue
            cap = brute_force_cap(size.tolist(), int(taken.sum()))
            assert ((taken == np.minimum(size, cap)) | ((taken == cap + 1) & (size > cap))).all()


def test_members_are_drawn_evenly():
    tree = hierarchy(np.repeat([0, 1], [30, 3]).tolist())
    drawn = np.concatenate([balanced_sample(tree, 10, np.random.default_rng(seed)) for seed in range(400)])
    often = np.bincount(drawn, minlength=33)
    np.testing.assert_array_equal(often[30:], 400)  # all of the small cluster
    assert abs(often[:30] - 400 * 7 / 30).max() < 5 * (400 * 7 / 30 * 23 / 30) ** 0.5  # standard deviations
