"""Recipes of linear probes: optimizers against torch and timm, schedules, the choice of a head."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from timm.optim.lars import Lars
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from muse.errors import ConfigError
from muse.evaluation.feature_probe import probe_recipe
from muse.evaluation.linear_probe import NATIVE_PROBE, train_linear_probe
from muse.evaluation.probe_heads import LinearProbe, rate_factor
from muse.evaluation.protocols import find_protocol

CHANNELS, CLASSES, RATES = 6, 3, (0.5, 0.02)
RELEASE, MAE, DINOV2 = (find_protocol(n, "linear_probe") for n in ("release", "mae", "dinov2"))


def batches(count=4, size=8):
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(size, CHANNELS, generator=generator) * 3 + 1
        yield rows, torch.randint(CLASSES, (size,), generator=generator)


def torch_optimizer(recipe, layer, rate):
    """(optimizers) of a layer trained alone, by public libraries."""
    options = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "lars":  # weights scaled by their size, the bias as plain SGD
        adapted = Lars([layer.weight], lr=rate, trust_coeff=1e-3, always_adapt=True, **options)
        return [adapted, torch.optim.SGD([layer.bias], rate, momentum=recipe.momentum)]
    nesterov = recipe.optimizer == "nesterov"
    return [torch.optim.SGD(layer.parameters(), rate, nesterov=nesterov, **options)]


@pytest.mark.parametrize(
    "recipe",
    [NATIVE_PROBE, RELEASE, MAE, DINOV2, replace(RELEASE, weight_decay=0.1)],
    ids=["nesterov", "sgd and length 1", "lars", "sgd without norm", "decay"],
)
def test_steps_are_those_of_torch_and_timm(recipe):
    """Two rates on two overlapping sets of columns, together, against a layer each, alone."""
    columns = (slice(0, 4), slice(2, 6))
    probe = LinearProbe(columns, CLASSES, recipe, RATES, seed=0)
    alone = []
    for group in probe.groups:
        for head, rate in enumerate(RATES):
            layer = nn.Linear(4, CLASSES)
            own = slice(head * CLASSES, (head + 1) * CLASSES)
            layer.weight.data.copy_(group.weight[own])
            layer.bias.data.copy_(group.bias[own])
            eps = recipe.norm_eps
            norm = nn.Identity() if eps is None else nn.BatchNorm1d(4, eps, affine=False)
            alone.append((group.columns, layer, norm, rate))
    optimizers = [torch_optimizer(recipe, layer, rate) for _, layer, _, rate in alone]
    for rows, labels in batches():
        probe.step(rows, labels)
        for (own, layer, norm, _), together in zip(alone, optimizers, strict=True):
            seen = F.normalize(rows[:, own], dim=1) if recipe.normalise else rows[:, own]
            layer.zero_grad()
            F.cross_entropy(layer(norm(seen)), labels).backward()
            for optimizer in together:
                optimizer.step()
    rows, labels = next(batches())
    logits = probe.eval()(rows)  # running statistics too
    for head, (own, layer, norm, _) in enumerate(alone):
        seen = F.normalize(rows[:, own], dim=1) if recipe.normalise else rows[:, own]
        torch.testing.assert_close(logits[:, head], layer(norm.eval()(seen)), rtol=1e-4, atol=1e-5)
        loss = F.cross_entropy(logits[:, head], labels)
        assert probe.score(rows, labels)[head].loss == pytest.approx(float(loss), rel=1e-5)


def test_the_schedule_is_torchs():
    recipe = replace(MAE, epochs=7, warmup_epochs=2)
    steps = 5
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    warm = LinearLR(optimizer, 1e-9, 1.0, 2 * steps)
    fall = CosineAnnealingLR(optimizer, 5 * steps)
    schedule = SequentialLR(optimizer, [warm, fall], [2 * steps])
    for step in range(7 * steps):
        assert rate_factor(recipe, step, steps) == pytest.approx(
            optimizer.param_groups[0]["lr"], abs=1e-8
        )
        optimizer.step()
        schedule.step()
    by_epoch = [rate_factor(replace(RELEASE, epochs=4), step, 2) for step in range(8)]
    assert by_epoch == pytest.approx(
        [1, 1, 0.853553, 0.853553, 0.5, 0.5, 0.146447, 0.146447], abs=1e-6
    )


def sets(seed):
    """Labels that only columns 2..4 of the features tell."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (400,), generator=generator)
    rows = torch.randn(400, 5, generator=generator)
    rows[:, 2:] += 4 * F.one_hot(labels, CLASSES)
    return rows, labels


def test_columns_are_chosen_on_the_held_out_part():
    (rows, labels), (val, val_labels) = sets(0), sets(1)
    columns = {"cls of 1": slice(0, 2), "cls+mean of 1": slice(0, 5)}
    options = {"epochs": 5, "recipe": replace(DINOV2, epoch_steps=None, batch_size=50)}
    result = train_linear_probe(
        rows, labels, val, val_labels, rates=(0.1, 1.0), columns=columns, **options
    )
    assert result.columns == result.best_columns == "cls+mean of 1" and result.last.micro > 0.9
    assert list(result.by_rate) == [f"{name} {rate}" for name in columns for rate in ("0.1", "1")]
    assert max(result.by_rate[f"cls of 1 {rate}"].micro for rate in ("0.1", "1")) < 0.5
    # on validation labels turned by one class the other columns would win
    turned = train_linear_probe(
        rows, labels, val, (val_labels + 1) % 3, rates=(0.1, 1.0), columns=columns, **options
    )
    assert turned.columns == "cls+mean of 1" and turned.last.micro < 0.1


def test_a_trial_leaves_the_rate_that_all_rates_would_have_chosen():
    """The head that goes on is the head of the whole run: heads do not touch each other."""
    (rows, labels), (val, val_labels) = sets(2), sets(3)
    options = {"rates": (1e-5, 0.1), "epochs": 6, "batch_size": 60}
    whole = train_linear_probe(rows, labels, val, val_labels, **options)
    recipe = replace(NATIVE_PROBE, trial_epochs=2)
    short = train_linear_probe(rows, labels, val, val_labels, recipe=recipe, **options)
    assert list(short.by_rate) == ["0.1"] and list(short.trial) == ["1e-05", "0.1"]
    assert short.learning_rate == whole.learning_rate == 0.1
    assert short.last == whole.last and short.best == whole.best
    assert short.trial["1e-05"].micro < short.trial["0.1"].micro


def test_an_epoch_has_the_steps_that_are_given():
    (rows, labels), (val, val_labels) = sets(4), sets(5)
    seen = []

    def augmented(places, batch_size, seed):
        while True:
            seen.append(batch_size)
            yield rows[places[:batch_size]], labels[places[:batch_size]]

    recipe = replace(DINOV2, epoch_steps=7, epochs=3, batch_size=1024)
    train_linear_probe(rows, labels, val, val_labels, recipe=recipe, augmented=augmented)
    assert seen == 21 * [360]  # a tenth of 400 is held out


def test_flags_change_the_recipe_and_leave_the_pictures():
    mae = probe_recipe(NATIVE_PROBE, "mae", epochs=20)
    assert (mae.optimizer, mae.epochs, mae.crop) == ("lars", 20, NATIVE_PROBE.crop)
    assert mae.augmentation == MAE.augmentation
    assert probe_recipe(MAE, augment="no").augmentation is None
    assert probe_recipe(RELEASE, augment="yes").augmentation.crop_size == 224
    for wrong, says in (
        ({"name": "simclr"}, "unknown --recipe 'simclr': one of native, release, mae, dinov2"),
        ({"name": "mae", "epochs": 10}, "--epochs 10 must be above the recipe's 10 epochs"),
        ({"trial_keep": 0}, "--trial_keep must be at least 1"),
        ({"epoch_steps": 0}, "--epoch_steps must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=says):
            probe_recipe(NATIVE_PROBE, **wrong)
