"""Training checkpoints: `OUTPUT/checkpoint-N/`, everything that moves, in safetensors and JSON; written beside and renamed.

config.json, model.safetensors   the student as it is (what `from_pretrained` reads)
ema.safetensors                  running means of the tensors that this stage trains
state.safetensors, state.json    optimizers, loss heads, discriminator, LeCam; step, images seen, configuration
rank-K.safetensors, rank-K.json  random generators and data position of every process
"""

import contextlib
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from muse.errors import CheckpointError
from muse.models.pretrained import read_weights

NAME = re.compile(r"^checkpoint-(\d+)$")
# What a process that was killed may leave: folders being written, being replaced, being removed. `latest` never sees them.
UNFINISHED = (".partial-*", ".checkpoint-*", ".final.*", ".removed-*")


# ------------------------------------------------------------------------------------------- trees of tensors
def pack(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split nested dicts and lists into a JSON-able skeleton and the tensors that stood in it."""
    tensors: dict[str, Tensor] = {}

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            tensors[path] = node.detach().cpu().contiguous()
            return {"__tensor__": path}
        if isinstance(node, dict):
            return {
                "__dict__": [[key, walk(value, f"{path}/{key}")] for key, value in node.items()]
            }
        if isinstance(node, (list, tuple)):
            return [walk(value, f"{path}/{index}") for index, value in enumerate(node)]
        return node

    return walk(tree, "root"), tensors


def unpack(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `pack`; keys keep their type (optimizers number their tensors)."""
    if isinstance(skeleton, dict):
        if "__tensor__" in skeleton:
            return tensors[skeleton["__tensor__"]]
        return {key: unpack(value, tensors) for key, value in skeleton["__dict__"]}
    if isinstance(skeleton, list):
        return [unpack(value, tensors) for value in skeleton]
    return skeleton


def write_tree(folder: Path, name: str, tree: Any) -> None:
    """`name.json` + `name.safetensors` in `folder`."""
    from safetensors.torch import save_file

    skeleton, tensors = pack(tree)
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(skeleton))


def read_tree(folder: Path, name: str) -> Any:
    """What `write_tree` wrote; `CheckpointError` when it is missing or broken."""
    try:
        skeleton = json.loads((folder / f"{name}.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{folder / name}.json: missing or unreadable ({type(error).__name__})"
        ) from None
    return unpack(skeleton, read_weights(folder / f"{name}.safetensors"))


# ------------------------------------------------------------------------------------------- random generators
def rng_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's global generators on this process."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = numpy.random.get_state()
    state = {
        "python": [version, list(internal), gauss],
        "torch": torch.get_rng_state(),
        "numpy": [
            kind,
            torch.from_numpy(keys.astype(numpy.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype(numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# ------------------------------------------------------------------------------------------- the run directory
def checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of every whole checkpoint, oldest first. A folder still being written has another name."""
    folder = Path(output_dir)
    found = [
        (int(match[1]), path)
        for path in folder.glob("checkpoint-*")
        if (match := NAME.match(path.name))
    ]
    return sorted(found)


def latest(output_dir: str | Path) -> Path | None:
    """The newest checkpoint, or None."""
    found = checkpoints(output_dir)
    return found[-1][1] if found else None


def clean(output_dir: str | Path) -> list[str]:
    """Remove what a killed run left unfinished, of however many processes; gives the names."""
    found = sorted(path for pattern in UNFINISHED for path in Path(output_dir).glob(pattern))
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in found]


@contextlib.contextmanager
def writing(target: Path, *leftovers: Path) -> Iterator[None]:
    """A full disk or a folder that may not be written: one line, nothing half written under a final name, `leftovers` removed."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, CheckpointError) as error:
        for path in leftovers:
            shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, CheckpointError):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CheckpointError(
            f"{target}: cannot be written ({reason}); checkpoints before it are whole"
        ) from None


def prune(output_dir: str | Path, keep_last: int, keep_every: int | None) -> None:
    """Remove old checkpoints: the newest `keep_last` stay, and those whose step is a multiple of `keep_every`."""
    for step, path in checkpoints(output_dir)[: -keep_last or None]:
        if not (keep_every and step % keep_every == 0):
            removed = path.with_name(
                f".removed-{step}"
            )  # a half-removed folder must not look like a checkpoint
            path.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)
