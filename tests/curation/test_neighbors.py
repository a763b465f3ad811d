from __future__ import annotations

import numpy as np
import pytest

from components.curation import neighbors
from components.curation.neighbors import find_neighbors


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
