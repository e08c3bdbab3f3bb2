"""The demo: pictures, the three stages with measurements after each, drawings, report."""

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig

import muse
from muse.analysis.routing import routing_report
from muse.config import load_config, resolved, shipped_config
from muse.errors import DataError
from muse.evaluation.suite import Yardstick, latent_grid
from muse.experiments.demo_data import make_demo_data
from muse.experiments.demo_data.kept_out import check_kept_out
from muse.experiments.demo_plan import SCRATCH_STAGES, STAGES, DemoPlan
from muse.experiments.demo_report import write_report
from muse.experiments.timed_training import fastest_precision, train_for
from muse.models.loading import load_model
from muse.teachers.build import shared_text_teacher, shared_topology_teacher
from muse.training.run_directory import was_run_with
from muse.training.tokenizer_task import train
from muse.utils.io import versions, writable_directory, write_json

log = logging.getLogger(__name__)

ENCODERS = ("muse_tiny", "scratch")
KINDS = ("everything", "stamps", "shapes")  # of data; where one cannot be made, the next is
# Shards that are measured where the data have them: after every stage, and after the last.
EVERY_STAGE, LAST_STAGE = ("val", "seen"), ("drawn", "seendrawn")
MOST_SHAPES = 2000


class _Run(NamedTuple):
    """What all stages of a demo share."""

    output: Path
    plan: DemoPlan
    stages: tuple[str, ...]
    overrides: list[str]
    yardsticks: Mapping[str, Yardstick]  # by the name of the shards


def run_demo(
    output: Path,
    plan: DemoPlan,
    data: Path | None = None,
    kind: str | None = None,
    overrides: Sequence[str] = (),
    encoder: str = "muse_tiny",
) -> dict[str, Any]:
    """Train and measure every stage that has not been done yet, and write the report.

    Args:
        output: the directory.
        plan: how many steps and pictures.
        data: a directory with train-*.tar, val-*.tar and classes.txt; None makes demo data.
        kind: of demo data, one of KINDS; the plan's when None.
        overrides: `key=value` for every stage.
        encoder: what stage 1 starts from: the packaged one, or from `scratch` one that a stage 0
            distils.

    Returns:
        What `metrics.json` holds.
    """
    started = time.perf_counter()
    output = writable_directory(output)
    data, kind = (Path(data), "own") if data else demo_data(output, plan.images, kind or plan.kind)
    _check_shards(data)
    if encoder == "muse_tiny" and kind in ("everything", "stamps"):
        check_kept_out(data)
    overrides = [
        f"dataset.params.train_shards_path_or_url={data}/train-*.tar",
        f"dataset.params.eval_shards_path_or_url={data}/val-*.tar",
        *(["model.encoder.source=random"] if encoder == "scratch" else []),
        *overrides,
    ]
    cfg = load_config(shipped_config("muse_tiny/stage3.yaml"), overrides)
    yardsticks = _yardsticks(cfg, data, plan)
    log.info("data and teachers ready after %.0f s", time.perf_counter() - started)
    stages = SCRATCH_STAGES if encoder == "scratch" else STAGES
    run = _with_precision(_Run(output, plan, stages, overrides, yardsticks))
    last, records = _run_stages(run)
    results = {
        "kind": kind,
        "data": str(data),
        "encoder": encoder,
        "plan": asdict(plan),
        "baselines": {name: one.baselines for name, one in yardsticks.items()},
        "stages": {name: record["measured"] for name, record in records.items()},
    }
    for key in ("steps", "train_seconds", "measure_seconds"):
        results[key] = {name: record[key] for name, record in records.items()}
    model = load_model(output / stages[-1] / "final", last.model)
    val = yardsticks["val"]
    # Which gradients are exactly zero in the trained model, as docs/fidelity.md says they are.
    results["routing"] = routing_report(model, val.val.images[:4], val.text[:4])
    results["seconds"] = round(time.perf_counter() - started, 1)
    results["protocol"] = _protocol(last, plan, yardsticks)
    topology = shared_topology_teacher(cfg, latent_grid(cfg))
    results["answers"] = write_report(output, results, model, yardsticks, topology)
    write_json(output / "metrics.json", results)
    return results


def _check_shards(data: Path) -> None:
    """`DataError` before any network loads."""
    for name in ("train-*.tar", "val-*.tar", "classes.txt"):
        if not any(data.glob(name)):
            raise DataError(f"{data}: holds no {name}")


def _yardsticks(cfg: DictConfig, data: Path, plan: DemoPlan) -> dict[str, Yardstick]:
    """One for each set of validation pictures that the data have; all share the training's."""
    first = Yardstick(
        cfg,
        shared_topology_teacher(cfg, latent_grid(cfg)),
        shared_text_teacher(cfg),
        plan.probe_images,
        plan.val_images,
    )
    found = {"val": first}
    for name in (*EVERY_STAGE, *LAST_STAGE):
        if name != "val" and any(data.glob(f"{name}-*.tar")):
            found[name] = first.beside(f"{data}/{name}-*.tar", plan.val_images)
    return found


def _with_precision(run: _Run) -> _Run:
    """The run with the precision of its plan; one that is measured here is measured once."""
    if any(one.startswith("training.mixed_precision=") for one in run.overrides):
        return run
    precision = run.plan.precision
    if precision is None:
        # Kept at once: with another one the stages would start again.
        kept = run.output / "precision.json"
        if not kept.is_file():
            write_json(kept, fastest_precision(_stage_cfg(run, "stage1")))
        precision = json.loads(kept.read_text())
    return run._replace(overrides=[f"training.mixed_precision={precision}", *run.overrides])


def _run_stages(run: _Run) -> tuple[DictConfig, dict[str, Any]]:
    """The last stage's configuration, and each stage's record."""
    records: dict[str, Any] = {}
    for stage in run.stages:
        seconds = run.plan.seconds_for(stage, run.stages, records)
        cfg, records[stage] = _run_stage(run, stage, seconds)
    return cfg, records


def _stage_cfg(run: _Run, stage: str, steps: int | None = None) -> DictConfig:
    """A stage's configuration; `steps` is what it took in its time, if it is there already."""
    planned = run.plan.steps_of(stage)
    every = f"experiment.log_every={max(1, min(10, planned // 10))}"
    overrides = [every, *run.overrides]
    return stage_config(stage, steps or planned, run.output, overrides, run.stages)


def _protocol(
    cfg: DictConfig, plan: DemoPlan, yardsticks: Mapping[str, Yardstick]
) -> dict[str, Any]:
    return {
        "muse": muse.__version__,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "precision": cfg.training.mixed_precision,
        "seed": cfg.training.seed,
        "images": {
            "train": plan.images,
            "probe": len(yardsticks["val"].train.labels),
            "validation": {name: len(one.val.labels) for name, one in yardsticks.items()},
        },
        "crop": cfg.dataset.preprocessing.crop_size,
        "feature_network": "efficientnet_lite0",
        "config": resolved(cfg),
    }


def demo_data(output: Path, images: int, kind: str) -> tuple[Path, str]:
    """(directory, kind) of the pictures; the next of KINDS where packages are unreachable."""
    for one in KINDS[KINDS.index(kind) :]:
        folder = output / f"data-{one}"
        count = min(images, MOST_SHAPES) if one == "shapes" else images
        try:
            make_demo_data(kind=one, output=folder, images=count)
            return folder, one
        except DataError as error:
            if one == KINDS[-1]:
                raise
            log.warning("%s; going on with %s", error, KINDS[KINDS.index(one) + 1])
    raise AssertionError  # the last kind has returned or raised


def stage_config(
    stage: str,
    steps: int,
    output: Path,
    overrides: Sequence[str],
    stages: Sequence[str] = STAGES,
) -> DictConfig:
    """The configuration of one stage in the directories of `output`.

    Args:
        stage: its name.
        steps: how many it takes, at most.
        output: the demo's directory.
        overrides: `key=value`; they win.
        stages: of the run; each starts from the one before it.
    """
    index = list(stages).index(stage)
    own = [
        f"training.max_train_steps={steps}",
        f"experiment.output_dir={output / stage}",
        f"experiment.init_from={output / stages[index - 1] if index else 'null'}",
        *overrides,
    ]
    return load_config(shipped_config(f"muse_tiny/{stage}.yaml"), own)


def _record(folder: Path) -> dict[str, Any] | None:
    """What a finished and measured stage has left."""
    file = folder / "measured.json"
    return json.loads(file.read_text()) if file.is_file() else None


def _run_stage(run: _Run, stage: str, seconds: float | None) -> tuple[DictConfig, dict[str, Any]]:
    """Train a stage and measure its final weights, or read the record of an equal run.

    seconds: how long it trains; None: its steps. Gives its configuration and its record.
    """
    folder, timed = run.output / stage, run.plan.seconds
    record = _record(folder)
    if record and record["plan_seconds"] == timed:
        cfg = _stage_cfg(run, stage, record["steps"] if timed else None)
        if was_run_with(folder, cfg) and (folder / "final").is_dir():
            log.info("%s is there already", folder)
            return cfg, record
    cfg = _stage_cfg(run, stage)
    # A stage that was to take its steps goes on where it stopped; one of a time starts again.
    if folder.is_dir() and (timed or record or not was_run_with(folder, cfg)):
        log.info("%s was not finished, or with other settings: starting it again", folder)
        for later in run.stages[run.stages.index(stage) :]:
            shutil.rmtree(run.output / later, ignore_errors=True)
    clock = time.perf_counter()
    if seconds is None:
        train(cfg)
        steps = cfg.training.max_train_steps
    else:
        log.info("%s trains for %.0f s", stage, seconds)
        steps = train_for(cfg, seconds)
    trained = time.perf_counter()
    measured = _measure(run, stage, load_model(folder / "final", cfg.model))
    record = {
        "steps": steps,
        "plan_seconds": timed,
        "precision": cfg.training.mixed_precision,
        "train_seconds": round(trained - clock, 1),
        "measure_seconds": round(time.perf_counter() - trained, 1),
        "measured": measured,
    }
    write_json(folder / "measured.json", record)
    return cfg, record


def _measure(run: _Run, stage: str, model: Any) -> dict[str, Any]:
    """The numbers of every set of validation pictures that this stage is measured on."""
    found = {}
    train_features = run.yardsticks["val"].train_features(model)
    for name, yardstick in run.yardsticks.items():
        if name in EVERY_STAGE or stage == run.stages[-1]:
            numbers = yardstick.measure(model, train_features)
            found[name] = numbers
            log.info(
                "%s, %s: PSNR %.2f dB, topology KL %.3f (prior %.3f), R@5 %.3f, zero-shot %.3f",
                stage,
                name,
                numbers["psnr"],
                numbers["topology"]["kl"],
                numbers["topology"]["kl_positional"],
                numbers["retrieval_r5"],
                numbers["zero_shot_macro"],
            )
    return found
