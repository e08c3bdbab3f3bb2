"""What tokenizers' latents are worth for generation: the same small generator on each of them.

Tokenizers are named by --run NAME=DIR,DIR (one checkpoint a seed) or are rows of an ablation study
(--study DIR --variants paper,shared). Writes comparison.md and comparison.json. After an
interruption the same command goes on.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

from muse import cli
from muse.evaluation.measurement import check_number


def make_parser():
    """The flags."""
    parser = cli.plain_parser(__doc__)
    add = parser.add_argument
    add(
        "--run",
        action="append",
        default=[],
        metavar="NAME=DIR,DIR",
        help="a tokenizer and its checkpoints, one a seed; may be given several times",
    )
    add("--study", help="output directory of tools/ablate.sh")
    add("--variants", default="paper,release,shared", help="rows of --study")
    add("--data", help="directory with your own train-*.tar, val-*.tar and classes.txt")
    add("--kind", choices=("stamps", "shapes"), default="stamps", help="demo pictures to make")
    add("--steps", type=int, help="of training, for each tokenizer; default: as the demo's")
    add("--samples", type=int, help="pictures that are measured; default: as the demo's")
    add("--seed", type=int, help="of an arm's first generator and its noise")
    add("--output", default="outputs/tokenizers", help="directory of the comparison")
    add("overrides", nargs="*", metavar="key=value", help="of the generator's configuration")
    return parser


@cli.entry
def main(argv=None) -> int:
    args = cli.parse(make_parser(), argv)
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    for flag, least in (("steps", 1), ("samples", 2), ("seed", 0)):
        check_number(flag, getattr(args, flag), least)

    # heavy, and --help is quick
    from muse.experiments import tokenizer_comparison as comparison  # noqa: PLC0415
    from muse.experiments.demo_generation import GENERATION_PLANS  # noqa: PLC0415

    given = {flag: getattr(args, flag) for flag in ("steps", "samples", "seed")}
    given = {flag: value for flag, value in given.items() if value is not None}
    plan = replace(GENERATION_PLANS["default"], **given)
    arms = comparison.read_tokenizer_arms(args.run, args.study, args.variants.split(","))
    data = Path(args.data) if args.data else None
    results = comparison.compare_tokenizers(
        Path(args.output), plan, arms, data, args.kind, args.overrides
    )
    print(comparison.comparison_table(results), end="")
    print(f"written to {args.output}/comparison.md and {args.output}/comparison.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
