"""The ablations of the paper on the demo's data: trains every variant with several seeds, measures, writes ablation.md and ablation.json.

Interrupted, the same command goes on where it was.
"""

import os
import sys
from pathlib import Path

from muse import cli
from muse.utils.io import writable_directory


@cli.entry
def main(argv=None) -> int:
    parser = cli.plain_parser(__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--fast",
        action="store_true",
        help="minutes, for tests: shows that it runs, says nothing about the method",
    )
    size.add_argument("--full", action="store_true", help="for a GPU: many more steps and pictures")
    parser.add_argument("--variants", default=None, help="names, separated by commas; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0")
    parser.add_argument(
        "--jobs",
        type=int,
        default=None,
        help="processes at once; default: one a core, one where there is a GPU",
    )
    parser.add_argument(
        "--data",
        default=None,
        help="directory with your own train-*.tar, val-*.tar and classes.txt",
    )
    parser.add_argument(
        "--kind", choices=("stamps", "shapes"), default="stamps", help="demo pictures to make"
    )
    parser.add_argument("--output", default="outputs/ablation", help="directory of the study")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="configuration overrides for every run"
    )
    args = cli.parse(parser, argv)

    from muse.errors import ConfigError
    from muse.experiments.ablation import PLANS, VARIANTS, Study
    from muse.experiments.ablation_study import markdown, run_study
    from muse.experiments.demo import demo_data

    if args.seeds < 1 or (args.jobs is not None and args.jobs < 1):
        raise ConfigError("--seeds and --jobs must be 1 or more")
    variants = args.variants.split(",") if args.variants else list(VARIANTS)
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise ConfigError(f"--variants: {', '.join(unknown)}: there are {', '.join(VARIANTS)}")
    plan = PLANS["fast" if args.fast else "full" if args.full else "default"]
    output = writable_directory(args.output)
    on_cpu = cli.device(None) == "cpu"
    if on_cpu:
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    data = Path(args.data) if args.data else demo_data(output, plan, args.kind)[0]
    if not list(data.glob("train-*.tar")) or not (data / "classes.txt").is_file():
        raise ConfigError(f"--data {data}: needs train-*.tar, val-*.tar and classes.txt")
    jobs = args.jobs or (os.cpu_count() or 1 if on_cpu else 1)
    results = run_study(
        Study(output, data, plan, tuple(args.overrides)), variants, range(args.seeds), jobs
    )
    print(markdown(results))
    print(f"written to {output / 'ablation.md'} and {output / 'ablation.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
