"""Train one stage of the multimodal model.

`python scripts/train_umm.py --config configs/umm_1b/stage1.yaml [key=value ...]`.
"""

import logging
import sys

from muse import cli
from muse.multimodal.umm_run_config import load_umm_config
from muse.multimodal.umm_task import train_umm

log = logging.getLogger("muse.train_umm")


@cli.entry
def main(argv=None) -> int:
    args = cli.parse(cli.parser(__doc__), argv)
    cfg = load_umm_config(args.config, args.overrides)
    cli.choose_training_device(args.device)
    log.info("the model, for the next stage and text_to_image.py: %s", train_umm(cfg))
    return 0


if __name__ == "__main__":
    sys.exit(main())
