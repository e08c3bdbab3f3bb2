"""Scores of a segmentation: the mean over classes that a protocol asks for, and the grid's bound.

A head on a grid of 8 x 8 cells cannot draw what is smaller than a cell. `GridBound` says how far an
oracle gets that is told the classes of every cell: no head on that grid can be held to more.
"""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from muse.data.eval import spread_sample
from muse.evaluation.held_out import SHARE
from muse.evaluation.mask_cells import cell_maps
from muse.evaluation.metrics.accuracy_iou import ConfusionMatrix, IoU
from muse.evaluation.recipes import SegmentationRecipe
from muse.evaluation.segmentation_heads import SegmentationHeads
from muse.evaluation.sliding_window import Inference, best_class, cover_pixels

Size = tuple[int, int]
MOST_HELD_OUT = 2000  # scenes, as many as ADE20K has to validate on


def mean_iou(result: IoU, mean_over: str = "present") -> float:
    """Over the classes that occur (`present`), or over all, where one that does not counts 0."""
    return result.mean if mean_over == "present" else float(result.per_class.nan_to_num(0).mean())


class GridBound:
    """mIoU of two oracles that know the labels of every cell, and go the way of a head's logits.

    `cells` gives all of a cell its most frequent class; `upsampled` has the share of each class in
    the cells for logits, resized bilinearly as a head's are.

    Args:
        num_classes: K.
        inference: whole or in windows, as the head's.
        cell: see `covered_size`.
    """

    ways = {"upsampled": (0, "bilinear"), "cells": (1, "nearest")}

    def __init__(
        self, num_classes: int, inference: Inference | None = None, cell: int | None = None
    ):
        self.num_classes, self.cell = num_classes, cell
        self.inference = inference or Inference()
        self.counts = {name: ConfusionMatrix(num_classes) for name in self.ways}
        self.grid: Size | None = None  # of the first picture, or of its first window

    def update(self, truth: Tensor, size: Size, grid_of: Callable[[Size], Size]) -> None:
        """Add one picture.

        Args:
            truth: (H,W) labels at the mask's own size.
            size: (h,w) of the picture.
            grid_of: gives the grid of a window of a size.
        """
        mask = truth[None, None].float()  # labels up to 65535 are exact
        if size != tuple(truth.shape):
            mask = F.interpolate(mask, size, mode="nearest")
        for name, (which, mode) in self.ways.items():

            def oracle(window: Tensor, which: int = which, mode: str = mode) -> Tensor:
                shown = tuple(window.shape[-2:])
                grid = tuple(grid_of(shown))
                self.grid = self.grid or grid
                maps = cell_maps(window[:, 0].long(), grid, self.num_classes, self.cell)
                return cover_pixels(maps[which], shown, self.cell, mode)

            guess = best_class(self.inference(oracle, mask[0])[0], tuple(truth.shape))
            self.counts[name].update(guess, truth)

    def as_dict(self, mean_over: str = "present") -> dict:
        """For metrics.json. ValueError when there was no labelled pixel."""
        found = {name: counts.compute() for name, counts in self.counts.items()}
        return {
            "grid": list(self.grid),
            **{f"miou_{name}": mean_iou(one, mean_over) for name, one in found.items()},
            **{f"pixel_accuracy_{name}": one.pixel_accuracy for name, one in found.items()},
        }


def score_values(result: IoU, mean_over: str, bound: GridBound) -> dict:
    """The values of metrics.json: `miou` as the protocol means it, and the bound beside it."""
    values = result.as_dict() | {"miou": mean_iou(result, mean_over)}
    if mean_over != "present":
        values["miou_present"] = result.mean
    return {**values, "oracle": bound.as_dict(mean_over)}


# ------------------------------------------------------------------------------------- the choice
def hold_out(places: Sequence[int], seed: int | None) -> tuple[list[int], list[int]]:
    """(fitted, held out) of places of training pictures, ascending; a tenth is held out.

    At most MOST_HELD_OUT. ValueError where there are not two.

    Args:
        places: ascending.
        seed: of the draw; None holds nothing out.
    """
    if seed is None:
        return list(places), []
    if len(places) < 2:
        raise ValueError("a choice needs at least two training pictures: one is held out")
    count = min(max(1, round(SHARE * len(places))), MOST_HELD_OUT)
    drawn = set(spread_sample(len(places), count, seed))
    fitted = [place for number, place in enumerate(places) if number not in drawn]
    return fitted, [places[number] for number in sorted(drawn)]


def best_head(
    heads: SegmentationHeads, scores: Sequence[IoU], mean_over: str
) -> tuple[int, dict[str, dict]]:
    """The head that was best on held-out pictures, and for metrics.json what each had there.

    Args:
        heads: trained ones; one that diverged is never chosen.
        scores: of each head; none where there was nothing to choose.
        mean_over: see `mean_iou`.
    """
    if not scores:
        return 0, {}
    lost = heads.diverged()
    found = [-1.0 if bad else mean_iou(one, mean_over) for one, bad in zip(scores, lost)]
    by_rate = {f"{rate:g}": max(0.0, one) for rate, one in zip(heads.rates, found)}
    return max(range(len(found)), key=found.__getitem__), {"held_out_miou_by_rate": by_rate}


def chosen_facts(
    recipe: SegmentationRecipe, head: int, held_out: int, epoch: int | None = None
) -> dict:
    """For the protocol: the rates that were tried, which was taken, and on what it was chosen.

    Args:
        recipe: with the rates.
        head: that was taken.
        held_out: training pictures that were not fitted.
        epoch: that was taken, where epochs were compared.
    """
    facts = {
        "learning_rates": list(recipe.learning_rates),
        "learning_rate": recipe.learning_rates[head],
        "held_out": held_out,
    }
    if epoch is not None:
        facts["epoch"] = epoch
    if held_out:
        facts["chosen_on"] = f"{held_out} held-out training pictures, by mIoU"
    return facts
