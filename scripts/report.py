"""One self-contained page about training runs and models, for any browser, without a network."""

import os
import sys
from pathlib import Path

from muse import cli


@cli.entry
def main(argv=None) -> int:
    """Parse, gather, write, print the page's path."""
    parser = cli.plain_parser(__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a training run's directory, a save_pretrained directory, or muse_tiny",
    )
    parser.add_argument("--output", default="report.html", help="the page")
    parser.add_argument("--images", type=int, default=6, help="how many pictures are shown")
    parser.add_argument(
        "--data",
        default=None,
        help="pictures to show: a file, a folder, a glob, or shards; default: the run's evaluation "
        "set, else drawn scenes",
    )
    parser.add_argument("--config", default=None, help="in place of the run's own configuration")
    parser.add_argument("--checkpoint", default=None, help="in place of the run's final weights")
    parser.add_argument(
        "--metrics", nargs="+", default=[], metavar="FILE", help="more metrics.json files"
    )
    parser.add_argument(
        "--device", default=None, help="cuda, mps or cpu; the first that exists when not given"
    )
    args = cli.parse(parser, argv)
    # What is not on this machine is left out of the page, and named there.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from muse.experiments.run_report import (  # noqa: PLC0415 - heavy, and --help is quick
        ReportOptions,
        write_run_report,
    )

    options = ReportOptions(
        config=args.config,
        checkpoint=args.checkpoint,
        data=args.data,
        images=args.images,
        metrics=tuple(args.metrics),
        device=cli.device(args.device),
    )
    print(write_run_report(args.runs, Path(args.output), options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
