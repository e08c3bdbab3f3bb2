"""muse: a unified visual tokenizer with its own attention subspaces for structure and semantics.

The paper is arXiv 2605.05646.
"""

from importlib import import_module
from typing import Any

from muse.errors import CheckpointError, ConfigError, DataError, MuseError

__version__ = "0.1.0"
__all__ = [
    "MUSE_ViT",
    "Encoding",
    "load_config",
    "load_release_checkpoint",
    "ConfigError",
    "CheckpointError",
    "DataError",
    "MuseError",
]

_LAZY = {
    "MUSE_ViT": "muse.models.muse_vit",
    "Encoding": "muse.models.muse_vit",
    "load_config": "muse.config",
    "load_release_checkpoint": "muse.models.release_weights",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `import muse` and `--help` need not wait for it.
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'muse' has no attribute {name!r}")
