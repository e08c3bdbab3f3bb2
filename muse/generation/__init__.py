"""Images generated in the tokenizer's latent space: network, flow, sampler and latents on disk."""

from muse.generation.flow import FlowLoss, flow_loss, sample_times, shift_time
from muse.generation.latent_shards import LatentRecord, LatentShards
from muse.generation.latents import LatentStatistics
from muse.generation.lightningdit import LightningDiT
from muse.generation.sampler import noise_for, sample, time_grid

__all__ = [
    "FlowLoss",
    "LatentRecord",
    "LatentShards",
    "LatentStatistics",
    "LightningDiT",
    "flow_loss",
    "noise_for",
    "sample",
    "sample_times",
    "shift_time",
    "time_grid",
]
