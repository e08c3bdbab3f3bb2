"""The command line of the training scripts."""

import logging
from collections.abc import Sequence

from muse import cli
from muse.errors import ConfigError

log = logging.getLogger(__name__)


def stage_main(stage: str | None, argv: Sequence[str] | None) -> int:
    """Parse, check that the configuration is of this stage, train.

    stage: the only one that the script trains; None: whichever the configuration names.
    """
    named = stage or "the one that the configuration names"
    parser = cli.parser(f"Train one stage of MUSE ({named}).", recipe=True)
    cli.refuse(parser, cli.ONE_PROCESS, *cli.LAUNCHER_FLAGS)
    cli.refuse(
        parser, "training counts optimizer steps; use training.max_train_steps=N", "--epochs"
    )
    cli.refuse(parser, "use optimizer.params.learning_rate=X", "--lr")
    args = cli.parse(parser, argv)
    cfg = cli.load_cfg(args)
    if stage is not None and cfg.training.stage != stage:
        raise ConfigError(
            f"{args.config} has training.stage={cfg.training.stage}, this script trains {stage}"
        )
    cli.choose_training_device(args.device)
    # torch and accelerate take seconds, which --help and a mistake need not wait for
    from muse.data.dataloader import build_train_loader  # noqa: PLC0415
    from muse.training.tokenizer_task import train  # noqa: PLC0415

    build_train_loader(cfg)  # names an unset MUSE_DATA or missing shards before networks load
    log.info("weights for `from_pretrained` and the next stage: %s", train(cfg))
    return 0
