"""Corruptions of real photographs: deterministic, stronger with severity, at any size."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from skimage import data

from components.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt

# By the mean distance of pixels. The others move content or add a texture, whose strength is not that distance.
MONOTONE = sorted(set(CORRUPTIONS) - {"glass_blur", "frost", "fog", "elastic_transform"})


def photograph(name="coffee", side=112):
    picture = Image.fromarray(getattr(data, name)()).convert("RGB")
    return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC, (0, 0, 400, 400)))


def distances(image, name, seeds):
    """Mean distance by severity; the same angles, places and noise at each."""
    found = [[corrupt(image, name, level, np.random.default_rng(seed)) for level in SEVERITIES] for seed in seeds]
    return np.abs(np.array(found).astype(float) - image).mean(axis=(0, 2, 3, 4))


def test_they_are_the_fifteen_of_the_paper():
    assert len(CORRUPTIONS) == 15
    assert {"gaussian_noise", "frost", "jpeg_compression"} < set(CORRUPTIONS)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_repeated_by_the_seed_and_changes_the_image(name):
    image = photograph()
    before = image.copy()
    once, again = (corrupt(image, name, 3, np.random.default_rng(7)) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    np.testing.assert_array_equal(image, before)
    assert (once.dtype, once.shape) == (np.uint8, image.shape)
    assert np.abs(once.astype(float) - image).mean() > 1


@pytest.mark.parametrize("name", MONOTONE)
def test_stronger_with_severity(name):
    assert (np.diff(distances(photograph(), name, range(3))) > 0).all()


def test_what_is_monotone_in_parts():
    """Glass 2 and 4 swap less often; frost 4 darkens more than 3; elastic 1 and 2 move all, 3 to 5 change shapes."""
    glass = distances(photograph(side=224), "glass_blur", range(2))
    assert glass[0] < glass[2] < glass[4]
    frost = distances(photograph(), "frost", range(2))
    assert frost[0] < frost[1] < frost[2]
    elastic = distances(photograph(), "elastic_transform", range(2))
    assert elastic[2] < elastic[3] < elastic[4]


def test_fog_hides_contrast_more_with_severity():
    image = photograph()
    kept = [
        np.mean([corrupt(image, "fog", level, np.random.default_rng(seed)).std(axis=2).mean() for seed in range(4)])
        for level in SEVERITIES
    ]
    assert (np.diff(kept) < 0).all()


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(
    "image", [photograph(side=32), photograph("camera", 48)[:, :40]], ids=["tiny", "gray, not square"]
)
def test_tiny_and_gray_images(name, image):
    for level in (1, 5):
        made = corrupt(image, name, level, np.random.default_rng(0))
        assert (made.dtype, made.shape) == (np.uint8, image.shape)
    assert np.abs(made.astype(float) - image).mean() > 1


@pytest.mark.parametrize(
    "name", ["defocus_blur", "motion_blur", "zoom_blur", "snow", "frost", "fog", "elastic_transform"]
)
def test_a_severity_looks_the_same_at_any_size(name):
    """Corrupted at twice the size and halved is nearly corrupted at the size itself."""
    large = photograph(side=224)
    small = np.asarray(Image.fromarray(large).resize((112, 112), Image.Resampling.BOX))
    made = corrupt(large, name, 4, np.random.default_rng(0))
    halved = np.asarray(Image.fromarray(made).resize((112, 112), Image.Resampling.BOX)).astype(float)
    direct = corrupt(small, name, 4, np.random.default_rng(0)).astype(float)
    assert np.abs(halved - direct).mean() < 0.35 * np.abs(direct - small).mean()


def test_values_by_hand():
    black, white = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)
    generator = np.random.default_rng(0)
    assert (corrupt(black, "brightness", 3, generator) == round(0.3 * 255)).all()
    half = np.concatenate([black[:16], white[:16]])
    levels = np.unique(corrupt(half, "contrast", 1, generator))  # 0.5 +- 0.4 / 2
    assert levels.tolist() == [round(0.3 * 255), round(0.7 * 255)]
    assert (corrupt(white, "defocus_blur", 5, generator) == 255).all()
    noisy = corrupt(np.full((200, 200, 3), 128, np.uint8), "impulse_noise", 4, generator)
    assert np.isin(noisy, (0, 128, 255)).all()
    assert (noisy != 128).mean() == pytest.approx(0.17, abs=0.01)
    gaussian = corrupt(np.full((200, 200, 3), 128, np.uint8), "gaussian_noise", 1, generator)
    assert gaussian.std() / 255 == pytest.approx(0.08, rel=0.02)


@pytest.mark.parametrize(
    ("image", "name", "severity", "message"),
    [
        (photograph(), "rain", 1, "corruption 'rain'; allowed: gaussian_noise"),
        (photograph(), "fog", 6, "severity 6; allowed: 1 to 5"),
        (photograph()[..., 0], "pixelate", 1, r"uint8 \[112, 112\]; allowed: uint8 \[H, W, 3\]"),
        (photograph() / 255, "snow", 1, "float64"),
    ],
)
def test_bad_arguments(image, name, severity, message):
    with pytest.raises(ValueError, match=message):
        corrupt(image, name, severity, np.random.default_rng(0))
