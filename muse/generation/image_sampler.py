"""Pictures by number: picture i depends on the seed and i, not on the batch or the process.

Its noise and its random label come from a Philox stream with the key (seed, i). Blocks of `batch`
consecutive numbers are shared out over the processes whole, so that with one batch size the bits
are the same on any number of processes; another batch size changes roundings of floats alone.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from muse.errors import ConfigError
from muse.generation.flow import VelocityField
from muse.generation.generator import Generator
from muse.generation.latent_tokenizer import LatentTokenizer
from muse.generation.sampler import noise_for, sample

# Far from the counters of an image's noise in the same stream.
_LABELS = 1 << 64


def blocks(count: int, batch: int, rank: int = 0, world: int = 1) -> Iterator[range]:
    """This process's blocks of the numbers 0 ... count - 1."""
    for first in range(rank * batch, count, world * batch):
        yield range(first, min(first + batch, count))


def labels_for(
    seed: int, indices: Sequence[int], wanted: str | Sequence[int], num_classes: int
) -> Tensor:
    """Labels of the images `indices`, (len(indices),) int64.

    Args:
        seed: of the drawn ones.
        indices: the images' numbers.
        wanted: "all" goes round the classes, so that each has as many images as the others;
            "random" draws; or the classes to go round.
        num_classes: of the generator.

    Raises:
        ConfigError: a label that is no class.
    """
    if wanted == "random":
        return torch.tensor([_drawn(seed, index, num_classes) for index in indices])
    classes = range(num_classes) if wanted == "all" else list(wanted)
    wrong = [label for label in classes if not 0 <= label < num_classes]
    if wrong or not classes:
        raise ConfigError(
            f"label {wrong[0] if wrong else '(none)'}: this generator's classes are 0 to "
            f"{num_classes - 1}"
        )
    return torch.tensor([classes[index % len(classes)] for index in indices])


def _drawn(seed: int, index: int, num_classes: int) -> int:
    stream = numpy.random.Philox(key=(int(seed) << 64) | int(index), counter=_LABELS)
    return int(numpy.random.Generator(stream).integers(num_classes))


class ImageSampler:
    """Pictures of a generator.

    Args:
        generator: the network and its statistics, on the device.
        tokenizer: decodes; the one whose latents the generator learned.
        options: of `sample`: steps, method, shift, cfg_scale, cfg_interval, cfg_channels.
        seed: of all pictures.
        size: side of the pictures; None is the decoder's own.
        autocast: precision of network and decoder where it is not float32.
        guide: a weaker network, for autoguidance.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: LatentTokenizer,
        options: dict[str, Any],
        seed: int = 0,
        size: int | None = None,
        autocast: torch.dtype | None = None,
        guide: VelocityField | None = None,
    ):
        self.generator, self.tokenizer, self.seed, self.guide = generator, tokenizer, seed, guide
        self.options = {**options, "cfg_interval": tuple(options["cfg_interval"])}
        channels, limit = self.options.get("cfg_channels"), generator.net.latent_shape[0]
        if channels is not None and not 1 <= channels <= limit:
            raise ConfigError(f"cfg_channels must be 1 to {limit}, got {channels}")
        self.size = None if size is None else (size, size)
        self.device = generator.net.pos_embed.device
        self.autocast = autocast

    def latents(self, indices: Sequence[int], labels: Tensor) -> Tensor:
        """Latents of the images `indices` as the tokenizer decodes them, (B, C, h, w)."""
        net = self.generator.net
        noise = noise_for(self.seed, indices, net.latent_shape).to(self.device)
        with self._precision():
            made = sample(net, noise, labels.to(self.device), guide=self.guide, **self.options)
        return self.generator.statistics.denormalise(made)

    def images(self, indices: Sequence[int], labels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of the images `indices`."""
        return self.decode(self.latents(indices, labels))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> pictures (B, 3, H, W) in [0, 1]."""
        with self._precision():
            return self.tokenizer.decode(latents, self.size)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)
