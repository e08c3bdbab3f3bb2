"""What a run needs of the machine: the accelerator as configured, and stop signals heard by every process."""

import os
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig

from muse.errors import ConfigError


def build_accelerator(cfg: DictConfig) -> Any:
    """accelerate's `Accelerator`: one process, DDP or FSDP, as the launcher says; precision from the configuration."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    unused = cfg.training.find_unused_parameters
    if unused is None:
        unused = leaves_tensors_unused(cfg)
    handler = DistributedDataParallelKwargs(find_unused_parameters=unused, broadcast_buffers=False)
    tracker = cfg.experiment.tracker
    if tracker != "none" and find_spec(tracker) is None:
        raise ConfigError(
            f"experiment.tracker={tracker} needs the package {tracker}: pip install {tracker}"
        )
    accelerator = Accelerator(
        mixed_precision=cfg.training.mixed_precision,
        kwargs_handlers=[handler],
        log_with=None if tracker == "none" else tracker,
        project_dir=cfg.experiment.output_dir,
    )
    if (
        os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        and accelerator.num_processes > 1
    ):
        _shard(accelerator)
    return accelerator


def _shard(accelerator: Any) -> None:
    """What FSDP needs beyond accelerate: version 2, and processes on CPUs too, which accelerate would silently give DDP."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = accelerator.state
    if (
        accelerator.device.type == "cpu"
    ):  # torch shards over gloo as well; this is how the tests try it
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = PartialState().distributed_type = (
            DistributedType.FSDP
        )  # the one is refreshed from the other
    if state.fsdp_plugin.fsdp_version != 2:
        raise ConfigError(
            "FSDP of version 1 cannot mix frozen and trained tensors here: set fsdp_version: 2, as in "
            "configs/accelerate/fsdp.yaml"
        )


def leaves_tensors_unused(cfg: DictConfig) -> bool:
    """Whether some tensor that learns may get no gradient, which DDP must be told of.

    A loss that reads the last block alone leaves W_Q, W_K or W_ITC of the others without one (docs/fidelity.md, row 1); so does
    a stage whose owner of a stream is switched off, or tensors that the user chose.
    """
    last = "last" in (cfg.losses.topology.blocks, cfg.losses.itc.blocks)
    structure = cfg.losses.topology.weight == 0 and cfg.model.shield_attention
    semantics = cfg.losses.itc.weight == 0 and cfg.training.stage != "topology_warmup"
    blocks_learn = cfg.training.stage != "encoder_distillation"
    return cfg.training.trainable is not None or (blocks_learn and (last or structure or semantics))
