"""A saved model: a directory with `config.json` and `model.safetensors`, as on the hub."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import Self

from muse.config import plain
from muse.errors import CheckpointError
from muse.models.internvit import encoder_fields
from muse.utils.io import atomic_directory
from muse.utils.weights import load_into, locate, read_mapping, read_state_dict

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


class PretrainedMixin:
    """`save_pretrained` and `from_pretrained`, for a class built by `(config, load_backbones)`."""

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, or leave an old directory as it is."""
        with atomic_directory(directory) as folder:
            write_weights(folder, self.state_dict(), self.portable_config())

    def portable_config(self) -> dict[str, Any]:
        """The configuration with encoder and decoder spelled out: loading needs no source."""
        model = plain(self.config)
        sources = {part: model[part]["source"] for part in ("encoder", "decoder")}
        fields = {
            "encoder": encoder_fields(self.encoder),
            "decoder": json.loads(json.dumps(self.decoder_fields)),  # tuples become lists
        }
        for part, config in fields.items():
            model[part] = {**model[part], "source": "random", "config": config}
        return {"model_type": "muse", "model": model, "initialised_from": sources}

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str | torch.device = "cpu") -> Self:
        """A model in eval mode from a directory or a hub id; `CheckpointError` where it does not
        fit.
        """
        path = locate(str(source), [CONFIG_FILE, WEIGHTS_FILE])
        model = cls(read_model_config(path), load_backbones=False)
        load_into(model, read_state_dict(path / WEIGHTS_FILE), path)
        return model.to(device).eval()


def read_model_config(directory: Path) -> dict[str, Any]:
    """The `model` section of a saved directory."""
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"{directory}: holds no {CONFIG_FILE}")
    try:
        return read_mapping(file, "model")
    except CheckpointError:
        raise CheckpointError(f"{file}: not the {CONFIG_FILE} of a MUSE model") from None


def write_weights(
    folder: Path, state: dict[str, Tensor], config: dict[str, Any] | None = None
) -> None:
    """model.safetensors (and config.json) into a folder that `atomic_directory` has made."""
    save_tensors(folder / WEIGHTS_FILE, state)
    if config is not None:
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def save_tensors(file: Path, state: dict[str, Tensor]) -> None:
    """One safetensors file, as the hub's tools expect it."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    save_file(tensors, file, metadata={"format": "pt"})
