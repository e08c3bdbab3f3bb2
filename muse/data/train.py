"""Training data: endless, shuffled, mixed, and resumable to the sample.

Every random choice comes from a generator seeded by (seed, epoch, rank, worker, source, key), so a
position is a few integers: how many draws from the mixture there were, and for each source the
epoch and how far into it. Going to a position of a local source shuffles numbers instead of records
(ordering.py); streams have to be read again.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from muse.data.decode import BadSample
from muse.data.faults import BadInARow, BadSamples, kinds_of
from muse.data.mixture import pick_source
from muse.data.ordering import Places, as_position, replay, shuffled, start_position
from muse.data.records import InMemory, Record, Source
from muse.data.samples import Prepared, SampleMaker, floats, torch_loader
from muse.data.shards import split_shards
from muse.data.transforms import generator_for
from muse.errors import CheckpointError, DataError, MuseError

logger = logging.getLogger(__name__)


class Report(NamedTuple):
    """What a worker tells beside each batch."""

    worker: int
    position: dict
    seen: int
    faults: list[tuple[str, str]]
    error: str | None = None
    retries: int = 0  # reads begun anew since the stream was opened


@dataclass(frozen=True)
class StreamSpec:
    """What a stream depends on, apart from its position."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    maker: SampleMaker
    batch_size: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    workers: int = 1
    shuffle_buffer: int = 1000
    resampled: bool = False
    mix: str = "sample"  # what a draw from the mixture gives: a sample, or a whole batch


@dataclass
class WorkerStream:
    """Iterator of (batch, Report) for one (rank, worker), from `position` on."""

    spec: StreamSpec
    worker: int
    position: dict
    _seen: int = 0
    _faults: list[tuple[str, str]] = field(default_factory=list)
    _in_a_row: BadInARow = field(default_factory=BadInARow)

    def __iter__(self) -> Iterator[tuple[dict | None, Report]]:
        streams = [self._samples(i) for i in range(len(self.spec.sources))]
        try:
            while True:
                yield self.spec.maker.collate(self._draw_batch(streams)), self._report()
        except MuseError as error:
            # In-band: an exception that crosses a process boundary arrives as a page of traceback.
            yield None, self._report(str(error))

    def _draw_batch(self, streams: Sequence[Iterator[Prepared]]) -> list[Prepared]:
        """Samples of a source drawn for each of them, or of one source drawn for the batch."""
        spec = self.spec
        per_draw = spec.batch_size if spec.mix == "batch" else 1
        batch: list[Prepared] = []
        while len(batch) < spec.batch_size:
            start = (spec.seed, spec.rank, self.worker)
            source = pick_source(spec.weights, self.position["drawn"], start)
            self.position["drawn"] += 1
            batch += islice(streams[source], per_draw)
        return batch

    def _report(self, error: str | None = None) -> Report:
        retries = sum(getattr(source, "retries", 0) for source in self.spec.sources)
        position = copy.deepcopy(self.position)
        report = Report(self.worker, position, self._seen, self._faults, error, retries)
        self._seen, self._faults = 0, []
        return report

    def _samples(self, index: int) -> Iterator[Prepared]:
        """Good samples of one source, epoch after epoch."""
        source, place = self.spec.sources[index], self.position["sources"][index]
        while True:
            epoch, start = place
            good = 0
            for record in self._records(index, epoch, start):
                place[1] += 1
                prepared = self._prepare(record, keep=isinstance(source, InMemory))
                if prepared is not None:
                    good += 1
                    rng = generator_for("sample", self.spec.seed, epoch, record.key)
                    yield self.spec.maker.finish(prepared, rng)
            if good == 0 and start == 0:
                raise DataError(
                    f"{source.name}: not one of the {place[1]} samples of rank {self.spec.rank}, "
                    f"worker {self.worker} can be used ({kinds_of(self._faults)})"
                )
            place[:] = [epoch + 1, 0]

    def _prepare(self, record: Record, keep: bool) -> Prepared | None:
        """The decoded sample, or None after noting why; `keep` puts it in place of the bytes."""
        self._seen += 1
        prepared = record.prepared
        if prepared is None and record.fault is None:
            try:
                prepared = self.spec.maker.prepare(record)
            except BadSample as error:
                record.fault = error.kind
            if keep:
                record.prepared, record.members = prepared, {}
        if prepared is not None:
            self._in_a_row.reset()
            return prepared
        self._faults.append((record.fault, record.key))
        self._in_a_row.add(record.fault, record.key, record.shard)
        return None

    def _records(self, index: int, epoch: int, skip: int) -> Iterator[Record]:
        """The worker's records of one epoch, shuffled, without the first `skip`."""
        spec, source = self.spec, self.spec.sources[index]
        size = 1 if source.one_per_shard else max(1, spec.shuffle_buffer)
        rng = generator_for("buffer", spec.seed, epoch, spec.rank, self.worker, index)
        # Every record that stays in memory is loaded when it is decoded.
        lazy = isinstance(source, InMemory)
        shards = self._shard_order(index, epoch)
        left, held, start = skip, [], 0
        if skip and source.local:
            places = Places(source, shards)
            numbers, start = replay(places.total, size, rng, skip)
            held = places.records(numbers)
            left = max(0, skip - places.total)
            records = places.read(start)
        else:
            records = (record for shard in shards for record in source.read(shard))
        # What is skipped is not read: a record that enters the buffer before skipping ends is
        # loaded when it is decoded.
        loaded = (record if left or lazy else record.load() for record in records)
        for record in shuffled(loaded, size, rng, held):
            if left:
                left -= 1
            else:
                yield record
        if left:
            logger.warning(
                "%s: %d samples fewer than at the checkpoint; the position is approximate",
                source.name,
                left,
            )

    def _shard_order(self, index: int, epoch: int) -> list[str]:
        """This worker's part of the epoch's shuffled shards; draws of its own if resampled."""
        spec, shards = self.spec, list(self.spec.sources[index].shards)
        part, parts = spec.rank * spec.workers + self.worker, spec.world * spec.workers
        if spec.resampled:
            return generator_for("shards", spec.seed, epoch, index, part).choices(
                shards, k=-(-len(shards) // parts)
            )
        generator_for("shards", spec.seed, epoch, index).shuffle(shards)
        return split_shards(shards, part, parts)


class TrainStream(IterableDataset):
    """The streams of all workers of one rank as torch's DataLoader wants them.

    Worker i of a process goes on as stream (i + `first`) mod workers, since a DataLoader always
    asks its worker 0 first.
    """

    def __init__(self, spec: StreamSpec, positions: list[dict], first: int):
        self.spec, self.positions, self.first = spec, positions, first

    def __iter__(self) -> Iterator[tuple[dict | None, Report]]:
        info = get_worker_info()
        stream = ((info.id if info else 0) + self.first) % self.spec.workers
        return iter(WorkerStream(self.spec, stream, copy.deepcopy(self.positions[stream])))


class TrainLoader:
    """Endless iterator of batches; `state_dict()` is the position after the last batch handed out.

    Iterating again goes on from that position. `bad` counts the samples skipped on this rank.
    Pictures go to `device` (None: stay where they are) as bytes and become float32 there.
    """

    def __init__(
        self,
        spec: StreamSpec,
        num_workers: int,
        max_bad_fraction: float,
        pin_memory: bool,
        device: torch.device | None = None,
    ):
        self.spec, self.num_workers, self.device = spec, num_workers, device
        self.bad = BadSamples(max_bad_fraction)
        self.batches = 0
        self._retries = [0] * spec.workers
        self._positions = [start_position(len(spec.sources)) for _ in range(spec.workers)]
        self.pin_memory = pin_memory

    def __iter__(self) -> Iterator[dict]:
        stream = TrainStream(self.spec, self._positions, first=self.batches % self.spec.workers)
        loader = torch_loader(stream, self.num_workers, self.spec.seed, self.pin_memory)
        for batch, report in loader:
            epochs_done = self.epoch
            self._positions[report.worker] = report.position
            self._retries[report.worker] = report.retries
            self.bad.add(report.seen, report.faults)
            self.bad.check(final=self.epoch > epochs_done)
            if report.error:
                raise DataError(report.error)
            self.batches += 1
            yield floats(batch, self.device)

    def _layout(self) -> dict:
        """What the order of samples depends on."""
        spec = self.spec
        return {
            "seed": spec.seed,
            "rank": spec.rank,
            "world": spec.world,
            "workers": spec.workers,
            "shuffle_buffer": spec.shuffle_buffer,
            "resampled": spec.resampled,
            "mix": spec.mix,
            "shards": [len(source.shards) for source in spec.sources],
            "weights": list(spec.weights),
        }

    @property
    def retries(self) -> int:
        """Reads of remote or failing shards begun anew by this rank, in its present iteration."""
        return sum(self._retries)

    @property
    def epoch(self) -> int:
        """How many times every worker of this rank has been through every source."""
        return min(epoch for position in self._positions for epoch, _ in position["sources"])

    def state_dict(self) -> dict:
        """The data position of this rank, as JSON. Each rank saves its own."""
        return {
            "layout": self._layout(),
            "batches": self.batches,
            "positions": copy.deepcopy(self._positions),
            "bad": self.bad.state_dict(),
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Go on from `state`.

        Exact (the same batches, bit for bit) where seed, rank, world, workers, buffer, weights, mix
        and shards are what they were. Otherwise, and for resampled shards, approximate: the next
        epoch of the sources begins, with a warning. The batch size may change.
        """
        try:
            # Positions written before there was a choice have no `mix`.
            layout = {"mix": "sample", **state["layout"]}
            positions = [as_position(p) for p in state["positions"]]
            batches = int(state["batches"])
            self.bad.load_state_dict(state["bad"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"not a data position: {error!r}") from error
        self.batches = batches
        spec, here = self.spec, self._layout()
        if layout == here and not spec.resampled:
            self._positions = positions
            return
        if layout != here:
            changes = [f"{k} {layout.get(k)} -> {v}" for k, v in here.items() if layout.get(k) != v]
            logger.warning(
                "the data position is approximate (%s): going on with the next epoch",
                ", ".join(changes),
            )
        drawn = max((p["drawn"] for p in positions), default=0)
        epoch = 1 + max((epoch for p in positions for epoch, _ in p["sources"]), default=0)
        self._positions = [
            start_position(len(spec.sources), drawn, epoch) for _ in range(spec.workers)
        ]
