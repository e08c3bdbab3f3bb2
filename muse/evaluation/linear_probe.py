"""Linear probe on frozen features: BatchNorm without affine parameters, then one linear layer.

SGD with Nesterov momentum and a cosine schedule. Several learning rates train at once: their weights lie side by side
in one matrix, so every batch of features is read and normalised once for all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy
import torch
import torch.nn.functional as F

LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
EVAL_BLOCK = 4096


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers over samples (micro) and averaged over the classes that occur (macro), both in [0, 1]."""

    micro: float
    macro: float


@dataclass(frozen=True)
class ProbeResult:
    """`last` is the final epoch and `best` the best epoch, each of the learning rate that did best there.

    Both learning rates are chosen on the validation set, as the field does; `by_rate` gives the last epoch of all of
    them.
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


def accuracy(predictions: torch.Tensor, labels: torch.Tensor, num_classes: int) -> Accuracy:
    """(N,) class indices twice -> `Accuracy`; classes absent from `labels` are left out of the macro mean."""
    right = torch.bincount(labels[predictions == labels], minlength=num_classes).double()
    total = torch.bincount(labels, minlength=num_classes).double()
    present = total > 0
    return Accuracy(
        float(right.sum() / total.sum()), float((right[present] / total[present]).mean())
    )


def majority_accuracy(
    train_labels: torch.Tensor, val_labels: torch.Tensor, num_classes: int
) -> Accuracy:
    """What always answering the training set's most frequent class scores."""
    common = torch.bincount(train_labels, minlength=num_classes).argmax()
    return accuracy(common.expand_as(val_labels), val_labels, num_classes)


def check_labels(labels: torch.Tensor, num_classes: int | None, what: str) -> int:
    """Number of classes: `num_classes`, or the largest label + 1. ValueError names a label out of range."""
    if not len(labels):
        raise ValueError(f"{what}: no labelled samples")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        raise ValueError(
            f"{what}: labels {low}..{high} do not fit {num_classes or high + 1} classes"
        )
    return num_classes or high + 1


def _rows(features, index) -> torch.Tensor:
    """Rows of a tensor, or of a memory-mapped array without reading the rest."""
    if isinstance(features, torch.Tensor):
        return features[index].float()
    index = index.numpy() if isinstance(index, torch.Tensor) else index
    return torch.from_numpy(numpy.array(features[index], dtype=numpy.float32))


class LinearProbe:
    """BatchNorm (momentum .1, no affine) and R linear heads C → K, one a learning rate.

    `weight` (C, R, K), `bias` (R, K).
    """

    momentum = 0.9

    def __init__(
        self,
        channels: int,
        num_classes: int,
        rates: Sequence[float],
        seed: int,
        device: str | torch.device,
    ):
        generator = torch.Generator().manual_seed(seed)
        self.norm = torch.nn.BatchNorm1d(channels, affine=False, device=device)
        start = torch.randn(channels, 1, num_classes, generator=generator) * 0.01
        self.weight = start.repeat(1, len(rates), 1).to(device).requires_grad_()
        self.bias = torch.zeros(len(rates), num_classes, device=device, requires_grad=True)
        self.rates = torch.tensor(rates, device=device).view(-1, 1)
        self.device = device
        self._velocity = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """(n, C) -> (n, R, K)"""
        normed = self.norm(features)
        return (normed @ self.weight.flatten(1)).unflatten(1, self.bias.shape) + self.bias

    def step(self, features: torch.Tensor, labels: torch.Tensor, schedule: float) -> None:
        """One Nesterov step of every head on one batch; each head's rate is multiplied by `schedule`."""
        self.norm.train()
        logits = self.logits(features.to(self.device))
        heads = logits.shape[1]
        targets = labels.to(self.device).repeat_interleave(heads)
        # mean over samples, sum over heads: the heads' gradients do not touch each other
        loss = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / len(features)
        for value, gradient, velocity in zip(
            (self.weight, self.bias),
            torch.autograd.grad(loss, (self.weight, self.bias)),
            self._velocity,
            strict=True,
        ):
            velocity.mul_(self.momentum).add_(gradient)
            with torch.no_grad():
                value -= self.rates * schedule * (gradient + self.momentum * velocity)

    @torch.no_grad()
    def predict(self, features) -> torch.Tensor:
        """(N, C) tensor or array -> (R, N) class indices on the CPU; -1 of a head that diverged."""
        self.norm.eval()
        blocks = [slice(i, i + EVAL_BLOCK) for i in range(0, len(features), EVAL_BLOCK)]
        guesses = torch.cat(
            [
                self.logits(_rows(features, block).to(self.device)).argmax(-1).T.cpu()
                for block in blocks
            ],
            dim=1,
        )
        guesses[~self.weight.isfinite().all(2).all(0).cpu()] = -1
        return guesses


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
    """Probe of (N, C) features (tensor or memory-mapped array) with (N,) labels.

    rates are for a batch of 256 and scale with the batch, as usual. batch_size None: sixteen batches an epoch, of 64
    to 1024. Evaluated after every epoch (at most 50 times). ValueError on labels out of range, missing samples,
    features of two widths, or when every rate diverges.

    Memory: batches of rows are copied from the array as they are needed, never the whole; beside them stand the heads
    (with gradient and velocity 3·R·C·K floats) and logits of at most max(batch_size, EVAL_BLOCK)·R·K floats.
    """
    num_classes = check_labels(train_labels, num_classes, "training set")
    if num_classes < 2:
        raise ValueError("all training samples are of one class: a probe needs at least two")
    check_labels(val_labels, num_classes, "validation set")
    if len(train_features) != len(train_labels) or len(val_features) != len(val_labels):
        raise ValueError("features and labels differ in number")
    if train_features.shape[1] != val_features.shape[1]:
        raise ValueError(
            f"features of two widths: {train_features.shape[1]} and {val_features.shape[1]}"
        )
    count = len(train_labels)
    if count < 2:
        raise ValueError("a probe needs at least two training samples")
    batch_size = min(batch_size or min(max(count // 16, 64), 1024), count)
    generator = torch.Generator().manual_seed(seed)
    scaled = [rate * batch_size / 256 for rate in rates]
    probe = LinearProbe(train_features.shape[1], num_classes, scaled, seed, device)
    steps, step = epochs * (count // batch_size), 0
    evaluate_every = max(1, epochs // 50)
    history: list[tuple[int, list[Accuracy]]] = []
    for epoch in range(1, epochs + 1):
        order = torch.randperm(count, generator=generator)
        for batch in order[: count // batch_size * batch_size].split(
            batch_size
        ):  # the odd rest waits for another epoch
            index = batch.sort().values  # reads of a mapped file in file order
            probe.step(
                _rows(train_features, index),
                train_labels[index],
                0.5 * (1 + math.cos(math.pi * step / steps)),
            )
            step += 1
        if epoch % evaluate_every == 0 or epoch == epochs:
            scores = [accuracy(row, val_labels, num_classes) for row in probe.predict(val_features)]
            history.append((epoch, scores))
    if not probe.weight.isfinite().all(2).all(0).any():
        raise ValueError("the probe diverged at every learning rate: give smaller ones")
    return _result(history, rates, train_labels, val_labels, num_classes)


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


def pixel_features(images: torch.Tensor, side: int = 16) -> torch.Tensor:
    """The raw-pixel baseline: (B,3,H,W) -> (B, 3*side*side), the picture shrunk by area."""
    return F.interpolate(images, (side, side), mode="area").flatten(1)


def run_linear_probe(args, cfg) -> tuple[ProbeResult, dict] | None:
    """The measurement behind scripts/linear_probe.py; None in the processes that only extract features."""
    from muse.evaluation import command, frozen_features

    command.check_numbers(args, num_classes=2, epochs=1, probe_batch_size=2, learning_rates=0.0)
    command.start(args)
    network, network_facts = frozen_features.feature_network(args, cfg)
    sets = [
        frozen_features.frozen_features(
            args, cfg, network, network_facts, source, default, "labels", pooled=True
        )
        for source, default in (
            (args.train_url, "train_shards_path_or_url"),
            (args.val_url, "eval_shards_path_or_url"),
        )
    ]
    if not command.finish():
        return None
    (train, train_labels, train_facts), (val, val_labels, val_facts) = sets
    command.check_classes(train_facts, val_facts)
    with command.one_line_errors("linear probe"):
        result = train_linear_probe(
            train,
            torch.tensor(train_labels),
            val,
            torch.tensor(val_labels),
            args.num_classes,
            args.learning_rates,
            args.epochs,
            args.probe_batch_size,
            cfg.training.seed,
            args.device,
        )
    probe = {
        "epochs": args.epochs,
        "batch_size": args.probe_batch_size,
        "learning_rates": args.learning_rates,
    }
    return result, {
        "network": network_facts,
        "probe": probe,
        "train": train_facts,
        "val": val_facts,
    }
