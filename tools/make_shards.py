#!/usr/bin/env python3
"""Make tar shards for training and evaluation out of folders, tars and tables of pictures."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from muse import cli  # noqa: E402
from muse.data.shard_builders import (  # noqa: E402
    ADE20K_SPLITS,
    BUILDERS,
    BuildOptions,
    list_samples,
)
from muse.data.shard_writer import WritePlan, write_shards_of  # noqa: E402

COLUMNS = ("image", "caption", "input", "output", "instruction")


@cli.entry
def main(argv: list[str] | None = None) -> int:
    """Parse, list the samples, write the shards, say what was left out."""
    parser = cli.plain_parser(__doc__)
    parser.add_argument("kind", help=f"what the input is: {', '.join(BUILDERS)}")
    parser.add_argument(
        "--input", required=True, help="folder, ImageNet's tar, table (.csv .tsv .jsonl .parquet)"
    )
    parser.add_argument("--output", required=True, help="folder for the shards")
    parser.add_argument("--name", default="train", help="shards are NAME-000000.tar and so on")
    parser.add_argument("--root", help="where a table's pictures lie; without it beside the table")
    for role in COLUMNS:
        parser.add_argument(f"--{role}_column", default=role, help="of a table")
    parser.add_argument("--split", default=ADE20K_SPLITS[0], help="of ADE20K, or validation")
    parser.add_argument("--per_shard", type=int, default=1000, help="samples of a shard")
    parser.add_argument("--workers", type=int, help="processes; without it one per core")
    parser.add_argument("--seed", type=int, default=0, help="of the order of samples")
    parser.add_argument("--keep_order", action="store_true", help="the order of the input")
    parser.add_argument("--max_side", type=int, help="pixels; larger pictures are made smaller")
    parser.add_argument("--verify", action="store_true", help="decode every picture before copying")
    parser.add_argument("--resume", action="store_true", help="keep shards that are there already")
    parser.add_argument(
        "--max_bad_fraction", type=float, default=0.01, help="of the samples may be left out"
    )
    args = parser.parse_args(argv)
    columns = {role: getattr(args, f"{role}_column") for role in COLUMNS}
    plan = WritePlan(
        output=Path(args.output).expanduser(),
        name=args.name,
        per_shard=args.per_shard,
        workers=os.cpu_count() or 1 if args.workers is None else args.workers,
        seed=None if args.keep_order else args.seed,
        max_side=args.max_side,
        verify=args.verify,
        resume=args.resume,
        max_bad_fraction=args.max_bad_fraction,
    )
    source = str(Path(args.input).expanduser())
    items = list_samples(args.kind, source, BuildOptions(args.root, columns, args.split))
    bad = write_shards_of(items, plan)
    print(f"{plan.output}: {bad.summary()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
