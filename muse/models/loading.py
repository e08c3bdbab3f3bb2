"""One function that opens whatever a user calls a checkpoint."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from muse.config import model_config, plain
from muse.errors import CheckpointError
from muse.models.muse_vit import MUSE_ViT
from muse.models.pretrained import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_weights,
    read_model_config,
    read_weights,
)
from muse.models.release_weights import load_release_checkpoint
from muse.utils.checkpoints import latest_checkpoint

log = logging.getLogger(__name__)

EMA_FILE = "ema.safetensors"


def weights_file(checkpoint: str | Path) -> Path:
    """The file whose weights `load_model` would use (for its hash): EMA weights where a training checkpoint has them."""
    path = Path(checkpoint).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint")
    for name in (EMA_FILE, WEIGHTS_FILE):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"{path}: holds neither {WEIGHTS_FILE} nor {EMA_FILE}, so it is no checkpoint of MUSE"
    )


def load_model(checkpoint: str | Path, config: Any, device: str | torch.device = "cpu") -> MUSE_ViT:
    """A model in eval mode from a `save_pretrained` directory, a training `checkpoint-N`, a `.safetensors` or the authors' file.

    config: the `model` section. A directory brings its own: one that contradicts it in size, or in a key that changes
    outputs, is a `CheckpointError`.
    """
    model, own = _open(checkpoint, config)
    if own is not None:
        for key in ("routing", "join_semantics"):
            if own[key] != model.config[key]:
                raise CheckpointError(
                    f"{checkpoint}: was trained with model.{key}={own[key]}, the configuration says "
                    f"{model.config[key]}, which changes its outputs; pass model.{key}={own[key]}"
                )
    return model.to(device).eval()


def initial_model(cfg: DictConfig) -> MUSE_ViT:
    """The student a training run starts from: `experiment.init_from` (another run, or any checkpoint), or the backbones' sources.

    A run's directory stands for its `final` weights, else for its newest checkpoint.
    """
    source = cfg.experiment.init_from
    if source is None:
        return MUSE_ViT(cfg.model)
    path = Path(source).expanduser()
    if (path / "final").is_dir():
        path = path / "final"
    elif path.is_dir() and not (path / WEIGHTS_FILE).is_file():
        path = latest_checkpoint(path) or path
    if not path.exists():
        raise CheckpointError(
            f"experiment.init_from={source}: no such checkpoint; run the stage before this one, or set "
            "experiment.init_from to its output directory"
        )
    model, _ = _open(path, cfg.model)
    modules = Counter(name.split(".")[0] for name in model.state_dict())
    log.info(
        "starting from %s: %s",
        path,
        ", ".join(f"{name} {count}/{count}" for name, count in modules.items()),
    )
    return model


def _open(checkpoint: str | Path, config: Any) -> tuple[MUSE_ViT, dict[str, Any] | None]:
    """The model with the user's configuration and the checkpoint's weights, and the checkpoint's own model section, if any."""
    file = weights_file(checkpoint)
    state = read_weights(file) if file.suffix == ".safetensors" else {}
    if not state or any(name.endswith("encoder.embeddings.class_embedding") for name in state):
        return load_release_checkpoint(file, config), None
    if (
        file.name == EMA_FILE
    ):  # only what a stage trains has a running mean; the rest is the model's own
        state = {**read_weights(file.parent / WEIGHTS_FILE), **state}
    config, own = model_config(config), None
    if (file.parent / CONFIG_FILE).is_file():
        own = read_model_config(file.parent)
        _check_sizes(own, config, file.parent)
        if (own["routing"] == "shared") != (config.routing == "shared"):
            raise CheckpointError(
                f"{checkpoint}: was trained with model.routing={own['routing']}, whose blocks hold other tensors than "
                f"those of model.routing={config.routing}; pass model.routing={own['routing']}"
            )
        # Encoder and decoder as they were built, so that their sources need not be read again.
        config = {**plain(config), "encoder": own["encoder"], "decoder": own["decoder"]}
    model = MUSE_ViT(config, load_backbones=False)
    load_weights(model, state, str(checkpoint))
    return model, own


def _check_sizes(own: dict[str, Any], config: DictConfig, where: Path) -> None:
    for key in ("dim", "num_heads", "num_blocks", "unshuffle", "latent_dim", "semantic_dim"):
        if own.get(key) != config[key]:
            raise CheckpointError(
                f"{where}: a checkpoint of another size: its model.{key} is {own.get(key)}, the configuration "
                f"says {config[key]}"
            )
    for part in ("encoder", "decoder"):
        for key, value in plain(config[part].config).items():
            mine = own[part]["config"].get(key, value)
            if (
                isinstance(value, (int, list))
                and not isinstance(value, bool)
                and _sides(mine) != _sides(value)
            ):
                raise CheckpointError(
                    f"{where}: a checkpoint of another size: its model.{part}.config.{key} is {mine}, the "
                    f"configuration says {value}"
                )


def _sides(value: Any) -> Any:
    """Sizes given as one number or as a pair compare equal."""
    return [value, value] if isinstance(value, int) else value
