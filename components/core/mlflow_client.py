"""Connect to MLflow servers: one checked client for each address, and errors as one line.

MLflow is imported on first use.
"""

from __future__ import annotations

import os
import re
import secrets
import tempfile
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from components.core.errors import ServiceError

_CLIENTS: dict[str, Any] = {}
_HEALTH_TIMEOUT_SECONDS = 5.0
CURRENT_USER = "/api/2.0/mlflow/users/current"  # of MLflow's basic-auth app
# MLflow's own defaults (7 retries, 120 s each) let a dead server hold a stage for minutes.
_CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # else one progress bar for each copied file
}


class TrackingError(ServiceError):
    """MLflow is unreachable or refused; the message names its address and what to do."""


def server_uri() -> str | None:
    """Return the address of the MLflow server; None if it is not configured."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def without_login(text: str) -> str:
    """Return a text without the logins in its URLs."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", text)


def shown_server() -> str:
    """Return the name of the server for messages."""
    return without_login(f"MLflow at {server_uri()}")


def checked_client() -> Any:
    """Return this process's MLflow client of the configured server, after a health check."""
    uri = server_uri()
    assert uri, "callers ask server_uri() first"
    if uri not in _CLIENTS:
        configure_client()
        _check_health(uri)
        from mlflow import MlflowClient

        _CLIENTS[uri] = MlflowClient(tracking_uri=uri)
    return _CLIENTS[uri]


def authenticated_user() -> str | None:
    """The user as whom the server knows this process; None where it knows no users, or has no MLflow logins.

    Raises:
        MlflowException: the server refuses the login.
    """
    uri = server_uri()
    if uri is None or not uri.startswith("http"):
        return None
    from mlflow.utils import credentials, rest_utils

    host: Any = credentials.get_default_host_creds(uri)  # pyright: ignore[reportUnknownMemberType]
    answer: Any = rest_utils.http_request(host, CURRENT_USER, "GET")  # pyright: ignore[reportUnknownMemberType]
    if answer.status_code == HTTPStatus.NOT_FOUND:
        return None
    rest_utils.verify_rest_response(answer, CURRENT_USER)  # pyright: ignore[reportUnknownMemberType]
    return answer.json()["user"]["username"]


def configure_client() -> None:
    """Set environment variables that MLflow's client reads, unless the user has; call this before creating a client."""
    for key, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(key, value)


def _check_health(uri: str) -> None:
    if not uri.startswith("http"):
        return
    try:
        urllib.request.urlopen(f"{without_login(uri).rstrip('/')}/health", timeout=_HEALTH_TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # the server answers; a gateway need not implement /health
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise TrackingError(_advice(str(reason))) from None


def _advice(reason: str) -> str:
    return (
        f"{shown_server()} or the storage behind it does not answer ({reason}); 'pedigree status' says what is "
        "down, 'pedigree up' starts it; or correct MLFLOW_TRACKING_URI (unset it to run without tracking)"
    )


def probe_artifacts(name: str) -> None:
    """Write and delete a probe artifact where runs of the model `name` store theirs.

    Raises:
        TrackingError: the server does not answer, refuses these credentials, or cannot reach its storage.
    """
    with reported():
        client = checked_client()
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        experiment = client.get_experiment_by_name(name) or client.get_experiment("0")
        probe = f"doctor-{secrets.token_hex(8)}"
        artifacts: Any = get_artifact_repository(f"{experiment.artifact_location.rstrip('/')}/{probe}")
        with tempfile.NamedTemporaryFile(prefix="probe-") as file:
            artifacts.log_artifact(file.name)
        artifacts.delete_artifacts()


@contextmanager
def reported() -> Generator[None]:
    """Convert the exceptions of MLflow and its transport into a TrackingError of one line."""
    import requests

    try:
        yield
    except TrackingError:
        raise
    except (requests.exceptions.RequestException, ConnectionError, TimeoutError) as error:
        raise TrackingError(_advice(type(error).__name__)) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in {"mlflow", "botocore", "boto3", "sqlalchemy"}:
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "Max retries exceeded" in first or "Connection" in first:
            raise TrackingError(_advice("connection lost")) from error
        raise TrackingError(f"{shown_server()} refuses: {without_login(first)}") from error
