"""Train a generator on the latents that extract_latents.py wrote.

`python scripts/train_generator.py --config configs/generation/tiny.yaml [key=value ...]`.
"""

import logging
import sys

from muse import cli
from muse.generation.generator_config import load_generator_config
from muse.generation.generator_task import train_generator

log = logging.getLogger("muse.train_generator")


@cli.entry
def main(argv=None) -> int:
    args = cli.parse(cli.parser(__doc__), argv)
    cfg = load_generator_config(args.config, args.overrides)
    cli.choose_training_device(args.device)
    log.info("the generator, for generate.py: %s", train_generator(cfg))
    return 0


if __name__ == "__main__":
    sys.exit(main())
