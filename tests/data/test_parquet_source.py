import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from components.data.ingest_config import IngestError
from components.data.ingest_lines import counted
from components.data.parquet_source import MAX_LABEL_BYTES, find_columns
from components.data.sources import Refusal, list_source, read_batch


def image(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = [image(number) for number in range(4)]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
STRUCTS = pa.array([{"bytes": data, "path": f"{n}.png"} for n, data in enumerate(IMAGES)], STRUCT)


def described(table: pa.Table, **features: dict) -> pa.Table:
    """With the metadata that the `datasets` library writes."""
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


@dataclass
class Taken:
    """What is read of tables, in order: labels, images or refusals, and what is told."""

    labels: list[str | None]
    images: list[bytes | Refusal]
    notes: list[str]
    num_ignored: int = 0


def take(root: Path, **tables: pa.Table) -> Taken:
    """Read tables as ingest does; a name may be a path with `__` for each slash."""
    for name, table in tables.items():
        path = root / "in" / f"{name.replace('__', '/')}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
    listing = list_source(str(root / "in"), root)
    rows = [row for batch in listing.batches for row in read_batch(batch)]
    notes = [*listing.notes, *((entry.note, entry.uri) for entry, _ in rows if entry.note)]
    assert all(uri.startswith(str(root)) for _, uri in notes)
    told = [note.rpartition(", such as ")[0] for note in counted(notes)]
    images = [*listing.refusals, *(data for _, data in rows)]
    return Taken([entry.label for entry, _ in rows], images, told, listing.ignored.counts.total())


BYTES = pa.array(IMAGES, pa.binary())


@pytest.mark.parametrize(
    "column",
    [STRUCTS, BYTES, BYTES.cast(pa.large_binary()), BYTES.cast(pa.binary_view()), BYTES.dictionary_encode()],
    ids=lambda column: str(column.type)[:12],
)
def test_every_type_of_bytes_is_read(tmp_path: Path, column: pa.Array) -> None:
    taken = take(tmp_path, a=pa.table({"image": column, "label": ["a", "b", "a", "b"]}))
    assert (taken.images, taken.labels, taken.notes) == (IMAGES, ["a", "b", "a", "b"], [])


@pytest.mark.parametrize("name", ["img", "jpg", "picture", "Image", "IMG", "scan_17"])
def test_the_only_column_of_bytes_is_read_under_any_name_and_told(tmp_path: Path, name: str) -> None:
    taken = take(tmp_path, a=pa.table({name: STRUCTS, "size": [1, 2, 3, 4]}))
    assert (taken.images, taken.notes) == (IMAGES, [f"column `{name}` is read as the images: 1"])


def test_a_second_column_of_images_is_told(tmp_path: Path) -> None:
    taken = take(tmp_path, a=pa.table({"mask": STRUCTS, "image": BYTES, "views": pa.array([[b"1"]] * 4)}))
    assert taken.images == IMAGES
    assert taken.notes == [
        f"column `{name}` holds images or bytes too, and is not read: 1" for name in ("mask", "views")
    ]


def test_metadata_of_the_schema_names_the_images_and_the_classes(tmp_path: Path) -> None:
    features = {"scan": {"_type": "Image"}, "animal": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    table = pa.table({"thumb": [b"1"] * 4, "scan": STRUCTS, "animal": [0, 1, -1, 7]})
    taken = take(tmp_path, a=described(table, **features))
    assert (taken.images, taken.labels) == (IMAGES, ["cat", "dog", None, None])
    assert taken.notes == [
        "column `animal` is read as the label: 1",
        "column `scan` is read as the images: 1",
        "column `thumb` holds images or bytes too, and is not read: 1",
        "labels without a name in the schema's metadata are read as none: 1",
        "the labels' names are those of the schema's metadata: cat, dog: 1",
    ]


@pytest.mark.parametrize(
    "metadata", ["{", "[]", "1", '{"info": {"features": {"label": 1}}}', "[" * 100_000, '{"info": {"features": null}}']
)
def test_damaged_metadata_is_none(metadata: str) -> None:
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64())], {"huggingface": metadata})
    assert find_columns(schema, "a").names is None


@pytest.mark.parametrize(
    ("values", "expected", "note"),
    [
        ([True, False, None, True], ["True", "False", None, "True"], None),
        ([1.0, 0.0, None, float("nan")], ["1", "0", None, None], None),  # whole numbers with gaps, as pandas has them
        ([0.5, 1.0, 2.0, 1.0], [None, "1", "2", "1"], "labels that are not whole numbers are left out: 1"),
        (["", "x" * (MAX_LABEL_BYTES + 1), "b", "b"], [None, None, "b", "b"], "labels of more than 1024 bytes"),
        ([["a"]] * 4, [None] * 4, "no labels are read: column `label` holds list<element: string>, not one class"),
        ([{"a": 1}] * 4, [None] * 4, "no labels are read: column `label` holds struct<a: int64>, not one class"),
    ],
)
def test_labels_are_classes_or_none(tmp_path: Path, values: list, expected: list, note: str | None) -> None:
    taken = take(tmp_path, a=pa.table({"image": BYTES, "label": values}))
    assert (taken.images, taken.labels) == (IMAGES, expected)
    assert len(taken.notes) == (note is not None)
    assert note is None or taken.notes[0].startswith(note)


def test_label_columns_of_other_names(tmp_path: Path) -> None:
    for name in ("fine_label", "cls", "Label", "category"):
        taken = take(tmp_path / name, a=pa.table({"image": BYTES, name: pa.array(list("abab")).dictionary_encode()}))
        assert (taken.labels, taken.notes) == (list("abab"), [f"column `{name}` is read as the label: 1"])
    taken = take(tmp_path, a=pa.table({"image": BYTES, "fine_label": [1, 2, 3, 4], "coarse_label": [0, 0, 1, 1]}))
    assert taken.labels == [None] * 4
    shown = "no labels are read: `fine_label`, `coarse_label` could be them; rename one to `label`: 1"
    assert taken.notes == [shown]


def test_partition_folders_give_labels(tmp_path: Path) -> None:
    halves = [pa.table({"image": BYTES[:2]}), pa.table({"image": BYTES[2:]})]
    names = ("label=__HIVE_DEFAULT_PARTITION____a", "year=2024__label=big%20cat__a", "year=2024__label=dog__a")
    taken = take(tmp_path, **dict(zip(names, [pa.table({"image": [image(9)]}), *halves], strict=True)))
    assert taken.labels == [None, "big cat", "big cat", "dog", "dog"]
    assert taken.notes == ["labels are read from the folders `label=...`: 3", "the folders `year=...` are not read: 2"]
    taken = take(tmp_path / "own", **{"label=dog__a": pa.table({"image": BYTES, "label": list("abab")})})
    assert taken.labels == list("abab")  # the table's own come first


def test_tables_without_images_beside_others_are_metadata(tmp_path: Path) -> None:
    plain = pa.table({"file_name": ["a.png"], "label": ["cat"]})
    taken = take(tmp_path, a=pa.table({"image": BYTES}), b=plain)
    assert (taken.images, taken.num_ignored, taken.notes) == (IMAGES, 1, ["a table without images is not read: 1"])
    (tmp_path / "beside" / "in").mkdir(parents=True)
    (tmp_path / "beside" / "in" / "a.png").write_bytes(IMAGES[0])
    taken = take(tmp_path / "beside", metadata=plain)
    assert (taken.images, taken.num_ignored, len(taken.notes)) == (IMAGES[:1], 1, 1)
    with pytest.raises(IngestError, match="holds 1 images and 1 archives"):
        take(tmp_path / "beside", more=pa.table({"image": BYTES}))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"images": pa.array([[IMAGES[0]]])}, "`images` holds lists of images: write one row an image; found: images"),
        ({"image": pa.array([[0, 255]], pa.list_(pa.uint8()))}, "`image` holds lists, not files: if these are pixels"),
        ({"image": ["aGk="]}, r"`image` holds text: .* decode it to bytes if it is base64; found: image \(string\)"),
        ({"image": pa.array([None])}, "`image` is of another type: give encoded images as bytes"),
        ({"size": [1], "x\ny": [2]}, "give encoded images as bytes, or .* found: size .int64., x\ufffdy"),
        ({"left": [b"1"], "right": [b"2"]}, "more than one column can be the images; rename one to `image`; found"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_read_are_one_line(tmp_path: Path, columns: dict, message: str) -> None:
    with pytest.raises(IngestError, match=message) as caught:
        take(tmp_path, a=pa.table(columns))
    assert "\n" not in str(caught.value)


def test_rows_without_bytes_and_tables_without_rows_say_what_is_there(tmp_path: Path) -> None:
    structs = pa.array([{"bytes": None, "path": "/x/0\n.png"}, None], STRUCT)
    empty, path, null = take(tmp_path, a=pa.table({"image": STRUCTS[:0]}), b=pa.table({"image": structs})).images
    assert (empty.reason, path.reason, null.reason) == ("no_rows", "not_an_image", "not_an_image")
    assert empty.detail == "column `image` is there, but the table has no rows; write it again with its rows"
    assert "only the path '/x/0\N{REPLACEMENT CHARACTER}.png': ingest the folder" in path.detail
    assert null.detail == "column `image` holds no bytes in this row"


def test_a_dictionary_is_held_once_and_not_for_each_row(tmp_path: Path) -> None:
    """An Arrow dictionary of one large value, which plain columns of labels must not make large either."""
    large = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), pa.array([bytes(2**22)], pa.binary()))
    texts = pa.array(["x" * 2**20], pa.string()).take(pa.array([0] * 64))
    pq.write_table(pa.table({"image": large, "label": texts}), tmp_path / "in.parquet", dictionary_pagesize_limit=2**23)
    del large, texts
    (batch,) = list_source(str(tmp_path / "in.parquet"), tmp_path).batches
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in read_batch(batch)]
    assert len(held) == 64
    assert max(held) < 10 * 2**22
