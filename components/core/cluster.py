"""Where shard-parallel work runs: processes of this machine (loky), or a Ray cluster at `RAY_ADDRESS`."""

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
    """What shard-parallel work runs on."""

    LOKY = "loky"
    RAY = "ray"


def choose_engine(engine: Engine | None, address: str | None) -> None:
    """Set where this process, and those that it starts, work on shards.

    Args:
        engine: None leaves what `RAY_ADDRESS` says.
        address: of the cluster, for ray; None takes `RAY_ADDRESS`.

    Raises:
        ConfigError: options that do not fit together, or Ray is not installed.
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
    """Connect to a running cluster and make it joblib's backend `ray`; yields the cluster's CPUs.

    Raises:
        EngineError: Ray is not installed, or no cluster answers at the address.
    """
    host = _reach(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # else a late thread of a pool connects again after the end
    if host in LOOPBACK:  # else Ray takes it for this machine's outer address, where such a cluster does not listen
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
    """The host of an address at which something listens; Ray itself would try for most of a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise EngineError(f"{ADDRESS} is {address!r}; expected HOST:PORT of a Ray cluster, as `ray start` prints it")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise EngineError(f"no Ray cluster answers at {address} ({error}); start one, or use --engine loky") from None
    return host
