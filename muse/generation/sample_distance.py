"""A cheap stand-in for gFID while a generator trains: a Fréchet distance of a few hundred samples.

Between features of samples and of decoded training latents, so that zero is as good as the
tokenizer allows. It is named after its network, never FID: few samples bias it upwards, and it
compares checkpoints of one run with one another and nothing else.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from muse.evaluation.metrics.frechet import RunningMoments, frechet_distance
from muse.generation.image_sampler import ImageSampler, blocks, labels_for
from muse.generation.latent_shards import LatentShards
from muse.utils.distributed import all_objects, process_index, world_size

BATCH = 32


class SampleDistance:
    """Distances of one set of latents to samples.

    Args:
        shards: training latents, of which `count` are decoded once.
        count: pictures of each side.
        network: images (B, 3, H, W) -> features (B, D).
    """

    def __init__(self, shards: LatentShards, count: int, network: Callable[[Tensor], Tensor]):
        self.shards, self.count, self.network = shards, min(count, len(shards)), network
        self._real: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def measure(self, sampler: ImageSampler) -> float:
        """The distance, the same on all processes, which call it together."""
        if self._real is None:
            chosen = islice(spread(self.shards, self.count), process_index(), None, world_size())
            latents = list(chosen)
            batches = [
                sampler.decode(torch.stack(latents[i : i + BATCH]).float().to(sampler.device))
                for i in range(0, len(latents), BATCH)
            ]
            self._real = self._moments(batches)
        classes = sampler.generator.net.num_classes
        parts = blocks(self.count, BATCH, process_index(), world_size())
        samples = (
            sampler.images(part, labels_for(sampler.seed, part, "random", classes))
            for part in parts
        )
        return frechet_distance(*self._real, *self._moments(samples))

    def _moments(self, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the features of all processes' pictures."""
        moments = RunningMoments()
        for images in batches:
            moments.update(self.network(images))
        width = max(all_objects(moments.dim or 0))  # a process may have had no picture
        return moments.compute(width)[1:]


def spread(shards: LatentShards, count: int) -> Iterator[Tensor]:
    """`count` latents (C, h, w), the first views, from shards that lie evenly over all."""
    names = list(shards.shards)
    used = min(len(names), count)
    chosen = [names[number * len(names) // used] for number in range(used)]
    left = count
    for place, name in enumerate(chosen):
        share = -(-left // (used - place))
        for record in islice(shards.read(name), share):
            yield record.latents[0]
            left -= 1
