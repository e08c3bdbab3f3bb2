"""What a linear probe gives: the accuracies of its heads, and which head and epoch were chosen."""

from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from muse.evaluation.metrics.accuracy_iou import Accuracy
from muse.evaluation.probe_heads import HeadScore


@dataclass(frozen=True)
class BestOnValidation(Accuracy):
    """The greatest accuracy over all heads and epochs, chosen on the pictures that it is of."""

    epoch: int
    learning_rate: float


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies on the validation set.

    `last` is the final epoch, of the head that was best there on the held-out training samples;
    `best` is the epoch and the head that were best on them; `reported` is the recipe's choice of
    the two. `by_rate` gives the final epoch of every head: its rate, after the name of its columns
    where there are several. `best_on_validation` is chosen on the validation set itself, as much of
    the field does, and so reads too high.
    """

    reported: Accuracy
    last: Accuracy
    best: Accuracy
    best_epoch: int
    best_learning_rate: float
    learning_rate: float
    by_rate: dict[str, Accuracy]
    best_on_validation: BestOnValidation
    chance: float
    majority: Accuracy
    classes: int
    train_samples: int
    held_out: int  # of the training samples; 0 where no class has two, and then all choose
    val_samples: int
    columns: str = ""  # of `last`
    best_columns: str = ""
    trial: dict[str, Accuracy] = field(default_factory=dict)  # by rate, on the held-out samples

    def as_dict(self) -> dict:
        """Plain numbers for metrics.json."""
        return asdict(self)


class EpochScores(NamedTuple):
    """Of all heads after an epoch."""

    epoch: int
    chosen_on: list[HeadScore]
    reported: list[HeadScore]


class Head(NamedTuple):
    """Which columns of the features, and which rate before it is scaled by the batch."""

    columns: str
    rate: float

    def name(self) -> str:
        """For `by_rate`."""
        return f"{self.columns} {self.rate:g}".strip()
