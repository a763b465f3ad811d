from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from components.core.storage import (
    MissingInStorageError,
    StorageError,
    atomic_dir,
    recover_dirs,
    s3_client,
    s3_errors,
    write_bytes,
    write_json,
)

REPLACE = """
import os, shutil, signal, sys
from pathlib import Path
from components.core.storage import atomic_dir

def or_killed(function):
    def call(*arguments, **options):
        if not left:
            if function is delete:  # in the middle of it
                next(arguments[0].iterdir()).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        left.pop()
        return function(*arguments, **options)
    return call

folder, left, delete = Path(sys.argv[1]), [None] * int(sys.argv[2]), shutil.rmtree
with atomic_dir(folder) as aside:
    (aside / "file").write_text("new")
    (aside / "second").write_text("new")
    Path.rename, shutil.rmtree = or_killed(Path.rename), or_killed(shutil.rmtree)
"""


def write(folder, text):
    with atomic_dir(folder) as staging:
        (staging / "file").write_text(text)
        (staging / "second").write_text(text)


def test_a_folder_is_whole_whenever_another_is_deleted(tmp_path, monkeypatch):
    folder, seen, delete = tmp_path / "set", [], shutil.rmtree

    def watched(path, **options):
        seen.append((folder / "file").read_text())  # what a kill in the middle of deleting would leave
        delete(path, **options)

    write(folder, "old")
    monkeypatch.setattr(shutil, "rmtree", watched)
    write(folder, "new")
    assert set(seen) == {"new"}
    with pytest.raises(TypeError):
        write(folder, None)
    assert (folder / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(("calls", "text"), [(0, "old"), (1, None), (2, "new"), (3, "new")])
def test_a_killed_writer_leaves_the_old_folder_or_the_new_one(tmp_path, calls, text):
    """SIGKILL before the first rename, before the second, after it, and while the old folder is deleted."""
    folder = tmp_path / "models" / "set"
    write(folder, "old")
    done = subprocess.run([sys.executable, "-c", REPLACE, str(folder), str(calls)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(folder.parent.iterdir())) == (1 if text is None else 2)
    assert (folder / "second").exists() == (text is not None)
    recover_dirs(folder.parent)
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(
        ("file", "second"), text or "old"
    )
    assert list(folder.parent.iterdir()) == [folder]


def test_half_a_folder_does_not_come_back(tmp_path):
    """A writer killed while it deletes the old folder, and then the new one is removed, as DVC does before a stage."""
    folder = tmp_path / "set"
    write(folder, "old")
    subprocess.run([sys.executable, "-c", REPLACE, str(folder), "3"], check=False)
    shutil.rmtree(folder)
    recover_dirs(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_gives_the_old_folder_back_and_a_living_writer_is_left_alone(tmp_path):
    folder, other = tmp_path / "set", tmp_path / "set.more"
    write(folder, "old")
    with atomic_dir(other) as living:
        with pytest.raises(FileNotFoundError), atomic_dir(folder) as staging:
            shutil.rmtree(staging)  # what makes the second rename fail
        assert (folder / "file").read_text() == "old"
        (living / "file").write_text("other")
    assert (other / "file").read_text() == "other"
    assert sorted(tmp_path.iterdir()) == [folder, other]


@pytest.mark.parametrize("code", ["ExpiredToken", "TokenRefreshRequired"])
def test_expired_credentials_are_told_from_wrong_ones(monkeypatch, code):
    """An answer as S3 words it; the S3 server of the local stack knows no credentials that expire."""

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f"<Error><Code>{code}</Code><Message>The provided token has expired.</Message></Error>".encode()
            self.send_response(400)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self) -> None:  # has no body to say why
            self.send_response(400)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            monkeypatch.setenv(name, "old")
        advice = "set new AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, and start again"
        for ask, said in (
            ("get_object", f"credentials expired ({code})"),
            ("head_object", "refused without a reason (400), as where credentials have expired"),
        ):
            line = re.escape(f"s3://bucket/step_4: {said}; {advice}")
            with pytest.raises(StorageError, match=f"^{line}$"), s3_errors("s3://bucket/step_4"):
                getattr(s3_client(), ask)(Bucket="bucket", Key="step_4")
        server.shutdown()


def test_a_name_that_no_bucket_can_have_is_said_to_be_one(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(MissingInStorageError, match=r'^s3://a b: .*Invalid bucket name "a b"'), s3_errors("s3://a b"):
        s3_client().get_object(Bucket="a b", Key="c")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file.json"
    write_json(path, {"b": 1, "a": [2]})
    old = '{\n  "a": [\n    2\n  ],\n  "b": 1\n}\n'
    assert path.read_text() == old
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_bytes(path, b"new")
    assert path.read_text() == old
    write_bytes(path, b"new", mode=0o600)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o600)
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_path_and_what_to_do(tmp_path):
    from safetensors import SafetensorError

    def write_plain(folder: Path) -> None:
        with Path("/dev/full").open("wb", buffering=0) as file:
            file.write(b"x")

    def write_weights(folder: Path) -> None:
        assert folder.is_dir()  # the words that save_file says on a full tmpfs
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for write in (write_plain, write_weights):
        told = r"No space left on device; free some, then run again: '.*/made'"
        with pytest.raises(OSError, match=told) as caught, atomic_dir(tmp_path / "made") as folder:
            write(folder)
        assert caught.value.errno == errno.ENOSPC
        assert list(tmp_path.iterdir()) == []
