"""What a text names: a version of a registered model, a run, a commit, data or an image."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from components.core import references
from components.core.references import EXACT_URI, ModelReference, is_registered

PROJECT = Path(__file__).parents[2]
OF_OTHERS = {"models:/My model/3": ModelReference("My model", version="3")}  # no name for a model of ours


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pedigree@champion", ModelReference("pedigree", alias="champion")),
        ("pedigree-small-candidates/12", ModelReference("pedigree-small-candidates", version="12")),
        ("pedigree", None),
        ("pedigree/latest", None),
        ("pedigree/3/4", None),
        ("a@b@c", None),
        ("a@b/3", None),
        ("-a/3", None),
        ("models/adapted", None),
        ("pedigree/3\n", None),
        ("", None),
    ],
)
def test_a_version_is_an_alias_or_a_number_with_models_before_it_where_it_may_be_a_folder(text, expected):
    assert ModelReference.parse(text) == expected
    assert ModelReference.of_uri(f"models:/{text}") == expected or text == "-a/3"
    assert ModelReference.of_uri(text) is None
    assert ModelReference.parse(f"models:/{text}") is None
    if expected is not None:
        assert (str(expected), expected.uri) == (text, f"models:/{text}")


def test_models_of_others_may_have_other_names():
    for uri, expected in OF_OTHERS.items():
        assert ModelReference.of_uri(uri) == expected
        assert ModelReference.parse(uri.removeprefix("models:/")) is None


def test_an_input_of_a_run_is_exact():
    assert re.search(EXACT_URI, "models:/pedigree/3")
    assert not re.search(EXACT_URI, "models:/pedigree@champion")


def test_a_registered_model_is_told_from_a_folder():
    assert is_registered("models:/pedigree/3")
    assert not is_registered("models/adapted")


def test_what_names_something_else_is_told_apart():
    named = {
        "RUN_ID": "20261129-061145-0635",
        "COMMIT": "8c8a244" + "0" * 33,
        "DATA_ID": "d41d8cd98f00b204e9800998ecf8427e.dir",
        "IMAGE_ID": "e3b0c442" + "0" * 56,
    }
    kinds = {kind: getattr(references, kind) for kind in named}
    for kind, text in named.items():
        assert [other for other, pattern in kinds.items() if pattern.fullmatch(text)] == [kind]
        assert ModelReference.parse(text) is None


def test_no_other_module_reads_a_reference_by_itself():
    files = [path for top in ("flows", "components", "infra") for path in (PROJECT / top).rglob("*.py")]
    reads = re.compile(r"""(startswith|removeprefix|re\.\w+|pattern=)\(?r?["']\^?models:/""")
    found = [str(path.relative_to(PROJECT)) for path in files if reads.search(path.read_text())]
    assert found == []
