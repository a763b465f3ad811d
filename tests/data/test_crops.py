import io

import numpy as np
import pytest
from PIL import Image
from skimage import data

from components.core.config import ConfigError, validate
from components.data.config import CropConfig
from components.data.crops import crop_box, draw_crops, sample_crops, shrinking
from components.data.shards import decode_image, load_image, open_image, upright_size


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PHOTO = Image.fromarray(data.astronaut()).resize((96, 96))
FILE = encode(PHOTO, "PNG")
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


def test_impossible_crop_falls_back_to_the_center():
    assert crop_box(1_000, 10, (1.0, 1.0), np.random.default_rng(0)) == (493, 0, 506, 10)  # aspect at most 4/3
    assert crop_box(10, 1_000, (1.0, 1.0), np.random.default_rng(0)) == (0, 493, 10, 506)  # and at least 3/4


def test_plain_crop_is_cut_and_resized():
    crops = sample_crops(FILE, CropConfig(**PLAIN), seed=3, position=7)
    assert crops.global_crops.shape == (2, 3, 32, 32)
    assert crops.local_crops.shape == (2, 3, 16, 16)
    for number, found in enumerate([*crops.global_crops, *crops.local_crops]):
        size, scale = ((32, (0.32, 1.0)), (16, (0.05, 0.32)))[number >= 2]
        box = crop_box(96, 96, scale, np.random.default_rng([3, 7, number]))
        expected = np.asarray(PHOTO.crop(box).resize((size, size), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(found.transpose(1, 2, 0) - expected).max() <= 1


def test_a_large_jpeg_is_decoded_smaller_with_hardly_a_difference():
    large = PHOTO.resize((600, 400), Image.Resampling.BICUBIC)
    sideways = Image.Exif()
    sideways[0x0112] = 6
    config = CropConfig(**PLAIN)
    for exif in (Image.Exif(), sideways):
        file = encode(large, "JPEG", quality=95, exif=exif.tobytes())
        opened = open_image(file)
        upright = upright_size(opened)
        assert upright == decode_image(file).size
        small = load_image(opened, shrink=7.9)
        assert small.size == (upright[0] // 4, upright[1] // 4)
        image, changed = decode_image(file), 0
        for position in range(8):
            found = sample_crops(file, config, 0, position)
            shrunk = [f for f in (8, 4, 2) if f <= shrinking(draw_crops(*image.size, config, 0, position))][:1]
            changed += len(shrunk)
            for draw, crop in zip(
                draw_crops(*image.size, config, 0, position), [*found.global_crops, *found.local_crops], strict=True
            ):
                assert min(np.subtract(draw.box[2:], draw.box[:2])) >= draw.size * (shrunk or [0])[0]
                box = [round(x / f) * f for x in draw.box for f in shrunk or [1]]
                plain = np.asarray(image.resize((draw.size, draw.size), Image.Resampling.BICUBIC, box=box))
                assert np.abs(plain.transpose(2, 0, 1).astype(int) - crop).mean() < 4  # fine detail at an eighth
        assert changed
    assert load_image(open_image(encode(large, "JPEG")), shrink=1.99).size == large.size
    assert load_image(open_image(encode(large, "JPEG")), shrink=2).size == (300, 200)
    odd = load_image(open_image(encode(large.crop((0, 0, 599, 397)), "JPEG")), shrink=100)
    assert odd.size == (75, 50)  # an eighth, rounded up


def test_is_a_function_of_seed_position_and_crop():
    config = CropConfig(global_size=32, local_size=16)
    first, again = sample_crops(FILE, config, 0, 5), sample_crops(FILE, config, 0, 5)
    assert (first.global_crops == again.global_crops).all()
    assert (first.local_crops == again.local_crops).all()
    assert len({crop.tobytes() for crop in first.local_crops}) == 8
    assert (first.global_crops != sample_crops(FILE, config, 0, 6).global_crops).any()
    assert (first.global_crops != sample_crops(FILE, config, 1, 5).global_crops).any()
    fewer = sample_crops(FILE, config.model_copy(update={"num_local": 0}), 0, 5)
    assert (fewer.global_crops == first.global_crops).all()
    assert fewer.local_crops.shape == (0, 3, 16, 16)


def _share_changed(**changes) -> list[float]:
    """Share of 300 positions where a change has an effect, for global 1, global 2 and local crops."""
    plain, changed = CropConfig(**PLAIN), CropConfig(**(PLAIN | changes))
    pairs = [(sample_crops(FILE, plain, 0, p), sample_crops(FILE, changed, 0, p)) for p in range(300)]
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
    plain, flipped = (sample_crops(FILE, CropConfig(**(PLAIN | {"flip_probability": p})), 0, 0) for p in (0.0, 1.0))
    assert (flipped.global_crops == plain.global_crops[..., ::-1]).all()


def test_all_that_is_random_is_drawn_as_often_and_as_strongly_as_asked():
    """Mean colors of jittered crops of an even gray picture: brightness alone moves it, uniformly."""
    gray = encode(Image.new("RGB", (32, 32), (100, 100, 100)), "PNG")
    config = CropConfig(**(PLAIN | {"color_jitter_probability": 0.8, "num_local": 8}))
    levels = np.array([sample_crops(gray, config, 0, p).local_crops.mean(axis=(1, 2, 3)) for p in range(250)]).ravel()
    moved = levels[levels != 100]
    assert len(moved) / len(levels) == pytest.approx(0.8, abs=0.03)
    assert moved.min() == pytest.approx(60, abs=1)
    assert moved.max() == pytest.approx(140, abs=1)
    assert moved.mean() == pytest.approx(100, abs=2)
    assert moved.std() == pytest.approx(80 / 12**0.5, rel=0.05)


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


def test_the_anchors_crops_are_the_global_ones_at_twice_the_resolution():
    """Against PIL; averaged over squares of 2 x 2 pixels they are the student's, whose colors alone are changed."""
    plain = CropConfig(**PLAIN)
    colored = CropConfig(**(PLAIN | {"color_jitter_probability": 1.0, "grayscale_probability": 0.5}))
    for position in range(4):
        crops, again = (sample_crops(FILE, config, 0, position, gram_scale=2) for config in (plain, colored))
        large = crops.gram_crops
        assert large is not None
        for number, found in enumerate(large):
            box = crop_box(96, 96, plain.global_scale, np.random.default_rng([0, position, number]))
            expected = np.asarray(PHOTO.crop(box).resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
            difference = np.abs(found.transpose(1, 2, 0) - expected)  # each of the two passes rounds and clips
            assert difference.mean() < 0.5
            assert difference.max() <= 3
        averaged = large.reshape(2, 3, 32, 2, 32, 2).astype(float).mean(axis=(3, 5))
        assert np.abs(averaged - crops.global_crops).mean() < 5  # gray levels; a bicubic kernel is no square
        np.testing.assert_array_equal(again.gram_crops, large)
        assert (again.global_crops != crops.global_crops).mean() > 0.5
        assert sample_crops(FILE, plain, 0, position).gram_crops is None
