"""Prefect's automations on a real server: a failed run of a deployment calls the webhook that was named."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from queue import Queue

import pytest
from prefect.client.orchestration import get_client

from infra import automations
from infra.local.site import StackError

FLOW = """
from prefect import flow

@flow
def short():
    raise ValueError('broken "on purpose"')
"""


@pytest.fixture
def webhook() -> Iterator[tuple[str, Queue[str]]]:
    """A local HTTP server: its address, and what was posted to it."""
    posted: Queue[str] = Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            posted.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook", posted
    server.shutdown()


@pytest.mark.stack
def test_a_failed_run_of_a_deployment_calls_the_webhook(stack, webhook, tmp_path, monkeypatch):
    url, posted = webhook
    file = tmp_path / "prefect.yaml"
    file.write_text("deployments: []\n")
    (stack.root / "short.py").write_text(FLOW)
    prefect = [str(Path(sys.executable).with_name("prefect")), "--no-prompt"]
    deploy = [*prefect, "deploy", "short.py:short", "--name", "notified", "--pool", "pedigree", "--tag", "pedigree"]
    subprocess.run(deploy, cwd=stack.root, check=True, capture_output=True)
    monkeypatch.setenv(automations.WEBHOOK_VARIABLE, "http://127.0.0.1:9/old")
    automations.apply(file)
    monkeypatch.setenv(automations.WEBHOOK_VARIABLE, url)
    automations.apply(file)
    monkeypatch.delenv(automations.WEBHOOK_VARIABLE)
    automations.apply(file)  # what is there stays
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("short/notified")
        (made,) = client.read_automations_by_name(automations.FAILURE_NOTIFICATION)
        try:
            run = client.create_flow_run_from_deployment(deployment.id)
            text = json.loads(posted.get(timeout=240))["text"]
            assert text.startswith(f"Pedigree: run {run.name} of notified Failed: ")
            assert 'broken "on purpose"' in text
            assert text.endswith(f"/runs/flow-run/{run.id}")
            shown = client.read_block_document_by_name(automations.WEBHOOK_BLOCK, "webhook", include_secrets=False)
            assert url not in shown.model_dump_json()
        finally:
            client.delete_automation(made.id)
            client.delete_deployment(deployment.id)


def test_an_address_that_is_none_is_refused():
    with pytest.raises(StackError, match="PEDIGREE_FAILURE_WEBHOOK: not an address; allowed: https"):
        automations.failure_notification(None, "hooks.example.org")  # pyright: ignore[reportArgumentType]
