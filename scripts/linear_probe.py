"""Linear probe: BatchNorm and a linear layer on frozen, grid-averaged features; accuracies into
OUTPUT_DIR/metrics.json.
"""

import sys

from muse import cli


@cli.entry
def main(argv=None) -> int:
    from muse.evaluation import command, frozen_features
    from muse.evaluation.linear_probe import LEARNING_RATES

    parser = cli.parser(__doc__)
    frozen_features.add_flags(parser, "semantic")
    command.add_flags(parser, "outputs/linear_probe", train=True)
    parser.add_argument(
        "--num_classes",
        "--num-classes",
        type=int,
        default=None,
        help="default: the largest training label + 1",
    )
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument(
        "--probe_batch_size",
        "--probe-batch-size",
        type=int,
        default=None,
        help="default: sixteen batches an epoch, of 64 to 1024",
    )
    parser.add_argument(
        "--learning_rates",
        "--learning-rates",
        type=float,
        nargs="+",
        default=list(LEARNING_RATES),
        help="for a batch of 256; all are trained at once",
    )
    args = cli.parse(parser, argv)
    cfg = cli.load_cfg(args)
    from muse.evaluation.linear_probe import run_linear_probe

    measured = run_linear_probe(args, cfg)
    if measured is not None:
        result, facts = measured
        name = facts["network"]["feature"]
        print(
            f"linear probe of {name} features, {result.classes} classes, {result.val_samples} pictures"
        )
        print(f"{'':>14} {'micro':>8} {'macro':>8}")
        for name, score in (
            ("last epoch", result.last),
            ("best epoch", result.best),
            ("majority", result.majority),
        ):
            print(f"{name:>14} {score.micro:8.4f} {score.macro:8.4f}")
        print(f"{'chance':>14} {result.chance:8.4f} {result.chance:8.4f}")
        print(command.write_metrics(args, cfg, result.as_dict(), **facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
