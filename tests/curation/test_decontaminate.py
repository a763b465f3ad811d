from __future__ import annotations

import numpy as np
import pyarrow as pa

from components.curation.config import IndexConfig
from components.curation.decontaminate import References, find_contamination
from components.curation.deduplicate import group_duplicates


def at_degrees(*degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def test_a_component_that_touches_a_reference_goes_whole(images):
    # Pool: 0, 50 (cosine 0.64 to 0), 180, 280. References: 110 of set b (cosine 0.5 to 50), 290 of set a (0.98 to 280).
    vectors = at_degrees(0, 50, 180, 280)
    groups = group_duplicates(vectors, images([(9, 9)] * 4), 64, 0.6)
    ids = ["b0", "a0"]
    table = pa.concat_tables([images([(9, 9)], ids[:1], "b"), images([(9, 9)], ids[1:], "a")])
    rows = np.array([10, 11, 12, 13])
    found = find_contamination(groups, rows, vectors, References(table, at_degrees(110, 290)), 0.45)
    rejected = sorted(found.rejected.to_pylist(), key=lambda row: row["row"])
    assert [row["row"] for row in rejected] == [10, 11, 13]
    assert [row["duplicate_of"] for row in rejected] == ["b0", "b0", "a0"]
    similarity = [row["similarity"] for row in rejected]  # that of image 0 is the one of the image it goes with
    np.testing.assert_allclose(similarity, np.cos(np.radians([60, 60, 10])), atol=1e-6)
    assert found.per_set == {"a": 1, "b": 2}
    np.testing.assert_allclose(found.nearest, np.cos(np.radians([70, 60, 70, 10])), atol=1e-6)


def test_an_image_that_goes_with_its_group_says_through_whom(images):
    vectors = at_degrees(0, 40, 180)
    groups = group_duplicates(vectors, images([(9, 9)] * 3), 64, 0.6)
    found = find_contamination(groups, np.arange(3), vectors, References(images([(9, 9)], ["r"]), at_degrees(90)), 0.45)
    details = {row["row"]: (row["detail"], row["duplicate_of"]) for row in found.rejected.to_pylist()}
    assert details == {
        0: ("evaluation set photos, through an image of its group", "r"),
        1: ("evaluation set photos", "r"),
    }


def test_without_references_nothing_is_removed(images):
    vectors = at_degrees(0, 90)
    groups = group_duplicates(vectors, images([(9, 9)] * 2), 64, 0.6)
    none = References(images([]), np.zeros((0, 0), np.float32))
    found = find_contamination(groups, np.arange(2), vectors, none, 0.45)
    assert len(found.rejected) == 0
    assert found.per_set == {}


def test_big_evaluation_sets_are_searched_by_an_index_that_is_checked_on_their_copies(images, unit_vectors):
    # 5 of 3,000 pool images are copies of set b's: a sample of 100 of the pool would see none of them.
    pool, references = unit_vectors(3000, 32, 1), unit_vectors(1000, 32, 2)
    copies, of = np.arange(100, 105), np.array([300, 500, 600, 800, 999])
    pool[copies] = references[of]
    names = [f"{number:04d}" for number in range(1000)]
    table = pa.concat_tables([images([(9, 9)] * 300, names[:300], "a"), images([(9, 9)] * 700, names[300:], "b")])
    groups = group_duplicates(pool, images([(9, 9)] * 3000), 64, 0.95)
    index = IndexConfig(flat_below=256, num_probes=16, recall_sample=700)
    flat, found = (
        find_contamination(groups, np.arange(3000), pool, References(table, references), 0.95, one)
        for one in (IndexConfig(), index)
    )
    assert flat.rejected["row"].to_pylist() == copies.tolist()
    assert flat.rejected["duplicate_of"].to_pylist() == [names[row] for row in of]
    assert found.rejected.equals(flat.rejected)
    assert (found.per_set, found.recall) == ({"a": 0, "b": 5}, {"a": 1.0, "b": 1.0})
