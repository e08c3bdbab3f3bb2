#!/usr/bin/env python3
"""Count and check shards, and write the indexes that training and evaluation read.

Exit code 2, with a line for each fault, where something is broken.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from muse import cli  # noqa: E402
from muse.data.shard_checks import check_shards  # noqa: E402
from muse.data.sources import open_source  # noqa: E402
from muse.utils.io import write_json  # noqa: E402


@cli.entry
def main(argv: list[str] | None = None) -> int:
    """Parse, check, print the numbers."""
    parser = cli.plain_parser(__doc__)
    parser.add_argument("urls", help="shard pattern, directory of shards, or image folder")
    parser.add_argument("--decode", action="store_true", help="decode every picture and mask too")
    parser.add_argument("--output", help="JSON file for the numbers, beside printing them")
    args = parser.parse_args(argv)
    found = check_shards(open_source(args.urls), args.decode)
    facts = found.facts()
    if args.output:
        write_json(args.output, facts)
    facts.get("classes", {}).pop("histogram", None)  # a thousand lines, which are in the file
    print(json.dumps(facts, indent=2))
    for line in found.fault_lines():
        print(f"error: {line}", file=sys.stderr)
    return 2 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
