"""`python -m seqloom`: see `seqloom.cli`."""

from seqloom.cli import main
from seqloom.entry import run

if __name__ == "__main__":
    run(main)
