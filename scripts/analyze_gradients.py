"""Measure whether the objectives conflict: gradients.jsonl and the panels of the paper's Fig. 3.

Trains MUSE and a baseline of shared weights from one start, and logs the gradient of each
objective. With --runs it reads runs that were trained with experiment.log_grad_every: --runs
muse=DIR,DIR,DIR baseline=DIR,DIR (the stages of one training in order; repeat an arm for another
seed).
"""

import sys

from muse import cli
from muse.errors import ConfigError
from muse.utils.io import writable_directory


@cli.entry
def main(argv=None) -> int:
    parser = cli.plain_parser(__doc__)
    parser.add_argument(
        "--config", default=None, help="configuration with the objectives that are to be compared"
    )
    parser.add_argument(
        "--checkpoint",
        default=None,
        help="where both start; of another routing the baseline takes the encoder alone. "
        "Default: the configuration's own start",
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        help="gets gradients.jsonl, gradients.png, metrics.json and the runs",
    )
    parser.add_argument("--steps", type=int, default=60, help="training steps of each arm")
    parser.add_argument("--every", type=int, default=2, help="steps between two measurements")
    parser.add_argument(
        "--frozen",
        action="store_true",
        help="keep the weights: the gradients of a finished model, batch after batch",
    )
    parser.add_argument(
        "--runs",
        nargs="+",
        default=(),
        metavar="ARM=DIR,...",
        help="read these runs; nothing is trained",
    )
    parser.add_argument(
        "--device", default=None, help="cuda, mps or cpu; the first that exists when not given"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="configuration overrides for both arms"
    )
    args = cli.parse(parser, argv)

    # Heavy, and --help is quick.
    from muse.experiments import gradient_study  # noqa: PLC0415

    if not (args.config or args.runs):
        raise ConfigError("--config is needed (or --runs, to read runs that are there)")
    output = writable_directory(args.output_dir)
    cli.choose_training_device(args.device)
    names = ("config", "checkpoint", "steps", "every", "frozen", "overrides")
    flags = {name: getattr(args, name) for name in names}
    if args.runs:
        arms = gradient_study.read_arms(args.runs)
    else:
        arms = gradient_study.train_arms(gradient_study.Comparison(**flags), output)
    for line in gradient_study.write_study(arms, output, {**flags, "runs": args.runs}):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
