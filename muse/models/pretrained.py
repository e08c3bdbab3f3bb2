"""Saving and loading a model as a directory: `config.json` + `model.safetensors`, the layout of the hub."""

import json
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from muse.config import plain
from muse.errors import CheckpointError
from muse.utils.io import atomic_directory

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


class PretrainedMixin:
    """`save_pretrained` and `from_pretrained` for a module with a `config` and the constructor `(config, load_backbones)`."""

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors; an existing directory is replaced only once both are whole."""
        target = Path(directory)
        with atomic_directory(target) as folder:
            write_weights(folder, self.state_dict(), self.portable_config())

    def portable_config(self) -> dict[str, Any]:
        """The configuration with encoder and decoder spelled out, so that loading needs neither hub nor source."""
        model = plain(self.config)
        sources = {part: model[part]["source"] for part in ("encoder", "decoder")}
        fields = self.encoder.config.to_diff_dict()
        for name in (
            "architectures",
            "transformers_version",
            "torch_dtype",
            "dtype",
            "model_type",
            "_name_or_path",
        ):
            fields.pop(name, None)
        for name in (
            "image_size",
            "patch_size",
        ):  # lists, whatever the library's version keeps them as
            fields[name] = list(getattr(self.encoder.config, name))
        model["encoder"] = {"source": "random", "config": fields}
        model["decoder"] = {
            "source": "random",
            "config": json.loads(json.dumps(self.decoder_fields)),
        }
        return {"model_type": "muse", "model": model, "initialised_from": sources}

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str | torch.device = "cpu") -> Self:
        """A model in eval mode from a directory or a hub id. Raises `CheckpointError` on anything that does not fit."""
        from muse.utils.weights import locate

        path = Path(source).expanduser()
        path = path if path.is_dir() else locate(str(source), [CONFIG_FILE, WEIGHTS_FILE])
        model = cls(read_model_config(path), load_backbones=False)
        load_weights(model, read_weights(path / WEIGHTS_FILE), str(path))
        return model.to(device).eval()


def read_model_config(directory: Path) -> dict[str, Any]:
    """The `model` section of a saved directory."""
    file = directory / CONFIG_FILE
    try:
        section = json.loads(file.read_text())["model"]
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: holds no {CONFIG_FILE}") from None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        section = None
    if not isinstance(section, dict):
        raise CheckpointError(f"{file}: not the {CONFIG_FILE} of a MUSE model")
    return section


def read_weights(file: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise CheckpointError(f"{file}: no such weights file")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: not a readable safetensors file ({' '.join(str(error).split())})"
        ) from None


def write_weights(
    folder: Path, state: dict[str, Tensor], config: dict[str, Any] | None = None
) -> None:
    """model.safetensors (and config.json) into an existing folder."""
    from safetensors.torch import save_file

    save_file(
        {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()},
        folder / WEIGHTS_FILE,
        metadata={"format": "pt"},
    )
    if config is not None:
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def load_weights(model: torch.nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Strict: every tensor named, every shape equal, or `CheckpointError` with the first that is not."""
    expected = model.state_dict()
    missing, unexpected = (
        sorted(expected.keys() - state.keys()),
        sorted(state.keys() - expected.keys()),
    )
    if missing or unexpected:
        first = f"missing {missing[0]}" if missing else f"unexpected {unexpected[0]}"
        raise CheckpointError(
            f"{where}: does not fit the model: {len(missing)} tensors missing, {len(unexpected)} "
            f"unexpected ({first})"
        )
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(state[name].shape)}, the model makes it "
                f"{tuple(tensor.shape)}: a checkpoint of another size"
            )
    model.load_state_dict(state)
