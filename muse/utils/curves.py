"""Curves out of `metrics.jsonl`: numbers of one or more runs over steps, one axis a number."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from muse.errors import DataError
from muse.utils.io import atomic_file

LOSSES = (
    "loss",
    "distillation_cosine",
    "reconstruction",
    "perceptual",
    "topology",
    "itc",
    "generator",
    "discriminator",
)
METRICS = "metrics.jsonl"


class Run(NamedTuple):
    """A run's name in the legend and its records, in the order of their steps."""

    name: str
    records: list[dict[str, Any]]


def read_run(path: str | Path, name: str | None = None) -> Run:
    """The records of an output directory or of a file; `DataError` where there are none.

    A line that is not complete, such as the last one of a killed run, is left out.
    """
    file = Path(path).expanduser()
    file = file / METRICS if file.is_dir() else file
    if not file.is_file():
        raise DataError(f"{file}: no such file; a run writes {METRICS} into its output directory")
    records = []
    for line in file.read_text().splitlines():
        try:
            record = json.loads(line)
            records.append({**record, "step": int(record["step"])})
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            continue
    if not records:
        raise DataError(f"{file}: holds no records")
    return Run(name or file.parent.name, sorted(records, key=lambda record: record["step"]))


def numbers_of(runs: Sequence[Run]) -> list[str]:
    """Losses (known names first) that some run recorded, then PSNR of evaluations on the way."""
    recorded = {name for run in runs for record in run.records for name in record}
    found = [name for name in LOSSES if name in recorded]
    return found + (["eval/psnr"] if "eval" in recorded else [])


def points(run: Run, name: str, offset: int = 0) -> list[tuple[int, float]]:
    """(step + offset, value) of every record with a finite number of this name.

    `a/b` also looks for `b` in an object `a`.
    """
    found = []
    for record in run.records:
        value = record.get(name)
        if value is None and "/" in name:
            inner = record.get(name.partition("/")[0])
            value = inner.get(name.partition("/")[2]) if isinstance(inner, dict) else None
        if isinstance(value, (int, float)) and math.isfinite(value):
            found.append((offset + record["step"], value))
    return found


def draw_curves(
    runs: Sequence[Run],
    path: str | Path,
    names: Sequence[str] | None = None,
    *,
    one_after_another: bool = True,
    columns: int = 5,
) -> Path:
    """Write a picture with one axis a number and one line a run.

    Args:
        runs: in the order of the legend.
        path: the picture.
        names: what is drawn; every loss that was recorded when None.
        one_after_another: a run's steps go on where the run before it ended (stages); else all
            begin at 0 (repetitions).
        columns: axes side by side, at most.

    Raises:
        DataError: none of `names` was recorded.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 (slow, and most commands draw nothing)

    names = list(names or numbers_of(runs))
    if not any(points(run, name) for run in runs for name in names):
        raise DataError(f"no run recorded {', '.join(names) or 'a loss'}")
    lines = -(-len(names) // columns)
    columns = -(-len(names) // lines)  # as even as can be
    figure = Figure(figsize=(2.8 * columns, 3 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    offset = 0
    for index, run in enumerate(runs):
        for name, axis in zip(names, axes):
            if line := points(run, name, offset):
                colour = f"C{index % 10}"  # the same on all axes
                axis.plot(*zip(*line), label=run.name, linewidth=1, color=colour)
        offset += run.records[-1]["step"] if one_after_another else 0
    for name, axis in zip(names, axes):
        _finish(axis, name)
    return save_figure(figure, path)


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a matplotlib figure atomically."""
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=110)
    return Path(path)


def _finish(axis: Any, name: str) -> None:
    axis.set_title(name.replace("_", " "), fontsize=10)
    axis.set_xlabel("optimizer step", fontsize=8)
    axis.tick_params(labelsize=7, which="both")
    if axis.lines:
        positive = all(value > 0 for line in axis.lines for value in line.get_ydata())
        if positive and not name.endswith("psnr"):
            axis.set_yscale("log")
        axis.legend(fontsize=7)
