"""accelerate's `Accelerator` as a run is configured and launched: one process, DDP or FSDP."""

import os
from importlib.util import find_spec

from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
)
from omegaconf import DictConfig

from muse.errors import ConfigError


def build_accelerator(cfg: DictConfig) -> Accelerator:
    """The accelerator that the launcher's environment and the configuration ask for."""
    tracker = cfg.experiment.tracker
    if tracker != "none" and find_spec(tracker) is None:
        raise ConfigError(
            f"experiment.tracker={tracker} needs the package {tracker}: pip install {tracker}"
        )
    handler = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(
        mixed_precision=cfg.training.mixed_precision,
        kwargs_handlers=[handler],
        log_with=None if tracker == "none" else tracker,
        project_dir=cfg.experiment.output_dir,
    )
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if wanted and accelerator.num_processes > 1:
        _shard_parameters(accelerator)
    return accelerator


def find_unused_parameters(accelerator: Accelerator, cfg: DictConfig, unused: bool) -> None:
    """Tell DDP, before it wraps a model, to look for parameters that get no gradient.

    Args:
        accelerator: of the run.
        cfg: `training.find_unused_parameters` decides where it is set.
        unused: whether there are such parameters.
    """
    chosen = cfg.training.find_unused_parameters
    accelerator.ddp_handler.find_unused_parameters = unused if chosen is None else chosen


def _shard_parameters(accelerator: Accelerator) -> None:
    """What FSDP needs beyond accelerate: version 2, and CPUs, which accelerate would give DDP."""
    state = accelerator.state
    if accelerator.device.type == "cpu":  # torch shards over gloo as well; so the tests try it
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        # accelerate refreshes the one from the other
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    if state.fsdp_plugin.fsdp_version != 2:
        raise ConfigError(
            "FSDP of version 1 cannot mix frozen and trained tensors here: set fsdp_version: 2, as "
            "in configs/accelerate/fsdp.yaml"
        )
