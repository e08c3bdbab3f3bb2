"""Several training sources in given proportions."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

from muse.data.transforms import generator_for
from muse.errors import ConfigError

_GOLDEN = 0.6180339887498949


def parse_mixture(source: object) -> tuple[list[object], list[float]]:
    """(sources, weights) of one source, or of a list of mappings with a `weight` each (or 1)."""
    is_list = isinstance(source, Sequence) and not isinstance(source, str)
    if not (is_list and source and all(isinstance(item, Mapping) for item in source)):
        return [source], [1.0]
    weights = [_weight(item) for item in source]
    kept = [(item, weight) for item, weight in zip(source, weights) if weight > 0]
    if not kept:
        raise ConfigError("all data sources have weight 0")
    return [item for item, _ in kept], [weight for _, weight in kept]


def _weight(item: Mapping) -> float:
    weight = item.get("weight", 1.0)
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not is_number or not 0 <= weight < float("inf"):
        name = item.get("urls", item.get("images"))
        raise ConfigError(f"weight of data source {name!r} must be a number >= 0, not {weight!r}")
    return float(weight)


def pick_source(weights: Sequence[float], drawn: int, seed: tuple) -> int:
    """The source of draw number `drawn`.

    A golden-ratio sequence from a random start spreads each source evenly over the draws: after n
    draws its share is right to about log(n)/n, where independent draws would give 1/sqrt(n).

    Args:
        weights: one for each source.
        drawn: how many draws there were before.
        seed: what the start depends on.
    """
    if len(weights) == 1:
        return 0
    start = generator_for("mixture", *seed).random()
    bounds = list(accumulate(weights))
    point = (start + drawn * _GOLDEN) % 1.0 * bounds[-1]
    return min(bisect_right(bounds, point), len(bounds) - 1)
