import logging
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

from components.core.knn import knn_predictions, nearest
from components.data.evaluation_set import Labels
from components.evaluation.config import EvaluateConfig, KnnConfig, LinearConfig
from components.evaluation.protocols.instance import retrieval_ranks
from components.evaluation.protocols.knn import draw_shots
from components.evaluation.protocols.knn import evaluate as evaluate_knn
from components.evaluation.protocols.linear import linear_predictions
from components.evaluation.scores import Scores, differences
from components.model.config import Preprocessing

MODELS = {"teacher": "models/adapted"}


@pytest.fixture
def blobs():
    """Overlapping classes: train [200, 16] and test [90, 16] with their classes."""
    generator = np.random.default_rng(0)
    centers = generator.standard_normal((5, 16))
    targets = generator.integers(5, size=290)
    features = (centers[targets] + 1.2 * generator.standard_normal((290, 16))).astype(np.float32)
    return features[:200], targets[:200], features[200:], targets[200:]


@pytest.mark.parametrize("k", [1, 10, 25])
def test_knn_equals_scikit_learn_with_the_papers_weights(blobs, k):
    train, targets, test, _ = blobs
    found = nearest(test, train, 25)
    predictions = knn_predictions(found.similarities, targets[found.indices], (1, 10, 25), 0.07)
    # exp((cosine - 1) / T) is the softmax weight up to a factor that all votes share.
    model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07))
    expected = model.fit(normalize(train), targets).predict(normalize(test))
    np.testing.assert_array_equal(predictions[k], expected)


def test_knn_by_hand():
    # Two far neighbors of class 1 outvote one near neighbor of class 0 at T = 1, and not at T = 0.07.
    similarities, classes = np.array([[0.9, 0.6, 0.6]]), np.array([[0, 1, 1]])
    assert knn_predictions(similarities, classes, (1, 3), 1.0) == {1: [0], 3: [1]}
    assert knn_predictions(similarities, classes, (3,), 0.07)[3] == [0]


def test_neighbors_are_of_predictable_classes():
    features = np.array([[1, 0], [0.9, 0.1], [0, 1], [1, 0.05], [0.1, 1]], np.float32)
    labels = Labels(("cat", "dog", "owl"), np.array([0, 1, 2, 1, 2]), np.arange(3), np.arange(3, 5))
    config = KnnConfig(num_neighbors=(1,), reported=1)
    assert evaluate_knn(features, labels, config).by_image["knn_top1"].tolist() == [0, 1]
    among = replace(labels, predictable=np.array([1, 2]))
    assert evaluate_knn(features, among, config).by_image["knn_top1"].tolist() == [1, 1]  # the cat is no neighbor


def test_nearest_is_cosine_and_tells_apart_what_float32_cannot():
    gallery = np.array([[1.0, 1e-5], [1.0, 3e-5], [1.0, 2e-5]], np.float32)
    found = nearest(5 * np.array([[1.0, 0.0]], np.float32), gallery, 3)
    assert found.indices.tolist() == [[0, 2, 1]]


def test_logistic_regression_equals_a_search_done_by_hand(blobs):
    train, targets, test, _ = blobs
    config = LinearConfig(c_grid=(1e-3, 0.1, 10.0))
    result = linear_predictions(train, targets, test, config, "blobs")
    order = np.random.default_rng(0).permutation(200)
    held, kept = order[:20], order[20:]
    scores = {}
    for c in config.c_grid:
        model = LogisticRegression(C=c, solver="newton-cg", tol=1e-10, max_iter=500)
        scores[c] = model.fit(train[kept].astype(float), targets[kept]).score(train[held].astype(float), targets[held])
    best = max(scores, key=lambda c: (scores[c], -c))
    assert result.c == best
    model = LogisticRegression(C=best, solver="newton-cg", tol=1e-10, max_iter=500).fit(train.astype(float), targets)
    np.testing.assert_array_equal(result.predictions, model.predict(test.astype(float)))
    among = linear_predictions(train, targets, test, LinearConfig(c_grid=(best,)), "blobs", np.array([1, 3, 4]))
    chosen = model.predict_proba(test.astype(float))[:, [1, 3, 4]].argmax(axis=1)
    np.testing.assert_array_equal(among.predictions, np.array([1, 3, 4])[chosen])


def test_too_few_images_to_hold_out(caplog):
    train, targets = np.array([[0.0], [1.0]]), np.array([0, 1])
    with caplog.at_level(logging.WARNING):
        result = linear_predictions(train, targets, np.array([[2.0]]), LinearConfig(c_grid=(1.0, 10.0, 100.0)), "two")
    assert (result.c, result.predictions.tolist()) == (10.0, [1])
    assert "too few" in caplog.text


def test_retrieval_ranks_by_hand():
    gallery = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    queries = np.array([[2.0, 0.1], [1.0, 0.9], [0.9, 1.0]])
    assert retrieval_ranks(queries, gallery, np.array([0, 2, 0])).tolist() == [1, 1, 3]


def test_collapsed_features_are_retrieved_last():
    same = np.ones((4, 2))
    assert retrieval_ranks(same, same, np.arange(4)).tolist() == [4, 4, 4, 4]


def test_differences_are_paired():
    scores = {name: Scores() for name in ("candidate", "random")}
    scores["candidate"].add("knn_top1", np.array([1.0, 1.0, 0.0, 1.0] * 50))
    scores["random"].add("knn_top1", np.array([0.0, 0.0, 0.0, 1.0] * 50))
    interval = differences(scores, "candidate", 500, seed=0)["random"]["knn_top1"]
    assert interval.mean == 0.5
    # Half the differences are 1, half 0: standard error sqrt(0.25 / 200), and not the larger one of unpaired samples.
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 200), rel=0.1)


def test_differences_of_parts_of_photographs_are_clustered():
    scores = {name: Scores() for name in ("candidate", "random")}
    clusters = np.repeat(np.arange(10), 20)
    scores["candidate"].add("knn_top1", (clusters < 5).astype(float))
    scores["random"].add("knn_top1", np.zeros(200))
    interval = differences(scores, "candidate", 500, 0, clusters)["random"]["knn_top1"]
    # As wide as of ten images, each of which stands for its photograph.
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 10), rel=0.15)
    clustered, independent = (scores["candidate"].intervals(given)["knn_top1"] for given in (clusters, None))
    assert clustered.high - clustered.low > 3 * (independent.high - independent.low)


def test_few_shot_takes_some_of_each_class_and_all_of_a_small_one(caplog):
    targets = np.array([0] * 10 + [1] * 3 + [2] * 9 + [0, 1, 2])
    labels = Labels(("cat", "dog", "owl"), targets, np.arange(22), np.arange(22, 25))
    rows = draw_shots(labels, 5, np.random.default_rng(0))
    assert np.bincount(targets[rows]).tolist() == [5, 3, 5]
    assert len({tuple(draw_shots(labels, 5, np.random.default_rng(seed))) for seed in range(10)}) > 5
    features = np.eye(3, dtype=np.float32)[targets]
    config = KnnConfig(num_neighbors=(3,), reported=3, few_shot=(1, 5), tries=2)
    scores = evaluate_knn(features, labels, config)
    assert scores.metrics["knn_top1_1shot"] == scores.metrics["knn_top1_5shot"] == 1
    assert scores.metrics["knn_top1_5shot_std"] == 0
    assert caplog.text.count("fewer than 5 train images") == 1
    assert "1 of 3 classes have fewer than 5 train images and use all of them (dog: 3)" in caplog.text


def test_few_shot_equals_scikit_learn_on_each_draw(blobs):
    train, targets, test, test_targets = blobs
    every = np.concatenate([targets, test_targets])
    labels = Labels(tuple("abcde"), every, np.arange(200), np.arange(200, 290))
    config = KnnConfig(few_shot=(1, 4), tries=3)
    scores = evaluate_knn(np.concatenate([train, test]), labels, config)
    for shots in config.few_shot:
        accuracies = []
        for seed in range(3):
            rows = draw_shots(labels, shots, np.random.default_rng(seed))
            model = KNeighborsClassifier(
                shots, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07)
            ).fit(train[rows], targets[rows])
            accuracies.append(model.score(test, test_targets))
        assert scores.metrics[f"knn_top1_{shots}shot"] == pytest.approx(np.mean(accuracies))
        assert scores.metrics[f"knn_top1_{shots}shot_std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert set(scores.by_image) == {"knn_top1", "knn_top1_1shot", "knn_top1_4shot"}


def test_defaults_are_the_papers():
    config = EvaluateConfig(models=MODELS)
    assert config.knn.num_neighbors == (10, 20, 100, 200)
    np.testing.assert_allclose(config.linear.c_grid, 10 ** np.linspace(-6, 5, 45))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KnnConfig(num_neighbors=(5,), reported=20), "one of num_neighbors"),
        (lambda: Preprocessing(crop_size=257), "crop_size 257 is larger than resize_size 256"),
        (lambda: EvaluateConfig(models=MODELS, champions={"teacher": "models:/tiny@champion"}), "pattern"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()
