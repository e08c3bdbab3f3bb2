"""The configuration of a multimodal training run: the model's section, data, and how it trains.

Files of this form lie in configs/umm_*. They are read as a tokenizer's (muse/config.py), and share
its sections of data, optimizer, schedule and experiment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from muse.config import load_config_as
from muse.config_fields import key, section
from muse.config_run import (
    DatasetConfig,
    ExperimentConfig,
    OptimizerConfig,
    SchedulerConfig,
    TrainingConfig,
)
from muse.errors import ConfigError
from muse.multimodal.umm_config import UMMConfig
from muse.multimodal.umm_stages import UMM_STAGES


@dataclass
class UMMTrainingConfig(TrainingConfig):
    stage: str = key("connector", "a row of muse/multimodal/umm_stages.py", choices=UMM_STAGES)
    drop_text: float = key(
        0.1,
        "share of the prompts and instructions that are replaced by the empty text, for guidance",
        least=0,
    )


@dataclass
class UMMSamplingConfig:
    steps: int = key(20, "of the solver, for the pictures of generate_every", least=1)
    guidance_scale: float = key(4.5, "1: no guidance", least=0)


@dataclass
class UMMRunConfig:
    model: UMMConfig = section(UMMConfig)
    dataset: DatasetConfig = section(
        DatasetConfig, "sources are {urls: ..., kind: image | edit | question, weight: ...}"
    )
    optimizer: OptimizerConfig = section(OptimizerConfig)
    lr_scheduler: SchedulerConfig = section(SchedulerConfig)
    training: UMMTrainingConfig = section(UMMTrainingConfig)
    sampling: UMMSamplingConfig = section(UMMSamplingConfig)
    experiment: ExperimentConfig = section(ExperimentConfig)


def load_umm_config(path: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """`muse.config.load_config` for a multimodal run: the same files, overrides and errors."""
    cfg = load_config_as(UMMRunConfig, path, overrides)
    if cfg.training.drop_text > 1:
        raise ConfigError(f"training.drop_text must be 0 to 1, got {cfg.training.drop_text}")
    crop = cfg.dataset.preprocessing
    if crop.crop_size > crop.resize_shorter_edge:
        raise ConfigError(
            f"dataset.preprocessing.crop_size={crop.crop_size} is larger than "
            f"resize_shorter_edge={crop.resize_shorter_edge}"
        )
    return cfg
