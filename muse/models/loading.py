"""Open whatever a user calls a checkpoint: saved directory, training checkpoint, weights file."""

import logging
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from muse.config import model_config, plain
from muse.errors import CheckpointError
from muse.models.low_precision import fill, lower_precision
from muse.models.muse_vit import MUSE_ViT
from muse.models.pretrained import CONFIG_FILE, WEIGHTS_FILE, read_model_config
from muse.models.release_weights import is_release_file, load_release_checkpoint
from muse.utils.weights import load_into, locate, packaged, read_mapping, read_state_dict

log = logging.getLogger(__name__)

EMA_FILE = "ema.safetensors"
# What the authors' training leaves in a directory, running means first.
RELEASE_FILES = ("ema_model/pytorch_model.bin", "pytorch_model.bin")
SIZES = ("dim", "num_heads", "num_blocks", "unshuffle", "latent_dim", "semantic_dim")
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of every complete checkpoint of a training run, oldest first.

    A folder that is still being written has another name.
    """
    found = [
        (int(match[1]), path)
        for path in Path(output_dir).glob("checkpoint-*")
        if (match := _CHECKPOINT.match(path.name))
    ]
    return sorted(found)


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint of a training run, or None."""
    found = checkpoints(output_dir)
    return found[-1][1] if found else None


def weights_file(checkpoint: str | Path) -> Path:
    """The file whose weights `load_model` uses: running means where the checkpoint has them."""
    path = packaged(checkpoint) or Path(checkpoint).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint")
    for name in (EMA_FILE, WEIGHTS_FILE, *RELEASE_FILES):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"{path}: holds neither {WEIGHTS_FILE} nor {EMA_FILE}, so it is no checkpoint of MUSE"
    )


def local_checkpoint(checkpoint: str | Path) -> str | Path:
    """The checkpoint as it was named; of a hub id that is no local path the downloaded directory.

    `CheckpointError` where it cannot be reached.
    """
    path = Path(checkpoint).expanduser()
    if packaged(checkpoint) or path.exists() or not _HUB_ID.fullmatch(str(checkpoint)):
        return checkpoint
    return locate(str(checkpoint), [CONFIG_FILE, WEIGHTS_FILE])


def own_config(checkpoint: str | Path) -> dict[str, Any]:
    """The `model` section that lies beside a checkpoint's weights.

    `CheckpointError` where there is none, as with the authors' file, or it is no tokenizer's.
    """
    file = weights_file(checkpoint)
    if is_release_file(file):
        raise CheckpointError(
            f"{checkpoint}: the authors' file holds no configuration; name it, such as "
            "--config muse_1b/stage3"
        )
    if not (file.parent / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{checkpoint}: no {CONFIG_FILE} beside its weights, so that its sizes are not known; "
            "name its configuration with --config"
        )
    kind = read_mapping(file.parent / CONFIG_FILE).get("model_type")
    if kind not in (None, "muse"):
        raise CheckpointError(f"{checkpoint}: no tokenizer but a model of type {kind!r}")
    return read_model_config(file.parent)


def holds_release_weights(checkpoint: str | Path) -> bool:
    """Whether `load_model` would read the authors' weights."""
    return is_release_file(weights_file(checkpoint))


def load_model(
    checkpoint: str | Path,
    config: Any,
    device: str | torch.device = "cpu",
    precision: str = "float32",
) -> MUSE_ViT:
    """A model in eval mode from any form of checkpoint.

    Args:
        checkpoint: a packaged model's name, a `save_pretrained` directory, a training
            `checkpoint-N`, a `.safetensors` file, or the authors' file or the directory that holds
            it.
        config: the `model` section.
        device: where the model goes.
        precision: `float32`, or for inference `bf16` or `int8` (muse/models/low_precision.py).

    Raises:
        CheckpointError: a directory's own configuration differs from `config` in a size, or in a
            key that changes outputs; or the weights do not fit.
    """
    model, own = _open(checkpoint, config, precision)
    if own is not None:
        for key in ("routing", "join_semantics"):
            if own[key] != model.config[key]:
                raise CheckpointError(
                    f"{checkpoint}: was trained with model.{key}={own[key]}, the configuration "
                    f"says {model.config[key]}, which changes its outputs; pass "
                    f"model.{key}={own[key]}"
                )
    return model.to(device).eval()


def initial_model(cfg: DictConfig) -> MUSE_ViT:
    """The student that a training run starts from.

    `experiment.init_from` names another run or any checkpoint; without it the weights are those of
    the backbones' sources. A run's directory stands for its `final` weights, else its newest
    checkpoint.
    """
    source = cfg.experiment.init_from
    if source is None:
        return MUSE_ViT(cfg.model)
    path = packaged(source) or Path(source).expanduser()
    if (path / "final").is_dir():
        path = path / "final"
    elif path.is_dir() and not (path / WEIGHTS_FILE).is_file():
        path = latest_checkpoint(path) or path
    if not path.exists():
        raise CheckpointError(
            f"experiment.init_from={source}: no such checkpoint; run the stage before this one, or "
            "set experiment.init_from to its output directory"
        )
    model, _ = _open(path, cfg.model)  # its weights are the process's own, not the file's pages
    modules = Counter(name.split(".")[0] for name in model.state_dict())
    log.info(
        "starting from %s: %s",
        path,
        ", ".join(f"{name} {count}/{count}" for name, count in modules.items()),
    )
    return model


def _open(
    checkpoint: str | Path, config: Any, precision: str | None = None
) -> tuple[MUSE_ViT, dict[str, Any] | None]:
    """The checkpoint's weights in a model as configured, and the checkpoint's own model section.

    precision: for inference, where the weights may stay in the file; None: for training, in memory.
    """
    file = weights_file(checkpoint)
    if is_release_file(file):
        return lower_precision(load_release_checkpoint(file, config), precision or "float32"), None
    # Only what a stage trains has a running mean.
    files = [file.parent / WEIGHTS_FILE, file] if file.name == EMA_FILE else [file]
    config, own = model_config(config), None
    if (file.parent / CONFIG_FILE).is_file():
        own = read_model_config(file.parent)
        _check_sizes(own, config, file.parent)
        if (own["routing"] == "shared") != (config.routing == "shared"):
            raise CheckpointError(
                f"{checkpoint}: was trained with model.routing={own['routing']}, whose blocks hold "
                f"other tensors than those of model.routing={config.routing}; pass "
                f"model.routing={own['routing']}"
            )
        # Encoder and decoder as they were built, so that their sources need not be read again.
        encoder = {**own["encoder"], "drop_path": config.encoder.drop_path}
        config = {**plain(config), "encoder": encoder, "decoder": own["decoder"]}
    build = partial(MUSE_ViT, config, load_backbones=False)
    if precision is not None:
        return fill(build, files, Path(checkpoint), precision), own
    model, state = build(), {}
    for part in files:
        state.update(read_state_dict(part))
    load_into(model, state, checkpoint)
    return model, own


def _check_sizes(own: dict[str, Any], config: DictConfig, where: Path) -> None:
    """`CheckpointError` at the first size in which a saved configuration differs from `config`."""
    pairs = [(f"model.{key}", own.get(key), config[key]) for key in SIZES]
    for part in ("encoder", "decoder"):
        saved = own[part]["config"]
        pairs += [
            (f"model.{part}.config.{key}", saved.get(key, value), value)
            for key, value in plain(config[part].config).items()
            if isinstance(value, (int, list)) and not isinstance(value, bool)
        ]
    for key, mine, value in pairs:
        if _sides(mine) != _sides(value):
            raise CheckpointError(
                f"{where}: a checkpoint of another size: its {key} is {mine}, the configuration "
                f"says {value}"
            )


def _sides(value: Any) -> Any:
    """Sizes given as one number or as a pair compare equal."""
    return [value, value] if isinstance(value, int) else value
