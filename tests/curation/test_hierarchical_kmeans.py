from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from components.curation import cluster
from components.curation.cluster import hierarchical_kmeans
from components.curation.config import LevelConfig


def flat(num_clusters: int) -> list[LevelConfig]:
    return [LevelConfig(num_clusters=num_clusters, resampling_steps=0)]


def test_lloyds_iterations_equal_scikit_learns(unit_vectors):
    vectors = unit_vectors(2000, 16, 1)
    seeds = hierarchical_kmeans(vectors, flat(30), 0, seed=5).centroids[0]
    assert {row.tobytes() for row in seeds} <= {row.tobytes() for row in vectors}
    ours = hierarchical_kmeans(vectors, flat(30), 4, seed=5)
    theirs = KMeans(30, init=seeds.astype(np.float64), n_init=1, max_iter=4, tol=0, algorithm="lloyd")
    theirs.fit(vectors.astype(np.float64))
    np.testing.assert_allclose(ours.centroids[0], theirs.cluster_centers_, atol=1e-6)
    np.testing.assert_array_equal(ours.labels[0], theirs.labels_)


def test_seeding_is_better_than_plain_k_means_plus_plus(unit_vectors):
    from sklearn.cluster import kmeans_plusplus

    vectors = unit_vectors(3000, 8, 2)

    def potential(seeds: np.ndarray) -> float:
        return float(((vectors[:, None] - seeds) ** 2).sum(2).min(1).sum())

    ours = [potential(hierarchical_kmeans(vectors, flat(40), 0, seed).centroids[0]) for seed in range(5)]
    plain = [potential(kmeans_plusplus(vectors, 40, n_local_trials=1, random_state=seed)[0]) for seed in range(5)]
    greedy = [potential(kmeans_plusplus(vectors, 40, random_state=seed)[0]) for seed in range(5)]  # the same 2 + ln C
    assert np.mean(ours) < np.mean(plain)
    assert np.mean(ours) == pytest.approx(np.mean(greedy), rel=0.02)


def test_levels_are_clusters_of_clusters():
    generator = np.random.default_rng(0)
    tops = np.array([[0, 0], [100, 0], [0, 100]])
    blobs = (tops[:, None] + np.array([[0, 0], [8, 0], [0, 8], [8, 8]])).reshape(12, 2)
    truth = np.repeat(np.arange(12), [200, 3, 30, 5, 9, 90, 4, 50, 3, 3, 60, 8])
    vectors = (blobs[truth] + generator.standard_normal((len(truth), 2)) * 0.1).astype(np.float32)
    levels = [LevelConfig(num_clusters=12, resampling_steps=2), LevelConfig(num_clusters=3, resampling_steps=1)]
    hierarchy = hierarchical_kmeans(vectors, levels, 50, seed=0)
    fine, coarse = hierarchy.labels
    assert (len(fine), len(coarse)) == (len(truth), 12)
    assert len(set(zip(truth.tolist(), fine.tolist(), strict=True))) == 12
    assert len(set(zip((truth // 4).tolist(), coarse[fine].tolist(), strict=True))) == 3
    assert hierarchy.paths() == [f"{coarse[number]}/{number}" for number in fine]
    np.testing.assert_allclose(hierarchy.centroids[1][coarse[fine[truth == 0]][0]], [4, 4], atol=0.2)  # of 4 centroids


def test_resampling_by_hand():
    # Centroids 3 and 103; the two points nearest to each are 1, 2 and 101, 102, whose means are 1.5 and 101.5.
    line = np.array([0, 1, 2, 9, 100, 101, 102, 109], np.float32)
    vectors = np.stack([line, np.zeros(8, np.float32)], axis=1)
    plain = hierarchical_kmeans(vectors, flat(2), 50, seed=0)
    assert sorted(plain.centroids[0][:, 0].tolist()) == [3, 103]
    again = hierarchical_kmeans(vectors, [LevelConfig(num_clusters=2, resampling_steps=3, sample_size=2)], 50, seed=0)
    assert sorted(again.centroids[0][:, 0].tolist()) == [1.5, 101.5]
    assert again.labels[0].tolist() in ([0] * 4 + [1] * 4, [1] * 4 + [0] * 4)


def test_resampling_spreads_centroids_over_the_support():
    # 19 of 20 points lie in the left half of a rectangle. In two dimensions centroids go by the square root of density.
    # Resampling takes 40 points of each of 100 clusters, which is all 400 on the right: n clusters there are stable
    # where n / (100 - n) = sqrt(400 / (40 (100 - n))), which is n = 27.
    generator = np.random.default_rng(0)
    vectors = generator.random((8000, 2)).astype(np.float32)
    vectors[:7600, 0] -= 1

    def share_right(level: LevelConfig) -> float:
        return float((hierarchical_kmeans(vectors, [level], 50, seed=0).centroids[0][:, 0] > 0).mean())

    plain = share_right(LevelConfig(num_clusters=100, resampling_steps=0))
    assert plain == pytest.approx(1 / (1 + 19**0.5), abs=0.04)
    assert share_right(LevelConfig(num_clusters=100)) == pytest.approx(0.27, abs=0.03)


def test_each_level_flattens_the_density_of_centroids():
    # As above: each level takes the square root of the density below it, so that 19 points on the left for one on the
    # right become 19^(1/2), then 19^(1/4) centroids (arXiv 2405.15613, section 3.2), and with resampling still fewer.
    generator = np.random.default_rng(1)
    vectors = generator.random((12000, 2)).astype(np.float32)
    vectors[:11400, 0] -= 1

    def divergence(resampling_steps: int) -> list[float]:  # of each level's centroids on the halves, from even ones
        levels = [LevelConfig(num_clusters=count, resampling_steps=resampling_steps) for count in (600, 150)]
        right = [float((c[:, 0] > 0).mean()) for c in hierarchical_kmeans(vectors, levels, 20, seed=0).centroids]
        return [float(np.log(2) + share * np.log(share) + (1 - share) * np.log(1 - share)) for share in right]

    plain = divergence(0)
    np.testing.assert_allclose(plain, [0.212, 0.063], atol=0.03)  # of shares 1 / (1 + 19^(1/2)) and 1 / (1 + 19^(1/4))
    resampled = divergence(2)
    assert resampled[0] < 0.75 * plain[0]
    assert resampled[1] < 0.5 * plain[1]


def test_the_same_for_any_thread_count_and_for_a_file(unit_vectors, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "CHUNK_BYTES", 2**17)  # 1,024 vectors: six chunks, and ten parts to seed from
    monkeypatch.setattr(cluster, "SEEDING_PART_BYTES", 2**14)
    vectors = unit_vectors(6000, 32, 4)
    path = tmp_path / "vectors.npy"
    np.save(path, np.concatenate([vectors[:10], vectors]))
    levels = [LevelConfig(num_clusters=40, resampling_steps=1), LevelConfig(num_clusters=5, resampling_steps=1)]
    with threadpool_limits(1):
        one = hierarchical_kmeans(vectors, levels, 10, seed=0)
    with threadpool_limits(3):
        file = np.load(path, mmap_mode="r")
        many = hierarchical_kmeans(file, levels, 10, seed=0, rows=np.arange(10, 6010))
    for left, right in zip(one.labels + one.centroids, many.labels + many.centroids, strict=True):
        np.testing.assert_array_equal(left, right)
    assert (one.labels[0] != hierarchical_kmeans(vectors, levels, 10, seed=1).labels[0]).any()


def test_no_more_clusters_than_images_and_empty_ones_stay_where_they_were(unit_vectors):
    assert sorted(hierarchical_kmeans(unit_vectors(3, 8, 0), flat(50), 5, seed=0).labels[0].tolist()) == [0, 1, 2]
    same = np.tile(unit_vectors(1, 8, 0), (20, 1))
    hierarchy = hierarchical_kmeans(same, [LevelConfig(num_clusters=4)], 5, seed=0)
    assert len(set(hierarchy.labels[0].tolist())) == 1
    np.testing.assert_allclose(hierarchy.centroids[0], same[: len(hierarchy.centroids[0])], atol=1e-6)


def test_memory_does_not_grow_with_the_vectors(tmp_path):
    shape, blobs = (200_000, 128), np.random.default_rng(1).standard_normal((8, 128)).astype(np.float32)
    path = tmp_path / "vectors.npy"
    file = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    file[:] = blobs[np.arange(len(file)) % 8]
    file += np.linspace(0, 0.01, len(file), dtype=np.float32)[:, None]
    del file
    with threadpool_limits(2):
        tracemalloc.start()
        hierarchy = hierarchical_kmeans(np.load(path, mmap_mode="r"), flat(8), 10, seed=0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    np.testing.assert_array_equal(np.bincount(hierarchy.labels[0]), [25_000] * 8)
    assert peak < 0.4 * 4 * np.prod(shape)
