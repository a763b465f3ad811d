"""Final state of a failed flow run: one line as its message, and a defect's traceback in its log."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from components.core.errors import ServiceError, defect, known, tracebacks_shown

if TYPE_CHECKING:  # importing Prefect is slow
    from prefect import State


def failed(error: Exception) -> State[Any]:
    """Return the final state of a flow run after `error`; its data is the error to print, with its exit code."""
    from httpx import HTTPError
    from prefect import get_run_logger
    from prefect.states import Failed

    found = prefect_is_away(error) if isinstance(error, HTTPError) else known(error)
    if found is None or tracebacks_shown():
        get_run_logger().error("%s ended the run", type(error).__name__, exc_info=error)
    shown = found or defect(error, "in the log")
    return Failed(message=str(shown) or type(shown).__name__, data=shown)


def prefect_is_away(error: Exception) -> ServiceError:
    """Return the error to print for an exception of Prefect's client."""
    address = os.environ.get("PREFECT_API_URL", "").removesuffix("/api")
    reason = str(error) or type(error).__name__
    advice = "`pedigree up` starts it. What was finished is kept: run again"
    return ServiceError(f"Prefect at {address} does not answer ({reason}); {advice}")
