"""The ablations of the paper on the demo's data: trains and measures each variant, seed by seed.

Writes ablation.md and ablation.json. After an interruption the same command goes on.
"""

import os
import sys
from pathlib import Path

from muse import cli
from muse.errors import ConfigError
from muse.utils.io import writable_directory

SIZES = ("fast", "short", "full")


def flags():
    """The parser of this command."""
    parser = cli.plain_parser(__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--fast",
        action="store_true",
        help="minutes: shows that it runs, says nothing about the method",
    )
    size.add_argument("--short", action="store_true", help="a third of the steps")
    size.add_argument("--full", action="store_true", help="for a GPU: many more steps and pictures")
    parser.add_argument(
        "--variants",
        default="claims",
        help="names, separated by commas, or a set: claims (those that carry the paper's claims; "
        "the default), teachers (of structure), all",
    )
    parser.add_argument(
        "--encoder",
        choices=("muse_tiny", "distilled"),
        default="muse_tiny",
        help="what all variants start from: the packaged encoder, or one that the study distils",
    )
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
    return parser


@cli.entry
def main(argv=None) -> int:
    args = cli.parse(flags(), argv)

    # Heavy, and --help is quick.
    from muse.experiments.ablation import SETS, STUDY_PLANS, VARIANTS, Study  # noqa: PLC0415
    from muse.experiments.ablation_study import markdown, run_study  # noqa: PLC0415
    from muse.experiments.demo import demo_data  # noqa: PLC0415

    if args.seeds < 1 or (args.jobs is not None and args.jobs < 1):
        raise ConfigError("--seeds and --jobs must be 1 or more")
    variants = SETS.get(args.variants) or args.variants.split(",")
    if unknown := [name for name in variants if name not in VARIANTS]:
        known = ", ".join([*SETS, *VARIANTS])
        raise ConfigError(f"--variants: {', '.join(unknown)}: there are {known}")
    plan = STUDY_PLANS[next((name for name in SIZES if getattr(args, name)), "default")]
    output = writable_directory(args.output)
    on_cpu = cli.device(None) == "cpu"
    if on_cpu:
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    data = Path(args.data) if args.data else demo_data(output, plan.images, args.kind)[0]
    if not list(data.glob("train-*.tar")) or not (data / "classes.txt").is_file():
        raise ConfigError(f"--data {data}: needs train-*.tar, val-*.tar and classes.txt")
    jobs = args.jobs or (os.cpu_count() or 1 if on_cpu else 1)
    pretrained = None if args.encoder == "distilled" else args.encoder
    study = Study(output, data, plan, tuple(args.overrides), pretrained)
    results = run_study(study, variants, range(args.seeds), jobs)
    print(markdown(results))
    print(f"written to {output / 'ablation.md'} and {output / 'ablation.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
