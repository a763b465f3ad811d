"""`torchrun` that exits with the code of the failed rank, so that a supervisor can distinguish 75 from a failure.

torchrun itself always exits with 1. The usage is torchrun's: `python -m components.training.torchrun --nnodes=2
--nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT -m components pretrain`. Ranks print their own errors.
"""

from __future__ import annotations

import signal
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from components.training.parallelize import EXIT_INTERRUPTED, SAVE_SECONDS


def main() -> None:
    """Start this machine's ranks and wait; after SIGTERM they have SAVE_SECONDS unless an option overrides it."""
    given = parse_args(None)
    if given.shutdown_timeout is None:  # torch's 30 seconds are often too short for a checkpoint
        given.shutdown_timeout = SAVE_SECONDS
    try:
        run(given)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as error:
        sys.exit(EXIT_INTERRUPTED if error.sigval == signal.SIGTERM else 128 + error.sigval)


if __name__ == "__main__":
    main()
