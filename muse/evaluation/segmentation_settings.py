"""What a user settles of a segmentation probe: its labels, and how a protocol's recipe changes."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy
import torch

from muse.data.masks import IGNORE_INDEX
from muse.errors import ConfigError
from muse.evaluation.mask_cells import count_classes, foreground_masks
from muse.evaluation.measurement import check_number, one_line_errors
from muse.evaluation.recipes import SegmentationRecipe

ADE20K_CLASSES = 150


@dataclass(frozen=True)
class MaskLabels:
    """How masks are read.

    Args:
        numbering: ade20k (0 is ignored, 1..150 become 0..149), plain (as they are) or foreground
            (0 against the rest).
        num_classes: None is 150 for ade20k, 2 for foreground, else the largest label + 1.
    """

    numbering: str = "ade20k"
    num_classes: int | None = None

    def __post_init__(self) -> None:
        check_number("num_classes", self.num_classes, 2)
        if self.num_classes is not None and self.numbering == "foreground":
            raise ConfigError(
                "--num_classes does not go with --labels foreground, which has two classes"
            )

    @property
    def zero_ignored(self) -> bool:
        """Whether the loader leaves 0 out and counts from 1."""
        return self.numbering == "ade20k"

    @property
    def relabel(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What changes a batch of masks before it is used."""
        return foreground_masks if self.numbering == "foreground" else None

    def read(self, masks: torch.Tensor) -> torch.Tensor:
        """Masks as loaded -> the labels that are learned."""
        return self.relabel(masks) if self.relabel else masks

    def classes(self, masks: Callable[[], Iterable[numpy.ndarray]]) -> int:
        """What was asked for, or what the numbering has, or what training masks hold.

        ValueError when a class would have the number of ignored pixels.

        Args:
            masks: gives all training masks, in arrays; asked only where nothing else tells.
        """
        known = self.num_classes or {"foreground": 2, "ade20k": ADE20K_CLASSES}.get(self.numbering)
        classes = known or max(2, *(count_classes(part) for part in masks()))
        if classes > IGNORE_INDEX:
            raise ValueError(
                f"{classes} classes: at most {IGNORE_INDEX}, since label {IGNORE_INDEX} means an "
                "ignored pixel"
            )
        return classes

    def facts(self, classes: int) -> dict:
        """For the protocol."""
        return {"labels": self.numbering, "num_classes": classes}

    def errors(self) -> contextlib.AbstractContextManager:
        """In which a ValueError becomes the one line that a user reads."""
        hint = " (ADE20K's labels counted from 0)" if self.zero_ignored else ""
        return one_line_errors("segmentation probe" + hint)


def adjusted_recipe(
    recipe: SegmentationRecipe,
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rates: Sequence[float] | None = None,
    inference: str | None = None,
    resize: int | None = None,
    crop: int | None = None,
) -> SegmentationRecipe:
    """A protocol's recipe with what a user has set; None is the protocol's.

    ConfigError for what does not fit it.

    Args:
        recipe: of the protocol.
        steps: batches, in place of epochs; a warm-up keeps its share of them.
        batch_size: pictures in each.
        learning_rates: of several one is chosen.
        inference: whole or slide.
        resize: shorter edge that the training's random scale is of.
        crop: side of training crops and windows, which keep the share by which they overlap.
    """
    check_number("steps", steps, 1)
    check_number("probe_batch_size", batch_size, 2)
    check_number("learning_rates", learning_rates, 0.0)
    given = {"batch_size": batch_size, "inference": inference}
    given["learning_rates"] = tuple(learning_rates) if learning_rates else None
    changes = {name: value for name, value in given.items() if value is not None}
    if steps is not None:
        warmup = round(recipe.warmup_steps * steps / recipe.steps) if recipe.steps else 0
        changes |= {"steps": steps, "epochs": None, "warmup_steps": warmup}
    if inference == "slide" and recipe.window is None:
        raise ConfigError("--inference slide: this protocol has no windows; dinov2 has")
    augmentation = recipe.augmentation
    if augmentation and resize is not None:
        augmentation = replace(augmentation, shorter_edge=resize)
    if augmentation and crop is not None:
        augmentation = replace(augmentation, crop_size=crop)
        stride = max(1, round(crop * recipe.stride / recipe.window))
        changes |= {"window": crop, "stride": stride}
    return replace(recipe, augmentation=augmentation, **changes)
