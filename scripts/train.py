"""Train the stage that the configuration names in `training.stage`.

`python scripts/train.py --config configs/muse_tiny/stage1.yaml [key=value ...]`.
"""

import sys

from muse import cli
from muse.training.main import stage_main


@cli.entry
def main(argv=None) -> int:
    return stage_main(None, argv)


if __name__ == "__main__":
    sys.exit(main())
