"""The demo of generation: latents, a generator for each latent space, samples, one table.

Every space gets the same network, the same steps and the same noise. What is done already (latents,
trained generators) is not done again, so a stopped run goes on.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muse import __version__
from muse.data.dataloader import eval_loader
from muse.errors import DataError
from muse.evaluation.metrics.networks import load_feature_network
from muse.evaluation.zero_shot import read_lines
from muse.experiments.demo import demo_data
from muse.experiments.generation_judge import BATCH, ClassifiedSet, Judge, classified_set
from muse.experiments.generation_report import draw_samples, write_tables
from muse.experiments.latent_spaces import (
    SIDE,
    TITLES,
    GenerationDemoPlan,
    LatentSpace,
    find_tokenizer,
    tokenizer_of,
)
from muse.generation.latent_tokenizer import open_tokenizer
from muse.utils.io import versions, writable_directory, write_json

log = logging.getLogger(__name__)

NETWORK = "efficientnet_lite0"


GENERATION_PLANS = {
    "default": GenerationDemoPlan(steps=100, samples=240, sampler_steps=25),
    "fast": GenerationDemoPlan(steps=6, samples=18, sampler_steps=3, images=96),
    "full": GenerationDemoPlan(steps=4000, samples=600, sampler_steps=50, watch_every=1000),
}


def run_generation_demo(
    output: Path,
    plan: GenerationDemoPlan,
    tokenizer: str | None = None,
    data: Path | None = None,
    kind: str = "stamps",
    spaces: Sequence[str] = tuple(TITLES),
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Train and measure a generator for each latent space; write table and pictures.

    Args:
        output: the directory.
        plan: how much.
        tokenizer: a checkpoint of MUSE; None takes the packaged or the demo's own.
        data: a directory with train-*.tar, val-*.tar and classes.txt; None makes demo data.
        kind: of demo data: stamps or shapes.
        spaces: some of `TITLES`, muse among them.
        overrides: `key=value` of the generator's configuration.

    Returns:
        What `metrics.json` holds.
    """
    started = time.perf_counter()
    output = writable_directory(output)
    torch.set_flush_denormal(True)
    trained = open_tokenizer(find_tokenizer(tokenizer))
    data, classes, judge, other_half, val = prepare_yardstick(output, plan, data, kind)
    results: dict[str, Any] = {
        "real": {"fd": judge.distance(other_half.first(plan.samples).features)},
        "held_out": {
            "accuracy": judge.class_accuracy(val),
            "nearest": float(judge.nearest(val.features)[0].mean()),
        },
        "chance": 1 / len(classes),
    }
    made = {}
    for name in spaces:
        one = tokenizer_of(name, trained, output / "untrained_tokenizer")
        space = LatentSpace(name, one, output, plan, data, len(classes), overrides)
        results[name], made[name] = space.run(judge, other_half, val)
        log.info("%s: %s", TITLES[name], results[name])
    results["protocol"] = _protocol(plan, trained.path, trained.sha256, data, judge, val)
    results["seconds"] = round(time.perf_counter() - started, 1)
    write_json(output / "metrics.json", results)
    draw_samples(output, made, judge, classes)
    write_tables(output, results)
    return results


class GenerationYardstick(NamedTuple):
    """What samples of every latent space are held against."""

    data: Path
    classes: list[str]
    judge: Judge
    other_half: ClassifiedSet  # real pictures that the judge's distance is not to
    val: ClassifiedSet  # real pictures that nobody learned


def prepare_yardstick(
    output: Path, plan: GenerationDemoPlan, data: Path | None, kind: str
) -> GenerationYardstick:
    """Read the pictures, or make them in `output`; DataError where they are too few."""
    data = Path(data) if data else demo_data(output, plan.images, kind)[0]
    classes = read_lines(data / "classes.txt", "class names")
    network = load_feature_network(NETWORK)
    train = classified_set(_pictures(f"{data}/train-*.tar"), network)
    val = classified_set(_pictures(f"{data}/val-*.tar"), network)
    judge = Judge(network, train, len(classes))
    other_half = ClassifiedSet(*(part[judge.half :] for part in train))
    if min(judge.half, len(other_half.labels)) < plan.samples:
        raise DataError(
            f"{data}: {len(train.labels)} training pictures are too few for halves of "
            f"{plan.samples}"
        )
    return GenerationYardstick(data, classes, judge, other_half, val)


def _protocol(
    plan: GenerationDemoPlan,
    path: str,
    sha256: str,
    data: Path,
    judge: Judge,
    val: ClassifiedSet,
) -> dict[str, Any]:
    return {
        "muse": __version__,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "plan": asdict(plan),
        "tokenizer": {"path": path, "sha256": sha256},
        "data": str(data),
        "network": NETWORK,
        "reference": judge.half,
        "train": len(judge.train.labels),
        "held_out": len(val.labels),
    }


def _pictures(source: str) -> Iterator[tuple[Tensor, Tensor]]:
    loader = eval_loader(
        source,
        batch_size=BATCH,
        fields=("images", "labels"),
        resize_shorter_edge=SIDE,
        crop_size=SIDE,
    )
    for batch in loader:
        yield batch["images"], batch["labels"]
