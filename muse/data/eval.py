"""Evaluation data: every sample exactly once, in order, shared out over ranks and workers."""

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise

import torch
from torch.utils.data import IterableDataset, get_worker_info

from muse.data.decode import BadSample
from muse.data.faults import BadSamples
from muse.data.records import SHARD_FAULTS, Record, Source, contents_of
from muse.data.samples import Prepared, SampleMaker, floats, torch_loader
from muse.data.shards import split_shards
from muse.data.transforms import generator_for
from muse.errors import DataError

# The first sample of remote shard i has index i * SHARD_STRIDE: how many samples lie before it is
# not known.
SHARD_STRIDE = 2**32


def spread_sample(total: int, count: int, seed: int) -> list[int]:
    """`count` of the places 0 .. total - 1, ascending: one drawn from each of as many stretches.

    The stretches are of one length, so a set that is sorted by class gives of all its classes, in
    the proportions of the set.
    """
    generator = generator_for("sample", seed)
    edges = [total * number // count for number in range(count + 1)]
    return [generator.randrange(first, last) for first, last in pairwise(edges)]


def count_samples(source: Source, limit: int | None = None) -> list[int]:
    """Samples in each shard of a local source, by their indexes; stops after `limit`.

    Raises DataError if there are none.
    """
    counts: dict[int, int] = {}
    order = range(len(source.shards))
    if limit is None:
        # Processes that start together begin at different shards: each scans a part of them and
        # finds the others' indexes beside the rest.
        first = os.getpid() % len(order)
        order = [*order[first:], *order[:first]]
    for number in order:
        if limit is not None and sum(counts.values()) >= limit:
            break
        shard = source.shards[number]
        found = contents_of(source, shard)
        if found.fault:
            raise broken_shard(found.fault, shard, found.samples)
        counts[number] = found.samples
    if not sum(counts.values()):
        raise DataError(f"{source.name} holds no samples")
    return [counts[number] for number in sorted(counts)]


def broken_shard(fault: str, shard: str, count: int) -> DataError:
    """The error for a broken shard.

    In training it counts as one bad sample, but a measurement must know how many samples it covers.
    """
    if fault == "unreadable_shard" and not count:
        return DataError(
            f"shard {shard} cannot be read ({fault}): check its address, or the command of a pipe"
        )
    return DataError(
        f"shard {shard} breaks off ({fault}) after {count} samples: fetch or write it again"
    )


@dataclass
class EvalStream(IterableDataset):
    """(batch or None, samples seen, faults) of one rank; torch's workers make batches in turn."""

    source: Source
    maker: SampleMaker
    batch_size: int
    rank: int = 0
    world: int = 1
    max_images: int | None = None
    counts: list[int] = field(default_factory=list)  # of a local source
    sample_seed: int | None = None  # of the choice of max_images; None: the first ones

    def __post_init__(self) -> None:
        super().__init__()
        self.places = self._places()

    def _places(self) -> Sequence[int]:
        """Places in a local source of the samples that are read, over all ranks, ascending."""
        total = sum(self.counts)
        if self.max_images is None or self.max_images >= total:
            return range(total)
        if self.sample_seed is None:
            return range(self.max_images)
        return spread_sample(total, self.max_images, self.sample_seed)

    def total(self) -> int:
        """Samples of a local source, over all ranks."""
        return len(self.places)

    def span(self) -> tuple[int, int]:
        """The rank's samples [first, last) of a local source, contiguous: few shards to open."""
        total = self.total()
        return total * self.rank // self.world, total * (self.rank + 1) // self.world

    def __iter__(self) -> Iterator[tuple[dict | None, int, list[tuple[str, str]]]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        whole_shards = (
            not self.source.local
            and self.max_images is None
            and len(self.source.shards) >= self.world * workers
        )
        if whole_shards:
            records = self._own_shards(self.rank * workers + worker, self.world * workers)
        else:
            records = self._local() if self.source.local else self._strided()
        number = 0
        while chunk := list(islice(records, self.batch_size)):
            if whole_shards or number % workers == worker:
                yield self._batch(chunk)
            number += 1

    def _local(self) -> Iterator[tuple[int, Record]]:
        first, last = self.span()
        places = self.places[first:last]
        start = 0
        for shard, count in zip(self.source.shards, self.counts, strict=False):
            inside = places[bisect_left(places, start) : bisect_left(places, start + count)]
            wanted = inside if isinstance(inside, range) else frozenset(inside)
            if wanted:
                for index, record in enumerate(self.source.read(shard), start):
                    if index in wanted:
                        yield index, record
            start += count

    def _strided(self) -> Iterator[tuple[int, Record]]:
        """Remote shards too few to share out: every rank reads all of them and decodes its part."""
        records = (record for shard in self.source.shards for record in self.source.read(shard))
        return islice(enumerate(records), self.rank, self.max_images, self.world)

    def _own_shards(self, part: int, parts: int) -> Iterator[tuple[int, Record]]:
        for number, shard in split_shards(list(enumerate(self.source.shards)), part, parts):
            yield from enumerate(self.source.read(shard), number * SHARD_STRIDE)

    def _batch(
        self, chunk: list[tuple[int, Record]]
    ) -> tuple[dict | None, int, list[tuple[str, str]]]:
        samples: list[Prepared] = []
        indices: list[int] = []
        faults: list[tuple[str, str]] = []
        for index, record in chunk:
            try:
                samples.append(self.maker.finish(self.maker.prepare(record)))
                indices.append(index)
            except BadSample as error:
                faults.append((error.kind, record.key))
        if not samples:
            return None, len(chunk), faults
        return {**self.maker.collate(samples), "indices": torch.tensor(indices)}, len(chunk), faults


class EvalLoader:
    """Iterable of batches over one rank's part; each pass starts anew, with a new `bad` count.

    `num_samples` counts those of all ranks together, None for remote shards; `len()` is this rank's
    number of batches if none is lost.
    """

    def __init__(
        self,
        stream: EvalStream,
        num_workers: int,
        max_bad_fraction: float,
        pin_memory: bool,
    ):
        self.stream, self.num_workers, self.max_bad_fraction = stream, num_workers, max_bad_fraction
        self.bad = BadSamples(max_bad_fraction)
        self.pin_memory = pin_memory
        self.num_samples = stream.total() if stream.source.local else None
        self.classes = getattr(stream.source, "classes", ())

    def __len__(self) -> int:
        if self.num_samples is None:
            raise TypeError("the number of samples in remote shards is not known")
        first, last = self.stream.span()
        return -(-(last - first) // self.stream.batch_size)

    def __iter__(self) -> Iterator[dict]:
        self.bad = BadSamples(self.max_bad_fraction)
        for batch, seen, faults in torch_loader(self.stream, self.num_workers, 0, self.pin_memory):
            self.bad.add(seen, faults)
            for kind, key in faults:
                if kind in SHARD_FAULTS:
                    raise broken_shard(kind, key, self.bad.seen - 1)
            self.bad.check()
            if batch is not None:
                yield floats(batch)
        self.bad.check(final=True)
        if self.num_samples is not None:
            first, last = self.stream.span()
            if self.bad.seen != last - first:
                raise DataError(
                    f"{self.stream.source.name}: {self.bad.seen} samples read where "
                    f"{last - first} were counted at the start"
                )
