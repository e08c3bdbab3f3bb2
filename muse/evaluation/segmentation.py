"""Segmentation probe: a batch norm and a 1×1 convolution on frozen features, mIoU over all pixels.

Where a protocol's pictures are small and always the same, features are stored once (this file);
where they are large or augmented, they are computed as they come (segmentation_training.py).
"""

import functools
from collections.abc import Iterator

import torch

from muse.evaluation.frozen_features import FeatureSet, frozen_sets, probe_facts, read_rows
from muse.evaluation.image_writer import image_writer
from muse.evaluation.mask_cells import foreground_masks
from muse.evaluation.measurement import (
    Measured,
    Setup,
    check_number,
    eval_data,
)
from muse.evaluation.metrics.accuracy_iou import ConfusionMatrix, IoU
from muse.evaluation.probed_network import ProbedNetwork, probed_network
from muse.evaluation.protocols import find_protocol
from muse.evaluation.recipes import SegmentationRecipe
from muse.evaluation.segmentation_heads import SegmentationHeads, SegmentationProbe, train_heads
from muse.evaluation.segmentation_pictures import SavedPredictions, prediction_picture
from muse.evaluation.segmentation_scores import (
    GridBound,
    best_head,
    chosen_facts,
    hold_out,
    score_values,
)
from muse.evaluation.segmentation_settings import MaskLabels
from muse.evaluation.segmentation_training import measure_scenes
from muse.utils.distributed import leave_processes
from muse.utils.viz_utils import segmentation_sheet


def stored_batches(
    features, masks, rows: torch.Tensor, batch_size: int, seed: int, device: str | torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches (b,C,h,w), (b,H,W) of stored rows, drawn anew each time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        drawn = torch.randperm(len(rows), generator=generator)[:batch_size].sort().values
        index = rows[drawn]  # ascending: reads of a mapped file in file order
        yield read_rows(features, index).to(device), read_rows(masks, index).to(device)


def train_segmentation_probe(
    features,
    masks,
    num_classes: int,
    steps: int = 400,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
    cell: int | None = None,
) -> SegmentationProbe:
    """A trained probe: AdamW, cosine to zero, cross-entropy on the cells' class shares.

    ValueError on a label out of range, on sets that differ in number, or when it diverges.

    Args:
        features: (N,C,h,w) tensor or memory-mapped array.
        masks: (N,H,W) labels, likewise.
        num_classes: K.
        steps: batches.
        batch_size: maps in each, drawn anew.
        learning_rate: at the start.
        seed: of the first weights and the batches.
        device: where the probe is.
        cell: see `covered_size`.
    """
    if len(features) != len(masks) or not len(features):
        raise ValueError(f"{len(features)} feature maps and {len(masks)} masks")
    recipe = find_protocol("native", "segment_probe")
    heads = SegmentationHeads(features.shape[1], num_classes, [learning_rate], seed=seed).to(device)
    rows = torch.arange(len(features))
    batches = stored_batches(features, masks, rows, batch_size, seed, device)
    for _ in train_heads(heads, batches, recipe, steps, cell):
        pass
    return heads.heads[0].eval()


@torch.no_grad()
def evaluate_segmentation(
    probe: SegmentationProbe,
    features,
    masks,
    batch_size: int = 32,
    cell: int | None = None,
    rows: torch.Tensor | None = None,
) -> IoU:
    """IoU of the probe at the masks' own size.

    Args:
        probe: a trained one.
        features: (N,C,h,w) tensor or memory-mapped array.
        masks: (N,H,W), likewise.
        batch_size: maps at a time.
        cell: see `covered_size`.
        rows: which count, ascending; None is all.
    """
    confusion = ConfusionMatrix(probe.classify.out_channels)
    device = probe.classify.weight.device
    for index in (torch.arange(len(features)) if rows is None else rows).split(batch_size):
        truth = read_rows(masks, index)
        maps = read_rows(features, index).to(device)
        confusion.update(probe.predict(maps, truth.shape[-2:], cell).cpu(), truth)
    return confusion.compute()


def foreground_iou(
    train_features: torch.Tensor,
    train_masks: torch.Tensor,
    val_features: torch.Tensor,
    val_masks: torch.Tensor,
    **options,
) -> float:
    """IoU of the foreground under a linear probe.

    Args:
        train_features: (N,C,h,w).
        train_masks: (N,H,W) object masks, 0 is background.
        val_features: (M,C,h,w).
        val_masks: (M,H,W).
        options: of `train_segmentation_probe`.
    """
    probe = train_segmentation_probe(train_features, foreground_masks(train_masks), 2, **options)
    return float(
        evaluate_segmentation(probe, val_features, foreground_masks(val_masks)).per_class[1]
    )


def run_segment_probe(
    setup: Setup,
    labels: MaskLabels,
    feature: str = "block",
    baseline: str | None = None,
    num_pictures: int = 0,
    saved: SavedPredictions | None = None,
) -> Measured | None:
    """The measurement of scripts/segment_probe.py; None in processes that only take part.

    Args:
        setup: what is probed, on which data, by which protocol (None: native).
        labels: how masks are read.
        feature: a kind of `MUSE_ViT.features`.
        baseline: encoder or pixels, probed instead, see `probed_network`.
        num_pictures: validation pictures in the sheet of predictions; 0 makes none.
        saved: where the predictions for all validation pictures go.
    """
    check_number("num_pictures", num_pictures, 0)
    native = find_protocol("native", "segment_probe")
    recipe = setup.protocol.recipe if setup.protocol else native
    own_grid = recipe.encoder_grid == "native"
    network = probed_network(setup, feature, baseline, own_grid=own_grid)
    measure = _measure_stored if recipe.loss == "cells" else measure_scenes
    return measure(setup, recipe, labels, network, num_pictures, saved)


def _measure_stored(
    setup: Setup,
    recipe: SegmentationRecipe,
    labels: MaskLabels,
    network: ProbedNetwork,
    num_pictures: int,
    saved: SavedPredictions | None,
) -> Measured | None:
    loading = {"relabel": labels.relabel, "zero_label_ignored": labels.zero_ignored}
    train, val = frozen_sets(setup, network, "masks", pooled=False, **loading)
    if not leave_processes():
        return None
    with labels.errors():
        classes = labels.classes(lambda: [train.targets])
        names = saved.class_names(classes) if saved else ()
        heads, held = _train_stored(setup, recipe, train, classes, network.cell)
        scores = [
            evaluate_segmentation(head, train.features, train.targets, 32, network.cell, held)
            for head in heads.heads
            if len(held)
        ]
        chosen, by_rate = best_head(heads, scores, recipe.mean_over)
        probe = heads.heads[chosen]
        result = evaluate_segmentation(probe, val.features, val.targets, cell=network.cell)
        bound = GridBound(classes, cell=network.cell)
        for row in range(len(val.targets)):
            truth = read_rows(val.targets, slice(row, row + 1))[0].long()
            bound.update(truth, tuple(truth.shape), lambda _: val.features.shape[-2:])
        values = score_values(result, recipe.mean_over, bound) | by_rate
    draw = functools.partial(_draw, setup, labels, probe, val, network.cell)
    if saved:
        with image_writer(saved.folder) as add:
            for picture, truth, guess in draw(None):
                add(prediction_picture(picture, truth, guess, classes, names)[None], None)
    facts = {
        **labels.facts(classes),
        "steps": recipe.steps,
        "probe_batch_size": recipe.batch_size,
        **chosen_facts(recipe, chosen, len(held)),
    }
    sheet = functools.partial(_sheet, draw, num_pictures, classes) if num_pictures else None
    return Measured(values, probe_facts(network, facts, train, val), sheet)


def _train_stored(
    setup: Setup, recipe: SegmentationRecipe, train: FeatureSet, classes: int, cell: int | None
) -> tuple[SegmentationHeads, torch.Tensor]:
    """The heads, trained; and the rows that they were not trained on, none for a single rate."""
    seed, count = setup.cfg.training.seed, len(train.targets)
    fitted, held = hold_out(range(count), seed if len(recipe.learning_rates) > 1 else None)
    rates, channels = recipe.learning_rates, train.features.shape[1]
    heads = SegmentationHeads(channels, classes, rates, recipe.affine, seed).to(setup.device)
    batches = stored_batches(
        train.features,
        train.targets,
        torch.tensor(fitted),
        recipe.batch_size,
        seed,
        setup.device,
    )
    for _ in train_heads(heads, batches, recipe, recipe.steps, cell):
        pass
    return heads, torch.tensor(held, dtype=torch.int64)


def _draw(
    setup: Setup,
    labels: MaskLabels,
    probe: SegmentationProbe,
    val: FeatureSet,
    cell: int | None,
    count: int | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Picture, true and predicted labels of the first `count` validation pictures, or of all."""
    device, row = probe.classify.weight.device, 0
    loader = eval_data(setup, "val", ("images", "masks"), zero_label_ignored=labels.zero_ignored)
    for batch in loader:
        for picture in batch["images"]:
            if row == count:
                return
            rows = slice(row, row + 1)
            truth = read_rows(val.targets, rows).long()
            guess = probe.predict(read_rows(val.features, rows).to(device), truth.shape[-2:], cell)
            yield picture, truth[0], guess[0].cpu()
            row += 1


def _sheet(draw, count: int, classes: int) -> torch.Tensor:
    """The first pictures of the validation set with their true and predicted labels."""
    images, truth, guess = (torch.stack(parts) for parts in zip(*draw(count), strict=True))
    return segmentation_sheet(images, truth, guess, classes)
