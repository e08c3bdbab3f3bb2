"""A number over several seeds: mean and standard deviation, and how a table shows them."""

import statistics
from collections.abc import Sequence
from typing import Any


def spread_of(values: Sequence[float | None]) -> dict[str, Any]:
    """`mean`, `std` (n - 1; None for a single value) and `values`; None among these is left out."""
    found = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(found) if found else None,
        "std": statistics.stdev(found) if len(found) > 1 else None,
        "values": list(values),
    }


def spread_cell(column: dict[str, Any], digits: int) -> str:
    """`mean ± std` of a `spread_of`; `none` without a value."""
    if column["mean"] is None:
        return "none"
    spread = f" ± {column['std']:.{digits}f}" if column["std"] is not None else ""
    return f"{column['mean']:.{digits}f}{spread}"
