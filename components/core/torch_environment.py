"""Environment variables that torch reads once, when it is imported; imports nothing."""

import os


def prepare() -> None:
    """Set what is not set; to be called by each program before torch is imported.

    Threads that wait give their core away. By default they spin, which stops the work of whatever else wants the cores:
    a stage beside this one, loader workers, other ranks. Each program may so use every core that is free, and the
    number of its threads, hence the rounding of its results, stays what it is alone.

    oneDNN keeps what it built for the last 1,024 shapes. The number of masked patches differs from step to step, so
    that new ones come all the time, and what they leave between activations keeps the heap from being used again. A
    step of a ViT-S needs 79: below that all are built anew in each step.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "96")
