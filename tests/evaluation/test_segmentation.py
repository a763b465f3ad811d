"""Linear segmentation: its metrics against scikit-learn, and heads on tokens whose score is known."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score
from torch.nn import functional as F

from components.core.errors import DatasetError
from components.evaluation.config import SegmentationConfig
from components.evaluation.dense import DenseFeatures, upsample
from components.evaluation.protocols.segmentation import (
    class_iou,
    confusion_matrices,
    evaluate,
    fit,
    measure,
    predict,
    segmentation_task,
)

CLASSES = ("sky", "grass", "water")
PATCH, GRID = 8, 4
TRAIN, TEST = np.arange(16), np.arange(16, 24)
CONFIG = SegmentationConfig(learning_rates=(0.03,), batch_size=8, steps=60, warmup_steps=5)


def blocks(stripes=False, count=24, num_classes=3):
    """Masks [N, 32, 32] of one class a patch, and that class [N, 16]; stripes are columns of patches."""
    classes = np.random.default_rng(0).integers(num_classes, size=(count, GRID, GRID))
    if stripes:
        classes = np.repeat(classes[:, :1], GRID, axis=1)
    masks = classes.repeat(PATCH, axis=1).repeat(PATCH, axis=2).astype(np.uint8)
    return masks, classes.reshape(count, -1)


def codes(classes, num_classes=3):
    return DenseFeatures(np.eye(num_classes, dtype=np.float32)[classes], GRID, GRID)


def task_of(masks, ignored=255, test=TEST):
    return segmentation_task(masks.__getitem__, TRAIN, test, CLASSES, ignored)


def test_iou_is_scikit_learns():
    generator = np.random.default_rng(0)
    truth, predicted = generator.integers(4, size=500), generator.integers(1, 6, size=500)
    confusion = np.bincount(truth * 7 + predicted, minlength=49).reshape(7, 7)
    iou = class_iou(confusion)
    expected = jaccard_score(truth, predicted, labels=range(6), average=None)  # 0 and 4 are in one of them only
    np.testing.assert_allclose(iou[:6], expected)
    assert np.isnan(iou[6])
    assert np.nanmean(iou) == pytest.approx(jaccard_score(truth, predicted, average="macro"))


@pytest.fixture(scope="module")
def trained():
    """Masks with ignored pixels, their task, noisy codes and a head trained on them."""
    masks, classes = blocks()
    masks[:, :5] = 255
    masks[16][masks[16] == 2] = 1  # predicted there, but not in the mask: no class of this image's mean
    features = codes(classes)
    noise = 0.7 * np.random.default_rng(1).standard_normal(features.tokens.shape).astype(np.float32)
    features = DenseFeatures(features.tokens + noise, GRID, GRID)
    task = task_of(masks)
    return masks, task, features, fit([features], task, CONFIG, 0, "segmentation")


@pytest.mark.parametrize("size", [(20, 7), (5, 6), (3, 11)])
def test_upsampling_is_torchs(size):
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 5, 6)).astype(np.float32))
    expected = F.interpolate(values, size, mode="bilinear")
    np.testing.assert_allclose(upsample(values, size), expected, atol=1e-6)


def test_metrics_are_those_of_the_predictions(trained):
    masks, task, features, head = trained
    scores = measure(head, [features], task, 8, "segmentation")
    predicted = predict(head, [features], TEST, (32, 32))
    known = masks[TEST] != 255
    truth, found = masks[TEST][known], predicted[known]
    iou = jaccard_score(truth, found, average=None)
    assert iou.min() < 1  # the noise costs something
    assert scores.metrics["segmentation_miou"] == pytest.approx(iou.mean())
    assert scores.metrics["segmentation_iou.grass"] == pytest.approx(iou[1])
    assert scores.metrics["segmentation_accuracy"] == pytest.approx((truth == found).mean())
    ratios = scores.ratios["segmentation_iou of each class"]
    np.testing.assert_allclose(ratios.parts.sum(axis=0) / ratios.wholes.sum(axis=0), iou)
    assert ratios.num_images.tolist() == [(masks[TEST] == number).any(axis=(1, 2)).sum() for number in range(3)]
    for row, image in enumerate(TEST):
        mask, seen = masks[image][known[row]], predicted[row][known[row]]
        expected = jaccard_score(mask, seen, average=None, labels=np.unique(mask)).mean()
        assert scores.by_image["segmentation_image_miou"][row] == pytest.approx(expected)
        assert scores.by_image["segmentation_image_accuracy"][row] == pytest.approx((mask == seen).mean())


def test_one_image_at_a_time_counts_the_same(trained):
    _, task, features, head = trained
    one, many = (list(confusion_matrices(head, [features], task, TEST, size)) for size in (1, 5))
    np.testing.assert_array_equal(one, many)


def test_codes_of_stripes_are_recovered_exactly():
    masks, classes = blocks(stripes=True)
    scores = evaluate([codes(classes)], task_of(masks), CONFIG, 0, "segmentation")
    assert scores.metrics["segmentation_miou"] == 1


def test_codes_of_blocks_reach_what_the_upsampling_allows():
    masks, classes = blocks()
    tokens = torch.from_numpy(codes(classes).tokens).reshape(-1, GRID, GRID, 3).permute(0, 3, 1, 2)
    best = F.interpolate(tokens, scale_factor=PATCH, mode="bilinear").argmax(dim=1).numpy()  # round at corners
    bound = jaccard_score(masks[TEST].ravel(), best[TEST].ravel(), average="macro")
    assert bound < 0.98
    found = evaluate([codes(classes)], task_of(masks), CONFIG, 0, "segmentation").metrics["segmentation_miou"]
    assert found == pytest.approx(bound, abs=0.02)


def test_random_tokens_are_at_chance():
    masks, _ = blocks()
    tokens = np.random.default_rng(3).standard_normal((24, 16, 8)).astype(np.float32)
    scores = evaluate([DenseFeatures(tokens, GRID, GRID)], task_of(masks), CONFIG, 0, "segmentation")
    assert scores.metrics["segmentation_accuracy"] == pytest.approx(1 / 3, abs=0.1)


def test_ignored_pixels_and_test_masks_do_not_change_the_head(trained):
    masks, _, features, head = trained
    other = np.where(masks == 255, 7, masks)  # the same pixels, marked by another value
    other[TEST] = 0
    again = fit([features], task_of(other, ignored=7), CONFIG, 0, "segmentation")
    for name, value in head.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_another_seed_is_another_head(trained):
    _, task, features, head = trained
    assert not torch.equal(head.linear.weight, fit([features], task, CONFIG, 1, "segmentation").linear.weight)


def test_scales_are_averaged_as_probabilities(trained):
    _, _, features, head = trained
    fine = DenseFeatures(np.random.default_rng(5).standard_normal((24, 64, 3)).astype(np.float16), 8, 8)
    probs = 0
    for each in (features, fine):
        with torch.no_grad():
            logits = head.eval().linear(head.norm(torch.from_numpy(each.tokens).float().flatten(0, 1)))
        logits = logits.reshape(24, each.rows, each.columns, 3).permute(0, 3, 1, 2)
        probs = probs + F.interpolate(logits, (32, 32), mode="bilinear", align_corners=False).softmax(dim=1)
    found = predict(head, [features, fine], TEST, (32, 32))
    np.testing.assert_array_equal(found, probs.argmax(dim=1)[TEST].numpy())
    assert (found != predict(head, [features], TEST, (32, 32))).mean() > 0.05
    tested = DenseFeatures(fine.tokens[TEST], 8, 8, TEST)  # without train images
    np.testing.assert_array_equal(predict(head, [features, tested], TEST[::2], (32, 32)), found[::2])


def test_the_learning_rate_is_chosen_on_train(trained, caplog):
    _, task, features, head = trained
    grid = CONFIG.model_copy(update={"learning_rates": (1e-7, 0.03)})
    with caplog.at_level(logging.INFO):
        chosen = fit([features], task, grid, 0, "segmentation")
    assert "segmentation: learning rate 0.03" in caplog.text
    assert torch.equal(chosen.linear.weight, head.linear.weight)  # trained again on all of train


@pytest.mark.parametrize("kind", ["memory map", "float16", "bfloat16"])
def test_tokens_of_other_types(trained, tmp_path, kind):
    _, _, features, _ = trained
    images = np.array([3, 1])
    if kind == "memory map":  # of several layers, of which the last is read
        np.save(tmp_path / "tokens.npy", np.concatenate([0 * features.tokens, features.tokens], axis=2))
        tokens, expected = np.load(tmp_path / "tokens.npy", mmap_mode="r")[..., 3:], features.tokens
    else:
        dtype = pytest.importorskip("ml_dtypes").bfloat16 if kind == "bfloat16" else np.float16
        tokens = features.tokens.astype(dtype)
        expected = tokens.astype(np.float32)
    batch = DenseFeatures(tokens, GRID, GRID).batch(images, torch.device("cpu"))
    assert (batch.dtype, tuple(batch.shape)) == (torch.float32, (2, GRID, GRID, 3))
    np.testing.assert_array_equal(batch[0, 1, 2], expected[3, 1 * GRID + 2])


def test_classes_that_are_nowhere_are_left_out_and_said(caplog):
    masks, classes = blocks(stripes=True)
    task = segmentation_task(masks.__getitem__, TRAIN, TEST, (*CLASSES, "snow"), None)
    scores = evaluate([codes(classes, 4)], task, CONFIG, 0, "segmentation")
    assert scores.metrics["segmentation_miou"] == 1
    assert "segmentation_iou.snow" not in scores.metrics
    assert "1 classes (such as snow) are in no test mask and no prediction" in caplog.text


def test_what_is_left_out_is_said(caplog):
    masks, _ = blocks()
    masks[:16][masks[:16] == 2] = 0
    masks[4] = 255
    task = task_of(masks)
    assert len(task.train) == 15
    assert "1 train images (such as 4) left out: ignored pixels only" in caplog.text
    assert "1 classes of test masks (such as water) are in no train mask" in caplog.text


def wrong(change):
    masks = list(blocks()[0])
    change(masks)
    return lambda: segmentation_task(masks.__getitem__, TRAIN, TEST, CLASSES, 255)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: task_of(blocks()[0], test=TEST[:0]), "16 train and 0 test images"),
        (wrong(lambda masks: masks.__setitem__(20, masks[20][:8])), r"image 20 is uint8 \(8, 32\)"),
        (wrong(lambda masks: masks.__setitem__(2, masks[2].astype(float))), r"image 2 is float64"),
        (wrong(lambda masks: masks[9].__setitem__((0, 0), 3)), "image 9 has value 3; classes are 0 to 2"),
        (wrong(lambda masks: masks[17].fill(255)), "test image 17: all pixels are 255, ignored"),
        (wrong(lambda masks: [mask.fill(255) for mask in masks[:16]]), "all 16 train images"),
    ],
)
def test_wrong_masks(make, message):
    with pytest.raises(DatasetError, match=message):
        make()


def test_tokens_that_cannot_be_learned_from():
    masks, classes = blocks()
    features = codes(classes)
    features.tokens[0, 0] = np.inf
    with pytest.raises(DatasetError, match=r"weights are not finite at learning rate 0\.03; give lower"):
        fit([features], task_of(masks), CONFIG, 0, "segmentation")
    with pytest.raises(ValueError, match=r"are not \[N, 5 \* 4, D\]"):
        DenseFeatures(features.tokens, 5, 4)
    with pytest.raises(ValueError, match="warmup_steps 10 must be less than steps 10"):
        SegmentationConfig(steps=10, warmup_steps=10)
