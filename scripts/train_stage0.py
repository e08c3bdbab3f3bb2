"""Train stage 0, encoder_distillation.

`python scripts/train_stage0.py --config configs/muse_tiny/stage0.yaml [key=value ...]`.
"""

import sys

from muse import cli
from muse.training.main import stage_main


@cli.entry
def main(argv=None) -> int:
    return stage_main("encoder_distillation", argv)


if __name__ == "__main__":
    sys.exit(main())
