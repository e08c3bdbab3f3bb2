"""Linear probe: linear layers on frozen features, trained as a named recipe says.

The accuracies go to OUTPUT_DIR/metrics.json.
"""

import sys

from muse import cli
from muse.evaluation import command
from muse.evaluation.feature_probe import probe_recipe, run_linear_probe
from muse.evaluation.linear_probe import NATIVE_PROBE
from muse.evaluation.token_columns import POOLS


def parser():
    made = cli.parser(__doc__)
    command.add_feature_flags(made, "semantic")
    command.add_data_flags(made, "outputs/linear_probe", train=True)
    command.add_protocol_flags(made, "linear_probe")
    flag = command.add_flag
    # not `recipe`: that is the configuration's, of commands that train a model
    help_recipe = "native, release, mae or dinov2; default: the protocol's"
    flag(made, "recipe", dest="probe_recipe", metavar="NAME", help=help_recipe)
    flag(made, "pool", nargs="+", choices=POOLS, help="of an encoder's tokens; default: recipe's")
    flag(made, "last_blocks", type=int, nargs="+", help="put together; default: the recipe's")
    flag(
        made,
        "augment",
        choices=("yes", "no"),
        help="yes: pictures cut anew for each batch; no: features stored; default: the recipe's",
    )
    flag(made, "num_classes", type=int, help="default: the largest training label + 1")
    flag(made, "epochs", "lp_epochs", type=int, help="default: the recipe's")
    flag(made, "epoch_steps", type=int, help="default: the recipe's, or the whole training set")
    flag(
        made,
        "probe_batch_size",
        type=int,
        help="default: the recipe's, or sixteen batches an epoch, of 64 to 1024",
    )
    flag(
        made,
        *("learning_rates", "lp_lr", "lr"),
        type=float,
        nargs="+",
        help="for a batch of 256 (release: as they are); all are trained at once",
    )
    flag(made, "trial_epochs", type=int, help="of a first run of all rates; 0: none")
    flag(made, "trial_keep", type=int, help="rates that go on after it")
    cli.refuse(made, "zero-shot is scripts/zero_shot.py; this is the linear probe", "--mode")
    return made


@cli.entry
def main(argv=None) -> int:
    args = cli.parse(parser(), argv)
    setup = command.set_up(args, cli.load_cfg(args))
    recipe = probe_recipe(
        setup.protocol.recipe if setup.protocol else NATIVE_PROBE,
        args.probe_recipe,
        args.augment,
        learning_rates=args.learning_rates and tuple(args.learning_rates),
        epochs=args.epochs,
        epoch_steps=args.epoch_steps,
        batch_size=args.probe_batch_size,
        trial_epochs=args.trial_epochs,
        trial_keep=args.trial_keep,
    )
    options = args.num_classes, args.pool, args.last_blocks
    measured = run_linear_probe(setup, recipe, args.feature, args.baseline, *options)
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
