from __future__ import annotations

import numpy as np

from components.curation.deduplicate import components, group_duplicates, keepers, near_duplicates
from components.curation.neighbors import Neighbors


def at_degrees(*degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def test_components_of_a_hand_made_graph():
    # 0-1-2 is a chain whose edges point both ways, 3 is alone, 4-5 is a pair.
    query, neighbor = np.array([1, 1, 5]), np.array([0, 2, 4])
    pairs = Neighbors(query, neighbor, np.ones(3, np.float32), np.zeros(6, np.float32))
    label = components(pairs, 6)
    assert label[0] == label[1] == label[2]
    assert label[4] == label[5]
    assert len(set(label.tolist())) == 3


def test_the_keeper_has_most_pixels_then_the_lowest_id(images):
    table = images([(10, 10), (20, 10), (10, 20), (30, 30), (5, 5)], ids=["a", "c", "b", "d", "e"])
    label = np.array([0, 0, 0, 1, 1])
    assert keepers(label, table).tolist() == [2, 2, 2, 3, 3]
    first = np.array([True, False, False, False, True])
    assert keepers(label, table, first).tolist() == [0, 0, 0, 4, 4]


def test_a_chain_is_one_group_and_says_so(images):
    # 45 degrees are cosine 0.707, 90 are 0: the ends are linked only through the middle; 200 is alone.
    vectors, table = at_degrees(0, 45, 90, 200), images([(30, 30), (20, 20), (10, 10), (5, 5)])
    groups = group_duplicates(vectors, table, 64, 0.6)
    rejected = near_duplicates(groups, np.array([7, 8, 9, 11]), vectors, table, 0.6).to_pylist()
    ids = table["image_id"].to_pylist()
    assert groups.keeper.tolist() == [0, 0, 0, 3]
    assert [row["row"] for row in rejected] == [8, 9]
    assert [row["duplicate_of"] for row in rejected] == [ids[0], ids[0]]
    np.testing.assert_allclose([row["similarity"] for row in rejected], [np.sqrt(0.5), 0], atol=1e-6)
    assert rejected[0]["detail"] == "group of 3"
    assert rejected[1]["detail"] == "group of 3, linked through other images of it"


def test_more_copies_than_neighbors_are_still_one_group(images):
    vectors = np.repeat(at_degrees(0, 120), 100, axis=0)
    vectors += np.random.default_rng(0).normal(0, 1e-3, vectors.shape).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    groups = group_duplicates(vectors, images([(8, 8)] * 200), 8, 0.6)
    assert len(set(groups.keeper.tolist())) == 2
