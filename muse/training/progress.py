"""How far a run is, and whether its processes do what the recipe promises."""

import logging
from dataclasses import dataclass

from omegaconf import DictConfig

from muse.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """The counters of a run: the trainer and the guard move them, every checkpoint holds them."""

    step: int = 0  # optimizer steps, skipped ones included
    images_seen: int = 0  # over all processes, without those of skipped steps
    skipped: int = 0  # steps that were not taken because a number was not finite


def check_global_batch(cfg: DictConfig, processes: int) -> None:
    """`ConfigError` unless these processes see as many images as the recipe promises."""
    training = cfg.training
    actual = training.per_gpu_batch_size * training.gradient_accumulation_steps * processes
    if training.global_batch_size not in (None, actual):
        raise ConfigError(
            f"training.global_batch_size={training.global_batch_size} but "
            f"{training.per_gpu_batch_size} per process x {training.gradient_accumulation_steps} "
            f"accumulated x {processes} processes = {actual}"
        )
    images = actual * training.max_train_steps
    if training.total_images not in (None, images):
        raise ConfigError(
            f"training.total_images={training.total_images} but {actual} a step x "
            f"{training.max_train_steps} steps = {images}"
        )
    log.info(
        "%d images a step over %d processes, %d in %d steps",
        actual,
        processes,
        images,
        training.max_train_steps,
    )
