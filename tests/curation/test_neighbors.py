from __future__ import annotations

import faiss
import numpy as np
import pytest

from components.curation import neighbors
from components.curation.config import CurationError, IndexConfig
from components.curation.neighbors import Neighbors, VectorRows, find_neighbors

APPROXIMATE = IndexConfig(flat_below=256, num_probes=32)


def as_set(pairs: Neighbors) -> set[tuple[int, int]]:
    return set(zip(pairs.query.tolist(), pairs.neighbor.tolist(), strict=True))


@pytest.fixture(scope="module")
def planted() -> np.ndarray:
    """4,000 vectors of 64 numbers around 40 centers; the last 400 are copies of the first at cosines above 0.77."""
    generator = np.random.default_rng(5)
    vectors = generator.standard_normal((4000, 64)) + generator.standard_normal((40, 64))[np.arange(4000) % 40]
    noise = generator.standard_normal((400, 64)) * np.linspace(0, 0.8, 400)[:, None]
    vectors[3600:] = vectors[:400] + noise
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("chunk", [64, 4096])
def test_equals_brute_force_among_themselves(unit_vectors, monkeypatch, chunk):
    monkeypatch.setattr(neighbors, "CHUNK", chunk)
    vectors = unit_vectors(300, 8, 1)
    pairs = find_neighbors(vectors, None, 5, 0.6)
    exact = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    np.fill_diagonal(exact, -np.inf)
    expected = {(i, j) for i in range(300) for j in np.argsort(-exact[i])[:5] if exact[i, j] > 0.6}
    assert len(expected) > 100
    assert set(zip(pairs.query.tolist(), pairs.neighbor.tolist(), strict=True)) == {(i, int(j)) for i, j in expected}
    np.testing.assert_allclose(pairs.similarity, exact[pairs.query, pairs.neighbor], atol=1e-6)
    np.testing.assert_allclose(pairs.nearest, exact.max(axis=1), atol=1e-5)


def test_equals_brute_force_against_others(unit_vectors):
    queries, others = unit_vectors(100, 6, 2), unit_vectors(40, 6, 3)
    pairs = find_neighbors(queries, others, 1, 0.5)
    exact = queries.astype(np.float64) @ others.astype(np.float64).T
    expected = {(i, int(exact[i].argmax())) for i in range(100) if exact[i].max() > 0.5}
    assert set(zip(pairs.query.tolist(), pairs.neighbor.tolist(), strict=True)) == expected


def test_the_threshold_is_exclusive_and_exact():
    angle = np.arccos([0.6, 0.6001, 0.5999])
    others = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    pairs = find_neighbors(np.array([[1, 0]], np.float32), others, 3, 0.6)
    assert pairs.neighbor.tolist() == [1]


def test_one_image_and_no_image():
    alone = find_neighbors(np.array([[1, 0]], np.float32), None, 64, 0.6)
    assert len(alone.query) == 0
    assert alone.nearest.tolist() == [-1]
    assert len(find_neighbors(np.zeros((0, 2), np.float32), None, 64, 0.6).query) == 0


def test_the_index_finds_the_planted_copies_that_all_products_find(planted):
    flat = find_neighbors(planted, None, 8, 0.75)
    found = find_neighbors(planted, None, 8, 0.75, APPROXIMATE)
    copies = {(i, i - 3600) for i in range(3600, 4000)}
    assert len(copies & as_set(flat)) == 400
    assert as_set(found) <= as_set(flat)
    assert len(copies & as_set(found)) >= 0.97 * 400
    assert len(as_set(found)) >= 0.97 * len(as_set(flat))
    assert (flat.recall, 0.97 <= found.recall <= 1) == (1.0, True)
    by_pair = dict(zip(zip(flat.query.tolist(), flat.neighbor.tolist(), strict=True), flat.similarity, strict=True))
    pairs = zip(found.query.tolist(), found.neighbor.tolist(), strict=True)
    assert [by_pair[pair] for pair in pairs] == found.similarity.tolist()  # the vectors decide, not the codes


def test_dims_that_split_into_no_equal_parts_are_coded_as_finely():
    generator = np.random.default_rng(5)
    vectors = generator.standard_normal((4000, 131)) + generator.standard_normal((40, 131))[np.arange(4000) % 40]
    vectors[3600:] = vectors[:400] + generator.standard_normal((400, 131)) * np.linspace(0, 0.8, 400)[:, None]
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    found = find_neighbors(vectors, None, 8, 0.75, APPROXIMATE)
    assert as_set(found) == as_set(find_neighbors(vectors, None, 8, 0.75))
    assert found.recall == 1.0  # 0.66 if a code is made of the 131 numbers as one part


def test_without_a_threshold_all_the_nearest_are_pairs_nearest_first(planted):
    queries = planted[:50]
    exact = queries.astype(np.float64) @ planted.astype(np.float64).T
    expected = np.argsort(-exact, axis=1, kind="stable")[:, :5]
    pairs = find_neighbors(queries, planted, 5, None)
    assert pairs.neighbor.reshape(50, 5).tolist() == expected.tolist()
    found = find_neighbors(queries, planted, 5, None, APPROXIMATE)
    hits = sum(
        len(set(a) & set(b)) for a, b in zip(found.neighbor.reshape(50, 5).tolist(), expected.tolist(), strict=True)
    )
    assert found.recall == pytest.approx(hits / 250)  # 50 queries: the sample is all of them
    assert np.all(np.diff(found.similarity.reshape(50, 5)) <= 0)


def test_an_index_that_misses_too_much_stops_the_run(planted):
    bad = IndexConfig(flat_below=256, num_lists=500, num_probes=1, min_recall=0.99)
    with pytest.raises(
        CurationError, match=r"finds 0\.\d+ of \d+ exact pairs .* 0\.99; raise curate\.index\.num_probes"
    ):
        find_neighbors(planted, None, 8, 0.75, bad)


@pytest.mark.parametrize("index", [IndexConfig(), APPROXIMATE], ids=["flat", "ivfpq"])
def test_threads_memory_maps_and_blocks_do_not_change_the_result(planted, index, tmp_path, monkeypatch):
    np.save(tmp_path / "vectors.npy", np.repeat(planted, 2, axis=0))
    twice = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    mapped = VectorRows(twice, np.arange(1, 8000, 2))
    threads = faiss.omp_get_max_threads()
    results = []
    try:
        for count, vectors in ((1, planted), (2, planted), (2, mapped)):
            faiss.omp_set_num_threads(count)
            if vectors is mapped:
                monkeypatch.setattr(neighbors, "EXACT_BLOCK_BYTES", 4 * 64 * 1500)
                monkeypatch.setattr(neighbors, "BLOCK_BYTES", 4 * 64 * 700)
            results.append(find_neighbors(vectors, None, 8, 0.6, index))
            assert faiss.omp_get_max_threads() == count
    finally:
        faiss.omp_set_num_threads(threads)
    for result in results[1:]:
        for name in ("query", "neighbor", "similarity", "recall"):
            np.testing.assert_array_equal(getattr(result, name), getattr(results[0], name))
        # Products of blocks of another shape may be added in another order.
        np.testing.assert_allclose(result.nearest, results[0].nearest, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(results[1].nearest, results[0].nearest)
