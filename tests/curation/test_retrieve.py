from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from components.curation.config import IndexConfig, SeedSetConfig
from components.curation.retrieve import CompositionRow, SeedSet, retrieve


def angles(*degrees: float) -> np.ndarray:
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def sample(k: int, **more) -> SeedSetConfig:
    return SeedSetConfig(retrieve="sample", k=k, **more)


def run(vectors, candidates, seed_sets, labels=None, seed=0):
    labels = np.zeros(len(vectors), np.int64) if labels is None else labels
    return retrieve(vectors, candidates, labels, seed_sets, IndexConfig(), np.random.default_rng(seed))


def test_samples_by_hand():
    # Seeds at 0 and 10 degrees (set a) and at 40 (set b); candidates at 4, 7, 24, 70; one that is none, at 1.
    vectors = angles(0, 10, 40, 4, 7, 24, 70, 1)
    candidates = np.array([False, True, False, True, True, True, True, False])  # row 1 is a seed all the same
    sets = {"a": SeedSet(np.array([0, 1]), sample(2, as_is=True)), "b": SeedSet(np.array([2]), sample(3))}
    result = run(vectors, candidates, sets)
    # a: 0 finds 4 and 7, 10 finds 7 and 4: two collisions. b: 24, 70, 7; 7 is nearer to a's seed at 10.
    assert result.row.tolist() == [3, 4, 5, 6]
    assert result.query_row.tolist() == [0, 1, 2, 2]
    assert result.seed_set == ["a", "a", "b", "b"]
    np.testing.assert_allclose(result.similarity, np.cos(np.deg2rad([4, 3, 16, 30])), atol=1e-6)
    assert result.composition == [
        CompositionRow("a", 2, "as is", None, 0, 2),
        CompositionRow("a", 2, "sample k=2", 4, 2, 2),
        CompositionRow("b", 1, "sample k=3", 3, 1, 2),
    ]


def test_samples_equal_brute_force_in_memory_and_in_a_file(unit_vectors, tmp_path):
    vectors = unit_vectors(900, 12, 3)
    candidates = np.random.default_rng(0).random(900) < 0.7
    sets = {"a": SeedSet(np.arange(0, 60), sample(5)), "b": SeedSet(np.arange(100, 120), sample(9))}
    allowed = np.flatnonzero(candidates & ~np.isin(np.arange(900), np.r_[0:60, 100:120]))
    best: dict[int, tuple[float, int]] = {}
    for seeds in sets.values():
        for query in seeds.rows:
            cosines = vectors[allowed].astype(np.float64) @ vectors[query]
            for near in np.argsort(-cosines)[: seeds.config.k]:
                row = int(allowed[near])
                best[row] = max(best.get(row, (-2.0, 0)), (float(cosines[near]), int(query)))
    result = run(vectors, candidates, sets)
    assert dict(zip(result.row.tolist(), result.query_row.tolist(), strict=True)) == {
        r: q for r, (_, q) in best.items()
    }
    np.testing.assert_allclose(result.similarity, [best[row][0] for row in result.row.tolist()], atol=2e-6)
    a, b = result.composition
    assert (a.retrieved, b.retrieved) == (60 * 5, 20 * 9)
    assert a.final + b.final == len(best) == 60 * 5 + 20 * 9 - a.collisions - b.collisions

    np.save(tmp_path / "vectors.npy", vectors)
    again = run(np.load(tmp_path / "vectors.npy", mmap_mode="r"), candidates, sets)
    np.testing.assert_array_equal(result.row, again.row)
    np.testing.assert_array_equal(result.query_row, again.query_row)


def test_clusters_with_enough_seeds_give_up_to_a_number_of_images(unit_vectors):
    vectors = unit_vectors(400, 6, 1)
    labels = np.repeat([0, 1, 2, -1], 100)
    seeds = np.r_[0:4, 100:103, 200:206, 300:310]  # 4 in cluster 0, 3 in cluster 1, 6 in cluster 2, 10 in none
    candidates = np.ones(400, bool)
    candidates[210:] = False  # 4 of cluster 2 are left
    sets = {"c": SeedSet(seeds, SeedSetConfig(retrieve="cluster", per_cluster=25))}
    result = run(vectors, candidates, sets, labels)
    assert np.bincount(labels[result.row], minlength=3).tolist() == [25, 0, 4]
    assert not np.isin(result.row, seeds).any()
    for row, query, similarity in zip(result.row, result.query_row, result.similarity, strict=True):
        own = seeds[labels[seeds] == labels[row]]
        cosines = vectors[own] @ vectors[row]
        assert query == own[cosines.argmax()]
        assert similarity == pytest.approx(cosines.max(), abs=1e-5)
    assert result.composition == [CompositionRow("c", 23, "cluster", 29, 0, 29)]
    assert (run(vectors, candidates, sets, labels).row == result.row).all()
    assert not np.array_equal(run(vectors, candidates, sets, labels, seed=1).row, result.row)


def test_a_cap_holds_a_set_and_two_sets_share_no_image(unit_vectors):
    vectors, labels = unit_vectors(300, 6, 1), np.repeat([0, 1, 2], 100)
    capped = SeedSetConfig(retrieve="cluster", min_seeds=1, cap=80)
    sets = {
        "c": SeedSet(np.array([0, 100, 200]), capped),
        "d": SeedSet(np.array([1, 101]), SeedSetConfig(retrieve="cluster", min_seeds=1)),
        "kept": SeedSet(np.arange(2, 7), SeedSetConfig(as_is=True)),
    }
    result = run(vectors, np.ones(300, bool), sets, labels)
    c, d, kept = result.composition
    assert (c.retrieved, d.retrieved, kept.retrieved) == (290, 191, None)
    assert (c.final + c.collisions, d.final + d.collisions, kept.final) == (80, 191, 5)
    assert c.final + d.final == len(result.row) == len(set(result.row.tolist()))
    by_set = {"c": [0, 100, 200], "d": [1, 101]}
    for row, query, name in zip(result.row, result.query_row, result.seed_set, strict=True):
        assert query in by_set[name]
        assert labels[row] == labels[query]


def test_nothing_to_retrieve_from_or_for(unit_vectors):
    vectors, none = unit_vectors(10, 4, 0), np.zeros(10, bool)
    cluster = SeedSetConfig(retrieve="cluster")
    both = {"a": SeedSet(np.arange(5), sample(3)), "b": SeedSet(np.arange(5, 10), cluster)}
    assert [row.final for row in run(vectors, none, both).composition] == [0, 0]
    assert len(run(vectors, ~none, {}).row) == 0
    empty = run(vectors, ~none, {"a": SeedSet(np.zeros(0, np.int64), sample(3))})
    assert empty.composition == [CompositionRow("a", 0, "sample k=3", 0, 0, 0)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give as_is: true, retrieve: sample or retrieve: cluster"),
        ({"retrieve": "cluster", "k": 8}, "k is not read where retrieve is cluster"),
        ({"as_is": True, "cap": 10}, "cap is not read where retrieve is not given"),
    ],
)
def test_a_seed_set_config_says_what_it_does_not_read(given, message):
    with pytest.raises(ValidationError, match=message):
        SeedSetConfig(**given)
    assert SeedSetConfig(**SeedSetConfig(as_is=True).model_dump()).as_is  # a resolved recipe can be read again
