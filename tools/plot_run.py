#!/usr/bin/env python3
"""Draw the curves of one or more runs from their metrics.jsonl, stages one after another."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from muse import cli
from muse.errors import ConfigError  # noqa: E402
from muse.utils.curves import draw_curves, read_run  # noqa: E402

ENDINGS = (".png", ".svg", ".pdf", ".jpg")


@cli.entry
def main(argv: list[str] | None = None) -> int:
    """Parse, read, draw, say where the picture is."""
    parser = cli.plain_parser(__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="OUTPUT_DIR",
        help="output directories of runs, or metrics.jsonl files, in order",
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help=f"the picture: {', '.join(ENDINGS)}"
    )
    parser.add_argument(
        "--names",
        nargs="+",
        metavar="NAME",
        help="numbers to draw, such as topology or grad_norm; without it the losses",
    )
    parser.add_argument(
        "--together", action="store_true", help="let all runs begin at step 0, to compare them"
    )
    args = cli.parse(parser, argv)
    if Path(args.output).suffix not in ENDINGS:
        raise ConfigError(
            f"--output {args.output}: expected a file that ends in {', '.join(ENDINGS)}"
        )
    path = draw_curves(
        [read_run(run) for run in args.runs],
        args.output,
        args.names,
        one_after_another=not args.together,
    )
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
