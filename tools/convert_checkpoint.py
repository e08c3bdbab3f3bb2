#!/usr/bin/env python3
"""`scripts/convert.py` under its first name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.convert import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
