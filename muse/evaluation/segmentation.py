"""Segmentation probe: BatchNorm and a 1×1 convolution on frozen features, mIoU over all pixels."""

import functools
from dataclasses import dataclass

import numpy
import torch
import torch.nn.functional as F
from torch import nn

from muse.data.masks import IGNORE_INDEX
from muse.errors import ConfigError
from muse.evaluation.frozen_features import FeatureSet, frozen_sets, probe_facts, read_rows
from muse.evaluation.mask_cells import (
    cell_targets,
    count_classes,
    covered_size,
    foreground_masks,
)
from muse.evaluation.measurement import (
    Measured,
    Setup,
    check_number,
    eval_data,
    one_line_errors,
)
from muse.evaluation.metrics.accuracy_iou import ConfusionMatrix, IoU
from muse.evaluation.probe_heads import cosine_schedule
from muse.evaluation.probed_network import probed_network
from muse.utils.distributed import leave_processes
from muse.utils.viz_utils import segmentation_sheet

ADE20K_CLASSES = 150


class SegmentationProbe(nn.Module):
    """(B,C,h,w) features -> (B,K,h,w) logits."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.classify = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.classify(self.norm(features.float()))

    @torch.no_grad()
    def predict(
        self, features: torch.Tensor, size: tuple[int, int], cell: int | None = None
    ) -> torch.Tensor:
        """(B,C,h,w) -> (B,*size) class indices: logits resized bilinearly, then the best class.

        The logits cover the padded picture; what lies beyond `size` is cut off.

        Args:
            features: (B,C,h,w).
            size: (H,W) of the pictures before any padding.
            cell: see `covered_size`.
        """
        self.eval()
        covered = covered_size(size, cell)
        logits = F.interpolate(self(features), covered, mode="bilinear", align_corners=False)
        return logits[..., : size[0], : size[1]].argmax(1)


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = SegmentationProbe(features.shape[1], num_classes).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=learning_rate, weight_decay=1e-4)
    schedule = cosine_schedule(optimizer, steps)
    generator, grid = torch.Generator().manual_seed(seed), features.shape[-2:]
    probe.train()
    for _ in range(steps):
        index = torch.randperm(len(features), generator=generator)[:batch_size].sort().values
        labels = read_rows(masks, index).to(device)
        target = cell_targets(labels, grid, num_classes, cell=cell)  # (B, h*w, K)
        logits = probe(read_rows(features, index).to(device))  # (B, K, h, w)
        log_shares = logits.log_softmax(1).flatten(2).transpose(1, 2)  # (B, h*w, K)
        loss = -(target * log_shares).sum() / target.sum().clamp_min(1e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if not probe.classify.weight.isfinite().all():
        raise ValueError(
            f"the probe diverged at learning rate {learning_rate:g}: give a smaller one"
        )
    return probe.eval()


@torch.no_grad()
def evaluate_segmentation(
    probe: SegmentationProbe, features, masks, batch_size: int = 32, cell: int | None = None
) -> IoU:
    """IoU of the probe at the masks' own size.

    Args:
        probe: a trained one.
        features: (N,C,h,w) tensor or memory-mapped array.
        masks: (N,H,W), likewise.
        batch_size: maps at a time.
        cell: see `covered_size`.
    """
    confusion = ConfusionMatrix(probe.classify.out_channels)
    device = probe.classify.weight.device
    for start in range(0, len(features), batch_size):
        block = slice(start, start + batch_size)
        truth = read_rows(masks, block)
        maps = read_rows(features, block).to(device)
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


@dataclass(frozen=True)
class SegmentRecipe:
    """How the probe of `run_segment_probe` is trained, and on which labels.

    Args:
        labels: how masks are numbered: ade20k (0 is ignored, 1..150 become 0..149), plain (as they
            are) or foreground (0 against the rest).
        num_classes: None is 150 for ade20k, 2 for foreground, else the largest label + 1.
        steps: batches.
        batch_size: maps in each.
        learning_rate: at the start.
    """

    labels: str = "ade20k"
    num_classes: int | None = None
    steps: int = 2000
    batch_size: int = 32
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        check_number("num_classes", self.num_classes, 2)
        check_number("steps", self.steps, 1)
        check_number("probe_batch_size", self.batch_size, 2)
        check_number("learning_rate", self.learning_rate, 0.0)
        if self.num_classes is not None and self.labels == "foreground":
            raise ConfigError(
                "--num_classes does not go with --labels foreground, which has two classes"
            )

    def loading(self) -> dict:
        """Options of `frozen_features` that give masks this numbering."""
        relabel = foreground_masks if self.labels == "foreground" else None
        return {"relabel": relabel, "zero_label_ignored": self.labels == "ade20k"}

    def classes(self, masks: numpy.ndarray) -> int:
        """What was asked for, or what the numbering has, or what the training masks hold."""
        found = max(count_classes(masks), 2)
        known = {"foreground": 2, "ade20k": ADE20K_CLASSES}
        classes = self.num_classes or known.get(self.labels, found)
        if classes > IGNORE_INDEX:
            raise ValueError(
                f"{classes} classes: at most {IGNORE_INDEX}, since label {IGNORE_INDEX} means an "
                "ignored pixel"
            )
        return classes

    def facts(self, num_classes: int) -> dict:
        """For the protocol."""
        return {
            "labels": self.labels,
            "num_classes": num_classes,
            "steps": self.steps,
            "probe_batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
        }


def run_segment_probe(
    setup: Setup,
    recipe: SegmentRecipe,
    feature: str = "block",
    baseline: str | None = None,
    num_pictures: int = 0,
) -> Measured | None:
    """The measurement of scripts/segment_probe.py; None in processes that only extract features.

    Args:
        setup: what is probed, on which data.
        recipe: how the probe is trained.
        feature: a kind of `MUSE_ViT.features`.
        baseline: encoder or pixels, probed instead, see `probed_network`.
        num_pictures: validation pictures in the sheet of predictions; 0 makes none.
    """
    check_number("num_pictures", num_pictures, 0)
    network = probed_network(setup, feature, baseline)
    train, val = frozen_sets(setup, network, "masks", pooled=False, **recipe.loading())
    if not leave_processes():
        return None
    hint = " (ADE20K's labels counted from 0)" if recipe.labels == "ade20k" else ""
    with one_line_errors("segmentation probe" + hint):
        probe = train_segmentation_probe(
            train.features,
            train.targets,
            recipe.classes(train.targets),
            recipe.steps,
            recipe.batch_size,
            recipe.learning_rate,
            setup.cfg.training.seed,
            setup.device,
            network.cell,
        )
        result = evaluate_segmentation(probe, val.features, val.targets, cell=network.cell)
    sheet = functools.partial(_sheet, setup, recipe, probe, val, network.cell, num_pictures)
    facts = probe_facts(network, recipe.facts(probe.classify.out_channels), train, val)
    return Measured(result.as_dict(), facts, sheet if num_pictures else None)


def _sheet(
    setup: Setup,
    recipe: SegmentRecipe,
    probe: SegmentationProbe,
    val: FeatureSet,
    cell: int | None,
    count: int,
) -> torch.Tensor:
    """The first `count` pictures of the validation set with their true and predicted labels."""
    ignored = recipe.loading()["zero_label_ignored"]
    loader = eval_data(setup, "val", ("images", "masks"), zero_label_ignored=ignored)
    images = next(iter(loader))["images"][:count]
    truth = read_rows(val.targets, slice(len(images))).long()
    maps = read_rows(val.features, slice(len(images))).to(probe.classify.weight.device)
    guess = probe.predict(maps, truth.shape[-2:], cell).cpu()
    return segmentation_sheet(images, truth, guess, probe.classify.out_channels)
