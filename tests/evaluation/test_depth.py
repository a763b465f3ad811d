"""Linear depth: the loss, the bins and the metrics by hand, and a depth that the tokens hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_percentage_error, root_mean_squared_error
from torch.nn import functional as F

from components.core.errors import DatasetError
from components.core.metric_names import LOWER_IS_BETTER, lower_is_better
from components.evaluation import protocol_input
from components.evaluation.config import DepthConfig
from components.evaluation.dense import DenseFeatures
from components.evaluation.protocol_input import keep_targets
from components.evaluation.protocols.depth import (
    DepthFeatures,
    depth_errors,
    depth_task,
    evaluate,
    expected_depth,
    fit,
    image_errors,
    measure,
    predict,
    sig_loss,
)

GRID, SIZE = 4, 32
TRAIN, TEST = np.arange(24), np.arange(24, 32)
CONFIG = DepthConfig(learning_rates=(0.02,), batch_size=8, steps=100, warmup_steps=5, num_bins=64)


def test_loss_by_hand():
    offset = 1e-3
    truth = torch.ones(2, dtype=torch.float64) - offset
    predicted = torch.tensor([0.2, 0.4], dtype=torch.float64).exp() - offset
    # g = 0.2 and 0.4: unbiased variance 0.02, mean 0.3.
    assert sig_loss(predicted, truth).item() == pytest.approx(math.sqrt(0.02 + 0.15 * 0.09))


def test_expected_depth_by_hand():
    logits = torch.tensor([[0.9, -5.0, 1.9], [-1.0, -1.0, 0.4]]).view(1, 2, 3, 1).permute(0, 2, 1, 3)  # of two places
    found = expected_depth(logits.clone(), torch.tensor([1.0, 2.0, 3.0]))
    assert found.shape == (1, 1, 2, 1)
    # Weights 1, 0.1 and 2 of depths 1, 2 and 3; and 0.1, 0.1 and 0.5.
    np.testing.assert_allclose(found.ravel(), [(1 + 0.2 + 6) / 3.1, (0.1 + 0.2 + 1.5) / 0.7], rtol=1e-6)


def test_errors_are_scikit_learns():
    generator = np.random.default_rng(0)
    truth, predicted = generator.uniform(1, 5, 200), generator.uniform(1, 5, 200)
    found = depth_errors(predicted, truth)
    assert found["rmse"] == pytest.approx(root_mean_squared_error(truth, predicted))
    assert found["abs_rel"] == pytest.approx(mean_absolute_percentage_error(truth, predicted))
    # Ratios 1.2, 1.3 and 1 / 1.3: one of three is near.
    assert depth_errors(np.array([1.2, 1.3, 1.0]), np.array([1.0, 1.0, 1.3]))["delta1"] == pytest.approx(1 / 3)


def sloped():
    """Tokens of which channel 0 is a smooth field, depths 2 + field, and pixels that were not measured."""
    generator = np.random.default_rng(0)
    field = F.interpolate(torch.from_numpy(generator.uniform(0, 2, (32, 1, 3, 3))), (GRID, GRID), mode="bilinear")
    depths = 2 + F.interpolate(field, (SIZE, SIZE), mode="bilinear")[:, 0].numpy()
    tokens = generator.standard_normal((32, GRID * GRID, 4)).astype(np.float32)
    tokens[:, :, 0] = field.reshape(32, -1).numpy()
    cls_tokens = generator.standard_normal((32, 4)).astype(np.float16)
    depths[:, :4, :4] = 0
    return depths, DepthFeatures(DenseFeatures(tokens, GRID, GRID), cls_tokens)


def task_of(depths, test=TEST):
    return depth_task(depths.__getitem__, TRAIN, test, 0.001, 6.0)


@pytest.fixture(scope="module")
def trained():
    depths, features = sloped()
    task = task_of(depths)
    return depths, task, features, fit(features, task, CONFIG, 0, "depth")


def test_depth_that_the_tokens_hold_is_recovered(trained):
    depths, task, features, head = trained
    scores = measure(head, features, task, CONFIG, "depth")
    known = depths[TEST] > 0
    assert depths[TEST][known].std() > 0.35  # the RMSE of the best constant
    assert scores.metrics["depth_rmse"] < 0.06
    assert scores.metrics["depth_delta1"] > 0.99
    predicted = predict(head, features, TEST, (SIZE, SIZE))
    expected = [root_mean_squared_error(depths[i][k], p[k]) for i, p, k in zip(TEST, predicted, known, strict=True)]
    np.testing.assert_allclose(scores.by_image["depth_rmse"], expected, rtol=1e-6)
    assert scores.metrics["depth_rmse"] == pytest.approx(np.mean(expected))


def test_a_training_decodes_each_map_once(monkeypatch):
    depths, features = sloped()
    read: list[int] = []

    def decode(image):
        read.append(image)
        return depths[image]

    task = depth_task(keep_targets(decode, SIZE), TRAIN, TEST, 0.001, 6)
    fit(features, task, CONFIG.model_copy(update={"steps": 9}), 0, "depth")
    assert sorted(read) == list(range(32))
    monkeypatch.setattr(protocol_input, "KEPT_BYTES", 5 * 4 * SIZE**2)
    assert keep_targets(decode, SIZE).cache_parameters() == {"maxsize": 5, "typed": False}


def test_the_head_is_the_papers(trained):
    # As dinov2/eval/depth: class tokens concatenated, tokens upsampled, then the layer.
    _, _, features, head = trained
    tokens = torch.from_numpy(features.patches.tokens[:2]).reshape(2, GRID, GRID, 4).permute(0, 3, 1, 2)
    cls_tokens = torch.from_numpy(features.cls_tokens[:2]).float()[:, :, None, None].expand(2, 4, GRID, GRID)
    joined = F.interpolate(torch.cat([tokens, cls_tokens], dim=1), scale_factor=4, mode="bilinear")
    with torch.no_grad():
        weights = F.conv2d(joined, head.linear.weight[:, :, None, None], head.linear.bias).relu() + 0.1
    depths = (weights * torch.linspace(0.001, 6, 64).reshape(1, -1, 1, 1)).sum(dim=1) / weights.sum(dim=1)
    expected = F.interpolate(depths[:, None], (SIZE, SIZE), mode="bilinear")[:, 0]
    np.testing.assert_allclose(predict(head, features, np.arange(2), (SIZE, SIZE)), expected, rtol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, 11.0, -1.0])
def test_unknown_pixels_and_test_maps_do_not_change_the_head(trained, value, caplog):
    depths, task, features, _ = trained
    other = np.where(depths == 0, value, depths)
    other[TEST, 10:] = 1.0
    config = CONFIG.model_copy(update={"steps": 6})
    head, again = (fit(features, each, config, 0, "depth") for each in (task, task_of(other)))
    assert torch.equal(head.linear.weight, again.linear.weight)
    assert not torch.equal(head.linear.weight, fit(features, task, config, 1, "depth").linear.weight)
    assert f"{32 * 16} of {32 * SIZE**2} pixels of depth left out" in caplog.text


def test_unknown_pixels_do_not_change_the_scores(trained):
    depths, task, features, head = trained
    other = task_of(np.where(depths == 0, 1e9, depths))
    assert measure(head, features, task, CONFIG, "d").metrics == measure(head, features, other, CONFIG, "d").metrics


def test_one_image_at_a_time_gives_the_same(trained):
    _, task, features, head = trained
    one, many = (
        [list(found.values()) for found in image_errors(head, features, task, TEST, config)]
        for config in (CONFIG.model_copy(update={"batch_size": 1}), CONFIG)
    )
    np.testing.assert_allclose(one, many, rtol=1e-5)


def test_the_learning_rate_is_chosen_and_names_say_what_is_better(trained):
    _, task, features, _ = trained
    config = CONFIG.model_copy(update={"learning_rates": (1e-9, 0.02), "steps": 30})
    scores = evaluate(features, task, config, 0, "depth_lin4")
    only = evaluate(features, task, config.model_copy(update={"learning_rates": (0.02,)}), 0, "depth_lin4")
    assert scores.metrics == only.metrics
    assert {"depth_lin4_rmse", "depth_lin4_abs_rel"} <= LOWER_IS_BETTER
    assert set(scores.metrics) - LOWER_IS_BETTER == {"depth_lin4_delta1"}
    assert lower_is_better("slices.light.gap")
    assert not lower_is_better("slices.light.worst")


def wrong(change):
    depths = list(sloped()[0])
    change(depths)
    return lambda: depth_task(depths.__getitem__, TRAIN, TEST, 0.001, 6.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: task_of(sloped()[0], test=TEST[:0]), "24 train and 0 test images"),
        (lambda: depth_task(sloped()[0].__getitem__, TRAIN, TEST, 0.0, 10.0), "range 0 to 10; give 0 < min < max"),
        (wrong(lambda depths: depths.__setitem__(30, depths[30][:8])), r"image 30 is float64 \(8, 32\)"),
        (wrong(lambda depths: depths.__setitem__(2, depths[2].astype(np.uint16))), "image 2 is uint16"),
        (wrong(lambda depths: depths[27].fill(np.nan)), "test image 27: no pixel within 0.001 to 6"),
        (wrong(lambda depths: [depth.fill(0) for depth in depths[:24]]), "all 24 train images: no pixels"),
    ],
)
def test_wrong_maps(make, message):
    with pytest.raises(DatasetError, match=message):
        make()


def test_train_images_without_depth_are_left_out(caplog):
    depths, features = sloped()
    depths[5] = np.nan
    assert 5 not in task_of(depths).train
    assert "1 train images (such as 5) left out" in caplog.text
    with pytest.raises(ValueError, match="class tokens"):
        DepthFeatures(features.patches, features.cls_tokens[:3])
