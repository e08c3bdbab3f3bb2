"""What a source of samples is: the interface of tar shards (tar.py) and image folders (folders.py).

A source has `shards` (the units that ranks and workers share out) and `read(shard)`, which yields
`Record`s: the key and the places of a sample's members, so that samples can be passed over (resume,
another rank's share) without reading them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

SHARD_FAULTS = ("truncated_tar", "unreadable_shard")


class Span(NamedTuple):
    """Bytes that lie in a file; `size` -1 is all of it."""

    path: str
    offset: int
    size: int


@dataclass(slots=True)
class Record:
    """One sample before decoding."""

    key: str
    shard: str
    members: dict[str, bytes | Span] = field(default_factory=dict)
    fault: str | None = None  # what is wrong with it
    prepared: object = None  # what was decoded of it, where it stays in memory

    def load(self) -> "Record":
        """Read the members' bytes, if that was not yet done."""
        try:
            for name, member in self.members.items():
                if isinstance(member, Span):
                    self.members[name] = _read_span(member)
        except (OSError, EOFError):
            self.members, self.fault = {}, "unreadable_file"
        return self


def _read_span(span: Span) -> bytes:
    with open(span.path, "rb") as file:
        file.seek(span.offset)
        data = file.read(span.size)
    if len(data) < span.size:
        raise EOFError(span.path)
    return data


class Source(Protocol):
    """What loaders read from.

    A source may also have `retries` (how many reads it began anew) and `classes` (folders' names).
    """

    name: str
    shards: Sequence[str]
    local: bool  # samples can be listed without reading them
    one_per_shard: bool  # a shard is a sample: shuffling shards shuffles samples

    def read(self, shard: str) -> Iterator[Record]: ...


class InMemory:
    """A source that keeps its records and what was decoded of them, for some thousand pictures."""

    def __init__(self, source: Source):
        self.name, self.shards, self.local = source.name, source.shards, source.local
        self.one_per_shard = source.one_per_shard
        self._source = source
        self._records: dict[str, list[Record]] = {}

    @property
    def retries(self) -> int:
        return getattr(self._source, "retries", 0)

    def read(self, shard: str) -> Iterator[Record]:
        if shard not in self._records:
            self._records[shard] = list(self._source.read(shard))
        return iter(self._records[shard])
