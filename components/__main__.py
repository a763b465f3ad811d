"""`python -m components STAGE [ITEM]`."""

import os

# Threads that wait give their core away. By default they spin, which stops the work of whatever else wants the cores:
# a stage beside this one, loader workers, other ranks. Each stage may so use every core that is free, and the number
# of its threads, hence the rounding of its results, stays what it is alone. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from components.cli import main

if __name__ == "__main__":
    main()
