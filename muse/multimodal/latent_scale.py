"""Between the tokenizer's latents and those that SANA denoises, of mean 0 and deviation 1.

The two tables are buffers, so that they travel with every checkpoint of the model.
"""

import torch
from torch import Tensor, nn

from muse.errors import ConfigError
from muse.generation.latents import LatentStatistics


class LatentScale(nn.Module):
    """(z - mean) / std by channel, and back.

    Until statistics are set the deviation is NaN: nothing can be generated or learnt by accident
    with latents of an unknown size.

    Args:
        channels: of the latents.
        factor: one number to multiply latents with instead of statistics (UniLIP).
    """

    def __init__(self, channels: int, factor: float | None = None):
        super().__init__()
        std = float("nan") if factor is None else 1 / factor
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.full((channels, 1, 1), std))

    def set_statistics(self, statistics: LatentStatistics) -> None:
        """Take over mean and deviation. `ConfigError` unless they are by channel and of as many."""
        if statistics.kind != "channel":
            raise ConfigError(
                f"latent statistics must be by channel, since pictures of every size are "
                f"generated; these are by {statistics.kind}"
            )
        if statistics.mean.shape != self.mean.shape:
            raise ConfigError(
                f"latent statistics of {len(statistics.mean)} channels, but the tokenizer's "
                f"latents have {len(self.mean)}"
            )
        self.mean.copy_(statistics.mean)
        self.std.copy_(statistics.std)

    def require(self) -> None:
        """`ConfigError` where neither statistics nor a factor were given."""
        if not torch.isfinite(self.std).all():
            raise ConfigError(
                "the scale of the latents is not known: set model.latent_statistics to the "
                "statistics of the tokenizer's latents (or model.latent_factor)"
            )

    def normalise(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) as the tokenizer gives them -> float32 for SANA."""
        return (latents.float() - self.mean) / self.std

    def denormalise(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) as SANA leaves them -> float32 as the tokenizer decodes them."""
        return latents.float() * self.std + self.mean
