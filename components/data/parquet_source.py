"""Read images and labels from Parquet tables of various layouts, and report what is skipped.

Tables are untrusted: so are their schema, metadata and rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import repeat
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from components.data.ingest_config import IngestError

MAX_LABEL_BYTES = 1024
MAX_SHOWN = 60  # characters of a name, type or path in a message
MAX_COLUMNS = 8  # named in a message

# Names in lower case. The usual name wins over all others; of the known ones there must be only one.
USUAL_IMAGE, USUAL_LABEL = ("image", "bytes"), ("label",)
KNOWN_IMAGE = {
    *("img", "picture", "photo", "jpg", "jpeg", "png", "webp"),
    *("image_bytes", "img_bytes", "jpeg_bytes", "png_bytes", "image_data", "image_content"),
}
KNOWN_LABEL = {
    *("labels", "class", "class_name", "classname", "cls", "category", "target"),
    *("fine_label", "coarse_label", "label_name"),
}
ENCODED = "give encoded images as bytes, or as a struct with the field `bytes`"
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


class NoImageColumnError(IngestError):
    """A table without a column of encoded images."""

    def __init__(self, uri: str, detail: str):
        super().__init__(f"{uri}: {detail}")
        self.uri = uri


@dataclass(frozen=True)
class Columns:
    """Columns of a table to read."""

    image: str
    label: str | None
    names: tuple[str, ...] | None  # of the classes, if the labels are their indices
    notes: tuple[str, ...]  # what was guessed, and what is left out


@dataclass(frozen=True)
class Row:
    """One image of a table; `data` is None where `problem` says why."""

    number: int  # in the file
    data: bytes | None
    label: str | None
    problem: str = ""
    note: str = ""  # why the label is missing


@dataclass(frozen=True)
class _Features:
    """Column types that the `datasets` library wrote into the schema's metadata."""

    images: frozenset[str]
    classes: dict[str, tuple[str, ...]]  # names of the classes by column


def find_columns(schema: pa.Schema, uri: str) -> Columns:
    """Choose the columns of the images and of their labels.

    Raises:
        NoImageColumnError: no column can contain the images.
        IngestError: several columns can.
    """
    fields = [field for field in schema if schema.names.count(field.name) == 1]
    features = _read_features(schema)
    candidates = [field.name for field in fields if _holds_images(field.type)]
    named = [name for name in candidates if name in features.images]
    image = _choose(named or candidates, USUAL_IMAGE, KNOWN_IMAGE, alone=True)
    if image is None:
        if candidates:
            what = "more than one column can be the images; rename one to `image`"
            raise IngestError(f"{uri}: {what}; found: {_found(schema)}")
        raise NoImageColumnError(uri, f"no column holds encoded images; {_advice(schema)}; found: {_found(schema)}")
    notes = [] if image in USUAL_IMAGE else [f"column `{_short(image)}` is read as the images"]
    others = [field.name for field in schema if field.name != image and _has_bytes(field.type)]
    notes += [f"column `{_short(name)}` holds images or bytes too, and is not read" for name in others]
    label, label_notes = _label_column([field for field in fields if field.name != image], features)
    return Columns(image, label, features.classes.get(label or ""), (*notes, *label_notes))


def read_rows(path: str, row_group: int, columns: Columns) -> Iterator[Row]:
    """Yield the rows of one row group, one in memory at a time.

    Raises:
        pyarrow.ArrowException, OSError, UnicodeDecodeError: the file is damaged.
    """
    with ExitStack() as stack:
        parquet = stack.enter_context(pq.ParquetFile(path))
        first = sum(parquet.metadata.row_group(number).num_rows for number in range(row_group))
        images = _values(parquet, row_group, columns.image)
        labels: Iterator[Any] = repeat(None)
        if columns.label is not None:
            labels = _values(stack.enter_context(pq.ParquetFile(path)), row_group, columns.label)
        # `zip` stops with the images; the labels repeat or have as many values.
        for number, (value, label) in enumerate(zip(images, labels, strict=False), start=first):
            yield _row(number, value, label, columns)


def partition_of(relative: PurePosixPath) -> dict[str, str | None]:
    """Return the values of Hive partition folders `key=value` above a table."""
    pairs = (part.split("=", 1) for part in relative.parts[:-1] if "=" in part)
    return {unquote(key): None if value == HIVE_NULL else unquote(value) for key, value in pairs}


def partition_label(relative: PurePosixPath) -> tuple[str | None, list[str]]:
    """Return the label from the partition folders above a table, and notes on these folders."""
    values = partition_of(relative)
    key = _choose(list(values), USUAL_LABEL, KNOWN_LABEL, alone=False)
    notes = [] if key is None else [f"labels are read from the folders `{_short(key)}=...`"]
    notes += [f"the folders `{_short(other)}=...` are not read" for other in values if other != key]
    return (values[key] or None) if key is not None else None, notes


def _choose(names: Sequence[str], usual: Sequence[str], known: set[str], *, alone: bool) -> str | None:
    """Return the column with a usual name, else the only one with a known name, else (`alone`) the only one."""
    for name in usual:
        found = [each for each in names if each == name] or [each for each in names if each.casefold() == name]
        if len(found) == 1:
            return found[0]
    found = [name for name in names if name.casefold() in known] or (names if alone else [])
    return found[0] if len(found) == 1 else None


def _label_column(fields: list[pa.Field], features: _Features) -> tuple[str | None, list[str]]:
    known = KNOWN_LABEL | {name.casefold() for name in features.classes}
    names = [field.name for field in fields]
    label = _choose(names, USUAL_LABEL, known, alone=False)
    if label is None:
        several = [name for name in names if name.casefold() in known]
        shown = ", ".join(f"`{_short(name)}`" for name in several)
        advice = f"no labels are read: {shown} could be them; rename one to `label`"
        return None, [advice] if several else []
    kind = next(field.type for field in fields if field.name == label)
    if not _is_class(kind):
        shown = f"column `{_short(label)}` holds {_short(str(kind))}, not one class an image"
        return None, [f"no labels are read: {shown} (text or whole numbers)"]
    notes = [] if label == "label" else [f"column `{_short(label)}` is read as the label"]
    if classes := features.classes.get(label):
        shown = ", ".join(map(_short, classes[:MAX_COLUMNS])) + (", ..." if len(classes) > MAX_COLUMNS else "")
        notes.append(f"the labels' names are those of the schema's metadata: {shown}")
    return label, notes


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind  # pyright: ignore[reportAttributeAccessIssue]


def _is_bytes(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _holds_images(kind: pa.DataType) -> bool:
    """Return whether a type is bytes, or the struct of bytes and path of the `datasets` library."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)  # pyright: ignore[reportAttributeAccessIssue]
    return _is_bytes(kind)


def _has_bytes(kind: pa.DataType) -> bool:
    """Return whether a type contains bytes at any depth."""
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    return _is_bytes(kind) or any(map(_has_bytes, inner))


def _is_class(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    tests: tuple[Callable[[pa.DataType], bool], ...] = (
        *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
        *(pa.types.is_integer, pa.types.is_boolean, pa.types.is_floating, pa.types.is_null),
    )
    return any(test(kind) for test in tests)


def _read_features(schema: pa.Schema) -> _Features:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"].items()
        images = frozenset(name for name, feature in features if feature.get("_type") == "Image")
        listed = {name: feature["names"] for name, feature in features if feature.get("_type") == "ClassLabel"}
        classes = {name: tuple(names) for name, names in listed.items() if all(isinstance(n, str) for n in names)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):  # absent, or malformed
        return _Features(frozenset(), {})
    return _Features(images, classes)


def _values(parquet: pq.ParquetFile, row_group: int, column: str) -> Iterator[Any]:
    """Yield the values of a column one at a time, because a small dictionary page can expand to many large images."""
    size = 1
    if _has_dictionary(parquet.schema_arrow.field(column).type):  # each batch would contain the whole dictionary
        size = max(parquet.metadata.row_group(row_group).num_rows, 1)
    for batch in parquet.iter_batches(size, row_groups=[row_group], columns=[column]):
        yield from (value.as_py() for value in batch.column(0))


def _has_dictionary(kind: pa.DataType) -> bool:
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    return pa.types.is_dictionary(kind) or any(map(_has_dictionary, inner))


def _row(number: int, value: Any, label: Any, columns: Columns) -> Row:
    name, note = _class_name(label, columns.names)
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is not None:
        return Row(number, data, name, note=note)
    path = value.get("path") if isinstance(value, dict) else None
    problem = f"column `{_short(columns.image)}` holds no bytes in this row"
    if path:
        problem += f", only the path {_short(str(path))!r}: ingest the folder of these files, or write their bytes"
    return Row(number, None, name, problem, note)


def _class_name(value: Any, names: tuple[str, ...] | None) -> tuple[str | None, str]:
    """Return the label of a value, and a note if it is rejected."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None, ""
    if isinstance(value, float):  # integers with missing values are stored as floats
        if not value.is_integer():
            return None, "labels that are not whole numbers are left out"
        value = int(value)
    if names is not None and isinstance(value, int):
        known = 0 <= value < len(names)
        unknown = "" if value == -1 else "labels without a name in the schema's metadata are read as none"
        return (names[value], "") if known else (None, unknown)  # the library encodes a missing label as -1
    text = str(value)
    if len(text.encode(errors="replace")) > MAX_LABEL_BYTES:
        return None, f"labels of more than {MAX_LABEL_BYTES} bytes are read as none"
    return text or None, ""


def _found(schema: pa.Schema) -> str:
    shown = ", ".join(f"{_short(field.name)} ({_short(str(field.type))})" for field in list(schema)[:MAX_COLUMNS])
    return shown + (f" and {len(schema) - MAX_COLUMNS} more" if len(schema) > MAX_COLUMNS else "")


def _advice(schema: pa.Schema) -> str:
    """Describe the most likely intended image column, and what to do."""
    names = {field.name.casefold(): field for field in schema}
    likely = [names[name] for name in (*USUAL_IMAGE, "images", *sorted(KNOWN_IMAGE)) if name in names]
    likely += [field for field in schema if _has_bytes(field.type)]
    if not likely:
        return ENCODED
    return f"`{_short(likely[0].name)}` {_remedy(likely[0].type)}"


def _remedy(kind: pa.DataType) -> str:
    plain = _plain(kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        if _has_bytes(kind):
            return "holds lists of images: write one row an image"
        return "holds lists, not files: if these are pixels, encode each image, such as to PNG"
    if pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain):
        return "holds text: ingest the folder of the files if these are paths, decode it to bytes if it is base64"
    return f"is of another type: {ENCODED}"


def _short(text: str) -> str:
    """Return one printable line of at most `MAX_SHOWN` characters."""
    text = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
