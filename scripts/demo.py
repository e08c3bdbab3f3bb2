"""Make pictures, train the three stages on a CPU, measure, draw, report."""

import os
import sys
from pathlib import Path

from muse import cli


@cli.entry
def main(argv=None) -> int:
    parser = cli.plain_parser(__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--fast", action="store_true", help="two minutes: shows that it runs, not what it can do"
    )
    size.add_argument("--full", action="store_true", help="hours: many more steps and pictures")
    parser.add_argument(
        "--data",
        default=None,
        help="directory with your own train-*.tar, val-*.tar and classes.txt",
    )
    parser.add_argument(
        "--kind", choices=("stamps", "shapes"), default="stamps", help="demo pictures to make"
    )
    parser.add_argument(
        "--output",
        default=None,
        help="default: outputs/demo, outputs/demo-fast or outputs/demo-full",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="configuration overrides for every stage"
    )
    args = cli.parse(parser, argv)
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    name = "fast" if args.fast else "full" if args.full else "default"
    output = Path(args.output or f"outputs/demo{'' if name == 'default' else '-' + name}")

    from muse.experiments import demo, demo_report  # noqa: PLC0415 - heavy, and --help is quick

    results = demo.run_demo(output, demo.DEMO_PLANS[name], args.data, args.kind, args.overrides)
    print(demo_report.terminal_table(results))
    print(demo_report.routing_line(results))
    pictures = f"{output / 'reconstructions.png'}, {output / 'attention.png'}"
    print(
        f"{results['seconds']:.0f} s in all; page: {output / 'report.html'}; pictures: {pictures}; "
        f"numbers: {output / 'metrics.json'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
