"""The local stack, started once for the whole test run and only if a test asks for it; who runs which test."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from components.lineage import audit_log
from infra.local import supervisor

SERVICES, MAIN_JOB = "services", "main-job"
# Groups that take long: they begin first, so that at the end no process waits for another one.
LONG = (
    MAIN_JOB, SERVICES, "test_ranks.py", "test_training_stages.py", "test_together.py", "test_embed_on_ray.py",
    "test_plan.py", "test_ledger.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Let xdist hand out the groups in the order below, not those of the most tests first, and let tests fork."""
    config.option.loadscopereorder = False
    # Small matrices gain nothing from threads, which took a quarter of the processors' time; torch and others read it
    # when they are imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Once a test has run a flow here, Prefect's events worker would fail at the end of each forked process, such as a
    # loader's: it waits for its own thread, which is not there.
    os.register_at_fork(after_in_child=threading._threading_atexits.clear)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where processes share the tests: all that need the stack to two of them, each with a stack; others by file."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    items.sort(key=lambda item: LONG.index(_group(item)) if _group(item) in LONG else len(LONG))


def _group(item: pytest.Item) -> str:
    """The main job, and then the registry's tests, have one stack; all others that need services share another."""
    if not {"stack", "servers"} & set(getattr(item, "fixturenames", ())):
        return item.path.name
    return MAIN_JOB if item.path.name == "test_main_job.py" or item.path.parent.name == "registry" else SERVICES


@pytest.fixture(autouse=True)
def _loggers_are_on(caplog: pytest.LogCaptureFixture) -> None:
    """Switch our loggers and pytest's handler on again: libraries that a test before this one used switch them off."""
    caplog.handler.setLevel(logging.NOTSET)
    for name, logger in logging.root.manager.loggerDict.items():
        if name.split(".")[0] in ("components", "flows", "infra") and isinstance(logger, logging.Logger):
            logger.disabled = False


@pytest.fixture(scope="session", autouse=True)
def _own_audit_heads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what tests verify of the audit log out of the checkpoints of the checkout that they run in."""
    folder = tmp_path_factory.mktemp("audit-heads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit_log, "heads_folder", lambda: folder)
        yield


@dataclass(frozen=True)
class RunningStack:
    """A running stack: its checkout folder, and the variables that are set in `os.environ`."""

    root: Path
    env: dict[str, str]


@pytest.fixture(scope="session")
def stack_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the run's one stack, which is stopped at the end and must leave no process behind."""
    # Characters that end a path in a URI, start a value in a settings file, or are no ASCII: people have such folders.
    root, before = tmp_path_factory.mktemp("stack ü 50% a?b#c"), dict(os.environ)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a test run that is cut short cleans up too
    try:
        yield root
    finally:
        os.environ.clear()
        os.environ.update(before)
        supervisor.down(root)
    assert supervisor.processes(root) == []


@pytest.fixture(scope="session")
def storage(stack_root: Path) -> RunningStack:
    """Only the S3 server, with its variables set: ready in a second."""
    env = supervisor.up(stack_root, only=("s3",))
    os.environ.update(env)
    return RunningStack(stack_root, env)


@pytest.fixture(scope="session")
def servers(stack_root: Path) -> Iterator[RunningStack]:
    """S3, MLflow and Prefect without worker and keeper, which runs of deployments need and runs by hand do not."""
    supervisor.up(stack_root, only=("s3", "mlflow", "prefect"))
    with _connected(stack_root, supervisor.environment(stack_root)) as running:
        yield running


@pytest.fixture(scope="session")
def stack(stack_root: Path) -> Iterator[RunningStack]:
    """All services, with their variables set; takes over those of `storage` or `servers` where they are running."""
    with _connected(stack_root, supervisor.up(stack_root)) as running:
        yield running


@contextmanager
def _connected(root: Path, env: dict[str, str]) -> Iterator[RunningStack]:
    os.environ.update(env)
    with ExitStack() as context:
        if "prefect" in sys.modules:  # it read its settings when a test module imported it
            from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_HOME, temporary_settings

            values = {
                setting: env[setting.name] for setting in (PREFECT_API_URL, PREFECT_API_AUTH_STRING, PREFECT_HOME)
            }
            context.enter_context(temporary_settings(values))
        yield RunningStack(root, env)
