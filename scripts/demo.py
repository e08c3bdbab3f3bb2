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
    size.add_argument("--full", action="store_true", help="hours: more steps and pictures")
    parser.add_argument(
        "--encoder",
        choices=("muse_tiny", "scratch"),
        default="muse_tiny",
        help="what stage 1 starts from: the packaged encoder, or one that a stage 0 distils first",
    )
    parser.add_argument(
        "--steps",
        default=None,
        metavar="N,N,N",
        help="steps of each stage, as metrics.json of another run has them, in place of the time",
    )
    parser.add_argument(
        "--data",
        default=None,
        help="directory with your own train-*.tar, val-*.tar and classes.txt",
    )
    parser.add_argument(
        "--kind",
        choices=("everything", "stamps", "shapes"),
        default=None,
        help="demo pictures to make; without it everything, and stamps for --fast",
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

    # Heavy, and --help is quick.
    from muse.experiments import demo, demo_report, demo_tables  # noqa: PLC0415
    from muse.experiments.demo_plan import DEMO_PLANS, SCRATCH_STAGES, STAGES  # noqa: PLC0415

    plan, stages = DEMO_PLANS[name], SCRATCH_STAGES if args.encoder == "scratch" else STAGES
    if args.steps:
        plan = plan.with_steps(args.steps, stages)
    results = demo.run_demo(output, plan, args.data, args.kind, args.overrides, args.encoder)
    print(demo_tables.terminal_table(results))
    print(demo_report.routing_line(results))
    names = ("reconstructions.png", "answers-val.png", "attention.png")
    pictures = ", ".join(str(output / name) for name in names)
    print(
        f"{results['seconds']:.0f} s in all; page: {output / 'report.html'}; pictures: {pictures}; "
        f"numbers: {output / 'metrics.json'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
