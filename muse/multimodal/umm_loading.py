"""Open whatever a user calls a multimodal checkpoint, and the model that a run starts from.

A saved directory, a hub id, a training run's directory, or one of its checkpoints (whose running
means are taken).
"""

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from muse.errors import CheckpointError
from muse.models.loading import EMA_FILE, latest_checkpoint
from muse.models.pretrained import WEIGHTS_FILE
from muse.multimodal.umm import MUSE_UMM
from muse.multimodal.umm_config import umm_config
from muse.utils.weights import read_state_dict

log = logging.getLogger(__name__)

# Keys of the section `model` that a run takes from the checkpoint that it starts from: what the
# parts are, and the scale of the latents, which the generator has learnt.
_OF_THE_CHECKPOINT = (
    "tokenizer",
    "language_model",
    "generator",
    "text_tokenizer",
    "latent_statistics",
    "latent_factor",
)


def open_umm(
    source: str | Path,
    device: str | torch.device = "cpu",
    changes: dict[str, Any] | None = None,
) -> MUSE_UMM:
    """A model in eval mode; `CheckpointError` on anything that is no multimodal checkpoint.

    Args:
        source: see above; of a run's directory `final`, else its newest checkpoint.
        device: where the model goes.
        changes: keys of the configuration that replace the saved ones.
    """
    path = resolve_checkpoint(source)
    if path.is_file():
        raise CheckpointError(f"{source}: a file; a multimodal checkpoint is a directory")
    model = MUSE_UMM.from_pretrained(path if path.is_dir() else source, "cpu", changes)
    if (path / EMA_FILE).is_file():
        means = read_state_dict(path / EMA_FILE, "the averages")
        if unknown := sorted(means.keys() - model.state_dict().keys()):
            raise CheckpointError(f"{path / EMA_FILE}: {unknown[0]} is no tensor of the model")
        model.load_state_dict(means, strict=False)
    return model.to(device)


def resolve_checkpoint(source: str | Path) -> Path:
    """The directory that holds the weights: of a run's `final`, else its newest checkpoint."""
    path = Path(source).expanduser()
    if (path / "final").is_dir():
        return path / "final"
    if path.is_dir() and not (path / WEIGHTS_FILE).is_file():
        return latest_checkpoint(path) or path
    return path


def initial_umm(cfg: DictConfig) -> MUSE_UMM:
    """The model that a run starts from: `experiment.init_from`, else its sources."""
    source = cfg.experiment.init_from
    if source is None:
        return MUSE_UMM(cfg.model)
    own = umm_config(cfg.model)
    changes = {name: value for name, value in own.items() if name not in _OF_THE_CHECKPOINT}
    if not Path(source).expanduser().exists() and source.count("/") != 1:
        raise CheckpointError(
            f"experiment.init_from={source}: no such checkpoint; run the stage before this one, or "
            "set experiment.init_from to its output directory"
        )
    model = open_umm(source, changes=changes)
    model.tokenizer.requires_grad_(False)
    model.internvl.requires_grad_(False)
    log.info("starting from %s", source)
    return model
