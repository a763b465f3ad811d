import colorsys

import numpy as np
import pytest
from PIL import Image
from skimage import data

from components.core.config import ConfigError, validate
from components.data.config import CropConfig
from components.data.crops import crop_box, jitter_colors, sample_crops, shift_hue

PHOTO = Image.fromarray(data.astronaut()).resize((96, 96))
PLAIN = {
    "global_size": 32, "local_size": 16, "num_local": 2, "flip_probability": 0.0, "color_jitter_probability": 0.0,
    "grayscale_probability": 0.0, "solarize_probability": 0.0,
    "blur_probability": {"global1": 0.0, "global2": 0.0, "local": 0.0},
}  # fmt: skip


def test_crop_box_has_the_asked_area_and_aspect():
    generator = np.random.default_rng(0)
    boxes = np.array([crop_box(400, 300, (0.05, 0.32), generator) for _ in range(2_000)])
    left, top, right, bottom = boxes.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= 400).all()
    assert (bottom <= 300).all()
    area, aspect = (right - left) * (bottom - top) / (400 * 300), (right - left) / (bottom - top)
    assert 0.048 < area.min() < 0.06
    assert 0.31 < area.max() < 0.325
    assert area.mean() == pytest.approx(0.185, abs=0.005)  # uniform
    assert np.log(aspect).mean() == pytest.approx(0.0, abs=0.02)  # uniform in log
    assert np.log(aspect).std() == pytest.approx(np.log(16 / 9) / 12**0.5, rel=0.05)


def test_impossible_crop_falls_back_to_the_centre():
    assert crop_box(1_000, 10, (1.0, 1.0), np.random.default_rng(0)) == (493, 0, 506, 10)  # aspect at most 4/3


def test_plain_crop_is_cut_and_resized():
    crops = sample_crops(PHOTO, CropConfig(**PLAIN), seed=3, position=7)
    box = crop_box(96, 96, (0.32, 1.0), np.random.default_rng([3, 7, 1]))
    expected = np.asarray(PHOTO.crop(box).resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    assert crops.global_crops.shape == (2, 32, 32, 3)
    assert crops.local_crops.shape == (2, 16, 16, 3)
    # The library's own resize works on the cut piece alone, so that only pixels at its edge may differ.
    assert np.abs(crops.global_crops[1] - expected)[2:-2, 2:-2].max() <= 1


def test_is_a_function_of_seed_position_and_crop():
    config = CropConfig(global_size=32, local_size=16)
    first, again = sample_crops(PHOTO, config, 0, 5), sample_crops(PHOTO, config, 0, 5)
    assert (first.global_crops == again.global_crops).all()
    assert (first.local_crops == again.local_crops).all()
    assert len({crop.tobytes() for crop in first.local_crops}) == 8
    assert (first.global_crops != sample_crops(PHOTO, config, 0, 6).global_crops).any()
    assert (first.global_crops != sample_crops(PHOTO, config, 1, 5).global_crops).any()
    fewer = sample_crops(PHOTO, config.model_copy(update={"num_local": 0}), 0, 5)
    assert (fewer.global_crops == first.global_crops).all()
    assert fewer.local_crops.shape == (0, 16, 16, 3)


def _share_changed(**changes) -> list[float]:
    """Share of 300 positions where a change has an effect, for global 1, global 2 and local crops."""
    plain, changed = CropConfig(**PLAIN), CropConfig(**(PLAIN | changes))
    pairs = [(sample_crops(PHOTO, plain, 0, p), sample_crops(PHOTO, changed, 0, p)) for p in range(300)]
    global1, global2 = ([(a.global_crops[i] != b.global_crops[i]).any() for a, b in pairs] for i in (0, 1))
    return [
        float(np.mean(x)) for x in (global1, global2, [(a.local_crops[0] != b.local_crops[0]).any() for a, b in pairs])
    ]


def test_blur_probabilities_are_those_of_the_released_weights():
    default = CropConfig().blur_probability.model_dump()
    shares = _share_changed(blur_probability=default, blur_sigma=(1.0, 2.0))
    assert shares[0] == 0.0
    assert shares[1] == pytest.approx(0.9, abs=0.05)
    assert shares[2] == pytest.approx(0.5, abs=0.08)


def test_only_the_second_global_crop_is_solarized():
    shares = _share_changed(solarize_probability=0.2)
    assert shares[0] == shares[2] == 0.0
    assert shares[1] == pytest.approx(0.2, abs=0.06)


def test_flip_mirrors():
    plain, flipped = (sample_crops(PHOTO, CropConfig(**(PLAIN | {"flip_probability": p})), 0, 0) for p in (0.0, 1.0))
    assert (flipped.global_crops == plain.global_crops[:, :, ::-1]).all()


def test_hue_turns_as_colorsys_does():
    colors = np.random.default_rng(0).integers(0, 256, (500, 1, 3), dtype=np.uint8)
    turned = np.asarray(shift_hue(Image.fromarray(colors), 0.1))[:, 0] / 255
    shift = int(0.1 * 255) / 256
    for rgb, found in zip(colors[:, 0] / 255, turned, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        np.testing.assert_allclose(found, colorsys.hsv_to_rgb((h + shift) % 1, s, v), atol=0.04)  # 8-bit steps


def test_jitter_without_strength_changes_nothing():
    config = CropConfig(brightness=0, contrast=0, saturation=0, hue=0)
    difference = np.asarray(jitter_colors(PHOTO, config, np.random.default_rng(0))).astype(int) - np.asarray(PHOTO)
    assert np.abs(difference).max() <= 6  # PIL's HSV has 256 hues


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"local_scale": [0.4, 0.1]}, "local_scale is 0.4 to 0.1; allowed: 0 < from <= to <= 1"),
        ({"blur_sigma": [0, 1]}, "blur_sigma is 0.0 to 1.0"),
        ({"hue": 0.7}, "hue: Input should be less than or equal to 0.5"),
        ({"num_locals": 4}, "unknown key; did you mean 'num_local'?"),
    ],
)
def test_refuses(values, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace("?", r"\?")):
        validate(CropConfig, values, "params.yaml")
