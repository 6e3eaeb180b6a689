"""`python -m onehour` and the command `onehour`."""

from __future__ import annotations

import sys

from onehour.cli import main

if __name__ == "__main__":
    sys.exit(main())
