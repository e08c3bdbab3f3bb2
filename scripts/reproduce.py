"""Measures a table of the paper: runs the cells that can be run here, names what is missing.

Each measurement goes to OUTPUT_DIR/NAME; docs/reproduce.md lists all commands.
"""

import json
import sys
from pathlib import Path

from muse import cli
from muse.errors import ConfigError
from muse.experiments.paper_tables import TABLES
from muse.experiments.reproduce import ROOT, page, quoted_numbers, result_lines, run_table
from muse.utils.io import writable_directory, write_json, write_text

RECORD, PAGE = ROOT / "docs/reproduce.json", ROOT / "docs/reproduce.md"


def recorded() -> dict:
    """The numbers that docs/reproduce.md shows."""
    return json.loads(RECORD.read_text()) if RECORD.is_file() else {}


@cli.entry
def main(argv=None) -> int:
    parser = cli.plain_parser(__doc__)
    parser.add_argument("table", nargs="?", help=", ".join(TABLES))
    parser.add_argument("--output_dir", default="outputs/reproduce", help="for the measurements")
    parser.add_argument("--long", action="store_true", help="also what takes hours")
    parser.add_argument("--device", help="of commands of one step: cuda, mps or cpu")
    parser.add_argument(
        "--record", action="store_true", help="keep the numbers for docs/reproduce.md"
    )
    parser.add_argument("--write_page", action="store_true", help="write docs/reproduce.md anew")
    args = cli.parse(parser, argv)
    if args.table is None and not args.write_page:
        raise ConfigError(f"say which table: {', '.join(TABLES)}")
    outcomes = {}
    if args.table is not None:
        flags = ["--device", args.device] if args.device else []
        output = Path(writable_directory(args.output_dir)).resolve()
        outcomes = run_table(args.table, output, args.long, flags)
        print("\n".join(result_lines(args.table, outcomes)))
    if args.record:
        found = {
            name: quoted_numbers(name, outcome.numbers)
            for name, outcome in outcomes.items()
            if outcome.numbers is not None
        }
        write_json(RECORD, recorded() | found)
    if args.write_page or args.record:
        write_text(PAGE, page(recorded()))
        print(PAGE)
    return int(any(outcome.failed for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
