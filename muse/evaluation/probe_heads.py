"""Linear heads that train side by side on frozen features, one a learning rate."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import skip_init

from muse.evaluation.frozen_features import read_rows
from muse.evaluation.metrics.accuracy_iou import Accuracy, accuracy

EVAL_BLOCK = 4096
LARGEST_RATE = 1e38  # float32 holds no larger step; a head with such a rate diverges all the same


class HeadScore(NamedTuple):
    """Of a head on a set: accuracy, and the mean cross-entropy, which tells equal ones apart."""

    accuracy: Accuracy
    loss: float

    def rank(self) -> tuple[float, float]:
        """Greater is better."""
        return self.accuracy.micro, -self.loss


class LinearProbe(nn.Module):
    """BatchNorm (momentum .1, no affine) and R linear heads C → K, one a learning rate."""

    def __init__(self, channels: int, num_classes: int, rates: Sequence[float], seed: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, affine=False)
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(channels, num_classes, generator=generator) * 0.01
        # skip_init: a measurement must not draw from the global generator
        self.heads = nn.ModuleList(skip_init(nn.Linear, channels, num_classes) for _ in rates)
        for head in self.heads:  # all rates start from the same weights
            head.weight.data.copy_(start.T)
            nn.init.zeros_(head.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(n, C) -> (n, R, K)"""
        weight = torch.cat([head.weight for head in self.heads])  # (R*K, C): one product for all
        bias = torch.cat([head.bias for head in self.heads])
        return F.linear(self.norm(features), weight, bias).unflatten(1, (len(self.heads), -1))

    def diverged(self) -> torch.Tensor:
        """(R,) whether a head's weights are no longer finite."""
        return torch.stack([~head.weight.isfinite().all() for head in self.heads])

    @torch.no_grad()
    def score(
        self, features, labels: torch.Tensor, places: torch.Tensor | None = None
    ) -> list[HeadScore]:
        """A score for each head; one that diverged has no right answer.

        Args:
            features: (N, C) tensor or array.
            labels: (N,).
            places: the rows that count, ascending; None is all.
        """
        self.eval()
        device, classes = self.norm.running_mean.device, self.heads[0].out_features
        count = len(labels) if places is None else len(places)
        guesses, losses = [], torch.zeros(len(self.heads))
        for start in range(0, count, EVAL_BLOCK):
            block = slice(start, start + EVAL_BLOCK)
            rows = block if places is None else places[block]
            logits = self(read_rows(features, rows).float().to(device))  # (n, R, K)
            right = logits.take_along_dim(labels[rows].to(device).view(-1, 1, 1), 2)  # (n, R, 1)
            losses += (logits.logsumexp(2) - right[..., 0]).sum(0).cpu()
            guesses.append(logits.argmax(2).T.cpu())
        answers = torch.cat(guesses, dim=1)  # (R, N)
        answers[self.diverged().cpu()] = -1
        truth = labels if places is None else labels[places]
        return [
            HeadScore(accuracy(row, truth, classes), loss / count)
            for row, loss in zip(answers, losses.nan_to_num(torch.inf).tolist(), strict=True)
        ]


def probe_optimizer(probe: LinearProbe, rates: Sequence[float]) -> torch.optim.SGD:
    """Nesterov SGD with a parameter group, and so a learning rate, for each head."""
    groups = [
        {"params": head.parameters(), "lr": min(rate, LARGEST_RATE)}
        for head, rate in zip(probe.heads, rates, strict=True)
    ]
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True)


def cosine_schedule(
    optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """From the rates given down to zero after `steps`, half a cosine."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )


def probe_step(
    probe: LinearProbe, optimizer: torch.optim.SGD, features: torch.Tensor, labels: torch.Tensor
) -> None:
    """One step of every head on one batch: features (n, C), labels (n,), on the probe's device."""
    probe.train()
    logits = probe(features)  # (n, R, K)
    targets = labels.repeat_interleave(logits.shape[1])
    # mean over samples, sum over heads: the heads' gradients do not touch each other
    loss = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / len(features)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def probe_batch(count: int, given: int | None = None) -> int:
    """The batch size for `count` samples: as given, or sixteen batches an epoch of 64 to 1024."""
    return min(given or min(max(count // 16, 64), 1024), count)
