"""What training and evaluation iterate over: starts torch's workers, counts bad samples, knows the position."""

import logging
from collections.abc import Iterator, Mapping

import torch
from torch.utils.data import DataLoader, IterableDataset

from muse.data.decode import BadSamples
from muse.data.eval_stream import EvalStream, broken_shard
from muse.data.sources import SHARD_FAULTS
from muse.data.train_stream import StreamSpec, TrainStream, start_position
from muse.errors import CheckpointError, DataError

logger = logging.getLogger(__name__)


def _as_it_is(batch: tuple) -> tuple:
    return batch


def _torch_loader(
    dataset: IterableDataset, num_workers: int, seed: int, pin_memory: bool, prefetch_factor: int | None
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor if num_workers else None,
        collate_fn=_as_it_is,
        generator=torch.Generator().manual_seed(seed),  # else starting the workers would draw from the global generator
    )


class TrainLoader:
    """Endless iterator of batches; `state_dict()` is the position after the last batch handed out.

    Iterating again goes on from that position. `bad` counts the samples skipped on this rank.
    """

    def __init__(
        self, spec: StreamSpec, num_workers: int, max_bad_fraction: float, pin_memory: bool, prefetch_factor: int | None
    ):
        self.spec, self.num_workers = spec, num_workers
        self.bad = BadSamples(max_bad_fraction)
        self.batches = 0
        self._retries = [0] * spec.workers
        self._positions = [start_position(len(spec.sources)) for _ in range(spec.workers)]
        self._pin_memory, self._prefetch = pin_memory, prefetch_factor

    def __iter__(self) -> Iterator[dict]:
        stream = TrainStream(self.spec, self._positions, first=self.batches % self.spec.workers)
        for batch, report in _torch_loader(stream, self.num_workers, self.spec.seed, self._pin_memory, self._prefetch):
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
                {"drawn": p["drawn"], "sources": [list(place) for place in p["sources"]]} for p in self._positions
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
                {"drawn": d, "sources": [list(place) for place in p]} for d, p in zip(drawn, places, strict=True)
            ]
            return
        if layout != here:
            changes = ", ".join(
                f"{key} {layout.get(key)} -> {here[key]}" for key in here if layout.get(key) != here[key]
            )
            logger.warning("the data position is approximate (%s): going on with the next epoch", changes)
        following = 1 + max((epoch for place in places for epoch, _ in place), default=0)
        start = {"drawn": max(drawn, default=0), "sources": [[following, 0] for _ in spec.sources]}
        self._positions = [start for _ in range(spec.workers)]


class EvalLoader:
    """Iterable of batches over one rank's part; each pass starts anew, with a new `bad` count.

    `num_samples` of all ranks together (None for remote shards); `len()` is this rank's number of batches if none is
    lost.
    """

    def __init__(
        self,
        stream: EvalStream,
        num_workers: int,
        max_bad_fraction: float,
        pin_memory: bool,
        prefetch_factor: int | None,
    ):
        self.stream, self.num_workers, self.max_bad_fraction = stream, num_workers, max_bad_fraction
        self.bad = BadSamples(max_bad_fraction)
        self._pin_memory, self._prefetch = pin_memory, prefetch_factor
        counts, limit = stream.counts, stream.max_images
        self.num_samples = (
            None if not stream.source.local else min(sum(counts), limit if limit is not None else sum(counts))
        )
        self.classes = getattr(stream.source, "classes", ())

    def __len__(self) -> int:
        if self.num_samples is None:
            raise TypeError("the number of samples in remote shards is not known")
        first, last = self.stream.span()
        return -(-(last - first) // self.stream.batch_size)

    def __iter__(self) -> Iterator[dict]:
        self.bad = BadSamples(self.max_bad_fraction)
        for batch, seen, faults in _torch_loader(self.stream, self.num_workers, 0, self._pin_memory, self._prefetch):
            self.bad.add(seen, faults)
            for kind, key in faults:
                if kind in SHARD_FAULTS:
                    raise broken_shard(kind, key, self.bad.seen - 1)
            self.bad.check()
            if batch is not None:
                yield batch
        self.bad.check(final=True)
        if self.num_samples is not None:
            first, last = self.stream.span()
            if self.bad.seen != last - first:
                name = self.stream.source.name
                raise DataError(f"{name}: {self.bad.seen} samples read where {last - first} were counted at the start")
