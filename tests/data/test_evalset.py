"""Evaluation sets: adding a folder, reading it back, and every fault that the check names."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.core.config import ConfigError
from components.core.errors import DatasetError
from components.core.storage import sha256_dir
from components.data.evalset import GROUPS, IGNORED, QUERIES, TARGETS, read_evalset
from components.data.evalset_add import Added, check_folder
from components.data.evalset_check import check_set
from components.data.evalset_config import EvalsetConfig, EvalsetError
from components.data.ingest import ingest
from components.data.ingest_config import IngestRequest
from components.data.rebuild import rebuild
from components.evaluation.features import EvaluationImages
from components.model.config import Preprocessing
from tests.data import evalset_folders as folders
from tests.data.evalset_folders import SIZE, add, config, halves, mask, npy, photo, png, request, write

quick = pytest.mark.usefixtures("quick_judge")


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory, quick_judge: None) -> dict[str, Added]:
    root = tmp_path_factory.mktemp("sets")
    makers = (folders.classification, folders.segmentation, folders.depth, folders.retrieval)
    return {make.__name__: add(make(root / make.__name__), make.__name__) for make in makers}


def uris(made: Added) -> list[str]:
    return read_evalset(made.snapshot).images.images["source_uri"].to_pylist()


def test_a_classification_set_has_labels_and_groups(added: dict[str, Added]) -> None:
    made = added["classification"]
    assert (made.images, made.classes) == ({"train": 4, "test": 4}, {"cat": 4, "dog": 4})
    assert "columns of groups.csv that the set does not use, left out: image, other" not in made.notes
    assert "columns of groups.csv that the set does not use, left out: other" in made.notes
    found = read_evalset(made.snapshot)
    assert found.images.labels is not None
    assert found.images.labels.classes == ("cat", "dog")
    assert [len(found.train), len(found.test)] == [4, 4]
    names = uris(made)
    assert [names[i].split("/")[0] for i in found.test] == ["test"] * 4
    # The rows were written in this order, day and night in turn.
    expected = ["day" if name.endswith("1.png") else "night" for name in names]
    assert found.groups["light"].tolist() == expected
    assert found.config.metric == "knn_top1"
    with pytest.raises(DatasetError, match="a set of task classification, which has nothing for depth"):
        found.depth(0)


def test_a_segmentation_set_has_masks(added: dict[str, Added]) -> None:
    found = read_evalset(added["segmentation"].snapshot)
    assert found.images.labels is None
    assert [len(found.train), len(found.test)] == [2, 2]
    for index in range(4):
        assert found.mask(index).dtype == np.uint8
        assert np.array_equal(found.mask(index), halves(255))
    assert (found.config.classes, found.config.ignore, found.config.resolution) == ({0: "grass", 1: "brick"}, 255, 48)
    assert np.array_equal(pickle.loads(pickle.dumps(found)).mask(3), halves(255))


def test_a_depth_set_is_in_meters_with_nan_where_nothing_is_measured(added: dict[str, Added]) -> None:
    found, names = read_evalset(added["depth"].snapshot), uris(added["depth"])
    near = found.depth(names.index("train/a.png"))
    assert near.dtype == np.float32
    assert np.array_equal(near, np.full(SIZE[::-1], 1.5, np.float32))
    far = found.depth(names.index("test/b.png"))
    assert np.isnan(far[0, :2]).all()  # 0: no depth; 9 m: outside of the range
    assert (far[1:] == 0.5).all()


def test_a_retrieval_set_has_queries_and_a_gallery(added: dict[str, Added]) -> None:
    found, names = read_evalset(added["retrieval"].snapshot), uris(added["retrieval"])
    related = {names[q.index]: [[names[i] for i in part] for part in (q.easy, q.hard, q.junk)] for q in found.queries}
    assert related == {"q/one.png": [["a.png"], ["b.png"], ["c.png"]], "q/two.png": [[], ["c.png"], []]}
    assert {names[i] for i in found.gallery} == {"a.png", "b.png", "c.png"}
    assert set(found.images.images["split"].to_pylist()) == {"test"}
    assert found.images.images["label"].null_count == 5


@quick
def test_a_video_set_has_eight_frames_of_each_clip(tmp_path: Path) -> None:
    folder = folders.video(tmp_path / "in")
    write(folder, {"images/train/walk/b/2.png": photo(100)})  # a frame that another clip has too
    made = add(folder)
    assert (made.rows, made.classes) == ({"clips": 4}, {"jump": 2, "walk": 2})
    found = read_evalset(made.snapshot)
    assert found.images.labels is not None
    assert found.clips is not None
    names = found.clips.frames.images["source_uri"].to_pylist()
    clips = [[names[row] for row in clip] for clip in found.clips.rows]
    tested, walked = (np.isin(np.arange(4), found.test), found.images.labels.targets == 1)
    # The middle of each eighth: of ten frames 0.6, 1.9, 3.1, 4.4, 5.6, 6.9, 8.1 and 9.4.
    (ten,) = (clips[row] for row in np.flatnonzero(~tested & ~walked))
    assert ten == [f"train/jump/a/{number}.png" for number in (1, 2, 4, 5, 6, 7, 9, 10)]
    (three,) = (clips[row] for row in np.flatnonzero(~tested & walked))
    assert three == [f"train/{name}.png" for name in (*["walk/b/1"] * 3, *["jump/a/1"] * 2, *["walk/b/3"] * 3)]
    assert sorted({name for row in found.test for name in clips[row]}) == sorted(found.tested["source_uri"].to_pylist())
    assert EvaluationImages(found.images, Preprocessing().at(8))[0].shape == (8, 8, 3)
    assert check_set(made.snapshot, tmp_path).checks
    gone = found.clips.frames.images["image_id"][names.index("test/jump/c/1.png")].as_py()
    left = read_evalset(rebuild(made.snapshot, [gone], "a request", tmp_path))  # the only frame of its clip
    assert (len(left.train), len(left.test)) == (2, 1)


@quick
def test_a_set_without_train_images_has_those_of_another(tmp_path: Path) -> None:
    learned = read_evalset(add(folders.classification(tmp_path / "classification"), "classification").snapshot)
    made = add(folders.mapped(tmp_path / "mapped"), "mapped")
    assert made.images == {"test": 4}
    found = read_evalset(made.snapshot)
    assert found.images.labels is not None
    assert found.images.labels.classes == ("cat", "dog")
    names = found.images.images["source_uri"].to_pylist()
    assert names[:4] == [learned.images.images["source_uri"][int(row)].as_py() for row in learned.train]
    targets = dict(zip(names[4:], found.images.labels.targets[found.test].tolist(), strict=True))
    assert targets == {"kitty/0.png": 0, "kitty/1.png": 0, "dog/0.png": 1, "dog/1.png": 1}
    assert EvaluationImages(found.images, Preprocessing().at(8))[7].shape == (8, 8, 3)  # from this set's shard
    for changes, expected in (
        ({"mapping": {}}, "classes_mapped: every class is one of classification.*; 1 of 2 wrong, .* kitty as kitty"),
        ({"mapping": {"kitty": "lion"}}, "classes_mapped: .*for example kitty as lion"),
        ({"mapping": {"kitty": "dog"}}, "two_classes: .*for example only dog"),
        ({"mapping": {"kitty": "cat", "cub": "cat"}}, "mapping_used: .*1 of 2 wrong, for example cub"),
        ({"train_set": "birds"}, "train_set_known: .*0 sets of this name in .*there are classification, mapped"),
        ({"train_set": "mapped", "mapping": {}}, "train_set_known: .*not a classification set with train images"),
    ):
        options = {"train_set": "classification", "mapping": {"kitty": "cat"}, **changes}
        folder = write(folders.mapped(tmp_path / "again"), {"evalset.yaml": config("classification", **options)})
        with pytest.raises(EvalsetError, match=expected):
            check_folder(request(folder))
    folder = write(folders.mapped(tmp_path / "again"), {"images/dog/2.png": photo(0)})
    with pytest.raises(EvalsetError, match=r"images_not_learned: .*1 of 5 wrong, for example dog/2\.png"):
        check_folder(request(folder))
    shutil.rmtree(folder / "images")
    for split in ("train", "test"):
        write(folder, {f"images/{split}/{name}/0.png": photo(len(split + name)) for name in ("kitty", "dog")})
    with pytest.raises(EvalsetError, match=r"only_test_images: .*2 of 4 wrong, for example train/dog/0\.png"):
        check_folder(request(folder))


def test_equal_folders_give_equal_bytes_and_other_content_another_version(
    added: dict[str, Added], tmp_path: Path
) -> None:
    folder = folders.segmentation(tmp_path / "elsewhere")
    again = add(folder, "segmentation")
    assert again.version == again.snapshot.name == added["segmentation"].version == read_evalset(again.snapshot).version
    assert sha256_dir(again.snapshot) == sha256_dir(added["segmentation"].snapshot)
    assert not add(folder, "segmentation").new
    write(folder, {"targets/test/0.png": mask(halves(1))})  # the images stay
    with pytest.raises(ConfigError, match=f"version {again.version} is there"):
        add(folder, "segmentation")
    changed = add(folder, "segmentation", replace=True)
    assert changed.new
    assert changed.version != again.version


def test_an_added_set_is_right_until_it_is_changed(added: dict[str, Added], tmp_path: Path) -> None:
    for made in added.values():
        assert check_set(made.snapshot, tmp_path).checks
    made = add(folders.classification(tmp_path / "in"))
    (made.snapshot / GROUPS).write_bytes((added["classification"].snapshot / "manifest.parquet").read_bytes())
    with pytest.raises(EvalsetError, match="version_is_name"):
        check_set(made.snapshot, tmp_path)


@quick
def test_a_snapshot_of_ingest_is_a_classification_set(tmp_path: Path) -> None:
    images = folders.classification(tmp_path / "in") / "images"
    values = {"evaluation": tmp_path / "evaluation", "docs_folder": tmp_path / "docs", "as_evaluation": True}
    report = ingest(IngestRequest.parse(source=str(images), name="shots", license="CC0-1.0", **values))
    found = read_evalset(report.evaluation_snapshot)
    assert found.config == EvalsetConfig(task="classification", license="CC0-1.0")
    assert [len(found.train), len(found.test), len(found.version)] == [4, 4, 12]
    assert found.groups == {}


def test_a_set_without_withdrawn_images_is_a_set(added: dict[str, Added], tmp_path: Path) -> None:
    for task, left in (("segmentation", 3), ("classification", 7), ("retrieval", 4)):
        snapshot, names = added[task].snapshot, uris(added[task])
        gone = read_evalset(snapshot).images.images["image_id"][names.index("c.png") if task == "retrieval" else 0]
        made = rebuild(snapshot, [gone.as_py()], "a request", tmp_path)
        found = read_evalset(made)
        assert found.images.images.num_rows == left
        assert found.version == made.name != snapshot.name
        if task == "segmentation":
            assert all(np.array_equal(found.mask(index), halves(255)) for index in range(left))
        if task == "retrieval":  # two.png has lost its only positive
            assert len(found.queries) == 1
        else:
            check_set(made, tmp_path)


def edges(values: np.ndarray, inside: int) -> np.ndarray:
    """Values that are left at the sides only, outside of the middle square."""
    changed = values.copy()
    changed[:, 2:10] = inside
    return changed


# What breaks a folder, and what the check says of it.
FAULTS: dict[str, tuple[Callable[[Path], Path], dict[str, bytes | str | None], str]] = {
    "missing": (folders.segmentation, {"targets/test/1.png": None}, "targets_there: .*1 of 4 wrong, .* test/1.png"),
    "size": (folders.segmentation, {"targets/test/1.png": mask(np.zeros((8, 11)))}, r"target_sizes: .*11 x 8 pixels"),
    "value": (folders.segmentation, {"targets/test/1.png": mask(halves(7))}, r"mask_values: .*test/1.png: 7"),
    "color": (folders.segmentation, {"targets/test/1.png": photo(9)}, "target_formats: masks are PNG"),
    "no png": (folders.segmentation, {"targets/test/1.png": b"no"}, "target_formats"),
    "cut": (folders.segmentation, {"targets/test/1.png": mask(halves())[:-30]}, "targets_readable"),
    "ignored": (folders.segmentation, {"targets/test/1.png": mask(np.full((8, 12), 255))}, "masks_filled"),
    "at the border": (folders.segmentation, {"targets/test/1.png": mask(edges(halves(), 255))},
                      "masks_filled: every mask has a pixel with a class, of test images in the middle .*1 of 4 wrong"),
    "class at the border": (folders.segmentation,
                            {f"targets/train/{n}.png": mask(edges(halves(), 0)) for n in range(2)},
                            "classes_in_train: every class is in a train mask; 1 of 2 wrong"),
    "class": (folders.segmentation,
              {"evalset.yaml": config("segmentation", classes={0: "a", 1: "b", 3: "c"}, ignore=255)},
              r"classes_in_train: every class is in a train mask; 1 of 3 wrong, for example c \(3\)"),
    "name": (folders.segmentation, {"images/test/1.bmp": photo(9)}, r"names_unique: .*2 of 5 wrong"),
    "both": (folders.segmentation, {"targets/test/1.npy": npy(halves())}, "one_target"),
    "split": (folders.segmentation, {"images/test/1.png": photo(0)}, "images_in_one_split: .*1 of"),
    "empty": (folders.depth, {"images/test/b.png": None}, "split_folders: .*1 of 2 wrong, for example test"),
    "nan": (folders.depth, {"targets/test/b.npy": npy(np.where(halves(), np.nan, 1).astype(np.float32))},
            "depth_values: .*48 NaN of 96 pixels"),
    "infinite": (folders.depth, {"targets/test/b.npy": npy(np.where(halves(), np.inf, -1).astype(np.float32))},
                 "depth_values: .*48 infinite, 48 negative of 96 pixels"),
    "none": (folders.depth, {"targets/test/b.npy": npy(np.zeros((8, 12), np.float32))}, "depth_filled"),
    "far left": (folders.depth, {"targets/test/b.npy": npy(edges(np.ones((8, 12), np.float32), 0))}, "depth_filled"),
    "pickle": (folders.depth, {"targets/test/b.npy": npy(np.array([[object]]), allow_pickle=True)}, "is object"),
    "long": (folders.depth, {"targets/test/b.npy": npy(np.ones((8, 12), np.float32)) + b"x"}, "targets_readable"),
    "huge": (folders.depth, {"targets/test/b.npy": npy(np.ones((1, 1), np.float32)).replace(b"(1, 1)", b"(8, 12)")},
             "targets_readable"),
    "doubles": (folders.depth, {"targets/test/b.npy": npy(np.ones((8, 12)))}, "is float64"),
    "8 bits": (folders.depth, {"targets/train/a.png": mask(halves())}, "target_formats: depth is 16-bit PNG"),
    "train": (folders.classification, {"images/test/bird/0.png": photo(99)}, "classes_in_train: .*for example bird"),
    "group": (folders.classification, {"groups.csv": "image,light\ntrain/cat/0.png,day\n"},
              "group_light: .*7 of 8 wrong"),
    "column": (folders.classification, {"groups.csv": "image,dark\n"}, "groups_columns: .*for example light"),
    "no table": (folders.classification, {"groups.csv": None}, "groups_columns"),
    "stranger": (folders.classification, {"groups.csv": "image,light\nx.png,day\n"}, "group_images: .* x.png"),
    "broken": (folders.classification, {"images/test/cat/0.png": photo(4)[:60]}, "images_readable: .*1 of 8 wrong"),
    "beside": (folders.classification, {"images/more/cat/0.png": photo(9)}, "images_in_splits: .*1 of 9 wrong"),
    "classes": (folders.classification, {"images/train/dog/9.png": photo(0)}, "copies_of_one_class: .*1 of 9 wrong"),
    "targets": (folders.segmentation,
                    {"images/train/9.png": photo(0), "targets/train/9.png": mask(halves(1))}, "copies_of_one_target"),
    "rows": (folders.classification, {"groups.csv": "image,light\na.png,day\na.png,night\n"}, "groups_once"),
    "header": (folders.classification, {"groups.csv": "image,light,light\n"}, "groups_header: .*for example light"),
    "pairs": (folders.retrieval, {"queries.csv": "query,image,relation\nq/one.png,a.png,easy\nq/one.png,a.png,junk\n"},
              "pairs_unique: .*1 of 1 wrong"),
    "own query": (folders.retrieval,
                  {"queries.csv": "query,image,relation\nq/one.png,q/two.png,easy\nq/two.png,a.png,easy\n"},
                  "gallery_images: .*1 of 2 wrong, for example q/one.png -> q/two.png"),
    "positive": (folders.retrieval, {"queries.csv": "query,image,relation\nq/one.png,a.png,junk\n"},
                 "queries_positive"),
    "unknown": (folders.retrieval, {"queries.csv": "query,image,relation\nq/one.png,z.png,easy\n"},
                "query_images: .*q/one.png -> z.png"),
    "relation": (folders.retrieval, {"queries.csv": "query,image,relation\nq/one.png,a.png,good\n"}, "relations_known"),
    "itself": (folders.retrieval, {"queries.csv": "query,image,relation\na.png,a.png,easy\n"}, "gallery_images"),
    "empty clip": (folders.video, {"images/test/jump/c/1.png": None}, "clips_filled: .*1 of 4 .*example test/jump/c"),
    "frame": (folders.video, {"images/test/walk/d/2.png": png(Image.new("RGB", (6, 6)))},
              "frame_sizes: frames of a clip have one size; 1 of 4 wrong, for example test/walk/d"),
    "new class": (folders.video, {"images/test/run/e/1.png": photo(7)}, "classes_in_train: .*1 of 3 .*example run"),
    "no clip": (folders.video, {"images/test/walk/5.png": photo(7)}, "frames_in_clips: .*1 of 17 .* test/walk/5.png"),
    "clip twice": (folders.video, {"images/test/walk/d/1.png": photo(110), "images/test/walk/d/2.png": photo(111),
                                   "images/test/walk/d/3.png": photo(112)}, "clips_in_one_split: .*test/walk/d"),
    "no query": (folders.retrieval, {"queries.csv": "query,image,relation\n"}, "queries_there"),
}  # fmt: skip


@quick
@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_is_named_with_count_and_example(what: str, tmp_path: Path) -> None:
    make, changes, expected = FAULTS[what]
    folder = make(tmp_path / "in")
    for name, data in changes.items():
        (folder / name).unlink() if data is None else write(folder, {name: data})
    with pytest.raises(EvalsetError, match=expected) as caught:
        check_folder(request(folder))
    assert caught.value.exit_code == 2


@quick
def test_all_faults_are_named_at_once_and_nothing_is_stored(tmp_path: Path) -> None:
    folder = folders.segmentation(tmp_path / "in")
    write(folder, {"targets/train/0.png": mask(halves(9)), "targets/test/0.png": photo(3)})
    (folder / "targets/test/1.png").unlink()
    with pytest.raises(EvalsetError) as caught:
        add(folder)
    faults = [line.partition(":")[0] for line in str(caught.value).splitlines()]
    assert faults == ["targets_there", "target_formats", "mask_values", "all checks"]
    assert not any((tmp_path / "evaluation").rglob("*"))


def test_a_damaged_file_is_named(added: dict[str, Added], tmp_path: Path) -> None:
    for task, name in (("segmentation", TARGETS), ("retrieval", QUERIES), ("classification", GROUPS)):
        folder = shutil.copytree(added[task].snapshot, tmp_path / task)
        for damage in (b"", b"PAR1", (folder / "manifest.parquet").read_bytes()):
            (folder / name).write_bytes(damage)
            with pytest.raises((DatasetError, EvalsetError), match=name.partition(".")[0]):
                check_set(folder, tmp_path / "docs")
        (folder / name).unlink()
        with pytest.raises(DatasetError, match=name):
            check_set(folder, tmp_path / "docs")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"task": "depth"}, "depth_range"),
        ({"task": "depth", "depth_range": [2, 1]}, "nearest < farthest"),
        ({"task": "segmentation", "classes": {0: "one"}}, "classes"),
        ({"task": "segmentation", "classes": {0: "a", 1: "b"}, "ignore": 1}, "ignore"),
        ({"task": "segmentation", "classes": {0: "a", 1: "a"}}, "same name"),
        ({"task": "segmentation", "classes": {0: "a", 256: "b"}}, "256"),
        ({"task": "classification", "groups": ["image"]}, "groups"),
        ({"task": "detection"}, "task"),
        ({"task": "depth", "depth_range": [1, 2], "train_set": "a"}, "train_set"),
        ({"task": "classification", "mapping": {"a": "b"}}, "mapping"),
        ({"task": "video", "groups": ["a"]}, "groups"),
        ({"task": "classification", "clip_features": "concatenated"}, "clip_features"),
        ({"task": "depth", "depth_range": [1, 2], "metric": ""}, "metric"),
        ({"task": "classification", "mertic": "x"}, "did you mean 'metric'"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path: Path, values: dict[str, object], expected: str) -> None:
    folder = write(tmp_path / "in", {"evalset.yaml": config(**values)})
    with pytest.raises(ConfigError, match=expected):
        check_folder(request(folder))


@quick
def test_a_folder_without_config_license_or_images_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"images/train/a.txt": b"no image"})
    with pytest.raises(ConfigError, match=r"no evalset\.yaml"):
        check_folder(request(folder))
    write(folder, {"evalset.yaml": "task: classification\n"})
    with pytest.raises(ConfigError, match="no license"):
        check_folder(request(folder))
    with pytest.raises(EvalsetError, match="images: "):
        check_folder(request(folder, license="CC0-1.0"))


@quick
def test_a_mask_has_class_indices_whatever_the_values(tmp_path: Path) -> None:
    folder = folders.segmentation(tmp_path / "in")
    for name in ("train/0", "train/1", "test/0", "test/1"):
        write(folder, {f"targets/{name}.png": mask(np.where(halves(), 200, 7) * (halves(9) != 9))})
    write(folder, {"evalset.yaml": config("segmentation", classes={200: "brick", 7: "grass"}, ignore=0)})
    found = read_evalset(add(folder).snapshot)
    assert found.class_names == ("grass", "brick")
    assert np.array_equal(found.mask(0), halves(IGNORED))


@quick
def test_a_palette_mask_gives_its_indices(tmp_path: Path) -> None:
    image = Image.new("P", SIZE)
    image.putdata(halves().astype(int).ravel().tolist())
    image.putpalette([200, 10, 10, 10, 200, 10])
    folder = write(folders.segmentation(tmp_path / "in"), {"targets/test/1.png": png(image)})
    made = add(folder)
    found = read_evalset(made.snapshot)
    assert np.array_equal(found.mask(uris(made).index("test/1.png")), halves())


def test_targets_are_read_from_their_row_group_only(tmp_path: Path) -> None:
    from components.data.evalset import ROW_GROUP_BYTES, TargetReader, TargetWriter

    with TargetWriter(tmp_path / TARGETS) as writer:
        for number in range(10):
            writer.add(f"{number:064x}", "png", bytes([number]) * (ROW_GROUP_BYTES // 2))
    reader = TargetReader(tmp_path / TARGETS)
    assert reader._metadata.num_row_groups == 5
    for number in (7, 2, 3, 9):
        assert reader.read(f"{number:064x}")[1][:1] == bytes([number])
    with pytest.raises(DatasetError, match="no target for image"):
        reader.read("f" * 64)
