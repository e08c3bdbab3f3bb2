#!/usr/bin/env python3
"""Make shards of demo data: pictures with captions (stamps, shapes), edits or questions."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from muse import cli
from muse.experiments.demo_data import make_demo_data  # noqa: E402


@cli.entry
def main(argv: list[str] | None = None) -> int:
    """Parse, make or reuse the data, print its card."""
    parser = cli.plain_parser(__doc__)
    parser.add_argument(
        "--kind",
        default="stamps",
        help="stamps (photo-like), everything (drawings too), shapes (drawn), edits or questions",
    )
    parser.add_argument(
        "--output", required=True, help="folder for the shards; reused when it holds the same data"
    )
    parser.add_argument(
        "--images",
        type=int,
        help="training pictures; without it 3000, 512 for shapes, 24000 for everything",
    )
    parser.add_argument(
        "--val-images",
        type=int,
        help="validation pictures; without it 240, images / 8 for shapes",
    )
    parser.add_argument("--size", type=int, default=128, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    parser.add_argument(
        "--objects",
        help="photo (when not given); all: stamps also of cartoons and other objects; drawn: edits "
        "and questions of drawn shapes, without any download",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace demo data made with other arguments"
    )
    parser.add_argument("--workers", type=int, help="processes; without it one per core")
    args = parser.parse_args(argv)
    make_demo_data(**vars(args))
    print((Path(args.output).expanduser() / "datacard.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
