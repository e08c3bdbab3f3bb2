"""The endless, shuffled, resumable stream of training samples of one worker.

Every random choice comes from a generator seeded by (seed, epoch, rank, worker, source, key), so a position is a few
integers: how many samples were drawn from the mixture, and per source the epoch and how far into it. Going to a
position walks the epoch's records once without loading them (tar headers of local shards; remote shards have to be read
through).
"""

import copy
import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import shuffle

from muse.data.decode import BadSample, BadSamples
from muse.data.records import InMemory, Record, Source
from muse.data.samples import Prepared, SampleMaker, torch_loader
from muse.data.shards import split_shards
from muse.data.transforms import generator_for
from muse.errors import CheckpointError, DataError, MuseError

logger = logging.getLogger(__name__)

MAX_BAD_IN_A_ROW = 500
MAX_UNREADABLE_IN_A_ROW = (
    3  # shards; each was tried several times, so it is the storage that is gone, not a shard
)
_GOLDEN = 0.6180339887498949


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


def start_position(sources: int) -> dict:
    return {"drawn": 0, "sources": [[0, 0] for _ in range(sources)]}


def pick_source(spec: StreamSpec, worker: int, drawn: int) -> int:
    """The source of draw number `drawn`: a golden-ratio sequence from a random start; ratios hold to about log(n)/n."""
    if len(spec.sources) == 1:
        return 0
    start = generator_for("mixture", spec.seed, spec.rank, worker).random()
    bounds = list(accumulate(spec.weights))
    point = (start + drawn * _GOLDEN) % 1.0 * bounds[-1]
    return min(bisect_right(bounds, point), len(bounds) - 1)


@dataclass
class WorkerStream:
    """Iterator of (batch, Report) for one (rank, worker), from `position` on."""

    spec: StreamSpec
    worker: int
    position: dict
    _seen: int = 0
    _in_a_row: int = 0
    _unreadable: int = 0
    _faults: list[tuple[str, str]] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[dict | None, Report]]:
        streams = [self._samples(i) for i in range(len(self.spec.sources))]
        try:
            while True:
                batch = self.spec.maker.collate(
                    [self._draw(streams) for _ in range(self.spec.batch_size)]
                )
                yield batch, self._report()
        except MuseError as error:
            # In-band: an exception that crosses a process boundary arrives as a page of traceback.
            yield None, self._report(str(error))

    def _draw(self, streams: Sequence[Iterator[Prepared]]) -> Prepared:
        source = pick_source(self.spec, self.worker, self.position["drawn"])
        self.position["drawn"] += 1
        return next(streams[source])

    def _report(self, error: str | None = None) -> Report:
        position = {
            "drawn": self.position["drawn"],
            "sources": [list(place) for place in self.position["sources"]],
        }
        retries = sum(getattr(source, "retries", 0) for source in self.spec.sources)
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
                    yield self.spec.maker.finish(
                        prepared, generator_for("sample", self.spec.seed, epoch, record.key)
                    )
            if good == 0 and start == 0:
                raise DataError(
                    f"{source.name}: not one of the {place[1]} samples of rank {self.spec.rank}, worker {self.worker} "
                    f"can be used ({kinds_of(self._faults)})"
                )
            place[:] = [epoch + 1, 0]

    def _prepare(self, record: Record, keep: bool) -> Prepared | None:
        """The decoded sample, or None after noting why there is none. `keep`: in the record, in place of its bytes."""
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
            self._in_a_row = self._unreadable = 0
            return prepared
        self._faults.append((record.fault, record.key))
        self._in_a_row += 1
        self._unreadable += record.fault == "unreadable_shard"
        if self._unreadable >= MAX_UNREADABLE_IN_A_ROW:
            raise DataError(
                f"{self._unreadable} shards in a row cannot be read, the last of them {record.shard}; when the storage "
                "is back, the same command goes on from the newest checkpoint"
            )
        if self._in_a_row >= MAX_BAD_IN_A_ROW:
            raise DataError(
                f"{self._in_a_row} samples in a row cannot be used, the last of them {record.key} of {record.shard} "
                f"({record.fault})"
            )
        return None

    def _records(self, index: int, epoch: int, skip: int) -> Iterator[Record]:
        """The worker's records of one epoch, shuffled, without the first `skip`."""
        spec, source = self.spec, self.spec.sources[index]
        left = skip
        # The bytes of what is skipped are not read; what is in the buffer when skipping ends is read when it comes out.
        lazy = isinstance(source, InMemory)
        shards = self._shard_order(index, epoch)
        records = (
            record if left or lazy else record.load()
            for shard in shards
            for record in source.read(shard)
        )
        if spec.shuffle_buffer > 1 and not source.one_per_shard:
            rng = generator_for("buffer", spec.seed, epoch, spec.rank, self.worker, index)
            records = shuffle(spec.shuffle_buffer, initial=spec.shuffle_buffer, rng=rng)(records)
        for record in records:
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
        """This worker's shards: its part of the epoch's one permutation, or its own draws if resampled."""
        spec, shards = self.spec, list(self.spec.sources[index].shards)
        part, parts = spec.rank * spec.workers + self.worker, spec.world * spec.workers
        if spec.resampled:
            return generator_for("shards", spec.seed, epoch, index, part).choices(
                shards, k=-(-len(shards) // parts)
            )
        generator_for("shards", spec.seed, epoch, index).shuffle(shards)
        return split_shards(shards, part, parts)


def kinds_of(faults: Sequence[tuple[str, str]]) -> str:
    """`truncated_image 3, missing_caption 1`, or `no samples at all`."""
    counts = Counter(kind for kind, _ in faults)
    return ", ".join(f"{kind} {n}" for kind, n in counts.most_common()) or "no samples at all"


class TrainStream(IterableDataset):
    """The streams of all workers of one rank as torch's DataLoader wants them.

    Worker i of a process goes on as stream (i + `first`) mod workers, since a DataLoader always asks its worker 0
    first.
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
    """

    def __init__(
        self,
        spec: StreamSpec,
        num_workers: int,
        max_bad_fraction: float,
        pin_memory: bool,
        prefetch_factor: int | None,
    ):
        self.spec, self.num_workers = spec, num_workers
        self.bad = BadSamples(max_bad_fraction)
        self.batches = 0
        self._retries = [0] * spec.workers
        self._positions = [start_position(len(spec.sources)) for _ in range(spec.workers)]
        self._pin_memory, self._prefetch = pin_memory, prefetch_factor

    def __iter__(self) -> Iterator[dict]:
        stream = TrainStream(self.spec, self._positions, first=self.batches % self.spec.workers)
        for batch, report in torch_loader(
            stream, self.num_workers, self.spec.seed, self._pin_memory, self._prefetch
        ):
            epochs_done = self.epoch
            self._positions[report.worker] = report.position
            self._retries[report.worker] = report.retries
            self.bad.add(report.seen, report.faults)
            self.bad.check(final=self.epoch > epochs_done)
            if report.error:
                raise DataError(report.error)
            self.batches += 1
            yield batch

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
            "shards": [len(source.shards) for source in spec.sources],
            "weights": list(spec.weights),
        }

    @property
    def retries(self) -> int:
        """Reads of remote or failing shards that were begun anew by this rank, since it last began to iterate."""
        return sum(self._retries)

    @property
    def epoch(self) -> int:
        """How many times every worker of this rank has been through every source."""
        return min(epoch for position in self._positions for epoch, _ in position["sources"])

    def state_dict(self) -> dict:
        """The data position of this rank: JSON, integers but for the skipped samples' keys. Each rank saves its own."""
        return {
            "layout": self._layout(),
            "batches": self.batches,
            "positions": [
                {"drawn": p["drawn"], "sources": [list(place) for place in p["sources"]]}
                for p in self._positions
            ],
            "bad": self.bad.state_dict(),
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Go on from `state`.

        Exact (the same batches, bit for bit) where seed, rank, world, workers, buffer, weights and shards are what they
        were. Otherwise, and for resampled shards, approximate: the sources' next epoch begins, with a warning. The
        batch size may change.
        """
        spec = self.spec
        try:
            layout, positions = dict(state["layout"]), state["positions"]
            places = [[(int(e), int(n)) for e, n in p["sources"]] for p in positions]
            drawn, batches = [int(p["drawn"]) for p in positions], int(state["batches"])
            self.bad.load_state_dict(state["bad"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"not a data position: {error!r}") from error
        self.batches = batches
        here = self._layout()
        if layout == here and not spec.resampled:
            self._positions = [
                {"drawn": d, "sources": [list(place) for place in p]}
                for d, p in zip(drawn, places, strict=True)
            ]
            return
        if layout != here:
            changes = ", ".join(
                f"{key} {layout.get(key)} -> {here[key]}"
                for key in here
                if layout.get(key) != here[key]
            )
            logger.warning(
                "the data position is approximate (%s): going on with the next epoch", changes
            )
        following = 1 + max((epoch for place in places for epoch, _ in place), default=0)
        start = {"drawn": max(drawn, default=0), "sources": [[following, 0] for _ in spec.sources]}
        self._positions = [start for _ in range(spec.workers)]
