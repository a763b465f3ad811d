"""Write the log file of each run, `.pedigree/logs/runs/<run-id>.log`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from components.core.errors import known
from components.core.layout import Layout

LOGGERS = ("components", "flows", "infra", "prefect.flow_runs", "prefect.task_runs")


@contextmanager
def log_file(checkout: Path, run_id: str) -> Iterator[Path]:
    """Write log records inside the block to the run's file, with times."""
    path = Layout(checkout).state / "logs" / "runs" / f"{run_id}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    for name in LOGGERS:
        logging.getLogger(name).addHandler(handler)
    try:
        yield path
    except Exception as error:
        if known(error) is None:  # the flow logs it only after this block
            raised = (type(error), error, error.__traceback__)
            handler.handle(logging.LogRecord(__name__, logging.ERROR, __file__, 0, "the run failed", None, raised))
        raise
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(handler)
        handler.close()
