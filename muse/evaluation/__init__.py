"""Numbers that people quote. Everything here reads a model and data, never a trainer."""

from muse.evaluation.evaluator import Evaluator, evaluate_reconstruction
from muse.evaluation.metrics.frechet import frechet_distance

__all__ = ["Evaluator", "evaluate_reconstruction", "frechet_distance"]
