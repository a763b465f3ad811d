import hashlib
import io
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from skimage import data
from torch.utils.data._utils.pin_memory import pin_memory

from components.core.errors import DatasetError
from components.data.batch import Batch, BatchPlan, TrainingBatches, iterate_batches
from components.data.config import CropConfig, MaskingConfig, StreamConfig
from components.data.crops import sample_crops
from components.data.manifest import CURATED_SCHEMA, MANIFEST, read_manifest, write_manifest
from components.data.shards import ImageError, ShardWriter
from components.data.stream import ImageStream

NUM_IMAGES = 40
BROKEN = 3  # of them, where asked for
CONFIG = StreamConfig(num_workers=0, window_shards=2)
CROPS = CropConfig(global_size=16, local_size=8, num_local=2)


def write_set(folder: Path, *, num_images: int = NUM_IMAGES, broken: int = 0) -> Path:
    """A curated set of tiles of a photograph, the first `broken` of them cut short; every fifth image is a seed."""
    folder.mkdir(parents=True)
    photo = Image.fromarray(data.astronaut())
    encoded = []
    for number in range(num_images):
        file = io.BytesIO()
        left, top = 40 * (number % 10), 40 * (number // 10)
        photo.crop((left, top, left + 32, top + 32)).save(file, "JPEG")
        encoded.append(file.getvalue()[:-200] if number < broken else file.getvalue())
    images = {hashlib.sha256(image).hexdigest(): image for image in encoded}
    known: dict[str, Any] = {
        "format": "JPEG", "width": 32, "height": 32, "source": "a", "source_uri": "b",
        "license": "c", "group_id": "",
    }  # fmt: skip
    rows = []
    with ShardWriter(folder, 20_480) as writer:
        for image_id, image in sorted(images.items()):
            shard, offset, length = writer.add(image_id, "jpg", image)
            place = {"image_id": image_id, "shard": shard, "offset": offset, "length": length}
            origin = "balanced" if len(rows) % 5 else "seed"
            rows.append({**dict.fromkeys(CURATED_SCHEMA.names), **known, **place, "origin": origin})
    write_manifest(pa.Table.from_pylist(rows, CURATED_SCHEMA), folder / MANIFEST)
    return folder


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("stream") / "curated")


def plan(**changes: Any) -> BatchPlan:
    values: dict[str, Any] = {"seed": 0, "batch_size": 8, "patch_size": 4, "crops": CROPS, "masking": MaskingConfig()}
    return BatchPlan(**(values | changes))


def batch(batches: TrainingBatches, step: int) -> Batch:
    found = batches[step]
    assert isinstance(found, Batch)
    return found


def test_each_epoch_is_another_permutation(curated):
    stream = ImageStream(curated, CONFIG, seed=0)
    epochs = [[stream.row(p) for p in range(e * NUM_IMAGES, (e + 1) * NUM_IMAGES)] for e in range(3)]
    assert all(sorted(epoch) == list(range(NUM_IMAGES)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = ImageStream(curated, CONFIG, seed=1)
    assert [other.row(p) for p in range(NUM_IMAGES)] != epochs[0]


def test_order_is_a_function_of_the_position(curated):
    """Asked in any order, by a stream that has read nothing before, a position has the same image."""
    positions = np.random.default_rng(0).permutation(4 * NUM_IMAGES)
    stream = ImageStream(curated, CONFIG, seed=0)
    rows = {int(p): stream.row(int(p)) for p in positions}
    assert all(ImageStream(curated, CONFIG, seed=0).row(p) == rows[p] for p in range(0, 4 * NUM_IMAGES, 7))
    assert stream.image_ids(13, 3) == [stream.image(p).image_id for p in (13, 14, 15)]


def test_a_window_touches_only_its_shards(curated):
    stream = ImageStream(curated, StreamConfig(num_workers=0, window_shards=1), seed=0)
    shards = [stream.shard(position) for position in range(NUM_IMAGES)]
    changes = sum(a != b for a, b in pairwise(shards))
    assert len(set(shards)) >= 3
    assert changes == len(set(shards)) - 1  # one shard after the other
    wide = ImageStream(curated, StreamConfig(num_workers=0, window_shards=100), seed=0)
    mixed = [wide.shard(position) for position in range(NUM_IMAGES)]
    assert sum(a != b for a, b in pairwise(mixed)) > 2 * changes


def test_ranks_split_a_step_and_a_run_may_go_on_with_another_number_of_them(curated):
    stream = ImageStream(curated, CONFIG, seed=0)
    whole = batch(TrainingBatches(stream, plan()), 5)
    for num_ranks in (2, 4):
        parts = [batch(TrainingBatches(stream, plan(rank=r, num_ranks=num_ranks)), 5) for r in range(num_ranks)]
        for name, crops in (("global_crops", 2), ("local_crops", 2), ("masks", 2)):
            # Crop-major on every rank: put the ranks side by side within each crop.
            joined = torch.cat([getattr(part, name).unflatten(0, (crops, -1)) for part in parts], dim=1)
            assert torch.equal(joined.flatten(0, 1), getattr(whole, name)), name


def test_rows_are_crop_major_and_normalized(curated):
    stream = ImageStream(curated, CONFIG, seed=0)
    made = batch(TrainingBatches(stream, plan(masking=None)), 0)
    assert made.global_crops.shape == (16, 3, 16, 16)
    assert made.local_crops.shape == (16, 3, 8, 8)
    assert made.masks is None
    third = stream.find(3, lambda data: sample_crops(data, CROPS, 0, 3)).image
    for g in (0, 1):
        np.testing.assert_array_equal(made.global_crops[g * 8 + 3], third.global_crops[g])
    normal = made.normalize(torch.device("cpu"))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    values = (made.global_crops[0, :, 2, 3].numpy() / 255 - mean) / std
    assert normal.global_crops[0, :, 2, 3].numpy() == pytest.approx(values, rel=1e-5)


def test_number_of_workers_changes_nothing(curated):
    batches = TrainingBatches(ImageStream(curated, CONFIG, seed=0), plan())
    alone = list(iterate_batches(batches, CONFIG, range(3, 8)))
    helped = list(iterate_batches(batches, StreamConfig(num_workers=2, window_shards=2), range(3, 8)))
    assert len(alone) == len(helped) == 5
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a.global_crops, b.global_crops)
        assert torch.equal(a.masks, b.masks)


def test_bad_images_are_replaced_named_and_counted(tmp_path, caplog):
    folder = write_set(tmp_path / "curated", broken=BROKEN)
    stream = ImageStream(folder, CONFIG, seed=0)
    bad = {}
    for position in range(NUM_IMAGES):
        found = stream.image(position)
        if found.skipped:
            following = position + len(found.skipped)
            assert found.image_id == stream.image_ids(following, 1)[0]
        bad |= {item.image_id: item.reason for item in found.skipped}
    assert len(bad) == BROKEN
    assert all("truncated" in reason for reason in bad.values())
    batches = TrainingBatches(stream, plan())
    assert len(list(iterate_batches(batches, StreamConfig(num_workers=0, max_bad_images=BROKEN), range(5)))) == 5
    assert [message.rpartition(" (")[2] for message in caplog.messages] == [f"{n} of at most 3)" for n in (1, 2, 3)]
    for workers in (0, 1):
        strict = StreamConfig(num_workers=workers, max_bad_images=BROKEN - 1)
        with pytest.raises(DatasetError, match=r"3 images cannot be decoded, at most 2 are allowed \(stream.max_bad"):
            list(iterate_batches(batches, strict, range(5)))


def test_so_many_bad_images_may_follow_each_other(curated):
    def decode(data: bytes) -> bytes:
        if tries:
            raise ImageError("truncated", tries.pop())
        return data

    stream = ImageStream(curated, CONFIG.model_copy(update={"max_bad_images": 2}), seed=0)
    tries = ["one", "two"]
    found = stream.find(5, decode)
    assert (found.image_id, len(found.skipped)) == (stream.image_ids(7, 1)[0], 2)
    tries = ["one", "two", "three"]
    with pytest.raises(DatasetError, match="3 images cannot be decoded, at most 2 are allowed"):
        stream.find(5, decode)


def test_a_bad_image_that_ends_an_epoch_and_begins_the_next_is_one(tmp_path):
    folder = write_set(tmp_path / "curated", num_images=5)
    config = CONFIG.model_copy(update={"max_bad_images": 1})
    streams = (ImageStream(folder, config, seed) for seed in range(100))
    stream = next(stream for stream in streams if stream.row(4) == stream.row(5))
    _, bad, good = stream.image_ids(4, 3)

    def decode(data: bytes) -> bytes:
        if hashlib.sha256(data).hexdigest() == bad:
            raise ImageError("truncated", "half")
        return data

    for position in (4, 5):
        found = stream.find(position, decode)
        assert (found.image_id, [item.image_id for item in found.skipped]) == (good, [bad])


def test_seen_is_exact_beside_bad_images_and_under_a_mix(tmp_path):
    """Against going through all positions and looking what is really there."""
    folder = write_set(tmp_path / "curated", broken=BROKEN)
    ids = read_manifest(folder / MANIFEST)["image_id"].to_pylist()
    for mix in (None, {"seed": 0.25, "balanced": 0.75}, {"balanced": 1.0}):
        config = StreamConfig(num_workers=0, window_shards=2, mix=mix)
        stream = ImageStream(folder, config, seed=0)
        first, count = 13, 70
        consumed = [stream.image(position).image_id for position in range(first, first + count)]
        belonging = stream.image_ids(first, count)
        assert 0 < sum(a != b for a, b in zip(consumed, belonging, strict=True)) <= 2 * BROKEN
        for image_id in ids:
            expected = [first + k for k, found in enumerate(consumed) if found == image_id]
            assert stream.seen(image_id, first, count) == expected
        assert stream.seen("0" * 64, first, count) == []
        for stop in (0, 13, 83):  # in the first epoch and in a later one, in the middle of windows
            assert stream.draws(stop) == Counter(stream.image_ids(0, stop))


def test_an_image_with_blurred_faces_goes_by_its_old_id_too(tmp_path):
    folder = write_set(tmp_path / "curated")
    table = read_manifest(folder / MANIFEST)
    before = pa.array([None] * 7 + ["f" * 64] + [None] * (NUM_IMAGES - 8), pa.string())
    index = table.column_names.index("derived_from")
    write_manifest(table.set_column(index, CURATED_SCHEMA.field("derived_from"), before), folder / MANIFEST)
    stream = ImageStream(folder, CONFIG, seed=0)
    assert len(stream.seen("f" * 64, 0, 80)) == 2
    assert stream.seen("f" * 64, 0, 80) == stream.seen(table["image_id"][7].as_py(), 0, 80)


def test_a_mix_keeps_its_shares_over_ranks_and_resumes(curated):
    config = StreamConfig(num_workers=0, window_shards=2, mix={"seed": 0.5, "balanced": 0.5})
    whole = [batch(TrainingBatches(ImageStream(curated, config, seed=0), plan()), step) for step in (5, 6)]
    resumed = TrainingBatches(ImageStream(curated, config, seed=0), plan())
    assert torch.equal(batch(resumed, 6).global_crops, whole[1].global_crops)
    halves = [
        batch(TrainingBatches(ImageStream(curated, config, seed=0), plan(rank=r, num_ranks=2)), 5) for r in (0, 1)
    ]
    joined = torch.cat([half.global_crops.unflatten(0, (2, -1)) for half in halves], dim=1).flatten(0, 1)
    assert torch.equal(joined, whole[0].global_crops)
    seeds = set(np.arange(0, NUM_IMAGES, 5))
    stream = ImageStream(curated, config, seed=0)
    assert sum(stream.row(position) in seeds for position in range(400)) == 200


def test_a_mix_is_the_same_however_its_parts_are_sorted(curated):
    """They are in `config.json`, from which it is said what a model has seen."""
    config = StreamConfig(num_workers=0, window_shards=2, mix={"seed": 0.25, "balanced": 0.75})
    written = json.loads(json.dumps(config.model_dump(mode="json"), sort_keys=True))
    assert list(written["mix"]) == ["balanced", "seed"]
    trained, told = (ImageStream(curated, c, seed=0).image_ids(0, 100) for c in (config, StreamConfig(**written)))
    assert trained == told


def test_batches_are_copied_to_a_gpu_from_pinned_memory(curated, monkeypatch):
    """The loader pins what it knows, or what says how: with a plain dataclass it does nothing."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.clone()) or pinned[-1])
    plain = batch(TrainingBatches(ImageStream(curated, CONFIG, seed=0), plan()), 0)
    made = pin_memory(plain)
    assert [id(tensor) for tensor in (made.global_crops, made.local_crops, made.masks)] == [id(p) for p in pinned]
    assert torch.equal(made.global_crops, plain.global_crops)
    assert made.gram_crops is None


def test_a_part_that_is_not_there_is_named(curated):
    config = StreamConfig(mix={"seed": 0.5, "retrieved": 0.5})
    message = r"asks for the part 'retrieved', but .*curated has only: balanced \(32\), seed \(8\). Leave retrieved out"
    with pytest.raises(DatasetError, match=message):
        ImageStream(curated, config, seed=0)


def test_refuses_too_few_images(tmp_path):
    stream = ImageStream(write_set(tmp_path / "few", num_images=5), CONFIG, seed=0)
    with pytest.raises(DatasetError, match="has 5 images, fewer than one batch of 8: lower batch_size, or ingest more"):
        TrainingBatches(stream, plan())
    write_manifest(CURATED_SCHEMA.empty_table(), tmp_path / "none" / MANIFEST)
    with pytest.raises(DatasetError, match="no images to train on"):
        ImageStream(tmp_path / "none", CONFIG, seed=0)
