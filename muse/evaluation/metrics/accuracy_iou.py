"""Scores of predicted labels: accuracy of pictures, intersection over union of pixels."""

from dataclasses import dataclass

import torch

from muse.data.masks import IGNORE_INDEX
from muse.utils.distributed import all_sum


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers in [0, 1], over samples (micro) and as a mean over classes (macro).

    Classes that do not occur are left out.
    """

    micro: float
    macro: float


def accuracy(predictions: torch.Tensor, labels: torch.Tensor, num_classes: int) -> Accuracy:
    """(N,) class indices twice; classes absent from `labels` are left out of the macro mean."""
    right = torch.bincount(labels[predictions == labels], minlength=num_classes).double()
    total = torch.bincount(labels, minlength=num_classes).double()
    present = total > 0
    return Accuracy(
        float(right.sum() / total.sum()), float((right[present] / total[present]).mean())
    )


def majority_accuracy(
    train_labels: torch.Tensor, val_labels: torch.Tensor, num_classes: int
) -> Accuracy:
    """What always answering the training set's most frequent class scores."""
    common = torch.bincount(train_labels, minlength=num_classes).argmax()
    return accuracy(common.expand_as(val_labels), val_labels, num_classes)


def check_labels(labels: torch.Tensor, num_classes: int | None, what: str) -> int:
    """Number of classes: `num_classes`, or the largest label + 1. ValueError on a wrong label."""
    if not len(labels):
        raise ValueError(f"{what}: no labelled samples")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        raise ValueError(
            f"{what}: labels {low}..{high} do not fit {num_classes or high + 1} classes"
        )
    return num_classes or high + 1


def hit_probability(scores: torch.Tensor, targets: torch.Tensor, k: int) -> torch.Tensor:
    """(n,) probability, float64, that the right column is among a row's k best, ties at random.

    Without ties this is 0 or 1. With them a collapsed model scores chance, not 100%.

    Args:
        scores: (n, m).
        targets: (n,) right columns.
        k: how many are looked at.
    """
    right = scores.gather(1, targets[:, None])
    above = (scores > right).sum(1)
    level = (scores == right).sum(1)
    return ((k - above).double() / level).clamp(0, 1)


@dataclass(frozen=True)
class IoU:
    """Intersection over union, (K,) `per_class` and its `mean` over the classes that occur.

    A class that is in neither masks nor predictions is NaN and one of the `absent`.
    """

    mean: float
    per_class: torch.Tensor
    absent: int
    pixel_accuracy: float

    def as_dict(self) -> dict:
        """Plain numbers for metrics.json."""
        by_class = [None if value != value else value for value in self.per_class.tolist()]
        return {
            "miou": self.mean,
            "pixel_accuracy": self.pixel_accuracy,
            "classes": len(by_class),
            "classes_absent": self.absent,
            "iou_by_class": by_class,
        }


class ConfusionMatrix:
    """Counts (true class, predicted class) over pixels; summed over processes when read."""

    def __init__(self, num_classes: int, ignore: int = IGNORE_INDEX):
        self.num_classes, self.ignore = num_classes, ignore
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.long)

    def update(self, predictions: torch.Tensor, masks: torch.Tensor) -> None:
        """Add class indices, twice of one shape with any number of dimensions.

        ValueError on another shape or a label out of range.
        """
        if predictions.shape != masks.shape:
            raise ValueError(
                f"prediction {tuple(predictions.shape)} and mask {tuple(masks.shape)} differ in "
                "size"
            )
        if not masks.numel():
            return
        truth, guess = masks.to(torch.int32), predictions.to(torch.int32)  # half the memory traffic
        ignored = truth == self.ignore
        self._check("mask", truth.masked_fill(ignored, 0))
        self._check("prediction", guess)
        # A last row for the ignored label, dropped again: cheaper than picking its pixels out.
        cells = truth.masked_fill(ignored, self.num_classes).mul_(self.num_classes).add_(guess)
        counts = torch.bincount(
            cells.flatten(), minlength=(self.num_classes + 1) * self.num_classes
        )
        self.counts += counts.view(-1, self.num_classes)[:-1].cpu()

    def _check(self, name: str, labels: torch.Tensor) -> None:
        low, high = (int(bound) for bound in torch.aminmax(labels))
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"{name} labels {low}..{high} do not fit {self.num_classes} classes")

    def compute(self) -> IoU:
        """`IoU` over the pixels of all processes. ValueError when there was no labelled one."""
        counts = all_sum(self.counts)
        hits = counts.diagonal().double()
        union = counts.sum(0).double() + counts.sum(1).double() - hits
        present = union > 0
        per_class = torch.where(present, hits / union.clamp_min(1), torch.nan)
        if not present.any():
            raise ValueError("no labelled pixel was given")
        return IoU(
            float(per_class[present].mean()),
            per_class,
            int((~present).sum()),
            float(hits.sum() / counts.sum()),
        )
