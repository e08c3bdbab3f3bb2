"""Linear segmentation heads that train side by side on frozen feature maps, one a learning rate.

A head is a batch norm and a 1x1 convolution. Several processes train one and the same set of heads:
each takes its part of a batch, and the norm's moments and the gradients are those of the whole.
"""

import copy
import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse.data.masks import IGNORE_INDEX
from muse.evaluation.mask_cells import cell_targets, check_mask_labels
from muse.evaluation.recipes import SegmentationRecipe
from muse.evaluation.sliding_window import RESIZED_VALUES, cover_pixels
from muse.utils.distributed import all_sum, world_size


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes together, of maps that need no gradient."""

    def forward(self, maps: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,h,w)"""
        if not self.training or world_size() == 1:
            return super().forward(maps)
        values = maps.double().transpose(0, 1).flatten(1)  # (C, n)
        count = values.new_full((1,), values.shape[1])
        sums = all_sum(torch.cat([values.sum(1), values.square().sum(1), count]))
        mean, square = sums[:-1].div(sums[-1]).chunk(2)
        variance = (square - mean.square()).clamp_min(0)  # (C,)
        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
        unbiased = variance * sums[-1] / (sums[-1] - 1)
        self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        self.num_batches_tracked.add_(1)
        moments = mean.to(maps), variance.to(maps)
        return F.batch_norm(maps, *moments, self.weight, self.bias, False, 0.0, self.eps)


class SegmentationProbe(nn.Module):
    """(B,C,h,w) features -> (B,K,h,w) logits."""

    def __init__(self, channels: int, num_classes: int, affine: bool = False):
        super().__init__()
        self.norm = SharedBatchNorm(channels, affine=affine)
        self.classify = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.classify(self.norm(features.float()))

    @torch.no_grad()
    def predict(self, features: Tensor, size: tuple[int, int], cell: int | None = None) -> Tensor:
        """(B,C,h,w) -> (B,*size) class indices: logits resized bilinearly, then the best class.

        The logits cover the padded picture; what lies beyond `size` is cut off.

        Args:
            features: (B,C,h,w).
            size: (H,W) of the pictures before any padding.
            cell: see `covered_size`.
        """
        self.eval()
        return cover_pixels(self(features), size, cell).argmax(1)


class SegmentationHeads(nn.Module):
    """R probes that start from the same weights; called, (B,C,h,w) -> (R,B,K,h,w) logits.

    Args:
        channels: C.
        num_classes: K.
        rates: R learning rates.
        affine: whether the norms have a scale and a shift.
        seed: of the first weights.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        rates: Sequence[float],
        affine: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first = SegmentationProbe(channels, num_classes, affine)
        self.rates, self.num_classes = tuple(rates), num_classes
        self.heads = nn.ModuleList(copy.deepcopy(first) for _ in rates)

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([head(features) for head in self.heads])

    def diverged(self) -> list[bool]:
        """Of each head, whether its weights are no longer finite."""
        return [not bool(head.classify.weight.isfinite().all()) for head in self.heads]

    def check(self) -> None:
        """ValueError when every head has diverged."""
        if all(self.diverged()):
            rates = ", ".join(f"{rate:g}" for rate in self.rates)
            which = f"learning rate {rates}" if len(self.rates) == 1 else f"every rate ({rates})"
            raise ValueError(f"the probe diverged at {which}: give a smaller one")


def heads_optimizer(heads: SegmentationHeads, recipe: SegmentationRecipe) -> torch.optim.Optimizer:
    """AdamW or SGD, a parameter group for each head."""
    groups = [
        {"params": head.parameters(), "lr": rate}
        for head, rate in zip(heads.heads, heads.rates, strict=True)
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    betas = (recipe.momentum, 0.999)
    return torch.optim.AdamW(groups, betas=betas, weight_decay=recipe.weight_decay)


def segmentation_rate(recipe: SegmentationRecipe, step: int, steps: int) -> float:
    """Of the learning rate in step 0 .. steps - 1; a linear warm-up multiplies the schedule."""
    done = step / steps
    schedule = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "poly": 1 - done,
    }[recipe.schedule]
    if step < recipe.warmup_steps:
        schedule *= max(1e-6, step / recipe.warmup_steps)
    return schedule


def train_heads(
    heads: SegmentationHeads,
    batches: Iterable[tuple[Tensor, Tensor]],
    recipe: SegmentationRecipe,
    steps: int,
    cell: int | None = None,
) -> Iterable[int]:
    """Train; after each step its number, from 1 on, is handed out, to be measured or passed over.

    ValueError on a label out of range, and when all heads diverge.

    Args:
        heads: in training mode again whenever a step begins.
        batches: features (b,C,h,w) and labels (b,H,W) of this process, on the heads' device.
        recipe: optimizer, schedule, loss.
        steps: batches.
        cell: see `covered_size`.
    """
    optimizer = heads_optimizer(heads, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: segmentation_rate(recipe, step, steps)
    )
    add_gradients = {"cells": _cells_backward, "pixels": _pixels_backward}[recipe.loss]
    for number, (features, labels) in zip(range(1, steps + 1), batches, strict=False):
        heads.train()
        optimizer.zero_grad()
        check_mask_labels(labels, heads.num_classes)
        add_gradients(heads(features), labels, cell)
        if world_size() > 1:
            for parameter in heads.parameters():
                parameter.grad.copy_(all_sum(parameter.grad))
        optimizer.step()
        schedule.step()
        yield number
    heads.eval()
    heads.check()


def _cells_backward(logits: Tensor, labels: Tensor, cell: int | None) -> None:
    """Cross-entropy on the cells' class shares, summed over heads, its gradients added."""
    grid, classes = tuple(logits.shape[-2:]), logits.shape[2]
    target = cell_targets(labels, grid, classes, cell=cell)  # (B, h*w, K)
    log_shares = logits.log_softmax(2).flatten(3).transpose(2, 3)  # (R, B, h*w, K)
    total = all_sum(target.sum()).clamp_min(1e-6)
    (-(target * log_shares).sum() / total).backward()


def _pixels_backward(logits: Tensor, labels: Tensor, cell: int | None) -> None:
    """Cross-entropy of labelled pixels, on logits resized to the masks, summed over heads.

    Some pictures of one head at a time: logits of 64 pictures of 512 x 512 pixels and 150 classes
    would take 10 GB.
    """
    size, classes = tuple(labels.shape[-2:]), logits.shape[2]
    at_once = max(1, 4 * RESIZED_VALUES // (classes * size[0] * size[1]))
    total = all_sum((labels != IGNORE_INDEX).sum()).clamp_min(1)
    gradient = torch.zeros_like(logits)
    for head, own in enumerate(logits.detach()):
        for first in range(0, len(labels), at_once):
            part = slice(first, first + at_once)
            leaf = own[part].requires_grad_()
            loss = F.cross_entropy(
                cover_pixels(leaf, size, cell),
                labels[part],
                ignore_index=IGNORE_INDEX,
                reduction="sum",
            )
            gradient[head, part] = torch.autograd.grad(loss / total, leaf)[0]
    logits.backward(gradient)
