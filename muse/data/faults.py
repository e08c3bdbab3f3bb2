"""Samples that cannot be used are counted by kind; too many of them stop the run."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping

from muse.errors import DataError

logger = logging.getLogger(__name__)


class BadSamples:
    """Counts skipped samples by kind; raises when they are too many of those that were read.

    Args:
        max_fraction: of the samples that may be bad.
        min_count: samples to be read before a judgement, unless an epoch ends earlier.
        keep: keys kept of each kind, for the message.
    """

    def __init__(self, max_fraction: float = 0.01, min_count: int = 200, keep: int = 10):
        self.max_fraction, self.min_count, self.keep = max_fraction, min_count, keep
        self.seen = 0
        self.counts: dict[str, int] = {}
        self.keys: dict[str, list[str]] = {}

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def add(self, seen: int, faults: Iterable[tuple[str, str]]) -> None:
        """Record that `seen` more samples were read, of which `faults` (kind, key) were skipped."""
        self.seen += seen
        for kind, key in faults:
            self.counts[kind] = self.counts.get(kind, 0) + 1
            kept = self.keys.setdefault(kind, [])
            if len(kept) < self.keep:
                kept.append(key)
                logger.warning("skipped %s: %s", key, kind)

    def check(self, final: bool = False) -> None:
        """Raise DataError if more than `max_fraction` was bad.

        Unless `final` (an epoch was read), not before `min_count` samples and with three standard
        deviations to spare, so that an unlucky start does not stop a run.
        """
        expected = self.max_fraction * self.seen
        if not final:
            expected += 3 * math.sqrt(expected)
        if (final or self.seen >= self.min_count) and self.total > expected:
            raise DataError(
                f"{self.summary()}; more than max_bad_fraction={self.max_fraction:g} allows: "
                "repair the data or raise the limit"
            )

    def summary(self) -> str:
        """One line: how many of how many, by kind, with the first keys."""
        kinds = "; ".join(
            f"{kind} {n} ({', '.join(self.keys[kind])})" for kind, n in sorted(self.counts.items())
        )
        return f"{self.total} of {self.seen} samples could not be used" + (
            f": {kinds}" if kinds else ""
        )

    def state_dict(self) -> dict:
        return {
            "seen": self.seen,
            "counts": dict(self.counts),
            "keys": {kind: list(keys) for kind, keys in self.keys.items()},
        }

    def load_state_dict(self, state: Mapping) -> None:
        self.seen = int(state["seen"])
        self.counts = {kind: int(n) for kind, n in state["counts"].items()}
        self.keys = {kind: list(keys) for kind, keys in state["keys"].items()}


class BadInARow:
    """Stops a stream that gives nothing usable any more: DataError after so many in a row."""

    MAX_SAMPLES = 500
    # Each shard was tried several times, so after three the storage is gone and not a shard.
    MAX_SHARDS = 3

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """A good sample was read."""
        self.samples = self.shards = 0

    def add(self, kind: str, key: str, shard: str) -> None:
        """Sample `key` of `shard` could not be used, for the reason `kind`."""
        self.samples += 1
        self.shards += kind == "unreadable_shard"
        if self.shards >= self.MAX_SHARDS:
            raise DataError(
                f"{self.shards} shards in a row cannot be read, the last of them {shard}; when the "
                "storage is back, the same command goes on from the newest checkpoint"
            )
        if self.samples >= self.MAX_SAMPLES:
            raise DataError(
                f"{self.samples} samples in a row cannot be used, the last of them {key} of "
                f"{shard} ({kind})"
            )


def kinds_of(faults: Iterable[tuple[str, str]]) -> str:
    """`truncated_image 3, missing_caption 1`, or `no samples at all`."""
    counts = Counter(kind for kind, _ in faults)
    return ", ".join(f"{kind} {n}" for kind, n in counts.most_common()) or "no samples at all"
