"""Linear probe: BatchNorm and a linear layer on frozen, grid-averaged features.

The accuracies go to OUTPUT_DIR/metrics.json.
"""

import sys

from muse import cli
from muse.evaluation import command
from muse.evaluation.linear_probe import LEARNING_RATES, ProbeRecipe, run_linear_probe


@cli.entry
def main(argv=None) -> int:
    parser = cli.parser(__doc__)
    command.add_feature_flags(parser, "semantic")
    command.add_data_flags(parser, "outputs/linear_probe", train=True)
    command.add_flag(
        parser, "num_classes", type=int, help="default: the largest training label + 1"
    )
    command.add_flag(parser, "epochs", "lp_epochs", type=int, default=100)
    command.add_flag(
        parser,
        "probe_batch_size",
        type=int,
        help="default: sixteen batches an epoch, of 64 to 1024",
    )
    command.add_flag(
        parser,
        *("learning_rates", "lp_lr", "lr"),
        type=float,
        nargs="+",
        default=list(LEARNING_RATES),
        help="for a batch of 256; all are trained at once",
    )
    cli.refuse(parser, "zero-shot is scripts/zero_shot.py; this is the linear probe", "--mode")
    args = cli.parse(parser, argv)
    recipe = ProbeRecipe(
        args.num_classes, args.epochs, args.probe_batch_size, tuple(args.learning_rates)
    )
    setup = command.set_up(args, cli.load_cfg(args))
    measured = run_linear_probe(setup, recipe, args.feature, args.baseline)
    if measured is not None:
        path = command.write_metrics(setup, measured)
        values, name = measured.values, measured.facts["network"]["feature"]
        print(
            f"linear probe of {name} features, {values['classes']} classes, "
            f"{values['val_samples']} pictures"
        )
        print(f"{'':>14} {'micro':>8} {'macro':>8}")
        for name, key in (("last epoch", "last"), ("best epoch", "best"), ("majority", "majority")):
            print(f"{name:>14} {values[key]['micro']:8.4f} {values[key]['macro']:8.4f}")
        print(f"{'chance':>14} {values['chance']:8.4f} {values['chance']:8.4f}")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
