"""What the packaged encoder has never seen: a validation part may show nothing else as unseen."""

import json
from pathlib import Path

from muse.errors import DataError
from muse.utils.weights import PACKAGED

UNSEEN_PARTS = ("val", "drawn")  # of which objects and photographs are to be unseen
GRADIENT = "gradient"  # in place of a photograph


def read_kept_out() -> dict[str, set[str]]:
    """`object` and `photograph` -> names that no training picture of `muse_tiny` shows."""
    found: dict[str, set[str]] = {"object": set(), "photograph": set()}
    for line in (PACKAGED / "muse_tiny" / "kept_out.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            what, _, name = line.partition(" ")
            found[what].add(name)
    return found


def check_kept_out(data: Path) -> None:
    """Check a folder of demo data against what `muse_tiny` was trained on.

    Raises:
        DataError: its validation parts show as unseen what the packaged encoder may have seen.
    """
    known = read_kept_out()
    for line in (data / "index.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["split"] not in UNSEEN_PARTS:
            continue
        ground = record["background"]
        for what, name in (("object", record["object"]), ("photograph", ground)):
            if name not in known[what] and name != GRADIENT:
                raise DataError(
                    f"{data}: the {what} {name} of part {record['split']} is not among those that "
                    "the packaged encoder muse_tiny has never seen; use --encoder scratch"
                )
