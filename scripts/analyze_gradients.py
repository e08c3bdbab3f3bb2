"""Do the objectives fight? Trains MUSE and a baseline of shared weights side by side from one start, and takes the gradient of each
objective alone as they go: gradients.jsonl and the four panels of the paper's Fig. 3.

With --runs it reads runs that were trained with experiment.log_grad_every instead: --runs muse=DIR,DIR,DIR baseline=DIR,DIR (the
stages of one training in order; repeat an arm for another seed).
"""

import sys

from muse import cli
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
        help="where both start; the baseline takes its encoder where the routings differ. "
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
        help="weights stay: the gradients of a finished model, batch after batch",
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

    from muse.experiments.gradient_study import compare, read_runs, write

    output = writable_directory(args.output_dir)
    cli.choose_training_device(args.device)
    arms = read_runs(args.runs) if args.runs else compare(args, output)
    flags = {
        name: getattr(args, name)
        for name in ("config", "checkpoint", "steps", "every", "frozen", "runs", "overrides")
    }
    for line in write(arms, output, flags):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
