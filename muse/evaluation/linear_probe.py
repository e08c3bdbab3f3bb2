"""Linear probe on frozen features: heads side by side, trained as a recipe says (recipes.py).

Every batch of features is read once for all heads: one for each learning rate, pooling and number
of last blocks. What the recipe leaves open is chosen on a part of the training set that is held out
(held_out.py); what is reported is measured on the validation set.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor

from muse.evaluation.frozen_features import read_rows
from muse.evaluation.held_out import split_training_set
from muse.evaluation.metrics.accuracy_iou import (
    Accuracy,
    check_labels,
    majority_accuracy,
)
from muse.evaluation.probe_heads import (
    EVAL_BLOCK,
    LinearProbe,
    probe_batch,
    rate_factor,
)
from muse.evaluation.probe_result import BestOnValidation, EpochScores, Head, ProbeResult
from muse.evaluation.probed_network import pixel_maps
from muse.evaluation.protocols import find_protocol
from muse.evaluation.recipes import LinearProbeRecipe

NATIVE_PROBE: LinearProbeRecipe = find_protocol("native", "linear_probe")
# Endless (features (n, C), labels (n,)) of training samples, of (places, batch size, seed).
Batches = Callable[[Tensor, int, int], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class ProbeSets:
    """What a probe is trained and measured on; see `train_linear_probe`."""

    train_features: object
    train_labels: Tensor
    val_features: object
    val_labels: Tensor
    num_classes: int
    columns: Mapping[str, slice]
    seed: int
    device: str | torch.device
    augmented: Batches | None
    fitted: Tensor
    held: Tensor

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless: stored features in a new order each epoch, or what `augmented` gives."""
        if self.augmented is not None:
            yield from self.augmented(self.fitted, batch_size, self.seed)
        count, generator = len(self.fitted), torch.Generator().manual_seed(self.seed)
        while True:
            order = self.fitted[torch.randperm(count, generator=generator)]
            # the odd rest waits for another epoch
            for batch in order[: count // batch_size * batch_size].split(batch_size):
                index = batch.sort().values  # reads of a mapped file in file order
                yield read_rows(self.train_features, index), self.train_labels[index]


def train_linear_probe(
    train_features,
    train_labels: Tensor,
    val_features,
    val_labels: Tensor,
    num_classes: int | None = None,
    rates: Sequence[float] | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    recipe: LinearProbeRecipe = NATIVE_PROBE,
    columns: Mapping[str, slice] | None = None,
    augmented: Batches | None = None,
) -> ProbeResult:
    """Probe of frozen features, evaluated after every epoch (at most 50 times).

    A tenth of the training samples (at most 10,000) is not fitted: what the recipe leaves open is
    chosen on it. With `recipe.trial_epochs` all rates run so many epochs first, with the whole
    schedule, and only the `trial_keep` best of them run `recipe.epochs`.

    ValueError on wrong labels, missing samples, features of two widths, or when all heads diverge.

    Memory: batches of rows are copied as they are needed (a GPU with room for twice the features
    holds all); the heads, with gradient and momentum, are 3·R·C·K floats, and their logits at most
    max(batch_size, EVAL_BLOCK)·R·K floats, twice.

    Args:
        train_features: (N, C) tensor or memory-mapped array.
        train_labels: (N,) int64.
        val_features: (M, C).
        val_labels: (M,).
        num_classes: None is the largest training label + 1.
        rates: in place of the recipe's.
        epochs: likewise.
        batch_size: likewise; see `probe_batch`.
        seed: of the first weights, the order of samples and the choice of those held out.
        device: where the heads are.
        recipe: how the heads are trained.
        columns: name -> columns of the features; each set has heads of its own. None is all.
        augmented: gives the training batches in place of `train_features`.
    """
    given = {"learning_rates": rates and tuple(rates), "epochs": epochs, "batch_size": batch_size}
    recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})
    classes = _check_sets(train_features, train_labels, val_features, val_labels, num_classes)
    sets = ProbeSets(
        on_device(train_features, device),
        train_labels,
        on_device(val_features, device),
        val_labels,
        classes,
        columns or {"": slice(0, train_features.shape[1])},
        seed,
        device,
        augmented,
        *split_training_set(train_labels, seed),
    )
    recipe, trial = _after_trial(sets, recipe)
    heads, history = _fit(sets, recipe)
    return _result(history, heads, sets, recipe, trial)


def _after_trial(
    sets: ProbeSets, recipe: LinearProbeRecipe
) -> tuple[LinearProbeRecipe, dict[str, Accuracy]]:
    """The recipe with the rates that go on, and how good every head of the trial was."""
    if not recipe.trial_epochs or len(recipe.learning_rates) <= recipe.trial_keep:
        return recipe, {}
    heads, history = _fit(sets, replace(recipe, epochs=recipe.trial_epochs, warmup_epochs=0))
    scores = dict(zip(heads, history[-1].chosen_on, strict=True))
    best = {
        rate: max(score.rank() for head, score in scores.items() if head.rate == rate)
        for rate in recipe.learning_rates
    }
    kept = sorted(best, key=best.get)[-recipe.trial_keep :]
    trial = {head.name(): score.accuracy for head, score in scores.items()}
    return replace(recipe, learning_rates=tuple(sorted(kept))), trial


def _fit(sets: ProbeSets, recipe: LinearProbeRecipe) -> tuple[list[Head], list[EpochScores]]:
    """All heads of the recipe through all of its epochs, with their scores."""
    count, chosen_on = len(sets.fitted), sets.held if len(sets.held) else sets.fitted
    batch_size = probe_batch(count, recipe.batch_size)
    scale = batch_size / recipe.rate_batch if recipe.rate_batch else 1.0
    rates = [rate * scale for rate in recipe.learning_rates]
    groups = list(sets.columns.values())
    probe = LinearProbe(groups, sets.num_classes, recipe, rates, sets.seed).to(sets.device)
    epoch_steps = recipe.epoch_steps or count // batch_size
    evaluate_every = max(recipe.evaluate_every, recipe.epochs // 50)
    history: list[EpochScores] = []
    batches = sets.batches(batch_size)
    for step in range(recipe.epochs * epoch_steps):
        rows, labels = next(batches)
        rows, labels = (each.to(sets.device, non_blocking=True) for each in (rows, labels))
        probe.step(rows.float(), labels, rate_factor(recipe, step, epoch_steps))
        epoch, rest = divmod(step + 1, epoch_steps)
        if rest == 0 and (epoch % evaluate_every == 0 or epoch == recipe.epochs):
            choice = probe.score(sets.train_features, sets.train_labels, chosen_on)
            reported = probe.score(sets.val_features, sets.val_labels)
            history.append(EpochScores(epoch, choice, reported))
    if probe.diverged().all():
        raise ValueError("the probe diverged at every learning rate: give smaller ones")
    return [Head(name, rate) for name in sets.columns for rate in recipe.learning_rates], history


def on_device(features, device: str | torch.device):
    """Features that a GPU has room for twice over, on it; else as they are, in memory or mapped."""
    device = torch.device(device)
    if device.type != "cuda" or isinstance(features, Tensor):
        return features
    if 2 * features.nbytes > torch.cuda.mem_get_info(device)[0]:
        return features
    dtype = torch.from_numpy(numpy.empty(0, features.dtype)).dtype
    whole = torch.empty(features.shape, dtype=dtype, device=device)
    for start in range(0, len(features), EVAL_BLOCK):
        block = slice(start, start + EVAL_BLOCK)
        whole[block] = read_rows(features, block).to(device)
    return whole


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
    heads: list[Head],
    sets: ProbeSets,
    recipe: LinearProbeRecipe,
    trial: dict[str, Accuracy],
) -> ProbeResult:
    final = history[-1]
    chosen = max(range(len(heads)), key=lambda head: final.chosen_on[head].rank())
    both = [(scores, head) for scores in history for head in range(len(heads))]
    best, best_head = max(both, key=lambda pair: pair[0].chosen_on[pair[1]].rank())
    top, top_head = max(both, key=lambda pair: pair[0].reported[pair[1]].rank())
    on_validation = top.reported[top_head].accuracy
    last, best_one = final.reported[chosen].accuracy, best.reported[best_head].accuracy
    by_head = zip(heads, final.reported, strict=True)
    return ProbeResult(
        reported=best_one if recipe.report == "best" else last,
        last=last,
        best=best_one,
        best_epoch=best.epoch,
        best_learning_rate=heads[best_head].rate,
        learning_rate=heads[chosen].rate,
        by_rate={head.name(): score.accuracy for head, score in by_head},
        best_on_validation=BestOnValidation(
            on_validation.micro, on_validation.macro, top.epoch, heads[top_head].rate
        ),
        chance=1 / sets.num_classes,
        majority=majority_accuracy(sets.train_labels, sets.val_labels, sets.num_classes),
        classes=sets.num_classes,
        train_samples=len(sets.train_labels),
        held_out=len(sets.held),
        val_samples=len(sets.val_labels),
        columns=heads[chosen].columns,
        best_columns=heads[best_head].columns,
        trial=trial,
    )


def pixel_features(images: Tensor) -> Tensor:
    """The raw-pixel baseline: (B,3,H,W) -> (B,768), the picture shrunk to 16×16 by area."""
    return pixel_maps(images).flatten(1)
