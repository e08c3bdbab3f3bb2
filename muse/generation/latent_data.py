"""Latents for training: the stream of muse.data over shards of latents, normalised and with labels.

So a run of a generator resumes to the sample as one of a tokenizer does. Where mirror images were
stored, one of an image's views is drawn by (seed, epoch, key).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from muse.data.decode import BadSample
from muse.data.records import InMemory, Record
from muse.data.shards import check_enough
from muse.data.tar import TarSource
from muse.data.train import StreamSpec, TrainLoader
from muse.errors import DataError
from muse.generation.latent_shards import LatentShards
from muse.generation.latents import LatentStatistics


class StoredLatent(NamedTuple):
    """One image of a shard, or one view of it."""

    key: str
    latents: Tensor  # (V, C, h, w); (C, h, w) once a view is chosen; in the stored dtype
    label: int


@dataclass(frozen=True)
class LatentMaker:
    """In the place of a `SampleMaker`: records of latent shards to batches.

    Args:
        statistics: which normalise.
        num_classes: labels are below it; another one stops the run.
    """

    statistics: LatentStatistics
    num_classes: int

    def prepare(self, record: Record) -> StoredLatent:
        """Decode. Raises BadSample, and DataError for a label that is no class."""
        members = record.load().members
        if record.fault:
            raise BadSample(record.fault)
        try:
            content = load(members["safetensors"])
            latents, label = content["latents"], int(content["label"])
        except (KeyError, SafetensorError) as error:
            raise BadSample("bad_latents", str(error)) from error
        if not 0 <= label < self.num_classes:
            raise DataError(
                f"{record.shard}: {record.key} has the label {label}, but with "
                f"generator.num_classes={self.num_classes} labels are 0 to {self.num_classes - 1}"
            )
        return StoredLatent(record.key, latents, label)

    def finish(self, stored: StoredLatent, rng: random.Random) -> StoredLatent:
        """One of its views."""
        view = rng.randrange(len(stored.latents))
        return stored._replace(latents=stored.latents[view])

    def collate(self, samples: Sequence[StoredLatent]) -> dict:
        """latents float32 (B, C, h, w), labels (B,), keys."""
        latents = torch.stack([sample.latents for sample in samples])
        return {
            "latents": self.statistics.normalise(latents),
            "labels": torch.tensor([sample.label for sample in samples]),
            "keys": [sample.key for sample in samples],
        }


def latent_loader(
    cfg: DictConfig,
    shards: LatentShards,
    statistics: LatentStatistics,
    *,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
) -> TrainLoader:
    """Endless shuffled batches of process `rank` of `world`, of a generator's configuration.

    DataError where there are fewer shards than readers.
    """
    options = cfg.latents
    workers = max(1, options.num_workers_per_gpu)
    source = TarSource([str(shards.folder / name) for name in shards.shards])
    if not options.resampled:
        check_enough(len(source.shards), world, workers, f"{shards.folder}")
    spec = StreamSpec(
        sources=(InMemory(source) if options.cache_in_memory else source,),
        weights=(1.0,),
        maker=LatentMaker(statistics, cfg.generator.num_classes),
        batch_size=cfg.training.per_gpu_batch_size,
        seed=cfg.training.seed,
        rank=rank,
        world=world,
        workers=workers,
        shuffle_buffer=options.shuffle_buffer,
        resampled=options.resampled,
    )
    return TrainLoader(spec, options.num_workers_per_gpu, 0.0, pin_memory)
