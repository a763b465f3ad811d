"""The search for bytes of images: nothing is missed at the edges of what is read at once, or in base64."""

from __future__ import annotations

import io
import os
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest

from components.lineage import residue
from components.lineage.residue import RUN, Needles, Searched, needle, search_disk, with_base64

RANDOM = np.random.default_rng(0)


def noise(size: int) -> bytes:
    return RANDOM.integers(0, 256, size, np.uint8).tobytes()


def found(wanted: Needles, data: bytes) -> bool:
    return wanted.is_in(io.BytesIO(data), lambda _: None)


def test_a_run_is_found_at_every_offset_of_what_is_read_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(residue, "CHUNK", 256)
    runs = [noise(RUN), noise(RUN)]
    wanted, around = Needles(runs), noise(1100)
    for start in range(0, 1100, 7):
        assert found(wanted, around[:start] + runs[start % 2] + around[start:])
    assert not found(wanted, around)
    assert not found(wanted, runs[0][:-1] + b"x" + runs[1][1:])
    assert not found(wanted, b"")
    assert not found(Needles([]), around)


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_a_run_is_found_in_base64_whatever_stands_before_it(before: int):
    image = noise(1000)
    page = b64encode(noise(before) + image)
    assert found(Needles(with_base64([needle(image)])), page)
    assert not found(Needles([needle(image)]), page)


def test_monotonous_and_tiny_images_are_searched_for_as_a_whole():
    assert needle(flat := bytes(5000)) == flat
    assert needle(tiny := noise(100)) == tiny
    image = bytes(3000) + noise(3000)
    assert len(needle(image)) == RUN
    assert not found(Needles([needle(image)]), bytes(10_000))


def test_a_run_is_none_that_other_images_have_too():
    tables, pixels = bytes(range(256)) * 8, [noise(300), noise(300)]  # as the tables of JPEGs, of many distinct bytes
    images = [b"\xff\xd8" + tables + b"\xff\xda" + each for each in pixels]
    assert needle(images[0]) in pixels[0]
    other = [each + tables for each in pixels]  # in another order
    assert needle(other[0]) in tables
    assert needle(other[0], [other[1]]) == other[0]


def test_links_are_not_followed_and_hard_links_are_read_once(tmp_path: Path):
    image = noise(1000)
    (tmp_path / "one").mkdir()
    (tmp_path / "one/a").write_bytes(b"before" + image)
    os.link(tmp_path / "one/a", tmp_path / "b")
    (tmp_path / "c").symlink_to(tmp_path / "b")
    (tmp_path / "d").write_bytes(noise(1000))
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/e").write_bytes(image)
    searched = Searched()
    hits = search_disk([tmp_path], Needles([needle(image)]), searched)
    assert {path.relative_to(tmp_path).as_posix() for path in hits} == {"one/a", "b"}
    assert (searched.files, searched.bytes) == (2, 2006)
