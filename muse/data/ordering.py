"""The order of samples in a shuffle buffer, and how a resume finds its place in it.

The buffer holds `size` items. One of them is drawn and the next item takes its place; at the end
the rest is drawn. What is drawn depends on the generator and on how many items there are, not on
what they are: a resume draws from numbers, and reads only what is in the buffer at its position.
"""

import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, groupby, islice
from typing import TypeVar

from muse.data.records import Record, Source, contents_of

T = TypeVar("T")


def start_position(sources: int, drawn: int = 0, epoch: int = 0) -> dict:
    """A worker's place: draws from the mixture, and [epoch, records read] by source."""
    return {"drawn": drawn, "sources": [[epoch, 0] for _ in range(sources)]}


def as_position(saved: Mapping) -> dict:
    """A saved place, checked. Raises KeyError, TypeError or ValueError."""
    places = [[int(epoch), int(read)] for epoch, read in saved["sources"]]
    return {"drawn": int(saved["drawn"]), "sources": places}


def _draw(rng: random.Random, count: int) -> int:
    """A number below `count`, from the same bits as `rng.randint(0, count - 1)`."""
    bits = count.bit_length()
    number = rng.getrandbits(bits)
    while number >= count:
        number = rng.getrandbits(bits)
    return number


def _pick(buffer: list[T], rng: random.Random) -> T:
    place = _draw(rng, len(buffer))
    item, buffer[place] = buffer[place], buffer[-1]
    buffer.pop()
    return item


def shuffled(
    items: Iterable[T], size: int, rng: random.Random, held: Sequence[T] = ()
) -> Iterator[T]:
    """`items` through a buffer of `size`, in the order of webdataset's shuffle; 1 keeps theirs.

    Args:
        items: what is left to come.
        size: of the buffer.
        rng: draws.
        held: what the buffer holds already.
    """
    if size <= 1:
        yield from items
        return
    buffer = list(held)
    if len(buffer) >= size:
        yield _pick(buffer, rng)
    for item in items:
        buffer.append(item)
        if len(buffer) >= size:
            yield _pick(buffer, rng)
    while buffer:
        yield _pick(buffer, rng)


def replay(total: int, size: int, rng: random.Random, skip: int) -> tuple[list[int], int]:
    """(numbers in the buffer, number that comes next) after `skip` of 0 .. total - 1 were drawn.

    `shuffled` of the rest with these numbers as `held` gives what is left. About 0.1 s a million.
    """
    if size <= 1:
        return [], min(skip, total)
    buffer = list(range(min(size, total)))
    taken = len(buffer)
    full = min(skip, total - taken)  # draws after which another number takes the free place
    bits, getrandbits = size.bit_length(), rng.getrandbits
    for number in range(taken, taken + full):  # `_pick` and append, written out for speed
        place = getrandbits(bits)
        while place >= size:
            place = getrandbits(bits)
        buffer[place] = buffer[-1]
        buffer[-1] = number
    for _ in range(min(skip - full, len(buffer))):
        _pick(buffer, rng)
    return buffer, taken + full


class Places:
    """The records of some shards of a local source, by their number in the order of the shards."""

    def __init__(self, source: Source, shards: Sequence[str]):
        self.source, self.shards = source, shards
        self._ends = list(accumulate(self._count(shard) for shard in shards))

    def _count(self, shard: str) -> int:
        found = contents_of(self.source, shard)
        return found.samples + bool(found.fault)  # a fault is a record too

    @property
    def total(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _shard_of(self, number: int) -> int:
        return bisect_right(self._ends, number)

    def _start(self, shard: int) -> int:
        return self._ends[shard - 1] if shard else 0

    def records(self, numbers: Sequence[int]) -> list[Record]:
        """The records of these numbers, not loaded; each shard that has some is opened once."""
        found: dict[int, Record] = {}
        for shard, group in groupby(sorted(numbers), key=self._shard_of):
            records = list(self.source.read(self.shards[shard]))
            for number in group:
                found[number] = records[number - self._start(shard)]
        return [found[number] for number in numbers]

    def read(self, first: int) -> Iterator[Record]:
        """All records from number `first` on."""
        if first >= self.total:
            return
        begin = self._shard_of(first)
        yield from islice(self.source.read(self.shards[begin]), first - self._start(begin), None)
        for shard in self.shards[begin + 1 :]:
            yield from self.source.read(shard)
