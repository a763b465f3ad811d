"""`python -m components STAGE [ITEM]`."""

from components.cli import main

if __name__ == "__main__":
    main()
