import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from components.core.errors import DatasetError
from components.data.evaluation_set import Labels
from components.evaluation.config import ProbeConfig
from components.evaluation.protocols import probe
from components.evaluation.protocols.probe import ProbeFeatures, evaluate, fit

CONFIG = ProbeConfig(learning_rates=(1e-4, 1e-2, 0.1), num_layers=(1, 2), num_steps=23, batch_size=32)


@pytest.fixture(scope="module")
def blobs():
    """Three classes that only the last layer and the patch tokens tell apart, in float16."""
    generator = np.random.default_rng(0)
    targets = generator.integers(3, size=160)
    cls_tokens = generator.standard_normal((160, 3, 6))
    patches = generator.standard_normal((160, 6))
    cls_tokens[:, -1] += 1.5 * np.eye(6)[targets]
    patches += 1.5 * np.eye(6)[targets]
    labels = Labels(("a", "b", "c"), targets, np.arange(110), np.arange(110, 160))
    return ProbeFeatures(cls_tokens.astype(np.float16), patches.astype(np.float16)), labels


def trained_one_by_one(features, labels, config, seed):
    """Every head by itself, with torch's modules and optimizer, on the same draws."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(labels.train)
    validation, fitted = order[:11], order[11:]
    cls_tokens, patches = (
        torch.from_numpy(values.astype(np.float32)) for values in (features.cls_tokens, features.mean_patch_tokens)
    )
    targets = torch.from_numpy(labels.targets)
    heads = []
    for layers in config.num_layers:
        for mean_patch in (False, True):
            inputs = torch.cat([cls_tokens[:, -layers:].flatten(1), *([patches] if mean_patch else [])], dim=1)
            weights = 0.01 * generator.standard_normal((9, inputs.shape[1]), np.float32)
            for number, rate in enumerate(config.learning_rates):
                head = torch.nn.Linear(inputs.shape[1], 3)
                with torch.no_grad():
                    head.weight.copy_(torch.from_numpy(weights[3 * number : 3 * number + 3]))
                    head.bias.zero_()
                optimizer = torch.optim.SGD(head.parameters(), rate * 32 / 256, momentum=0.9)
                schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.num_steps, eta_min=0)
                heads.append((head, inputs, optimizer, schedule))
    passes = [generator.permutation(fitted) for _ in range(8)]
    for step in range(config.num_steps):
        rows = passes[step // 3][step % 3 * 32 :][:32]  # 99 images: three batches a pass
        for head, inputs, optimizer, schedule in heads:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(inputs[rows]), targets[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        logits = [head(inputs) for head, inputs, _, _ in heads]
    accuracies = [float((values.argmax(1) == targets)[validation].float().mean()) for values in logits]
    best = int(np.argmax(accuracies))
    return logits[best].numpy(), accuracies[best], best


@pytest.mark.parametrize("seed", [0, 1])
def test_equals_heads_trained_one_by_one_by_torch(blobs, seed):
    features, labels = blobs
    logits, validation, best = trained_one_by_one(features, labels, CONFIG, seed)
    found = fit(features, labels, CONFIG, np.random.default_rng(seed), "blobs")
    np.testing.assert_allclose(found.logits(features, np.arange(160)), logits, rtol=1e-4, atol=1e-5)
    assert found.validation_top1 == pytest.approx(validation)
    grid = [(n, patch, rate) for n in (1, 2) for patch in (False, True) for rate in CONFIG.learning_rates]
    assert (found.head.num_layers, found.head.mean_patch, found.head.learning_rate) == grid[best]
    two = replace(labels, predictable=np.array([0, 2]))
    among = evaluate(features, two, CONFIG, np.random.default_rng(seed), "blobs").by_image["probe_top1"]
    expected = np.array([0, 2])[logits[labels.test][:, [0, 2]].argmax(axis=1)]
    np.testing.assert_array_equal(among, expected == labels.targets[labels.test])
    scores = evaluate(features, labels, CONFIG, np.random.default_rng(seed), "blobs")
    correct = logits[labels.test].argmax(axis=1) == labels.targets[labels.test]
    np.testing.assert_array_equal(scores.by_image["probe_top1"], correct)
    assert scores.notes["probe_head"] == str(found.head)


def test_chunks_change_nothing(blobs, monkeypatch):
    features, labels = blobs
    whole = fit(features, labels, CONFIG, np.random.default_rng(0), "blobs")
    monkeypatch.setattr(probe, "_CHUNK", 7)
    parts = fit(features, labels, CONFIG, np.random.default_rng(0), "blobs")
    assert (whole.head, whole.validation_top1) == (parts.head, parts.validation_top1)
    np.testing.assert_allclose(whole.logits(features, labels.test), parts.logits(features, labels.test), rtol=1e-5)


def test_defaults_are_the_papers_grid_of_52():
    config = ProbeConfig()
    assert len(config.learning_rates) * len(config.num_layers) * 2 == 52
    assert (config.num_steps, config.batch_size) == (12_500, 1024)


def test_small_sets_train_on_all_images_at_once_and_say_so(blobs, caplog):
    features, labels = blobs
    with caplog.at_level(logging.WARNING):
        fit(features, labels, CONFIG.model_copy(update={"batch_size": 1024}), np.random.default_rng(0), "blobs")
    assert "batches of 99, all train images, instead of probe.batch_size 1024" in caplog.text


def test_what_cannot_be_trained(blobs):
    features, labels = blobs
    with pytest.raises(DatasetError, match="the features have class tokens of 3 layers"):
        fit(features, labels, ProbeConfig(), np.random.default_rng(0), "blobs")
    few = Labels(labels.classes, labels.targets, np.array([0, 1]), labels.test)
    with pytest.raises(DatasetError, match="2 train images are too few for a linear probe"):
        fit(features, few, CONFIG, np.random.default_rng(0), "blobs")
    bad = ProbeFeatures(features.cls_tokens.copy(), features.mean_patch_tokens)
    bad.cls_tokens[5] = np.nan
    with pytest.raises(DatasetError, match="not finite; check the features"):
        fit(bad, labels, CONFIG, np.random.default_rng(0), "blobs")
