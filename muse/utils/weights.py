"""Weights of other networks and of this one: where a source lies, how it is read, how it is loaded.

A source is a hub id (owner/name) or a local directory that holds config.json beside .safetensors
files. Every file is read without running code from it, and every load is strict: a tensor that is
missing, unexpected or misshapen stops with one line that names it.
"""

import hashlib
import json
import logging
import os
import pickle
import re
import struct
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor, nn

from muse.config import nearest
from muse.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

# Trained models that are installed with muse (docs/muse_tiny.md); `./NAME` is a local directory.
PACKAGED = Path(__file__).parents[1] / "pretrained"
# What is fetched of a source: its configuration and weights, never code or pickles.
SOURCE_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
# What `torch.load(weights_only=True)` and safetensors raise on a foreign file: read as a pickle, a
# text is a row of opcodes, and what they stumble over can be nearly anything.
_UNREADABLE = (
    safetensors.SafetensorError,
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


# ------------------------------------------------------------------------------------------ sources
def packaged(name: str | Path) -> Path | None:
    """The directory of a model that comes with muse, such as `muse_tiny`; None for another name."""
    path = PACKAGED / str(name)
    return path if str(name).isidentifier() and path.is_dir() else None


def locate(source: str, patterns: Sequence[str] = SOURCE_FILES) -> Path:
    """The local directory of `source`: a packaged model, itself, a copy under CHECKPOINT_DIR, or
    the hub's snapshot.

    A hub id is downloaded when it can be reached. Raises CheckpointError where it is none of them.
    """
    path = packaged(source) or Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise CheckpointError(
            f"{source}: no such directory, and not a hub id of the form owner/name"
        )
    if copy := copy_of(source):
        return copy
    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{source}: neither a local directory nor reachable on the hub ({_reason(error)}); "
            "download it once and pass its directory as the source"
        ) from None


def copy_of(source: str, file: str = "config.json") -> Path | None:
    """The directory `$CHECKPOINT_DIR/NAME` of the hub id OWNER/NAME, or None where there is none.

    The authors' scripts keep their downloads there. Their InternVL3 has the original layout, and
    its name lacks the `-hf` of transformers' layout.

    file: what the directory must hold.
    """
    root, (_, slash, name) = os.environ.get("CHECKPOINT_DIR"), source.partition("/")
    if not (root and slash) or "/" in name or ":" in source:
        return None
    for folder in (name, name.removesuffix("-hf")):
        path = Path(root).expanduser() / folder
        if (path / file).is_file():
            log.info("%s: read from %s", source, path)
            return path
    return None


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


def refuse_unknown(fields: Iterable[str], known: Collection[str], key: str) -> None:
    """`ConfigError` for a field that the configuration section `key` does not know."""
    for name in fields:
        if name not in known:
            raise ConfigError(f"unknown key {key}.{name}{nearest(name, known)}")


class TensorFiles:
    """The safetensors of a directory (single, or sharded with an index) or of one file.

    Files are memory-mapped and tensors read by name when asked for, so that a vision tower costs no
    more than its own bytes in a directory that also holds a language model.
    """

    def __init__(self, source: str | Path):
        path = Path(source)
        files = [path] if path.is_file() else self._files(path)
        self._handles, self._where = {}, {}
        for file in files:
            try:
                handle = safetensors.safe_open(file, framework="pt")
            except (safetensors.SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file}: not a readable safetensors file ({_reason(error)})"
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


# -------------------------------------------------------------------------------------- state dicts
def read_state_dict(
    path: str | Path, what: str = "the model", wrappers: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Name -> tensor from a `.safetensors` file, or else with `torch.load(weights_only=True)`.

    Args:
        path: the file.
        what: whose weights they are, for the message.
        wrappers: keys under which a file may hold the state dict, outermost first.

    Raises:
        CheckpointError: the file is missing, unreadable, or holds no state dict.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"weights of {what} not found: {path}")
    is_safetensors = path.suffix == ".safetensors"
    try:
        if is_safetensors:
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        expected = (
            "a readable safetensors file"
            if is_safetensors
            else "a checkpoint that loads with weights_only=True"
        )
        raise CheckpointError(
            f"weights of {what} cannot be read: {path}: not {expected} ({_reason(error)})"
        ) from error
    for wrapper in wrappers:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(one, Tensor) for one in state.values()):
        raise CheckpointError(f"weights of {what}: {path} holds no mapping of names to tensors")
    return state


def load_into(
    module: nn.Module,
    state: dict[str, Tensor],
    path: str | Path,
    what: str = "the model",
    assign: bool = False,
) -> None:
    """`load_state_dict` that asks for every tensor, no other, and equal shapes.

    Args:
        module: what is filled.
        state: name -> tensor.
        path: where `state` came from, for the message.
        what: whose weights were expected, for the message.
        assign: put the tensors themselves in place, for a module built on the meta device.

    Raises:
        CheckpointError: with the first tensor that is missing, unexpected or misshapen.
    """
    own = module.state_dict()
    problems = [
        *_count("missing", sorted(own.keys() - state.keys())),
        *_count("unexpected", sorted(state.keys() - own.keys())),
        *_misshapen(own, state),
    ]
    if problems:
        raise CheckpointError(f"{path} does not hold the weights of {what}: {'; '.join(problems)}")
    module.load_state_dict(state, assign=assign)


def _count(kind: str, names: list[str]) -> list[str]:
    if not names:
        return []
    if len(names) == 1:
        return [f"1 {kind} tensor ({names[0]})"]
    return [f"{len(names)} {kind} tensors (the first is {names[0]})"]


def _misshapen(own: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    for name, tensor in own.items():
        if name in state and state[name].shape != tensor.shape:
            return [
                f"{name} has shape {tuple(state[name].shape)}, the model makes it "
                f"{tuple(tensor.shape)}: a checkpoint of another size"
            ]
    return []


def state_sha256(module: nn.Module) -> str:
    """SHA-256 over the names and bytes of a module's tensors, in the order of the names."""
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def _reason(error: Exception, limit: int = 200) -> str:
    """The first line of an error without terminal colours; its class where it says no sentence."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    if lines and " " in lines[0]:
        return lines[0][:limit]
    return f"{type(error).__name__} {lines[0] if lines else ''}".strip()[:limit]
