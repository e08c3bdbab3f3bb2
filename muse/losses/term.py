"""What a loss term is: a weight, what it reads of the student, and its value on a batch."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from muse.models.muse_vit import StudentOutput
from muse.teachers.cache import CachedTeacher


class Needs(NamedTuple):
    """Which parts of `StudentOutput` a term reads; what no term reads is not computed."""

    topology: bool = False
    semantics: bool = False
    reconstruction: bool = False


class Term(nn.Module):
    """One weighted objective.

    `forward` gives its unweighted value, and further numbers for the log. `name` is the term's
    section of `losses`. A teacher is an attribute of its term and never a part of the student.
    """

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
    """The teacher's answer to a batch's images; a CachedTeacher looks it up by the sample keys."""
    if isinstance(teacher, CachedTeacher):
        return teacher(batch["images"], keys=batch["keys"])
    return teacher(batch["images"])
