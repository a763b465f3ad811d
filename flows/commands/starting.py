"""Start flows from the command line: connect to the services, run, and return the result or raise the error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from components.core.errors import PedigreeError
from flows.failure import prefect_is_away
from infra.local import supervisor


def connect(checkout: Path, beside: bool = False) -> None:
    """Configure this process for the team's services that the environment names, else for the local stack.

    Args:
        checkout: Pedigree's folder.
        beside: do not wait for services that only runs of deployments need.

    Raises:
        StackError: the local stack cannot start.
        StorageError: S3 does not answer; nothing has been read or written yet.
    """
    from components.core.storage import s3_client, s3_errors

    os.environ.update(supervisor.connect(checkout, beside=beside))
    bucket = os.environ["PEDIGREE_DATA_BUCKET"]
    with s3_errors(f"s3://{bucket}"):
        s3_client().list_objects_v2(Bucket=bucket, MaxKeys=1)


def finished(flow: Any, *arguments: Any, **named: Any) -> Any:
    """Run a flow and return its result.

    Raises:
        PedigreeError: it failed; the message is the reason.
    """
    from httpx import HTTPError
    from prefect.exceptions import TerminationSignal

    from flows.prefect_watch import watched

    try:
        with watched(os.environ["PREFECT_API_URL"]):
            state = flow(*arguments, **named, return_state=True)
    except TerminationSignal:  # SIGTERM before our handlers were installed, or after their removal
        raise KeyboardInterrupt from None
    except HTTPError as error:
        raise prefect_is_away(error) from error
    if state.is_cancelled():
        raise KeyboardInterrupt
    if not state.is_completed():
        error = state.result(raise_on_failure=False)
        raise error if isinstance(error, PedigreeError) else PedigreeError(state.message)
    return state.result()
