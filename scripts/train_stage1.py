"""Train stage 1, topology_warmup.

`python scripts/train_stage1.py --config configs/muse_tiny/stage1.yaml [key=value ...]`.
"""

import sys

from muse import cli
from muse.training.main import stage_main


@cli.entry
def main(argv=None) -> int:
    return stage_main("topology_warmup", argv)


if __name__ == "__main__":
    sys.exit(main())
