"""Time the evaluator beside plain reference implementations of the slow way, in one run, and print the ratios."""

import sys

from muse import cli
from muse.utils.io import write_json


@cli.entry
def main(argv=None) -> int:
    parser = cli.plain_parser(__doc__)
    parser.add_argument("--parts", default="evaluator,frechet,miou", help="comma-separated")
    parser.add_argument(
        "--dim", type=int, default=2048, help="feature width of evaluator and frechet"
    )
    parser.add_argument(
        "--images", type=int, default=128, help="image pairs of 224x224 for evaluator"
    )
    parser.add_argument(
        "--masks", type=int, default=4, help="512x512 masks of 150 classes for miou"
    )
    parser.add_argument(
        "--output", default=None, help="also write the figures as JSON to this file"
    )
    args = cli.parse(parser, argv)
    from muse.evaluation.benchmark import run

    rows = run([part.strip() for part in args.parts.split(",")], args.dim, args.images, args.masks)
    print(f"{'part':<12}{'ours':>12}{'slow way':>12}{'ratio':>9}{'wanted at most':>18}")
    for name, row in rows.items():
        times = "".join(f"{row[way]:>10.2f}{row['unit']:>2}" for way in ("ours", "slow"))
        print(
            f"{name:<12}{times}{row['slow'] / row['ours']:>8.1f}x{row['goal']:>16.2f}{row['unit']:>2}"
        )
        for way, value in row.get("also", {}).items():
            print(
                f"{'':<12}{'':>12}{value:>10.2f}{row['unit']:>2}{value / row['ours']:>8.1f}x  {way}"
            )
    if args.output:
        write_json(args.output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
