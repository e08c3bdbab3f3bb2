"""Segmentation probe: BatchNorm and a 1×1 convolution on frozen features, mIoU from one confusion matrix."""

import math
from dataclasses import dataclass

import numpy
import torch
import torch.nn.functional as F
from torch import nn

from muse.data.masks import IGNORE_INDEX
from muse.utils.distributed import all_sum

IGNORE = IGNORE_INDEX


class ConfusionMatrix:
    """Counts (true class, predicted class) over pixels; summed over processes when read."""

    def __init__(self, num_classes: int, ignore: int = IGNORE):
        self.num_classes, self.ignore = num_classes, ignore
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.long)

    def update(self, predictions: torch.Tensor, masks: torch.Tensor) -> None:
        """Class indices of one shape, any number of dimensions. ValueError on another shape or a label out of range."""
        if predictions.shape != masks.shape:
            raise ValueError(
                f"prediction {tuple(predictions.shape)} and mask {tuple(masks.shape)} differ in size"
            )
        if not masks.numel():
            return
        truth, guess = masks.to(torch.int32), predictions.to(torch.int32)  # half the memory traffic
        ignored = truth == self.ignore
        self._check("mask", truth.masked_fill(ignored, 0))
        self._check("prediction", guess)
        # A last row for the ignored label, dropped again: cheaper than picking its pixels out.
        cells = (
            truth.masked_fill(ignored, self.num_classes)
            .mul_(self.num_classes)
            .add_(guess)
            .flatten()
        )
        counts = torch.bincount(cells, minlength=(self.num_classes + 1) * self.num_classes)
        self.counts += counts.view(-1, self.num_classes)[:-1].cpu()

    def _check(self, name: str, labels: torch.Tensor) -> None:
        low, high = (int(bound) for bound in torch.aminmax(labels))
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"{name} labels {low}..{high} do not fit {self.num_classes} classes")

    def compute(self) -> "IoU":
        """Intersection over union of every class."""
        counts = all_sum(self.counts)
        hits, truth, guess = (
            counts.diagonal().double(),
            counts.sum(1).double(),
            counts.sum(0).double(),
        )
        union = truth + guess - hits
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


@dataclass(frozen=True)
class IoU:
    """`mean` over the classes that occur in masks or predictions; `per_class` (K,) with NaN for the `absent` others."""

    mean: float
    per_class: torch.Tensor
    absent: int
    pixel_accuracy: float


def cell_targets(
    masks: torch.Tensor, grid: tuple[int, int], num_classes: int, ignore: int = IGNORE
) -> torch.Tensor:
    """(B,H,W) labels -> (B,h*w,K) share of every class among the pixels of each cell; ignored pixels count nothing.

    Cross-entropy against these shares, summed, equals pixel-wise cross-entropy on logits repeated over the cell's
    pixels, at a fraction of the cost. Masks are cut to whole cells by nearest resizing where the grid does not divide
    them.
    """
    height, width = masks.shape[-2:]
    rows, columns = max(1, round(height / grid[0])), max(1, round(width / grid[1]))
    masks = masks.long()
    if (rows * grid[0], columns * grid[1]) != (height, width):
        size = (rows * grid[0], columns * grid[1])
        masks = F.interpolate(masks[:, None].float(), size, mode="nearest")[:, 0].long()
    ignored = masks == ignore
    labels = masks.masked_fill(
        ignored, num_classes
    )  # a class of its own, dropped below: far cheaper than picking the others out
    low, high = (int(bound) for bound in torch.aminmax(masks.masked_fill(ignored, 0)))
    if low < 0 or high >= num_classes:
        raise ValueError(f"mask labels {low}..{high} do not fit {num_classes} classes")
    batch, cells = len(masks), grid[0] * grid[1]
    tiles = (
        labels.view(batch, grid[0], rows, grid[1], columns)
        .permute(0, 1, 3, 2, 4)
        .reshape(batch * cells, rows * columns)
    )
    places = torch.arange(batch * cells, device=masks.device)[:, None] * (num_classes + 1) + tiles
    counts = torch.bincount(places.flatten(), minlength=batch * cells * (num_classes + 1)).view(
        -1, num_classes + 1
    )
    shares = counts[:, :num_classes].float()
    return (shares / (rows * columns)).view(batch, cells, num_classes)


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
    def predict(self, features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(B,C,h,w) -> (B,*size) class indices: logits resized bilinearly, then the best class."""
        self.eval()
        return F.interpolate(self(features), size, mode="bilinear", align_corners=False).argmax(1)


def _rows(array, index) -> torch.Tensor:
    """Rows of a tensor or of a memory-mapped array, as a tensor."""
    rows = array[index]
    return rows if isinstance(rows, torch.Tensor) else torch.from_numpy(numpy.array(rows))


def train_segmentation_probe(
    features,
    masks,
    num_classes: int,
    steps: int = 400,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> SegmentationProbe:
    """Probe on (N,C,h,w) features with (N,H,W) labels (tensors or memory-mapped arrays).

    AdamW, cosine to zero, cross-entropy on the cells' class shares. ValueError on a label out of range, on maps and
    masks that differ in number, or when it diverges.
    """
    if len(features) != len(masks) or not len(features):
        raise ValueError(f"{len(features)} feature maps and {len(masks)} masks")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = SegmentationProbe(features.shape[1], num_classes).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    generator = torch.Generator().manual_seed(seed)
    probe.train()
    for _ in range(steps):
        index = torch.randperm(len(features), generator=generator)[:batch_size].sort().values
        target = cell_targets(_rows(masks, index).to(device), features.shape[-2:], num_classes)
        log_shares = (
            probe(_rows(features, index).to(device)).log_softmax(1).flatten(2).transpose(1, 2)
        )
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
def evaluate_segmentation(probe: SegmentationProbe, features, masks, batch_size: int = 32) -> IoU:
    """IoU of the probe at the masks' own size; tensors or memory-mapped arrays."""
    confusion = ConfusionMatrix(probe.classify.out_channels)
    device = probe.classify.weight.device
    for start in range(0, len(features), batch_size):
        block = slice(start, start + batch_size)
        truth = _rows(masks, block)
        confusion.update(
            probe.predict(_rows(features, block).to(device), truth.shape[-2:]).cpu(), truth
        )
    return confusion.compute()


def foreground_masks(masks: torch.Tensor) -> torch.Tensor:
    """Object masks -> 0 background, 1 any object; ignored pixels stay ignored."""
    return torch.where(masks == IGNORE, IGNORE, (masks > 0).long())


def foreground_iou(
    train_features: torch.Tensor,
    train_masks: torch.Tensor,
    val_features: torch.Tensor,
    val_masks: torch.Tensor,
    **options,
) -> float:
    """IoU of the foreground under a linear probe: features (N,C,h,w), object masks (N,H,W) with 0 as background."""
    probe = train_segmentation_probe(train_features, foreground_masks(train_masks), 2, **options)
    return float(
        evaluate_segmentation(probe, val_features, foreground_masks(val_masks)).per_class[1]
    )
