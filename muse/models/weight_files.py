"""Reading a file of weights: one function, one kind of error, nothing but tensors."""
import hashlib
import pickle
import re
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from muse.errors import CheckpointError

# What `torch.load(weights_only=True)` and safetensors raise on a file that is none of theirs: a text file, read as a pickle's
# opcodes, ends in whatever the opcode that its first letters happen to be stumbles over.
UNREADABLE = (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, OSError, ValueError, LookupError, TypeError,
              AttributeError, AssertionError, struct.error)


def read_state_dict(path: str | Path, what: str) -> dict[str, Tensor]:
    """Name -> tensor from a `.safetensors` file, or from any other with `torch.load(weights_only=True)`.

    `what` names the weights in the message. Raises CheckpointError when the file is missing or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"weights of {what} not found: {path}")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else (
            torch.load(path, map_location="cpu", weights_only=True))
    except UNREADABLE as error:
        raise CheckpointError(f"weights of {what} cannot be read: {path} ({reason(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"weights of {what}: {path} does not hold a plain state dict (name -> tensor)")
    return state


def load_into(module: nn.Module, state: dict[str, Tensor], path: str | Path, what: str, assign: bool = False) -> None:
    """Strict `load_state_dict`. Raises CheckpointError with the first keys that are missing, unexpected or misshapen.

    `assign=True` puts the tensors themselves in place: for a module built on the meta device.
    """
    own = module.state_dict()
    problems = {"missing": sorted(own.keys() - state.keys()), "unexpected": sorted(state.keys() - own.keys()),
                "of another shape": sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)}
    told = [f"{len(keys)} {kind} ({keys[0]}{', ...' if len(keys) > 1 else ''})"
            for kind, keys in problems.items() if keys]
    if told:
        raise CheckpointError(f"{path} does not hold the weights of {what}: {'; '.join(told)}")
    module.load_state_dict(state, assign=assign)


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, for a protocol."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def reason(error: Exception) -> str:
    """The first line of an error, without terminal colours; its kind where it says nothing in words."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return lines[0] if lines and " " in lines[0] else f"{type(error).__name__} {lines[0] if lines else ''}".strip()
