"""Which checkpoints a run directory holds."""

import re
from pathlib import Path

NAME = re.compile(r"^checkpoint-(\d+)$")


def checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint, oldest first; one still being written has another name."""
    found = [
        (int(match[1]), path)
        for path in Path(output_dir).glob("checkpoint-*")
        if (match := NAME.match(path.name))
    ]
    return sorted(found)


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint, or None."""
    found = checkpoints(output_dir)
    return found[-1][1] if found else None
