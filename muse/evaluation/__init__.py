"""Numbers that people quote. Everything here reads a model and data, never a trainer."""

from importlib import import_module
from typing import Any

__all__ = ["Evaluator", "evaluate_reconstruction", "frechet_distance"]

_LAZY = {
    "Evaluator": "muse.evaluation.evaluator",
    "evaluate_reconstruction": "muse.evaluation.evaluator",
    "frechet_distance": "muse.evaluation.metrics.frechet",
}


def __getattr__(name: str) -> Any:
    # The evaluator brings torchvision and scipy; who asks for one metric need not wait for them.
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'muse.evaluation' has no attribute {name!r}")
