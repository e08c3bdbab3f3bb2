"""Some samples of a source: those that are fitted, those that are held out, a seeded draw."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from muse.data.records import Record, Source


class PartOfSource:
    """The samples at `places` of a local source, in its order; a source like any other.

    Args:
        source: a local one.
        counts: samples in each of its shards, as `count_samples` gives them; a tail may be missing.
        places: of the samples in the whole source, ascending.
    """

    local = True

    def __init__(self, source: Source, counts: Sequence[int], places: Sequence[int]):
        self.name, self.one_per_shard, self._source = source.name, source.one_per_shard, source
        self.classes = getattr(source, "classes", ())
        self.mask_folder = getattr(source, "mask_folder", None)
        self._wanted: dict[str, set[int]] = {}
        starts = (0, *accumulate(counts))
        for shard, start, count in zip(source.shards, starts, counts, strict=False):
            inside = places[bisect_left(places, start) : bisect_left(places, start + count)]
            if len(inside):
                self._wanted.setdefault(shard, set()).update(place - start for place in inside)
        self.shards = tuple(self._wanted)

    @property
    def retries(self) -> int:
        return getattr(self._source, "retries", 0)

    def read(self, shard: str) -> Iterator[Record]:
        wanted = self._wanted[shard]
        return (
            record for number, record in enumerate(self._source.read(shard)) if number in wanted
        )
