"""Linear probe on frozen features: BatchNorm without affine parameters, then one linear layer.

SGD with Nesterov momentum and a cosine schedule. Several learning rates train at once, a linear
head each: every batch of features is read and normalised once for all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import skip_init

from muse.evaluation.frozen_features import frozen_sets, probe_facts, read_rows
from muse.evaluation.measurement import (
    Measured,
    Setup,
    check_classes,
    check_number,
    one_line_errors,
)
from muse.evaluation.metrics.accuracy_iou import (
    Accuracy,
    accuracy,
    check_labels,
    majority_accuracy,
)
from muse.evaluation.probed_network import pixel_maps, probed_network
from muse.utils.distributed import leave_processes

LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
EVAL_BLOCK = 4096
LARGEST_RATE = 1e38  # float32 holds no larger step; a head with such a rate diverges all the same


@dataclass(frozen=True)
class ProbeResult:
    """`last` is the final epoch and `best` the best epoch, each of the rate that did best there.

    Both learning rates are chosen on the validation set, as the field does; `by_rate` gives the
    last epoch of all of them.
    """

    last: Accuracy
    best: Accuracy
    best_epoch: int
    learning_rate: float
    by_rate: dict[str, Accuracy]
    chance: float
    majority: Accuracy
    classes: int
    train_samples: int
    val_samples: int

    def as_dict(self) -> dict:
        """Plain numbers for metrics.json."""
        return asdict(self)


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
    def predict(self, features) -> torch.Tensor:
        """(N, C) tensor or array -> (R, N) class indices on the CPU; -1 of a head that diverged."""
        self.eval()
        device = self.norm.running_mean.device
        blocks = [slice(i, i + EVAL_BLOCK) for i in range(0, len(features), EVAL_BLOCK)]
        guesses = torch.cat(
            [
                self(read_rows(features, block).float().to(device)).argmax(-1).T.cpu()
                for block in blocks
            ],
            dim=1,
        )
        guesses[self.diverged().cpu()] = -1
        return guesses


def probe_optimizer(probe: LinearProbe, rates: Sequence[float]) -> torch.optim.SGD:
    """Nesterov SGD with a parameter group, and so a learning rate, for each head."""
    groups = [
        {"params": head.parameters(), "lr": min(rate, LARGEST_RATE)}
        for head, rate in zip(probe.heads, rates, strict=True)
    ]
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True)


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


def train_linear_probe(
    train_features,
    train_labels: torch.Tensor,
    val_features,
    val_labels: torch.Tensor,
    num_classes: int | None = None,
    rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 100,
    batch_size: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> ProbeResult:
    """Probe of frozen features, evaluated after every epoch (at most 50 times).

    ValueError on labels out of range, missing samples, features of two widths, or when every rate
    diverges.

    Memory: batches of rows are copied from the array as they are needed, never the whole; beside
    them stand the heads (with gradient and momentum 3·R·C·K floats) and logits of at most
    max(batch_size, EVAL_BLOCK)·R·K floats.

    Args:
        train_features: (N, C) tensor or memory-mapped array.
        train_labels: (N,) int64.
        val_features: (M, C).
        val_labels: (M,).
        num_classes: None is the largest training label + 1.
        rates: learning rates for a batch of 256; they scale with the batch, as usual.
        epochs: passes over the training set.
        batch_size: None makes sixteen batches an epoch, of 64 to 1024.
        seed: of the first weights and the order of samples.
        device: where the heads are.
    """
    num_classes = _check_sets(train_features, train_labels, val_features, val_labels, num_classes)
    count = len(train_labels)
    batch_size = min(batch_size or min(max(count // 16, 64), 1024), count)
    probe = LinearProbe(train_features.shape[1], num_classes, rates, seed).to(device)
    optimizer = probe_optimizer(probe, [rate * batch_size / 256 for rate in rates])
    steps = epochs * (count // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    generator = torch.Generator().manual_seed(seed)
    evaluate_every = max(1, epochs // 50)
    history: list[tuple[int, list[Accuracy]]] = []
    for epoch in range(1, epochs + 1):
        order = torch.randperm(count, generator=generator)
        # the odd rest waits for another epoch
        for batch in order[: count // batch_size * batch_size].split(batch_size):
            index = batch.sort().values  # reads of a mapped file in file order
            rows = read_rows(train_features, index).float()
            probe_step(probe, optimizer, rows.to(device), train_labels[index].to(device))
            schedule.step()
        if epoch % evaluate_every == 0 or epoch == epochs:
            scores = [accuracy(row, val_labels, num_classes) for row in probe.predict(val_features)]
            history.append((epoch, scores))
    if probe.diverged().all():
        raise ValueError("the probe diverged at every learning rate: give smaller ones")
    return _result(history, rates, train_labels, val_labels, num_classes)


def _check_sets(
    train_features, train_labels, val_features, val_labels, num_classes: int | None
) -> int:
    """The number of classes. ValueError for sets that no probe can be trained or measured on."""
    num_classes = check_labels(train_labels, num_classes, "training set")
    if num_classes < 2:
        raise ValueError("all training samples are of one class: a probe needs at least two")
    check_labels(val_labels, num_classes, "validation set")
    if len(train_features) != len(train_labels) or len(val_features) != len(val_labels):
        raise ValueError("features and labels differ in number")
    widths = train_features.shape[1], val_features.shape[1]
    if widths[0] != widths[1]:
        raise ValueError(f"features of two widths: {widths[0]} and {widths[1]}")
    if len(train_labels) < 2:
        raise ValueError("a probe needs at least two training samples")
    return num_classes


def _result(history, rates, train_labels, val_labels, num_classes) -> ProbeResult:
    last = history[-1][1]
    chosen = max(range(len(rates)), key=lambda i: last[i].micro)
    best_epoch, best = max(
        ((epoch, score) for epoch, scores in history for score in scores),
        key=lambda pair: pair[1].micro,
    )
    return ProbeResult(
        last=last[chosen],
        best=best,
        best_epoch=best_epoch,
        learning_rate=rates[chosen],
        by_rate={f"{rate:g}": score for rate, score in zip(rates, last, strict=True)},
        chance=1 / num_classes,
        majority=majority_accuracy(train_labels, val_labels, num_classes),
        classes=num_classes,
        train_samples=len(train_labels),
        val_samples=len(val_labels),
    )


def pixel_features(images: torch.Tensor) -> torch.Tensor:
    """The raw-pixel baseline: (B,3,H,W) -> (B,768), the picture shrunk to 16×16 by area."""
    return pixel_maps(images).flatten(1)


@dataclass(frozen=True)
class ProbeRecipe:
    """How the probe of `run_linear_probe` is trained: settings of `train_linear_probe`."""

    num_classes: int | None = None
    epochs: int = 100
    batch_size: int | None = None
    learning_rates: tuple[float, ...] = LEARNING_RATES

    def __post_init__(self) -> None:
        check_number("num_classes", self.num_classes, 2)
        check_number("epochs", self.epochs, 1)
        check_number("probe_batch_size", self.batch_size, 2)
        check_number("learning_rates", self.learning_rates, 0.0)

    def facts(self) -> dict:
        """For the protocol."""
        return {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "learning_rates": list(self.learning_rates),
        }


def run_linear_probe(
    setup: Setup, recipe: ProbeRecipe, feature: str = "semantic", baseline: str | None = None
) -> Measured | None:
    """The measurement of scripts/linear_probe.py; its values are those of a `ProbeResult`.

    None in the processes that only extract features.

    Args:
        setup: what is probed, on which data.
        recipe: how the probe is trained.
        feature: a kind of `MUSE_ViT.features`.
        baseline: encoder or pixels, probed instead, see `probed_network`.
    """
    network = probed_network(setup, feature, baseline)
    train, val = frozen_sets(setup, network, "labels", pooled=True)
    if not leave_processes():
        return None
    check_classes(train.facts, val.facts)
    with one_line_errors("linear probe"):
        result = train_linear_probe(
            train.features,
            torch.tensor(train.targets),
            val.features,
            torch.tensor(val.targets),
            recipe.num_classes,
            recipe.learning_rates,
            recipe.epochs,
            recipe.batch_size,
            setup.cfg.training.seed,
            setup.device,
        )
    return Measured(result.as_dict(), probe_facts(network, recipe.facts(), train, val))
