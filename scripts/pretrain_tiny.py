"""Make the packaged model `muse_tiny`: pictures, distilled encoder, three stages, export."""

import os
import sys
from pathlib import Path

from muse import cli


@cli.entry
def main(argv=None) -> int:
    parser = cli.plain_parser(__doc__)
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="factor on the steps of all stages; 1 is the packaged model, 4 a night",
    )
    parser.add_argument("--images", type=int, default=None, help="training pictures made")
    parser.add_argument("--val-images", type=int, default=None, help="pictures of each other part")
    parser.add_argument("--probe-images", type=int, default=None, help="pictures for the probes")
    parser.add_argument(
        "--processes", type=int, default=None, help="training processes of one thread each"
    )
    parser.add_argument(
        "--data", type=Path, default=None, help="folder of `make_demo_data.py --kind everything`"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/pretrain_tiny"))
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="configuration overrides for every stage"
    )
    args = cli.parse(parser, argv)
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    # Loads torch and transformers, which `--help` does not need.
    from muse.experiments.pretrain_tiny import (  # noqa: PLC0415
        PretrainPlan,
        pretrain,
        summary_line,
    )

    given = {
        name: value
        for name in ("images", "val_images", "probe_images", "scale", "processes")
        if (value := getattr(args, name)) is not None
    }
    results = pretrain(args.output, PretrainPlan(**given), args.data, args.overrides)
    for split in results["splits"].values():
        print(f"{split['title']}: {summary_line(split['measured'])}")
    print(f"model: {args.output / 'package'}; numbers: {args.output / 'metrics.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
