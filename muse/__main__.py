"""`python -m muse` is the command `muse`."""

import sys

from muse.command_line import main

if __name__ == "__main__":
    sys.exit(main())
