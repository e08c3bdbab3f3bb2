"""Linear heads that train side by side on frozen features: one a rate, a pooling and a depth.

The gradient of a linear layer under cross-entropy is written down, (softmax - target)ᵀ · features,
so that a step is two matrix products for all rates together, one softmax, and one update in place,
without a graph and without a wait for the device.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse.evaluation.frozen_features import read_rows
from muse.evaluation.metrics.accuracy_iou import Accuracy, accuracy
from muse.evaluation.recipes import LinearProbeRecipe

EVAL_BLOCK = 4096
LARGEST_RATE = 1e38  # float32 holds no larger step; a head with such a rate diverges all the same
LARS_TRUST = 1e-3


class HeadScore(NamedTuple):
    """Of a head on a set: accuracy, and the mean cross-entropy, which tells equal ones apart."""

    accuracy: Accuracy
    loss: float

    def rank(self) -> tuple[float, float]:
        """Greater is better."""
        return self.accuracy.micro, -self.loss


class HeadGroup(nn.Module):
    """R heads C -> K on the same columns of the features, one a rate, as one matrix (R·K, C).

    Args:
        columns: of the stored features.
        heads: R.
        num_classes: K.
        recipe: its `normalise` and `norm_eps`.
        generator: of the first weights.
    """

    def __init__(
        self,
        columns: slice,
        heads: int,
        num_classes: int,
        recipe: LinearProbeRecipe,
        generator: torch.Generator,
    ):
        super().__init__()
        width = columns.stop - columns.start
        self.columns, self.heads, self.normalise = columns, heads, recipe.normalise
        eps = recipe.norm_eps
        self.norm = nn.BatchNorm1d(width, eps, affine=False) if eps is not None else nn.Identity()
        start = torch.randn(width, num_classes, generator=generator) * 0.01
        self.register_buffer("weight", start.T.repeat(heads, 1))  # all rates start equal
        self.register_buffer("bias", torch.zeros(heads * num_classes))
        self.register_buffer("weight_velocity", torch.zeros_like(self.weight))
        self.register_buffer("bias_velocity", torch.zeros_like(self.bias))

    def inputs(self, features: Tensor) -> Tensor:
        """(n, C of all columns) -> (n, C) as the heads see it."""
        rows = features[:, self.columns]
        return self.norm(F.normalize(rows, dim=1) if self.normalise else rows)

    def logits(self, features: Tensor) -> Tensor:
        """(n, C of all columns) -> (n, R·K)"""
        return F.linear(self.inputs(features), self.weight, self.bias)

    def gradients(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Of the mean cross-entropy of each head: (R·K, C) and (R·K,)."""
        inputs = self.inputs(features)
        logits = torch.addmm(self.bias, inputs, self.weight.T)
        errors = logits.view(len(inputs) * self.heads, -1).softmax(1)  # (n·R, K)
        errors.scatter_add_(
            1, labels.repeat_interleave(self.heads)[:, None], errors.new_full((len(errors), 1), -1)
        )
        errors = errors.view(len(inputs), -1)  # (n, R·K)
        share = 1 / len(inputs)
        weight = torch.addmm(self.weight, errors.T, inputs, beta=0, alpha=share)
        return weight, errors.sum(0).mul_(share)


class LinearProbe(nn.Module):
    """All heads of a probe: for every set of columns a group with a head for each rate.

    Args:
        groups: columns of the features, one group each.
        num_classes: K.
        recipe: normalisation, optimizer, momentum, decay.
        rates: the learning rates R, as they are used.
        seed: of the first weights.
    """

    def __init__(
        self,
        groups: Sequence[slice],
        num_classes: int,
        recipe: LinearProbeRecipe,
        rates: Sequence[float],
        seed: int,
    ):
        super().__init__()
        self.recipe, self.num_classes = recipe, num_classes
        generator = torch.Generator().manual_seed(seed)  # a measurement leaves the global one alone
        self.groups = nn.ModuleList(
            HeadGroup(columns, len(rates), num_classes, recipe, generator) for columns in groups
        )
        self.register_buffer("rates", torch.tensor([min(rate, LARGEST_RATE) for rate in rates]))

    def forward(self, features: Tensor) -> Tensor:
        """(n, C) -> (n, groups · R, K)"""
        logits = [group.logits(features).unflatten(1, (group.heads, -1)) for group in self.groups]
        return torch.cat(logits, 1)

    @torch.no_grad()
    def step(self, features: Tensor, labels: Tensor, factor: float = 1.0) -> None:
        """One step of every head on one batch, on the probe's device.

        Args:
            features: (n, C) float32.
            labels: (n,).
            factor: of the schedule, times every rate.
        """
        self.train()
        rates = self.rates * factor
        for group in self.groups:
            weight, bias = group.gradients(features, labels)
            self._update(group.weight, group.weight_velocity, weight, rates)
            self._update(group.bias, group.bias_velocity, bias, rates)

    def _update(self, value: Tensor, velocity: Tensor, gradient: Tensor, rates: Tensor) -> None:
        """SGD with momentum, Nesterov's, or LARS (You et al. 2017) for each head by itself."""
        recipe, matrix = self.recipe, value.dim() == 2
        heads = (len(rates), -1)
        value, velocity, gradient = (each.view(heads) for each in (value, velocity, gradient))
        lars = recipe.optimizer == "lars"
        if recipe.weight_decay and (matrix or not lars):  # LARS leaves biases alone
            gradient.add_(value, alpha=recipe.weight_decay)
        if lars and matrix:
            size, change = value.norm(dim=1), gradient.norm(dim=1)
            trust = LARS_TRUST * size / change
            gradient.mul_(trust.where((size > 0) & (change > 0), torch.ones_like(trust))[:, None])
        velocity.mul_(recipe.momentum).add_(gradient)
        if recipe.optimizer == "nesterov":
            change = gradient.add_(velocity, alpha=recipe.momentum)
        else:
            change = velocity
        value.addcmul_(change, rates[:, None], value=-1)

    def diverged(self) -> Tensor:
        """(groups · R,) whether a head's weights are no longer finite."""
        finite = [group.weight.view(group.heads, -1).isfinite().all(1) for group in self.groups]
        return ~torch.cat(finite)

    @torch.no_grad()
    def score(self, features, labels: Tensor, places: Tensor | None = None) -> list[HeadScore]:
        """A score for each head; one that diverged has no right answer.

        Args:
            features: (N, C) tensor or array.
            labels: (N,).
            places: the rows that count, ascending; None is all.
        """
        self.eval()
        device, classes = self.rates.device, self.num_classes
        count = len(labels) if places is None else len(places)
        truth = labels if places is None else labels[places]
        guesses, losses = [], torch.zeros(len(self.groups) * len(self.rates), device=device)
        for start in range(0, count, EVAL_BLOCK):
            block = slice(start, start + EVAL_BLOCK)
            rows = read_rows(features, block if places is None else places[block])
            rows, right = rows.to(device).float(), truth[block].to(device)
            best = []
            for index, group in enumerate(self.groups):
                logits = group.logits(rows).view(len(rows) * group.heads, -1)  # (n·R, K)
                each = F.cross_entropy(
                    logits, right.repeat_interleave(group.heads), reduction="none"
                ).view(-1, group.heads)
                losses[index * group.heads : (index + 1) * group.heads] += each.sum(0)
                best.append(logits.argmax(1).view(-1, group.heads))
            guesses.append(torch.cat(best, 1).T.cpu())
        answers = torch.cat(guesses, dim=1)  # (groups · R, N)
        answers[self.diverged().cpu()] = -1
        return [
            HeadScore(accuracy(row, truth, classes), loss / count)
            for row, loss in zip(answers, losses.nan_to_num(torch.inf).tolist(), strict=True)
        ]


def rate_factor(recipe: LinearProbeRecipe, step: int, epoch_steps: int) -> float:
    """What the rates are multiplied by at `step` (from 0): linear warm-up, then half a cosine."""
    epoch = step // epoch_steps if recipe.cosine_by == "epoch" else step / epoch_steps
    if epoch < recipe.warmup_epochs:
        return epoch / recipe.warmup_epochs
    left = recipe.epochs - recipe.warmup_epochs
    return 0.5 * (1 + math.cos(math.pi * (epoch - recipe.warmup_epochs) / left))


def cosine_schedule(
    optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """From the rates given down to zero after `steps`, half a cosine."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )


def probe_batch(count: int, given: int | None = None) -> int:
    """The batch size for `count` samples: as given, or sixteen batches an epoch of 64 to 1024."""
    return min(given or min(max(count // 16, 64), 1024), count)
