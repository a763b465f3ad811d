"""The line that says that Prefect's server is away, and what its client says meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx

from flows import prefect_watch
from flows.console import screen


class _Refusing(BaseHTTPRequestHandler):
    """A server that is there, whatever it answers."""

    def do_GET(self) -> None:
        self.send_error(401)

    def log_message(self, format: str, *arguments: object) -> None: ...


def _until(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not done():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_away_is_said_once_and_its_clients_complaints_are_not_shown(caplog, capsys, monkeypatch):
    monkeypatch.setattr(prefect_watch, "EVERY_SECONDS", 0.01)
    caplog.set_level(logging.WARNING)
    client, ours = logging.getLogger("prefect.events.clients"), logging.getLogger("flows.retrain")
    for logger in (client, ours):
        logger.addHandler(screen)
    with HTTPServer(("127.0.0.1", 0), _Refusing) as free:
        port = free.server_port
    with prefect_watch.watched(f"http://127.0.0.1:{port}/api"):
        client.warning("before")
        _until(lambda: len(caplog.messages) == 2)
        client.warning("Unable to connect")
        ours.error("Encountered exception", exc_info=httpx.ConnectError("refused"))
        ours.warning("a checkpoint")
        assert not logging.raiseExceptions
        server = HTTPServer(("127.0.0.1", port), _Refusing)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        _until(lambda: "again" in caplog.messages[-1])
        client.warning("after")
        server.shutdown()
        server.server_close()
    for logger in (client, ours):
        logger.removeHandler(screen)
    assert logging.raiseExceptions
    told = [message for message in caplog.messages if message.startswith("Prefect at")]
    assert told[0].startswith(f"Prefect at http://127.0.0.1:{port} does not answer (")
    assert "`pedigree up` starts it" in told[0]
    assert told[1:2] == [f"Prefect at http://127.0.0.1:{port} answers again"]
    assert capsys.readouterr().err.splitlines() == ["before", "a checkpoint", "after"]


def test_a_server_that_answers_is_not_mentioned(caplog, monkeypatch):
    monkeypatch.setattr(prefect_watch, "EVERY_SECONDS", 0.01)
    server = HTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with prefect_watch.watched(f"http://127.0.0.1:{server.server_port}/api"):
        time.sleep(0.3)
    server.shutdown()
    server.server_close()
    assert caplog.messages == []
