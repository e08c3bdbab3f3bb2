"""Segmentation probes of large or augmented pictures: features are computed as they come.

Nothing is stored, and one picture at a time is evaluated, at its mask's own size: memory does not
grow with the set.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from muse.data.eval import EvalLoader
from muse.evaluation import measurement
from muse.evaluation.image_writer import image_writer
from muse.evaluation.mask_cells import check_mask_labels
from muse.evaluation.measurement import Measured, Setup
from muse.evaluation.metrics.accuracy_iou import ConfusionMatrix, IoU
from muse.evaluation.probed_network import ProbedNetwork
from muse.evaluation.recipes import SegmentationRecipe
from muse.evaluation.scene_data import (
    SceneMaps,
    SceneTraining,
    evaluation_scenes,
    training_scenes,
)
from muse.evaluation.segmentation_heads import SegmentationHeads, train_heads
from muse.evaluation.segmentation_pictures import SavedPredictions, prediction_picture, stacked
from muse.evaluation.segmentation_scores import (
    GridBound,
    best_head,
    chosen_facts,
    mean_iou,
    score_values,
)
from muse.evaluation.segmentation_settings import MaskLabels
from muse.evaluation.sliding_window import Inference, best_class, cover_pixels
from muse.utils.distributed import leave_processes

Seen = Callable[[int, Tensor, Tensor, Tensor], None]  # index, picture, truth, guess


class Chosen(NamedTuple):
    """The head that is reported."""

    heads: SegmentationHeads  # of that time, in eval mode
    head: int
    score: float
    by_rate: dict
    epoch: int | None

    def alone(self) -> SegmentationHeads:
        """The head without the others."""
        one = copy.copy(self.heads)
        one._modules = {"heads": torch.nn.ModuleList([self.heads.heads[self.head]])}
        one.rates = (self.heads.rates[self.head],)
        return one


@torch.no_grad()
def evaluate_scenes(
    heads: SegmentationHeads,
    maps: Callable[[Tensor], Tensor],
    loader: EvalLoader,
    read: Callable[[Tensor], Tensor],
    inference: Inference,
    bound: GridBound | None = None,
    seen: Seen | None = None,
) -> list[IoU]:
    """IoU of every head at the masks' own sizes, over the pictures of all processes.

    ValueError for a label out of range, and where no pixel is labelled.

    Args:
        heads: on the device of the maps.
        maps: see `SceneMaps`.
        loader: of images (B,3,h,w), masks (B,H,W) and indices; pictures may differ in size.
        read: changes masks before they are compared.
        inference: whole, or in windows.
        bound: of the grid, fed beside.
        seen: is told of the first head's predictions.
    """
    heads.eval()
    confusions = [ConfusionMatrix(heads.num_classes) for _ in heads.heads]

    def network(window: Tensor) -> Tensor:
        return cover_pixels(heads(maps(window))[:, 0], tuple(window.shape[-2:]), maps.cell)

    for batch in loader:
        samples = zip(batch["indices"].tolist(), batch["images"], read(batch["masks"]), strict=True)
        for index, picture, truth in samples:
            check_mask_labels(truth, heads.num_classes)
            logits = inference(network, picture)  # (R,K,h,w)
            guesses = [best_class(one, tuple(truth.shape)).cpu() for one in logits]
            for confusion, guess in zip(confusions, guesses, strict=True):
                confusion.update(guess, truth)
            if bound is not None:
                bound.update(truth, tuple(picture.shape[-2:]), maps.grids.__getitem__)
            if seen is not None:
                seen(index, picture, truth, guesses[0])
    return [confusion.compute() for confusion in confusions]


def measure_scenes(
    setup: Setup,
    recipe: SegmentationRecipe,
    labels: MaskLabels,
    network: ProbedNetwork,
    num_pictures: int = 0,
    saved: SavedPredictions | None = None,
) -> Measured | None:
    """Train and measure by a protocol whose pictures are not stored; see `run_segment_probe`."""
    maps = SceneMaps(network, setup, recipe.rest == "drop")
    inference = Inference(*_windows(recipe))
    with labels.errors(), _writer(saved) as add:
        data = training_scenes(setup, recipe, labels)
        classes = labels.classes(data.all_masks)
        names = saved.class_names(classes) if saved else ()
        chosen = _train(setup, recipe, labels, maps, data, classes, inference)
        bound = GridBound(classes, inference, maps.cell)
        sheet: list[Tensor] = []

        def seen(index: int, picture: Tensor, truth: Tensor, guess: Tensor) -> None:
            if add is None and len(sheet) >= num_pictures:
                return
            shown = prediction_picture(picture, truth, guess, classes, names)
            if add is not None:
                add(shown[None], torch.tensor([index]))
            if len(sheet) < num_pictures:
                sheet.append(shown)

        loader = evaluation_scenes(setup, "val", labels)
        (result,) = evaluate_scenes(
            chosen.alone(), maps, loader, labels.read, inference, bound, seen
        )
        val = measurement.data_facts(setup, loader)
        values = score_values(result, recipe.mean_over, bound) | chosen.by_rate
        train = data.finished_facts(setup)
    if not leave_processes():
        return None
    val["images"] = val["samples"]["read"] - val["samples"]["skipped"]
    held = len(data.held_out.stream.places) if data.held_out else 0
    probe = {
        **labels.facts(classes),
        "steps": data.steps,
        "probe_batch_size": recipe.batch_size,
        **chosen_facts(recipe, chosen.head, held, chosen.epoch),
    }
    facts = {"network": network.facts, "probe": probe, "train": train, "val": val}
    return Measured(values, facts, (lambda: stacked(sheet)) if sheet else None)


def _windows(recipe: SegmentationRecipe) -> tuple[int | None, int | None]:
    return (recipe.window, recipe.stride) if recipe.inference == "slide" else (None, None)


def _writer(saved: SavedPredictions | None) -> contextlib.AbstractContextManager:
    return image_writer(saved.folder) if saved else contextlib.nullcontext()


def _train(
    setup: Setup,
    recipe: SegmentationRecipe,
    labels: MaskLabels,
    maps: SceneMaps,
    data: SceneTraining,
    classes: int,
    inference: Inference,
) -> Chosen:
    """The head that is reported: the only one, or the best on the held-out pictures."""
    batches = _feature_batches(maps, data.batches, setup.device)
    first = next(batches)
    heads = SegmentationHeads(
        first[0].shape[1], classes, recipe.learning_rates, recipe.affine, setup.cfg.training.seed
    ).to(setup.device)
    best = None
    for step in train_heads(heads, chain([first], batches), recipe, data.steps, maps.cell):
        ended = data.epoch_steps and step % data.epoch_steps == 0
        if data.held_out is None or not (ended or step == data.steps):
            continue
        scores = evaluate_scenes(heads, maps, data.held_out, labels.read, inference)
        head, by_rate = best_head(heads, scores, recipe.mean_over)
        score = mean_iou(scores[head], recipe.mean_over)
        if best is None or score > best.score:
            epoch = -(-step // data.epoch_steps) if data.epoch_steps else None
            best = Chosen(copy.deepcopy(heads).eval(), head, score, by_rate, epoch)
    return best or Chosen(heads.eval(), 0, 0.0, {}, None)


def _feature_batches(
    maps: SceneMaps, batches: Iterator[tuple[Tensor, Tensor]], device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures and masks -> features (b,C,h,w) and masks (b,H,W) on the device."""
    for images, masks in batches:
        yield maps(images), masks.to(device)
