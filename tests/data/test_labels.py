import pytest

from components.data.ingest_config import IngestError
from components.data.labels import MemberLabels, label_line, place, placement_lines, split_of, untested_line

SPLITS = {
    "train": ["train", "Training", "TRAIN", "train_set", "training-data", "train2017", "train split"],
    "test": ["val", "valid", "Validation", "test", "testing", "dev", "eval", "evaluation", "testset", "val2017"],
    None: ["trains", "bullet_train", "contest", "value", "cat", "train1", "set", "dataset", "images", "tests"],
}


@pytest.mark.parametrize(("split", "name"), [(split, name) for split, names in SPLITS.items() for name in names])
def test_names_of_splits(split: str | None, name: str) -> None:
    assert split_of(name) == split


CLASSES = ("cat", "dog")


def below(*tops: str, classes: tuple[str, ...] = CLASSES) -> list[str]:
    return [f"{top}/{name}" for top in tops for name in classes]


@pytest.mark.parametrize(
    ("folders", "labels", "splits"),
    [
        (["cat", "dog", ""], ["cat", "dog", None], [None] * 3),
        (["cat/cam1", "cat/cam2", "dog/cam1", ""], ["cat", "cat", "dog", None], [None] * 4),
        (["only", ""], [None, None], [None, None]),
        (["a/b/c/only"], [None], [None]),
        (below("dataset"), ["cat", "dog"], [None, None]),
        (below("up/and/up"), ["cat", "dog"], [None, None]),
        ([*below("dataset"), ""], ["cat", "dog", None], [None] * 3),
        (below("train", "val"), ["cat", "dog"] * 2, ["train"] * 2 + ["test"] * 2),
        (below("d/Training", "d/test"), ["cat", "dog"] * 2, ["train"] * 2 + ["test"] * 2),
        (below("train/images", "val/images"), ["cat", "dog"] * 2, ["train"] * 2 + ["test"] * 2),
        ([*below("train", "test"), "extra"], ["cat", "dog"] * 2 + [None], ["train"] * 2 + ["test"] * 2 + [None]),
        (["train", "test"], [None, None], ["train", "test"]),
        (below("val", "test"), ["cat", "dog"] * 2, [None] * 4),  # nothing to train on: they divide nothing
        (below("val"), ["cat", "dog"], [None, None]),
        ([*below("train"), "test"], ["cat", "dog", None], [None] * 3),  # test images without labels
        (["train", "bus", "car"], ["train", "bus", "car"], [None] * 3),  # the vehicle
    ],
)
def test_labels_and_splits_of_folders(folders: list[str], labels: list[str | None], splits: list[str | None]) -> None:
    placed = place(folders)
    assert [placed.labels[folder] for folder in folders] == labels
    assert [placed.splits[folder] for folder in folders] == splits


def test_what_is_no_class_is_said() -> None:
    assert list(placement_lines(place(["cat", "dog"]))) == []
    assert list(placement_lines(place(below("a/b")))) == ["all other folders are in a/b: labels are read below it"]
    (line,) = placement_lines(place(below("train", "val", "test")))
    assert line == "folders taken as splits, not as classes: train as train; test, val as test"
    lines = list(placement_lines(place([*below("train"), "test", "extra"])))
    assert "only one split has images (labeled ones" in lines[1]
    assert lines[2] == "images of extra have no label: these folders are siblings of the splits"
    assert "no label, for a class needs another class" in next(placement_lines(place(["on\nly"])))
    assert "test: the name of a split, taken as a class" in next(placement_lines(place(["cat", "dog", "test"])))


def test_labels_that_are_names_of_links() -> None:
    assert place(["top/cat", "top/dog"], {"top/cat"}).links == {"cat"}
    assert place(["cat/a", "dog"], {"cat/a"}).links == set()


def test_the_line_on_labels_counts_all_of_them() -> None:
    line = label_line({"None": 7, "01": 1, "[red]x\nerror: y": 2}, ["a\nb.jpg"], "folder names")
    assert line == (
        r"labels from folder names, 3 classes: 01 1, None 7, [red]x\nerror: y 2; "
        r"1 images without label, for example a\nb.jpg"
    )
    line = label_line({f"c{number:02}": number + 1 for number in range(40)}, [], "`.cls` members")
    assert "40 classes: those with the fewest images: c00 1, c01 2" in line
    assert "c19 20; up to 40 in one; 0 images without label" in line
    assert label_line({}, ["a"], "folder names") == "labels: none; 1 images without label"


def test_classes_that_cannot_be_evaluated() -> None:
    members = [("a", "train"), ("a", "test"), ("b", "train"), ("b", "train"), (None, "test")]
    line = untested_line({"a", "b", "c"}, members)
    assert line is not None
    assert line.startswith("2 of 3 classes cannot be evaluated")
    assert line.endswith("b (2 train, 0 test), c (0 train, 0 test)")
    assert untested_line({"a"}, members) is None
    assert "no image is held out" in str(untested_line({"a"}, []))


def test_a_key_ends_where_a_label_says_so() -> None:
    labels = MemberLabels("x.tar")
    for name, text in {"shot.00": "dog", "shot.01": "cat", "v1.5/7": "owl", "8": "", "left": "x"}.items():
        labels.add(f"{name}.cls", text)
    labels.add("left.CLS", "x")  # again, and the same
    names = ["shot.00.jpg", "shot.01.left.jpg", "v1.5/7.a.b.png", "v1.5/8.jpg", "8.jpg", "left", "none.jpg", "shot.jpg"]
    assert [labels.of(name) for name in names] == ["dog", "cat", "owl", None, None, "x", None, None]
    assert labels.unused() == []
    labels.add("gone.cls", "x")
    assert labels.unused() == ["gone.cls"]
    with pytest.raises(IngestError, match=r"^x.tar: two labels for the key shot\.00: 'dog' and 'c\\nat'; correct"):
        labels.add("shot.00.cls", "c\nat")
