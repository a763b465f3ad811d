from __future__ import annotations

import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from components.core.storage import StorageError, atomic_dir, s3_client, s3_errors


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

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            monkeypatch.setenv(name, "old")
        line = (
            f"s3://bucket/step_4: credentials expired ({code}); "
            "set new AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, and start again"
        )
        with pytest.raises(StorageError, match=f"^{re.escape(line)}$"), s3_errors("s3://bucket/step_4"):
            s3_client().get_object(Bucket="bucket", Key="step_4")
        server.shutdown()
