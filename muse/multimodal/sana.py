"""SANA: diffusers' `SanaTransformer2DModel`, which denoises the tokenizer's latents.

A source is a hub id or a directory (of the whole pipeline, or of its transformer), or `random`.
"""

import inspect
import json
from pathlib import Path
from typing import Any

from torch import nn

from muse.config_fields import nearest
from muse.errors import ConfigError
from muse.utils.weights import TensorFiles, load_into, locate, read_config

_WEIGHTS = "diffusion_pytorch_model"
# Of a pipeline the transformer alone, in full precision: no text encoder, no autoencoder.
_PATTERNS = [
    f"{folder}{name}"
    for folder in ("", "transformer/")
    for name in (
        "config.json",
        f"{_WEIGHTS}.safetensors",
        f"{_WEIGHTS}-*.safetensors",
        f"{_WEIGHTS}.safetensors.index.json",
    )
]


def build_sana(
    source: str, config: dict[str, Any], latent_dim: int, load_weights: bool = True
) -> nn.Module:
    """`SanaTransformer2DModel` in eval mode.

    Args:
        source: hub id, directory, or "random".
        config: fields of `SanaTransformer2DModel`; empty: the source's own.
        latent_dim: channels of the tokenizer's latents, which SANA must take and give.
        load_weights: False builds it from `config` alone, for a checkpoint that brings weights.

    Raises:
        ConfigError: fields that make no SANA, or one for latents of other channels.
        CheckpointError: a source that is missing or does not fit the fields.
    """
    from diffusers import SanaTransformer2DModel  # noqa: PLC0415 (slow to import)

    directory = None
    if source != "random" and (load_weights or not config):
        directory = locate(source, _PATTERNS)
        if (directory / "transformer" / "config.json").is_file():
            directory = directory / "transformer"
    known = list(inspect.signature(SanaTransformer2DModel.__init__).parameters)[1:]
    fields = dict(config)
    if not fields and directory is not None:  # another release's file may hold more
        fields = {name: v for name, v in read_config(directory).items() if name in known}
    for name in fields:
        if name not in known:
            raise ConfigError(f"unknown key model.generator.config.{name}{nearest(name, known)}")
    try:
        generator = SanaTransformer2DModel(**fields)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise ConfigError(f"model.generator.config makes no SANA: {error}") from None
    _check(generator.config, latent_dim)
    if directory is not None and load_weights:
        files = TensorFiles(_weights(directory))
        state = {name: files[name].float() for name in files.keys()}
        load_into(generator, state, source, "SANA")
    return generator.eval()


def sana_fields(generator: nn.Module) -> dict[str, Any]:
    """Fields that build the same SANA again, as plain JSON values."""
    fields = {name: v for name, v in generator.config.items() if not name.startswith("_")}
    return json.loads(json.dumps(fields))


def _weights(directory: Path) -> Path:
    """The one file in full precision where variants lie beside it, else the directory."""
    file = directory / f"{_WEIGHTS}.safetensors"
    return file if file.is_file() else directory


def _check(config: Any, latent_dim: int) -> None:
    out = config.out_channels or config.in_channels
    if not config.in_channels == out == latent_dim:
        raise ConfigError(
            f"SANA takes latents of {config.in_channels} channels and gives {out}, but the "
            f"tokenizer's have {latent_dim}: set in_channels and out_channels in "
            "model.generator.config"
        )
    if config.patch_size != 1:
        raise ConfigError(
            f"model.generator.config.patch_size must be 1, got {config.patch_size}: MUSE's grid "
            "of latents may have odd sides"
        )
    if config.guidance_embeds:
        raise ConfigError("model.generator.config.guidance_embeds: guidance is not an input here")
