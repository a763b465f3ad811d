"""Run a stage: `python -m components STAGE [ITEM]`."""

import os

# Threads that wait give their core away. By default they spin, which stops the work of whatever else wants the cores:
# a stage beside this one, loader workers, other ranks. Each stage may so use every core that is free, and the number
# of its threads, hence the rounding of its results, stays what it is alone. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# oneDNN keeps what it built for the last 1,024 shapes. The number of masked patches differs from step to step, so that
# new ones come all the time, and what they leave between activations keeps the heap from being used again. A step of a
# ViT-S needs 79: below that all are built anew in each step.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "96")

from components.cli import main

if __name__ == "__main__":
    main()
