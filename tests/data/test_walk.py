import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from components.data import sources
from components.data.ingest_config import IngestError
from components.data.walk import Walk, walk


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def link(folder: Path, **links: str) -> None:
    for name, target in links.items():
        (folder / name).symlink_to(target)


def taken(found: Walk) -> list[str]:
    return sorted(file.relative for file in found.files)


def refused(found: Walk, root: Path) -> dict[str, str]:
    return {os.path.relpath(path, root): reason for path, reason, _ in found.refused}


@contextmanager
def as_nobody() -> Iterator[None]:
    """Permissions are those of an ordinary user, also where root runs the tests."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_links_within_the_folder_invent_no_copies(tmp_path: Path) -> None:
    root = write(tmp_path / "in", "cat/1.jpg", "zoo/2.jpg", "loose.jpg")
    link(root, itself=".", parent="..", a_cat="cat", b_file="loose.jpg", gone="nowhere", dead="gone/x", round="round")
    link(root / "zoo", back="..")
    found = walk(str(root))
    assert taken(found) == ["cat/1.jpg", "loose.jpg", "zoo/2.jpg"]
    loops = dict.fromkeys(("itself", "parent", "round", "zoo/back"), "looping_link")
    assert refused(found, root) == {**loops, "gone": "dangling_link", "dead": "dangling_link"}
    assert found.repeated == ["a_cat", "b_file"]
    assert (found.outside, found.links) == ([], set())
    details = {os.path.basename(path): detail for path, _, detail in found.refused}
    assert details["gone"] == "a link to nowhere: No such file or directory"
    assert details["itself"] == "leads back to the folder itself, in which it lies"


def test_links_out_of_the_folder_keep_their_names_and_are_counted(tmp_path: Path) -> None:
    store = write(tmp_path / "store", "a/1.jpg", "a/deep/2.jpg", "b/3.jpg")
    root = write(tmp_path / "in", "cat/0.jpg", ".hidden/5.jpg")
    link(root, z_again=str(store / "a"), dog="../store/a", inner=".hidden")
    link(store / "a", sibling="../b", home="../../in/cat", up="..")
    link(root / "cat", one="../../store/b/3.jpg", two=str(store / "b" / "3.jpg"))
    found = walk(str(root))
    inside = ["cat/0.jpg", "dog/1.jpg", "dog/deep/2.jpg", "dog/sibling/3.jpg", "inner/5.jpg"]
    assert taken(found) == inside
    assert found.links == {"dog", "dog/sibling", "inner"}
    assert found.outside == [f"dog -> {store}/a", f"dog/sibling -> {store}/b"]
    assert found.num_outside == 3
    assert found.repeated == ["z_again", "dog/home", "cat/one", "cat/two"]
    assert refused(found, root) == {"dog/up": "looping_link"}
    assert found.ignored.counts == {"hidden": 1}


def test_links_to_files_are_files_of_the_folder_that_they_lie_in(tmp_path: Path) -> None:
    write(tmp_path / "store", "1.jpg", "2.jpg")
    root = write(tmp_path / "in", "normal/0.jpg")
    (root / "abnormal").mkdir()
    link(root / "abnormal", b="../../store/1.jpg", a="../../store/1.jpg", c="../../store/2.jpg")
    found = walk(str(root))
    assert taken(found) == ["abnormal/a", "abnormal/c", "normal/0.jpg"]
    assert (found.repeated, found.num_outside) == (["abnormal/b"], 2)


def test_what_cannot_be_read_is_named() -> None:
    with tempfile.TemporaryDirectory(prefix="pedigree-") as scratch:
        os.chmod(scratch, 0o755)  # pytest's own folders are closed to others
        root = write(Path(scratch, "in"), "cat/1.jpg", "dog/2.jpg", "owl/3.jpg")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(root / "cat" / "socket"))
        (root / "dog").chmod(0)
        (root / "owl").chmod(0o444)  # its names can be read, its files cannot
        with as_nobody():
            found = walk(str(root))
        assert taken(found) == ["cat/1.jpg"]
        assert refused(found, root) == {"dog": "unreadable", "owl/3.jpg": "unreadable", "cat/socket": "special_file"}
        assert "folder: Permission denied; its files are missing" in [detail for *_, detail in found.refused]
        (root / "cat").chmod(0)
        message = r"holds no files that can be read; 3 cannot be, for example .*: Permission denied"
        with as_nobody(), pytest.raises(IngestError, match=message):
            sources.list_source(str(root), root)
        root.chmod(0)
        with as_nobody(), pytest.raises(IngestError, match=rf"^{root}: cannot be read: Permission denied$"):
            sources.list_source(str(root), root)
        for folder in (root, root / "cat", root / "dog", root / "owl"):
            folder.chmod(0o755)


def test_system_files_are_ignored_and_counted_by_kind(tmp_path: Path) -> None:
    names = [
        "@eaDir/0.jpg/SYNO.jpg",
        "cat/@eaDir/a.jpg",
        "cat/._1.jpg",
        ".DS_Store",
        "cat/Thumbs.db",
        ".thumbnails/x/1.png",
    ]
    found = walk(str(write(tmp_path, "cat/1.jpg", *names)))
    assert taken(found) == ["cat/1.jpg"]
    assert found.ignored.counts == {"@eaDir": 2, "._*": 1, ".DS_Store": 1, "Thumbs.db": 1, ".thumbnails": 1}
    assert str(found.ignored).startswith("6 files ignored: @eaDir 2 (such as @eaDir)")
