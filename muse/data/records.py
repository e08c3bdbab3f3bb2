"""What a source of samples is: the interface of tar shards (tar.py) and image folders (folders.py).

A source has `shards` (the units that ranks and workers share out) and `read(shard)`, which yields
`Record`s: the key and the places of a sample's members, so that samples can be passed over (resume,
another rank's share) without reading them.
"""

import os
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from muse.data.shard_index import ShardContents

MAX_OPEN_FILES = 32  # shards kept open in a process; the system allows some hundred files
SHARD_FAULTS = ("truncated_tar", "unreadable_shard")


class Span(NamedTuple):
    """Bytes that lie in a file; `size` -1 is all of it."""

    path: str
    offset: int
    size: int


class SharedFile:
    """A shard that stays open while its samples are read: one `open` for all of them.

    The place in the file is given with every read, so that processes forked from this one may go
    on with the same handle. It is closed with the last record of the shard; of many shards, those
    not used for longest are closed before.
    """

    _open: "OrderedDict[int, weakref.ref[SharedFile]]" = OrderedDict()

    def __init__(self, path: str):
        self.path = path
        self._handle: int | None = None

    def read(self, offset: int, size: int) -> bytes:
        """Raises OSError, and EOFError where the file is shorter."""
        if self._handle is None:
            self._handle = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self._open[id(self)] = weakref.ref(self)
        self._open.move_to_end(id(self))
        while len(self._open) > MAX_OPEN_FILES:
            oldest = next(iter(self._open.values()))()
            oldest.close()
        parts = []
        while size > 0:  # one call gives two gigabytes at most
            part = _read_at(self._handle, size, offset)
            if not part:
                raise EOFError(self.path)
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Until the next read."""
        self._open.pop(id(self), None)
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    __del__ = close


def _read_at(handle: int, size: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(handle, size, offset)
    os.lseek(handle, offset, os.SEEK_SET)  # Windows, which does not fork
    return os.read(handle, size)


@dataclass(slots=True)
class Record:
    """One sample before decoding."""

    key: str
    shard: str
    members: dict[str, bytes | Span] = field(default_factory=dict)
    fault: str | None = None  # what is wrong with it
    prepared: object = None  # what was decoded of it, where it stays in memory
    file: SharedFile | None = None  # where all of its spans lie

    def load(self) -> "Record":
        """Read the members' bytes, if that was not yet done."""
        spans = {name: span for name, span in self.members.items() if isinstance(span, Span)}
        try:
            if self.file is not None and spans:
                self.members |= _read_together(self.file, spans)
            else:
                self.members |= {name: _read_span(span) for name, span in spans.items()}
        except (OSError, EOFError):
            self.members, self.fault = {}, "unreadable_file"
        return self


def _read_together(file: SharedFile, spans: dict[str, Span]) -> dict[str, bytes]:
    """Members of one sample lie side by side: one read for all of them."""
    first = min(span.offset for span in spans.values())
    last = max(span.offset + span.size for span in spans.values())
    if last - first > 2 * sum(span.size for span in spans.values()) + (1 << 16):
        return {name: file.read(span.offset, span.size) for name, span in spans.items()}
    block = file.read(first, last - first)
    return {
        name: block[span.offset - first : span.offset - first + span.size]
        for name, span in spans.items()
    }


def _read_span(span: Span) -> bytes:
    with open(span.path, "rb") as file:
        file.seek(span.offset)
        data = file.read(span.size)
    if len(data) < span.size:
        raise EOFError(span.path)
    return data


class Source(Protocol):
    """What loaders read from.

    A source may also have `retries` (how many reads it began anew), `classes` (folders' names) and
    `contents(shard)` where the count is known without reading.
    """

    name: str
    shards: Sequence[str]
    local: bool  # samples can be listed without reading them
    one_per_shard: bool  # a shard is a sample: shuffling shards shuffles samples

    def read(self, shard: str) -> Iterator[Record]: ...


def contents_of(source: Source, shard: str) -> ShardContents:
    """How many samples `shard` holds, and the fault after them, in the cheapest way there is."""
    if source.one_per_shard:
        return ShardContents(1)
    counted = getattr(source, "contents", None)
    return counted(shard) if counted is not None else count_by_reading(source, shard)


def count_by_reading(source: Source, shard: str) -> ShardContents:
    """The same by going through all records."""
    samples = 0
    for record in source.read(shard):
        if record.fault in SHARD_FAULTS:
            return ShardContents(samples, record.fault)
        samples += 1
    return ShardContents(samples)


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

    def contents(self, shard: str) -> ShardContents:
        return contents_of(self._source, shard)

    def read(self, shard: str) -> Iterator[Record]:
        if shard not in self._records:
            self._records[shard] = list(self._source.read(shard))
        return iter(self._records[shard])
