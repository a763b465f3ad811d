"""Run a stage: `python -m components STAGE [ITEM]`."""

from components.core import torch_environment

if __name__ == "__main__":
    torch_environment.prepare()
    from components.cli import main

    main()
