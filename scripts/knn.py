"""k nearest neighbours on frozen features, by cosine: exact, without training.

The accuracies of every k go to OUTPUT_DIR/metrics.json.
"""

import argparse
import sys
from dataclasses import replace

from muse import cli
from muse.evaluation import command
from muse.evaluation.feature_probe import run_knn
from muse.evaluation.token_columns import POOLS


def numbers(text: str) -> list[int]:
    """10,20 -> [10, 20]"""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers joined by commas") from None


@cli.entry
def main(argv=None) -> int:
    parser = cli.parser(__doc__)
    command.add_feature_flags(parser, "semantic")
    command.add_data_flags(parser, "outputs/knn", train=True)
    command.add_protocol_flags(parser, "knn")
    flag = command.add_flag
    flag(parser, "k", type=numbers, help="neighbours, joined by commas; default: the protocol's")
    flag(parser, "temperature", type=float, help="of the votes; default: the protocol's")
    flag(parser, "pool", choices=POOLS, help="of an encoder's tokens; default: the protocol's")
    flag(parser, "last_blocks", type=int, help="put together; default: the protocol's")
    flag(parser, "num_classes", type=int, help="default: the largest training label + 1")
    args = cli.parse(parser, argv)
    setup = command.set_up(args, cli.load_cfg(args))
    recipe = setup.protocol.recipe
    if args.temperature is not None:
        recipe = replace(recipe, temperature=args.temperature)
    pooling, last_blocks = ([one] if one else None for one in (args.pool, args.last_blocks))
    options = args.num_classes, pooling, last_blocks, args.k
    measured = run_knn(setup, recipe, args.feature, args.baseline, *options)
    if measured is not None:
        path = command.write_metrics(setup, measured)
        values, name = measured.values, measured.facts["network"]["feature"]
        print(
            f"k nearest neighbours of {name} features, {values['classes']} classes, "
            f"{values['val_samples']} pictures"
        )
        print(f"{'k':>10} {'top-1':>8} {'top-5':>8} {'macro':>8}")
        for k, score in values["by_k"].items():
            print(f"{k:>10} {score['top1']:8.4f} {score['top5']:8.4f} {score['top1_macro']:8.4f}")
        print(f"{'majority':>10} {values['majority']['micro']:8.4f}")
        print(f"{'chance':>10} {values['chance']:8.4f}")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
