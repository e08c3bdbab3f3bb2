"""Train stage 2, semantic_injection.

`python scripts/train_stage2.py --config configs/muse_tiny/stage2.yaml [key=value ...]`.
"""

import sys

from muse import cli
from muse.training.main import stage_main


@cli.entry
def main(argv=None) -> int:
    return stage_main("semantic_injection", argv)


if __name__ == "__main__":
    sys.exit(main())
