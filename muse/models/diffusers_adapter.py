"""MUSE_ViT with the interface of diffusers' autoencoders, for its pipelines and training scripts.

There pixels are in [-1, 1], and one cell of the latent is as many pixels as the decoder enlarges it
to. MUSE-1B reads 224 pixels where its decoder gives 256: `encode` resizes, so that what it encodes
comes back in its own size.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from typing_extensions import Self

from muse.models.muse_vit import MUSE_ViT


@dataclass
class EncodedLatents(BaseOutput):
    """What `encode` gives; `latent` is AutoencoderDC's name of `latents`."""

    latents: Tensor  # (B, C, h, w)
    latent_dist: Any = None  # as AutoencoderKL's, where it was asked for

    @property
    def latent(self) -> Tensor:
        return self.latents


class PointDistribution:
    """AutoencoderKL's `latent_dist` of a deterministic encoder: its sample is its mean."""

    def __init__(self, mean: Tensor):
        self.mean, self.std = mean, torch.zeros_like(mean)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.mean

    def mode(self) -> Tensor:
        return self.mean


class MuseAutoencoder(nn.Module):
    """A drop-in for `vae` in diffusers' pipelines.

    Args:
        model: a `MUSE_ViT`.
        scaling_factor: what pipelines multiply latents by: one over their standard deviation over
            your data, which `extract_latents.py` measures. The factor in the decoder's own
            configuration belongs to DC-AE's latents and is not used.
        latent_dist: also give `encode(...).latent_dist`, as AutoencoderKL does.
    """

    def __init__(self, model: MUSE_ViT, scaling_factor: float = 1.0, latent_dist: bool = False):
        super().__init__()
        if scaling_factor <= 0:
            raise ValueError(f"scaling_factor must be above 0, got {scaling_factor}")
        self.model, self.latent_dist = model, latent_dist
        stages = list(model.decoder_fields["decoder_block_out_channels"])
        self.scale = 2 ** (len(stages) - 1)  # pixels of one latent cell, on the decoder's side
        self.config = FrozenDict(
            scaling_factor=scaling_factor,
            shift_factor=None,
            latent_channels=model.config.latent_dim,
            in_channels=3,
            out_channels=3,
            block_out_channels=stages,  # their number tells pipelines the scale
            encoder_block_out_channels=stages,
            force_upcast=False,
        )

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Self:
        """As `MUSE_ViT.from_pretrained`; `options` are those of the class."""
        return cls(MUSE_ViT.from_pretrained(source), **options)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def encode(self, x: Tensor, return_dict: bool = True) -> EncodedLatents | tuple[Tensor]:
        """x (B, 3, H, W) in [-1, 1], sides multiples of `scale` -> latents (B, C, H/s, W/s)."""
        if any(side % self.scale for side in x.shape[-2:]):
            raise ValueError(f"sides must be multiples of {self.scale}, got {tuple(x.shape[-2:])}")
        images = (x + 1) / 2
        if self.model.cell != self.scale:
            size = [side // self.scale * self.model.cell for side in x.shape[-2:]]
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True).clamp(0, 1)
        latents = self.model.encode(images).latent
        if not return_dict:
            return (PointDistribution(latents) if self.latent_dist else latents,)
        return EncodedLatents(latents, PointDistribution(latents) if self.latent_dist else None)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """z (B, C, h, w), not scaled -> `.sample` (B, 3, h*scale, w*scale), nominal [-1, 1]."""
        size = (z.shape[-2] * self.scale, z.shape[-1] * self.scale)
        sample = self.model.decode(z, size=size) * 2 - 1
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """There and back."""
        return self.decode(self.encode(sample).latents, return_dict)
