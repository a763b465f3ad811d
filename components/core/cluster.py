"""Select where shard-parallel work runs: local processes (loky), or a Ray cluster at `RAY_ADDRESS`."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from enum import StrEnum
from typing import cast

from components.core.config import ConfigError
from components.core.errors import EngineError

ADDRESS = "RAY_ADDRESS"  # Ray's own variable, so that child processes work where their parent does
CONNECT_SECONDS = 5.0
LOOPBACK = ("127.0.0.1", "localhost")
_MISSING = "engine ray needs Ray, which is not installed: pip install 'pedigree[cluster]'"


class Engine(StrEnum):
    """The backends for shard-parallel work."""

    LOKY = "loky"
    RAY = "ray"


def choose_engine(engine: Engine | None, address: str | None) -> None:
    """Select the engine of this process and of the processes that it starts.

    Args:
        engine: None keeps the choice that `RAY_ADDRESS` makes.
        address: of the cluster, for ray; None means `RAY_ADDRESS`.

    Raises:
        ConfigError: the options contradict each other, or Ray is not installed.
        EngineError: no cluster answers at the address.
    """
    if address and engine is not Engine.RAY:
        raise ConfigError(f"--address {address} is for --engine ray, but the engine is {engine or 'not given'}")
    if engine is Engine.LOKY:
        os.environ.pop(ADDRESS, None)
    elif engine is Engine.RAY:
        chosen = address or os.environ.get(ADDRESS)
        if not chosen:
            raise ConfigError(f"--engine ray needs the cluster's --address HOST:PORT, or {ADDRESS}")
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(_MISSING)
        _reach(chosen)
        os.environ[ADDRESS] = chosen


@contextmanager
def connected(address: str) -> Generator[int]:
    """Connect to a running cluster, register it as joblib's backend `ray`, and yield its number of CPUs.

    Raises:
        EngineError: Ray is not installed, or no cluster answers at the address.
    """
    host = _reach(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # else a late pool thread reconnects after shutdown
    if host in LOOPBACK:  # else Ray resolves it to an external address where the cluster does not listen
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError:
        raise EngineError(_MISSING) from None
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)  # pyright: ignore[reportUnknownMemberType]
    except (ConnectionError, RuntimeError, ValueError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EngineError(f"the Ray cluster at {address} cannot be used: {reason}") from None
    try:
        register_ray()
        yield int(cast("dict[str, float]", ray.cluster_resources()).get("CPU", 0))
    finally:
        ray.shutdown()  # pyright: ignore[reportUnknownMemberType]


def _reach(address: str) -> str:
    """Return the host of an address, once a connection succeeds; Ray itself would retry for most of a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise EngineError(f"{ADDRESS} is {address!r}; expected HOST:PORT of a Ray cluster, as `ray start` prints it")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise EngineError(f"no Ray cluster answers at {address} ({error}); start one, or use --engine loky") from None
    return host
