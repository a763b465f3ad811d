import logging

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier

from components.data.evaluation_set import read_evaluation_set
from components.data.shards import ShardReader, decode_image
from components.model.config import Preprocessing
from components.model.preprocessing import center_crop, to_input
from components.training.config import KnnProbeConfig
from components.training.knn_probe import load_probe
from tests.training.jobs import make_job, write_labeled


def test_knn_is_scikit_learns(curated, pretrain_values, tmp_path):
    write_labeled(tmp_path)
    probe = load_probe(tmp_path, KnnProbeConfig(every_steps=1, num_images=40, num_neighbors=5), 32, bfloat16=False)
    assert probe is not None
    job = make_job(pretrain_values(), curated)
    job.training_step()  # gives the networks their values
    found = read_evaluation_set(tmp_path)
    assert found.labels is not None
    reader, rows = ShardReader(tmp_path), found.images.to_pylist()
    images = [decode_image(reader.read(r["shard"], r["offset"], r["length"])) for r in rows]
    pixels = np.stack(
        [np.asarray(center_crop(image, Preprocessing(resize_size=37, crop_size=32))) for image in images]
    ).transpose(0, 3, 1, 2)
    with torch.no_grad():
        features = job.networks.ema.backbone(to_input(torch.from_numpy(pixels.copy()))).cls_token
    unit = torch.nn.functional.normalize(features.double(), dim=1).numpy()
    test = found.labels.test[:8]
    train = found.labels.train[: 40 - len(test)]
    classifier = KNeighborsClassifier(5, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07), algorithm="brute")
    classifier.fit(unit[train], found.labels.targets[train])
    assert probe.top1(job.networks.ema) == classifier.score(unit[test], found.labels.targets[test])


def test_without_labels_there_is_no_probe(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert load_probe(tmp_path / "evaluation", KnnProbeConfig(every_steps=1), 32, bfloat16=False) is None
    assert "holds no labeled images: no kNN while training" in caplog.text
