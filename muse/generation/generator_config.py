"""A generator's configuration: its network, its latents, how it trains, samples and is watched.

Every fact about a key stands at its field (muse/config_fields.py). Files of this form lie in
configs/generation and are read as all others are: `base:` files, overrides, types, ranges.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from muse.config import load_config_as, plain
from muse.config_fields import key, same_key, section
from muse.config_run import ExperimentConfig, OptimizerConfig, SchedulerConfig, TrainingConfig
from muse.errors import ConfigError
from muse.generation.sampler import METHODS


@dataclass
class LightningDiTConfig:
    patch_size: int = key(1, "side of the square of latent cells that makes one token", least=1)
    hidden_size: int = key(1152, "width, a multiple of 4 x num_heads", least=1)
    depth: int = key(28, "blocks", least=1)
    num_heads: int = key(16, "attention heads", least=1)
    num_classes: int = key(1000, "labels are 0 to num_classes - 1", least=1)
    mlp_ratio: float = key(4.0, "width of a plain MLP over hidden_size; ours is gated", above=0)
    qk_norm: bool = key(False, "RMSNorm of queries and keys")
    class_dropout_prob: float = key(
        0.1, "share of training images whose label is dropped, for guidance", least=0
    )
    gradient_checkpointing: bool = key(False, "compute each block again in the backward pass")


@dataclass
class LatentsConfig:
    path: str = key("${oc.env:LATENTS_DIR}", "folder of scripts/extract_latents.py")
    shape: list[int] | None = key(
        None, "[channels, height, width] that the latents must have; null: whatever they have"
    )
    num_workers_per_gpu: int = key(4, "loader processes of each process; 0: none", least=0)
    shuffle_buffer: int = key(10000, "latents a reader shuffles among, after the shards")
    resampled: bool = key(
        False, "draw shards with replacement; a resume is then approximate, as of dataset.params"
    )
    cache_in_memory: bool = key(False, "keep latents in memory (small sets, no loader processes)")


@dataclass
class TokenizerConfig:
    checkpoint: str | None = key(
        None, "what decodes; null: the checkpoint that the latents name. Its hash must be theirs"
    )
    image_size: int | None = key(
        None, "side of decoded pictures; null: what the decoder itself gives", least=1
    )


@dataclass
class FlowConfig:
    time_mean: float = key(
        0.0, "of the logit of training times; below 0 nearer to the noise (VTP: -0.75)"
    )
    time_std: float = key(1.0, "of the logit of training times", above=0)
    shift: float = key(1.0, "of training times: the same as ln(shift) more in time_mean", above=0)
    cosine_weight: float = key(1.0, "of 1 - cosine between the velocities", least=0)


@dataclass
class SamplingConfig:
    steps: int = key(250, "of the solver", least=1)
    method: str = key("euler", "heun sees the network twice a step", choices=METHODS)
    shift: float = key(
        1.0, "of the grid of times; below 1 finer near the noise (VA-VAE: 0.3)", above=0
    )
    cfg_scale: float = key(1.0, "of guidance; 1: none")
    cfg_interval: list[float] = key([0.0, 1.0], "guided where low <= t < high")
    cfg_channels: int | None = key(None, "guide this many first channels alone; null: all")


@dataclass
class ProxyConfig:
    images: int = key(
        256,
        "samples of each eval_every for a Fréchet distance, which so few bias upwards: compare it "
        "with itself alone; 0: none",
        least=0,
    )
    network: str = key("efficientnet_lite0", "its features; any name that fd_<network> takes")
    weights: str | None = key(None, "file with that network's weights; null: its own source")
    steps: int = key(50, "of the solver, for these samples and the pictures", least=1)
    guidance: float = key(3.0, "cfg_scale of the guided rows of the pictures")


@dataclass
class GeneratorTrainingConfig:
    seed: int = same_key(TrainingConfig, "seed")
    max_train_steps: int = same_key(TrainingConfig, "max_train_steps")
    per_gpu_batch_size: int = same_key(TrainingConfig, "per_gpu_batch_size")
    global_batch_size: int | None = same_key(TrainingConfig, "global_batch_size")
    total_images: int | None = same_key(TrainingConfig, "total_images")
    gradient_accumulation_steps: int = same_key(TrainingConfig, "gradient_accumulation_steps")
    max_grad_norm: float = same_key(TrainingConfig, "max_grad_norm")
    mixed_precision: str = same_key(TrainingConfig, "mixed_precision")
    use_ema: bool = same_key(TrainingConfig, "use_ema")
    ema_decay: float = same_key(TrainingConfig, "ema_decay")
    max_skipped_steps: int = same_key(TrainingConfig, "max_skipped_steps")
    find_unused_parameters: bool | None = same_key(TrainingConfig, "find_unused_parameters")
    compile: bool = key(False, "torch.compile of the network")


@dataclass
class GeneratorConfig:
    generator: LightningDiTConfig = section(LightningDiTConfig)
    latents: LatentsConfig = section(LatentsConfig)
    tokenizer: TokenizerConfig = section(TokenizerConfig)
    flow: FlowConfig = section(FlowConfig)
    sampling: SamplingConfig = section(SamplingConfig, "what scripts/generate.py does unless told")
    evaluation: ProxyConfig = section(ProxyConfig, "while it trains")
    optimizer: OptimizerConfig = section(OptimizerConfig)
    lr_scheduler: SchedulerConfig = section(SchedulerConfig)
    training: GeneratorTrainingConfig = section(GeneratorTrainingConfig)
    experiment: ExperimentConfig = section(ExperimentConfig)


def load_generator_config(path: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """`muse.config.load_config` for a generator: the same files, overrides and errors."""
    cfg = load_config_as(GeneratorConfig, path, overrides)
    net, interval = cfg.generator, cfg.sampling.cfg_interval
    if net.hidden_size % (4 * net.num_heads):
        raise ConfigError(
            f"generator.hidden_size={net.hidden_size} is not a multiple of 4 x "
            f"generator.num_heads={net.num_heads}"
        )
    if net.class_dropout_prob >= 1:
        raise ConfigError("generator.class_dropout_prob must be below 1: no class would be learned")
    if len(interval) != 2 or not interval[0] <= interval[1]:
        raise ConfigError(
            f"sampling.cfg_interval must be two ascending times, got {plain(interval)}"
        )
    check_shape(cfg.latents.shape)
    return cfg


def check_shape(shape: Any) -> None:
    """`ConfigError` unless `latents.shape` is null or three positive sizes."""
    if shape is not None and (len(shape) != 3 or min(shape) < 1):
        raise ConfigError(
            f"latents.shape must be [channels, height, width] or null, got {plain(shape)}"
        )
