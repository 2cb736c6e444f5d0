"""``python -m fastres``: the command line."""

import sys

from fastres.cli import main

if __name__ == "__main__":
    sys.exit(main())
