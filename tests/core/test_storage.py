from __future__ import annotations

import shutil

import pytest

from components.core.storage import atomic_dir


def write(folder, text):
    with atomic_dir(folder) as aside:
        (aside / "file").write_text(text)


def test_a_folder_is_whole_whenever_another_is_deleted(tmp_path, monkeypatch):
    folder, seen, delete = tmp_path / "set", [], shutil.rmtree

    def watched(path, **options):
        seen.append((folder / "file").read_text())  # what a kill in the middle of deleting would leave
        delete(path, **options)

    write(folder, "old")
    monkeypatch.setattr(shutil, "rmtree", watched)
    write(folder, "new")
    assert seen == ["new"]
    with pytest.raises(TypeError):
        write(folder, None)
    assert (folder / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
