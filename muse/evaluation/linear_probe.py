"""Linear probe on frozen features: BatchNorm without affine parameters, then one linear layer.

SGD with Nesterov momentum and a cosine schedule. Several learning rates train at once, a linear
head each: every batch of features is read and normalised once for all of them. Rate and epoch are
chosen on a part of the training set that is held out (held_out.py); what is reported is measured on
the validation set.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from muse.evaluation.frozen_features import frozen_sets, probe_facts, read_rows
from muse.evaluation.held_out import split_training_set
from muse.evaluation.measurement import (
    Measured,
    Setup,
    check_classes,
    check_number,
    one_line_errors,
)
from muse.evaluation.metrics.accuracy_iou import (
    Accuracy,
    check_labels,
    majority_accuracy,
)
from muse.evaluation.probe_heads import (
    HeadScore,
    LinearProbe,
    cosine_schedule,
    probe_batch,
    probe_optimizer,
    probe_step,
)
from muse.evaluation.probed_network import pixel_maps, probed_network
from muse.utils.distributed import leave_processes

LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class BestOnValidation(Accuracy):
    """The greatest accuracy over all rates and epochs, chosen on the pictures that it is of."""

    epoch: int
    learning_rate: float


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies on the validation set.

    `last` is the final epoch, of the rate that was best there on the held-out training samples;
    `best` is the epoch and the rate that were best on them. `by_rate` gives the final epoch of
    every rate. `best_on_validation` is chosen on the validation set itself, as much of the field
    does, and so reads too high.
    """

    last: Accuracy
    best: Accuracy
    best_epoch: int
    best_learning_rate: float
    learning_rate: float
    by_rate: dict[str, Accuracy]
    best_on_validation: BestOnValidation
    chance: float
    majority: Accuracy
    classes: int
    train_samples: int
    held_out: int  # of the training samples; 0 where no class has two, and then all choose
    val_samples: int

    def as_dict(self) -> dict:
        """Plain numbers for metrics.json."""
        return asdict(self)


class EpochScores(NamedTuple):
    """Of all heads after an epoch."""

    epoch: int
    chosen_on: list[HeadScore]
    reported: list[HeadScore]


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

    A tenth of the training samples (at most 10,000) is not fitted: rate and epoch are chosen on it.

    ValueError on labels out of range, missing samples, features of two widths, or when every rate
    diverges.

    Memory: batches of rows are copied from the array as they are needed, never the whole; beside
    them stand the heads (with gradient and momentum 3·R·C·K floats) and logits of at most
    max(batch_size, EVAL_BLOCK)·R·K floats, twice.

    Args:
        train_features: (N, C) tensor or memory-mapped array.
        train_labels: (N,) int64.
        val_features: (M, C).
        val_labels: (M,).
        num_classes: None is the largest training label + 1.
        rates: learning rates for a batch of 256; they scale with the batch, as usual.
        epochs: passes over the training set.
        batch_size: see `probe_batch`.
        seed: of the first weights, the order of samples and the choice of those held out.
        device: where the heads are.
    """
    num_classes = _check_sets(train_features, train_labels, val_features, val_labels, num_classes)
    fitted, held = split_training_set(train_labels, seed)
    chosen_on = held if len(held) else fitted
    count = len(fitted)
    batch_size = probe_batch(count, batch_size)
    probe = LinearProbe(train_features.shape[1], num_classes, rates, seed).to(device)
    optimizer = probe_optimizer(probe, [rate * batch_size / 256 for rate in rates])
    schedule = cosine_schedule(optimizer, epochs * (count // batch_size))
    generator = torch.Generator().manual_seed(seed)
    evaluate_every = max(1, epochs // 50)
    history: list[EpochScores] = []
    for epoch in range(1, epochs + 1):
        order = fitted[torch.randperm(count, generator=generator)]
        # the odd rest waits for another epoch
        for batch in order[: count // batch_size * batch_size].split(batch_size):
            index = batch.sort().values  # reads of a mapped file in file order
            rows = read_rows(train_features, index).float()
            probe_step(probe, optimizer, rows.to(device), train_labels[index].to(device))
            schedule.step()
        if epoch % evaluate_every == 0 or epoch == epochs:
            choice = probe.score(train_features, train_labels, chosen_on)
            history.append(EpochScores(epoch, choice, probe.score(val_features, val_labels)))
    if probe.diverged().all():
        raise ValueError("the probe diverged at every learning rate: give smaller ones")
    return _result(history, rates, train_labels, val_labels, num_classes, len(held))


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


def _result(
    history: list[EpochScores],
    rates: Sequence[float],
    train_labels: torch.Tensor,
    val_labels: torch.Tensor,
    num_classes: int,
    held_out: int,
) -> ProbeResult:
    last = history[-1]
    chosen = max(range(len(rates)), key=lambda head: last.chosen_on[head].rank())
    both = [(scores, head) for scores in history for head in range(len(rates))]
    best, best_head = max(both, key=lambda pair: pair[0].chosen_on[pair[1]].rank())
    top, top_head = max(both, key=lambda pair: pair[0].reported[pair[1]].rank())
    on_validation = top.reported[top_head].accuracy
    by_rate = zip(rates, last.reported, strict=True)
    return ProbeResult(
        last=last.reported[chosen].accuracy,
        best=best.reported[best_head].accuracy,
        best_epoch=best.epoch,
        best_learning_rate=rates[best_head],
        learning_rate=rates[chosen],
        by_rate={f"{rate:g}": score.accuracy for rate, score in by_rate},
        best_on_validation=BestOnValidation(
            on_validation.micro, on_validation.macro, top.epoch, rates[top_head]
        ),
        chance=1 / num_classes,
        majority=majority_accuracy(train_labels, val_labels, num_classes),
        classes=num_classes,
        train_samples=len(train_labels),
        held_out=held_out,
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

    def facts(self, result: ProbeResult, seed: int) -> dict:
        """For the protocol: the settings that `result` was had with."""
        held = f"{result.held_out} held-out training samples, of all classes (seed {seed})"
        return {
            "num_classes": result.classes,
            "epochs": self.epochs,
            "batch_size": probe_batch(result.train_samples - result.held_out, self.batch_size),
            "learning_rates": list(self.learning_rates),
            "rate_and_epoch_chosen_on": held if result.held_out else "the fitted training samples",
            "fitted_samples": result.train_samples - result.held_out,
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
    network, seed = probed_network(setup, feature, baseline), setup.cfg.training.seed
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
            seed,
            setup.device,
        )
    facts = probe_facts(network, recipe.facts(result, seed), train, val)
    return Measured(result.as_dict(), facts)
