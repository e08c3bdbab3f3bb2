"""Features of training pictures that are cut and mirrored anew each time, for a linear probe."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor

from muse.data.crops import RandomCrop
from muse.data.records import Record, Source
from muse.data.samples import SampleMaker
from muse.data.shards import check_enough
from muse.data.train import StreamSpec, TrainLoader
from muse.errors import ConfigError, DataError
from muse.evaluation import measurement
from muse.evaluation.frozen_features import FeatureSet
from muse.evaluation.measurement import Setup
from muse.evaluation.probed_network import ProbedNetwork
from muse.utils.distributed import all_rows, process_index, world_size


class ChosenSource:
    """A local source with some of its samples only.

    Args:
        source: all samples.
        counts: how many each shard holds.
        wanted: bool for every place in the source.
    """

    local = True

    def __init__(self, source: Source, counts: list[int], wanted: numpy.ndarray):
        self.source, self.wanted = source, wanted
        self.name, self.one_per_shard = source.name, source.one_per_shard
        starts = numpy.cumsum([0, *counts])[:-1].tolist()
        self.starts = dict(zip(source.shards, starts, strict=True))
        counts_wanted = numpy.add.reduceat(wanted, starts)
        self.shards = [s for s, n in zip(source.shards, counts_wanted, strict=True) if n]

    def read(self, shard: str) -> Iterator[Record]:
        """The chosen samples of a shard."""
        for place, record in enumerate(self.source.read(shard), self.starts[shard]):
            if self.wanted[place]:
                yield record


@dataclass(frozen=True)
class AugmentedFeatures:
    """Training batches for `train_linear_probe`, computed as they are asked for.

    Every process computes its part of a batch and gets the whole. With several processes or loader
    workers the shards are shared out among them, as in training, so that the order of samples
    depends on their number.

    Args:
        setup: which data; how many pictures at a time run through the network, and its precision.
        network: what is probed.
        train: the stored features, whose rows `train_linear_probe` speaks of.
        augmentation: how pictures are cut; its square gets the size of the measured pictures.
    """

    setup: Setup
    network: ProbedNetwork
    train: FeatureSet
    augmentation: RandomCrop

    def __call__(self, rows: Tensor, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless (features (batch_size, C), labels (batch_size,)) of these rows of `train`."""
        rank, world = process_index(), world_size()
        share = batch_size // world + (rank < batch_size % world)
        features, labels, count = [], [], 0
        for batch in self._loader(self.train.indices[rows.numpy()], seed):
            features.append(self._features(batch))
            labels.append(batch["labels"])
            count += len(batch["labels"])
            while count >= share:
                ready, known = torch.cat(features), torch.cat(labels)
                yield self._together(ready[:share]), self._together(known[:share])
                features, labels, count = [ready[share:]], [known[share:]], count - share

    @staticmethod
    def _together(rows: Tensor) -> Tensor:
        return all_rows(rows) if world_size() > 1 else rows

    def _loader(self, places: numpy.ndarray, seed: int) -> TrainLoader:
        setup = self.setup
        stream = measurement.eval_data(setup, "train", ("images", "labels")).stream
        if not stream.source.local:
            raise ConfigError(
                f"{stream.source.name}: augmented pictures are drawn from local data, not from a "
                "stream; --augment no trains on stored features"
            )
        wanted = numpy.zeros(sum(stream.counts), bool)
        wanted[places] = True
        source, workers = ChosenSource(stream.source, stream.counts, wanted), setup.workers()
        check_enough(len(source.shards), world_size(), workers, source.name)
        size = setup.picture_crop().crop_size
        if size is None:
            raise ConfigError("augmented pictures need a size: --crop N, or --augment no")
        spec = StreamSpec(
            sources=(source,),
            weights=(1.0,),
            maker=SampleMaker(replace(self.augmentation, crop_size=size), ("images", "labels")),
            batch_size=setup.images_at_a_time(),
            seed=seed,
            rank=process_index(),
            world=world_size(),
            workers=max(1, workers),
            shuffle_buffer=setup.cfg.dataset.params.shuffle_buffer,
        )
        limit, pinned = setup.cfg.dataset.max_bad_fraction, setup.device.startswith("cuda")
        return TrainLoader(spec, workers, limit, pinned)

    @torch.no_grad()
    def _features(self, batch: dict) -> Tensor:
        with self.setup.autocast():
            features = self.network.vectors(batch["images"])
        if not torch.isfinite(features).all():
            raise DataError(f"features of {batch['keys'][0]} and its batch contain NaN or infinity")
        return features
