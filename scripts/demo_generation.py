"""Generate pictures in the tokenizer's latent space on a CPU: latents, generators, one table."""

import os
import sys
from dataclasses import replace
from pathlib import Path

from muse import cli
from muse.errors import ConfigError
from muse.evaluation.measurement import check_number


def make_parser():
    """The flags."""
    parser = cli.plain_parser(__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--fast", action="store_true", help="a minute: shows that it runs")
    size.add_argument("--full", action="store_true", help="hours; goes on where it was stopped")
    add = parser.add_argument
    add("--tokenizer", help="checkpoint of MUSE; default: muse_tiny, else that of tools/demo.sh")
    add("--data", help="directory with your own train-*.tar, val-*.tar and classes.txt")
    add("--kind", choices=("stamps", "shapes"), default="stamps", help="demo pictures to make")
    add("--spaces", default="muse,untrained,pixels", help="latent spaces to compare")
    add("--steps", type=int, help="of training, for each latent space")
    add("--samples", type=int, help="pictures of every row of the table")
    add("--seed", type=int, help="of the generators and of all noise")
    add("--output", help="default: outputs/demo-generation, with -fast or -full behind it")
    add("overrides", nargs="*", metavar="key=value", help="of the generator's configuration")
    return parser


@cli.entry
def main(argv=None) -> int:
    args = cli.parse(make_parser(), argv)
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    name = "fast" if args.fast else "full" if args.full else "default"
    suffix = "" if name == "default" else f"-{name}"
    output = Path(args.output or f"outputs/demo-generation{suffix}")
    for flag, least in (("steps", 1), ("samples", 2), ("seed", 0)):
        check_number(flag, getattr(args, flag), least)

    # heavy, and --help is quick
    from muse.experiments import demo_generation, generation_report  # noqa: PLC0415

    spaces = args.spaces.split(",")
    unknown = [space for space in spaces if space not in generation_report.TITLES]
    if unknown or spaces[0] != "muse":
        known = ", ".join(generation_report.TITLES)
        raise ConfigError(f"--spaces must begin with muse and name some of {known}: {args.spaces}")
    given = {flag: getattr(args, flag) for flag in ("steps", "samples", "seed")}
    given = {flag: value for flag, value in given.items() if value is not None}
    plan = replace(demo_generation.GENERATION_PLANS[name], **given)
    results = demo_generation.run_generation_demo(
        output, plan, args.tokenizer, args.data, args.kind, spaces, args.overrides
    )
    print(generation_report.generation_table(results))
    pictures = ", ".join(str(output / f"{name}.png") for name in ("samples", "guided", "spaces"))
    print(f"{results['seconds']:.0f} s in all; pictures: {pictures}; table: {output / 'table.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
