"""The measurements of scripts/linear_probe.py and scripts/knn.py, on features that both can read.

run_knn(Setup(load_config(FILE), checkpoint=DIRECTORY), find_protocol("native", "knn"))
"""

from collections.abc import Sequence
from dataclasses import asdict, fields, replace

import torch

from muse.data.crops import RandomCrop
from muse.errors import ConfigError
from muse.evaluation.augmented_features import AugmentedFeatures
from muse.evaluation.frozen_features import FeatureSet, frozen_sets, probe_facts
from muse.evaluation.knn import knn_scores
from muse.evaluation.linear_probe import NATIVE_PROBE, ProbeResult, train_linear_probe
from muse.evaluation.measurement import (
    Measured,
    Setup,
    check_classes,
    check_number,
    one_line_errors,
)
from muse.evaluation.metrics.accuracy_iou import check_labels, majority_accuracy
from muse.evaluation.probe_heads import probe_batch
from muse.evaluation.probed_network import ProbedNetwork, probed_network
from muse.evaluation.protocols import PROTOCOLS, find_protocol
from muse.evaluation.recipes import LinearProbeRecipe, NeighbourRecipe
from muse.evaluation.token_columns import fitting_recipe
from muse.utils.distributed import leave_processes


def probe_recipe(
    recipe: LinearProbeRecipe, name: str | None = None, augment: str | None = None, **changes
) -> LinearProbeRecipe:
    """The recipe of flags.

    ConfigError for a value out of range and an unknown name.

    Args:
        recipe: of the protocol, whose pictures stay.
        name: --recipe, a protocol whose way of training is taken; None is the same protocol's.
        augment: --augment: yes, no, or None for what the recipe has.
        changes: fields given by other flags; None where not given.
    """
    if name is not None:
        known = [key for key, commands in PROTOCOLS.items() if "linear_probe" in commands]
        if name not in known:
            raise ConfigError(f"unknown --recipe '{name}': one of {', '.join(known)}")
        recipe = replace(find_protocol(name, "linear_probe"), crop=recipe.crop)
    if augment is not None:
        augmentation = recipe.augmentation or RandomCrop()
        recipe = replace(recipe, augmentation=augmentation if augment == "yes" else None)
    recipe = replace(recipe, **{key: one for key, one in changes.items() if one is not None})
    check_number("epochs", recipe.epochs, 1)
    check_number("probe_batch_size", recipe.batch_size, 2)
    check_number("learning_rates", recipe.learning_rates, 0.0)
    check_number("epoch_steps", recipe.epoch_steps, 1)
    check_number("trial_epochs", recipe.trial_epochs, 0)
    check_number("trial_keep", recipe.trial_keep, 1)
    if recipe.epochs <= recipe.warmup_epochs:
        raise ConfigError(
            f"--epochs {recipe.epochs} must be above the recipe's {recipe.warmup_epochs} epochs of "
            "warm-up"
        )
    return recipe


def _network(
    setup: Setup,
    recipe: LinearProbeRecipe | NeighbourRecipe,
    feature: str,
    baseline: str | None,
    pooling: Sequence[str] | None,
    last_blocks: Sequence[int] | None,
) -> tuple[ProbedNetwork, LinearProbeRecipe | NeighbourRecipe]:
    """What is probed, and the recipe with the pooling and blocks that it can have."""
    network = probed_network(setup, feature, baseline)
    name = network.facts["feature"]
    recipe = fitting_recipe(recipe, network.layers, name, pooling, last_blocks)
    return network.with_pooling(recipe.pooling, recipe.last_blocks), recipe


def _facts(setup: Setup, recipe, network, probe: dict, train: FeatureSet, val: FeatureSet) -> dict:
    """For metrics.json: the protocol with the recipe that was used, and `probe_facts`."""
    used = {}
    if setup.protocol is not None:
        changes = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name != "crop"}
        used = setup.protocol.with_recipe(**changes).facts()
    return {**used, **probe_facts(network, probe, train, val)}


def run_linear_probe(
    setup: Setup,
    recipe: LinearProbeRecipe = NATIVE_PROBE,
    feature: str = "semantic",
    baseline: str | None = None,
    num_classes: int | None = None,
    pooling: Sequence[str] | None = None,
    last_blocks: Sequence[int] | None = None,
) -> Measured | None:
    """The measurement of scripts/linear_probe.py; its values are those of a `ProbeResult`.

    None in the processes that only extract features.

    Args:
        setup: what is probed, on which data.
        recipe: how the probe is trained.
        feature: a kind of `MUSE_ViT.features`.
        baseline: encoder or pixels, probed instead, see `probed_network`.
        num_classes: None is the largest training label + 1.
        pooling: see `fitting_recipe`.
        last_blocks: likewise.
    """
    check_number("num_classes", num_classes, 2)
    network, recipe = _network(setup, recipe, feature, baseline, pooling, last_blocks)
    train, val = frozen_sets(setup, network, "labels", pooled=True)
    check_classes(train.facts, val.facts)
    augmented = None
    if recipe.augmentation is not None:  # every process computes features of every batch
        augmented = AugmentedFeatures(setup, network, train, recipe.augmentation)
    elif not leave_processes():
        return None
    with one_line_errors("linear probe"):
        result = train_linear_probe(
            train.features,
            torch.tensor(train.targets),
            val.features,
            torch.tensor(val.targets),
            num_classes,
            seed=setup.cfg.training.seed,
            device=setup.device,
            recipe=recipe,
            columns=network.columns,
            augmented=augmented,
        )
    if not leave_processes():
        return None
    probe = _probe_facts(recipe, result, setup.cfg.training.seed)
    return Measured(result.as_dict(), _facts(setup, recipe, network, probe, train, val))


def _probe_facts(recipe: LinearProbeRecipe, result: ProbeResult, seed: int) -> dict:
    """For the protocol: the settings that `result` was had with."""
    fitted = result.train_samples - result.held_out
    held = f"{result.held_out} held-out training samples, of all classes (seed {seed})"
    return {
        "num_classes": result.classes,
        "epochs": recipe.epochs,
        "batch_size": probe_batch(fitted, recipe.batch_size),
        "learning_rates": list(recipe.learning_rates),
        "optimizer": recipe.optimizer,
        "features": "computed anew for every batch" if recipe.augmentation else "stored once",
        "chosen_on": held if result.held_out else "the fitted training samples",
        "reported": f"{recipe.report} epoch",
        "fitted_samples": fitted,
    }


def run_knn(
    setup: Setup,
    recipe: NeighbourRecipe,
    feature: str = "semantic",
    baseline: str | None = None,
    num_classes: int | None = None,
    pooling: Sequence[str] | None = None,
    last_blocks: Sequence[int] | None = None,
    ks: Sequence[int] | None = None,
) -> Measured | None:
    """The measurement of scripts/knn.py: shares of right answers for every number of neighbours.

    None in the processes that only extract features. Nothing is chosen: every k is reported.

    Args:
        setup: what is probed, on which data.
        recipe: temperature, and numbers of neighbours, of which those above the training set are
            left out.
        feature: a kind of `MUSE_ViT.features`.
        baseline: encoder or pixels, probed instead, see `probed_network`.
        num_classes: None is the largest training label + 1.
        pooling: one name, see `fitting_recipe`.
        last_blocks: one number, likewise.
        ks: numbers of neighbours that must be possible, in place of the recipe's.
    """
    check_number("num_classes", num_classes, 2)
    check_number("k", ks, 1)
    check_number("temperature", recipe.temperature, 0.0)
    network, recipe = _network(setup, recipe, feature, baseline, pooling, last_blocks)
    train, val = frozen_sets(setup, network, "labels", pooled=True)
    if not leave_processes():
        return None
    check_classes(train.facts, val.facts)
    if ks is not None and max(ks) > len(train.targets):
        raise ConfigError(f"--k {max(ks)} is above the {len(train.targets)} training samples")
    recipe = replace(recipe, ks=tuple(sorted(set(ks or recipe.ks))))
    with one_line_errors("k-NN"):
        values = _knn_values(train, val, recipe, network, num_classes, setup.device)
    probe = {
        "num_classes": values["classes"],
        "k": [k for k in recipe.ks if str(k) in values["by_k"]],
        "k_left_out": [k for k in recipe.ks if str(k) not in values["by_k"]],
        "temperature": recipe.temperature,
        "similarity": "cosine",
    }
    return Measured(values, _facts(setup, recipe, network, probe, train, val))


def _knn_values(
    train: FeatureSet,
    val: FeatureSet,
    recipe: NeighbourRecipe,
    network: ProbedNetwork,
    num_classes: int | None,
    device: str,
) -> dict:
    known, asked = (torch.tensor(each.targets) for each in (train, val))
    classes = check_labels(known, num_classes, "training set")
    # an only set of columns: --pool and --last_blocks take one value each
    columns = next(iter(network.columns.values())) if network.columns else slice(None)
    rows = train.features[:, columns], known, val.features[:, columns], asked
    scores = knn_scores(*rows, classes, recipe.ks, recipe.temperature, device)
    return {
        "by_k": {str(k): score._asdict() for k, score in scores.items()},
        "chance": 1 / classes,
        "majority": asdict(majority_accuracy(known, asked, classes)),
        "classes": classes,
        "train_samples": len(known),
        "val_samples": len(asked),
    }
