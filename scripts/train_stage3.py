"""Train stage 3, synergistic_tuning.

`python scripts/train_stage3.py --config configs/muse_tiny/stage3.yaml [key=value ...]`.
"""

import sys

from muse import cli
from muse.training.main import stage_main


@cli.entry
def main(argv=None) -> int:
    return stage_main("synergistic_tuning", argv)


if __name__ == "__main__":
    sys.exit(main())
