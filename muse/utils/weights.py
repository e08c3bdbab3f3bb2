"""Where pretrained weights lie: hub ids and directories, safetensors read lazily by name, JSON beside them."""

import json
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from muse.errors import CheckpointError


class TensorFiles:
    """The safetensors of a directory (single, or sharded with an index) or of one file, read lazily by name."""

    def __init__(self, source: str | Path):
        from safetensors import SafetensorError, safe_open

        path = Path(source)
        files = [path] if path.is_file() else self._files(path)
        self._handles, self._where = {}, {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file}: not a readable safetensors file ({error})"
                ) from None
            self._handles[file] = handle
            self._where.update(dict.fromkeys(handle.keys(), file))

    @staticmethod
    def _files(directory: Path) -> list[Path]:
        indices = sorted(directory.glob("*.safetensors.index.json"))
        if indices:
            names = sorted(set(read_mapping(indices[0], "weight_map").values()))
            missing = [name for name in names if not (directory / name).is_file()]
            if missing:
                raise CheckpointError(
                    f"{directory}: the index names {missing[0]}, which is missing"
                )
            return [directory / name for name in names]
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{directory}: holds no .safetensors file")
        return files

    def keys(self) -> list[str]:
        return list(self._where)

    def __getitem__(self, name: str) -> Tensor:
        return self._handles[self._where[name]].get_tensor(name)


def locate(source: str, patterns: list[str]) -> Path:
    """The local directory of `source`: itself, or its snapshot in the hub cache (downloaded when it is reachable)."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise CheckpointError(
            f"{source}: no such directory, and not a hub id of the form owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{source}: neither a local directory nor reachable on the hub ({reason}); "
            "download it once and pass its directory as the source"
        ) from None


def read_config(directory: Path) -> dict[str, Any]:
    """A directory's config.json; `CheckpointError` where there is none."""
    file = directory / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{directory}: holds no config.json")
    return read_mapping(file)


def read_mapping(file: Path, key: str | None = None) -> dict[str, Any]:
    """A JSON file's mapping, or the mapping under one key of it."""
    try:
        content = json.loads(file.read_text())
        content = content if key is None else content[key]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{file}: cannot be used ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds no mapping of names")
    return content


# What `torch.load(weights_only=True)` and safetensors raise on a file that is none of theirs: a text file, read as a pickle's
# opcodes, ends in whatever the opcode that its first letters happen to be stumbles over.
UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    EOFError,
    RuntimeError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)


def read_state_dict(path: str | Path, what: str) -> dict[str, Tensor]:
    """Name -> tensor from a `.safetensors` file, or from any other with `torch.load(weights_only=True)`.

    `what` names the weights in the message. Raises CheckpointError when the file is missing or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"weights of {what} not found: {path}")
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else (torch.load(path, map_location="cpu", weights_only=True))
        )
    except UNREADABLE as error:
        raise CheckpointError(
            f"weights of {what} cannot be read: {path} ({reason(error)})"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise CheckpointError(
            f"weights of {what}: {path} does not hold a plain state dict (name -> tensor)"
        )
    return state


def load_into(
    module: nn.Module, state: dict[str, Tensor], path: str | Path, what: str, assign: bool = False
) -> None:
    """Strict `load_state_dict`. Raises CheckpointError with the first keys that are missing, unexpected or misshapen.

    `assign=True` puts the tensors themselves in place: for a module built on the meta device.
    """
    own = module.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": sorted(
            k for k in own.keys() & state.keys() if own[k].shape != state[k].shape
        ),
    }
    told = [
        f"{len(keys)} {kind} ({keys[0]}{', ...' if len(keys) > 1 else ''})"
        for kind, keys in problems.items()
        if keys
    ]
    if told:
        raise CheckpointError(f"{path} does not hold the weights of {what}: {'; '.join(told)}")
    module.load_state_dict(state, assign=assign)


def reason(error: Exception) -> str:
    """The first line of an error, without terminal colours; its kind where it says nothing in words."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return (
        lines[0]
        if lines and " " in lines[0]
        else f"{type(error).__name__} {lines[0] if lines else ''}".strip()
    )
