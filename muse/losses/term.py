"""What a loss term is: a weight, what it reads of the student, and its value on a batch."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from muse.models.muse_vit import StudentOutput
from muse.teachers.cache import CachedTeacher


class Needs(NamedTuple):
    """Which parts of `StudentOutput` a term reads."""

    topology: bool = False
    semantics: bool = False
    reconstruction: bool = False


class Term(nn.Module):
    """One weighted objective. `forward` gives its unweighted value and further numbers worth a log line."""

    name: str
    needs = Needs()

    def __init__(self, weight: float):
        super().__init__()
        self.weight = weight

    def forward(
        self, out: StudentOutput, batch: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError


def ask(teacher: nn.Module, batch: dict[str, Any]) -> Any:
    """The teacher's answer for a batch; one that remembers is told the samples' keys."""
    return (
        teacher(batch["images"], keys=batch["keys"])
        if isinstance(teacher, CachedTeacher)
        else teacher(batch["images"])
    )
