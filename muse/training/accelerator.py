"""accelerate's `Accelerator` as a run is configured and launched: one process, DDP or FSDP."""

import os
from importlib.util import find_spec

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
)
from omegaconf import DictConfig
from torch.distributed.fsdp import MixedPrecisionPolicy

from muse.errors import ConfigError

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


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


def sharded_precision(mixed_precision: str) -> MixedPrecisionPolicy | None:
    """FSDP's precision: 16 bits in what is gathered, float32 in what is stored and in all sums.

    accelerate's own policy would reduce gradients in 16 bits as well, and round to 16 bits the
    pixels that come in and the outputs that the losses read. Here the policy casts neither: within
    the forward pass autocast casts what is multiplied, and its outputs are made float32, both as
    under DDP (`fsdp.prepare_model`). The policy is each block's too, whose outputs stay as they
    are.
    """
    if mixed_precision == "no":
        return None
    return MixedPrecisionPolicy(
        param_dtype=HALF[mixed_precision], reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def _shard_parameters(accelerator: Accelerator) -> None:
    """What FSDP needs beyond accelerate: version 2, CPUs (accelerate would give them DDP), and a
    precision for gradients and outputs.
    """
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
    state.fsdp_plugin.mixed_precision_policy = sharded_precision(accelerator.mixed_precision)
