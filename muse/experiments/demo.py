"""The demo from end to end: data, a stand-in for pretraining, three stages with measurements between them, pictures, report."""

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

import muse
from muse.config import load_config, resolved
from muse.errors import DataError
from muse.evaluation.suite import Yardstick, latent_grid
from muse.experiments.demo_data import make_demo_data
from muse.experiments.demo_report import write_report
from muse.models.loading import load_model
from muse.teachers.build import shared_text_teacher, shared_topology_teacher
from muse.training.run_directory import was_run_with
from muse.training.tokenizer_task import train
from muse.utils.io import versions, writable_directory, write_json

log = logging.getLogger(__name__)

CONFIGS = Path(muse.__file__).parents[1] / "configs" / "muse_tiny"
STAGES = ("stage0", "stage1", "stage2", "stage3")
# Seconds of one stage-0 step on the machine the default plan was made for; a slower one gets fewer steps (`Plan.fitted`).
REFERENCE_STEP = 0.58


@dataclass(frozen=True)
class Plan:
    """How much of everything: optimizer steps of each stage, pictures made, pictures for the probes and for validation."""

    steps: tuple[int, int, int, int]
    images: int = 3000
    probe_images: int = 600
    val_images: int | None = None
    limited: bool = True

    def fitted(self, seconds_per_step: float) -> "Plan":
        """The plan with the steps after stage 0 cut in proportion where the machine is slower than the reference."""
        factor = min(1.0, REFERENCE_STEP / seconds_per_step) if self.limited else 1.0
        if factor == 1.0:
            return self
        log.warning(
            "this machine takes %.2f s for a step that should take %.2f: stages 1-3 get %.0f%% of their steps",
            seconds_per_step,
            REFERENCE_STEP,
            100 * factor,
        )
        return replace(
            self, steps=(self.steps[0], *(max(20, int(count * factor)) for count in self.steps[1:]))
        )


PLANS = {
    "default": Plan((200, 160, 200, 130)),
    "fast": Plan((12, 12, 10, 8), images=160, probe_images=120, val_images=64, limited=False),
    "full": Plan((600, 1200, 1200, 1200), images=6000, probe_images=2000, limited=False),
}


def run_demo(
    output: Path,
    plan: Plan,
    data: Path | None = None,
    kind: str = "stamps",
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Do everything that is not there yet; returns what `metrics.json` holds."""
    started = time.perf_counter()
    output = writable_directory(output)
    data, kind = (Path(data), "own") if data else demo_data(output, plan, kind)
    base = [
        f"dataset.params.{split}_shards_path_or_url={data}/{name}-*.tar"
        for split, name in (("train", "train"), ("eval", "val"))
    ]
    cfg = load_config(CONFIGS / "stage3.yaml", [*base, *overrides])
    text = shared_text_teacher(cfg)
    yardstick = Yardstick(
        cfg,
        shared_topology_teacher(cfg, latent_grid(cfg)),
        text,
        plan.probe_images,
        plan.val_images,
    )
    log.info("data and teachers ready after %.0f s", time.perf_counter() - started)

    records: dict[str, Any] = {}
    for index, stage in enumerate(STAGES):
        stage_cfg = stage_config(stage, plan.steps[index], output, [*base, *overrides])
        records[stage] = run_stage(stage_cfg, yardstick)
        if index == 0:
            # Of the recorded time, so that a second run of the demo makes the same plan and finds its stages done.
            plan = plan.fitted(records[stage]["train_seconds"] / plan.steps[0])
    results = {
        "kind": kind,
        "data": str(data),
        "plan": asdict(plan),
        "baselines": yardstick.baselines,
        "stages": {name: record["measured"] for name, record in records.items()},
        **{
            key: {name: record[key] for name, record in records.items()}
            for key in ("train_seconds", "measure_seconds")
        },
    }
    model = load_model(Path(stage_cfg.experiment.output_dir) / "final", stage_cfg.model)
    results["routing"] = check_routing(model, yardstick)
    results["seconds"] = round(time.perf_counter() - started, 1)
    results["protocol"] = {
        "muse": muse.__version__,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "seed": cfg.training.seed,
        "images": {
            "train": plan.images,
            "probe": len(yardstick.train.labels),
            "validation": len(yardstick.val.labels),
        },
        "crop": cfg.dataset.preprocessing.crop_size,
        "feature_network": "efficientnet_lite0",
        "config": resolved(stage_cfg),
    }
    write_report(output, results, model, yardstick, shared_topology_teacher(cfg, latent_grid(cfg)))
    write_json(output / "metrics.json", results)
    return results


def demo_data(output: Path, plan: Plan, kind: str) -> tuple[Path, str]:
    """Make or reuse the pictures; where the packages of `stamps` cannot be had, say so and draw `shapes`."""
    if kind == "stamps":
        try:
            make_demo_data(kind="stamps", output=output / "data-stamps", images=plan.images)
            return output / "data-stamps", "stamps"
        except DataError as error:
            log.warning("%s; going on with drawn shapes", error)
    make_demo_data(kind="shapes", output=output / "data-shapes", images=min(plan.images, 2000))
    return output / "data-shapes", "shapes"


def stage_config(stage: str, steps: int, output: Path, overrides: Sequence[str]) -> DictConfig:
    """The configuration of one stage in this run's directories."""
    before = STAGES[STAGES.index(stage) - 1] if stage != STAGES[0] else None
    own = [
        f"training.max_train_steps={steps}",
        f"experiment.output_dir={output / stage}",
        f"experiment.init_from={output / before if before else 'null'}",
        *overrides,
    ]
    return load_config(CONFIGS / f"{stage}.yaml", own)


def prepare(cfg: DictConfig) -> bool:
    """Whether this very stage was trained already; a run of other settings in its place is removed."""
    folder = Path(cfg.experiment.output_dir)
    if not (folder / "config.yaml").is_file():
        return False
    same = was_run_with(folder, cfg)
    if not same:
        log.info("%s was trained with other settings: starting it again", folder)
        for later in STAGES[STAGES.index(folder.name) :]:
            shutil.rmtree(folder.parent / later, ignore_errors=True)
    return same and (folder / "final").is_dir()


def run_stage(cfg: DictConfig, yardstick: Yardstick) -> dict[str, Any]:
    """Train a stage and measure its final weights, or read what an equal run kept beside them."""
    folder = Path(cfg.experiment.output_dir)
    kept = folder / "measured.json"
    if prepare(cfg) and kept.is_file():
        log.info("%s is there already", folder)
        return json.loads(kept.read_text())
    clock = time.perf_counter()
    train(cfg)
    trained = time.perf_counter()
    numbers = yardstick.measure(load_model(folder / "final", cfg.model))
    record = {
        "train_seconds": round(trained - clock, 1),
        "measure_seconds": round(time.perf_counter() - trained, 1),
        "measured": numbers,
    }
    log.info(
        "%s measured in %.0f s: PSNR %.2f dB, topology KL %.3f (prior %.3f), R@5 %.3f, probe %.3f",
        folder.name,
        record["measure_seconds"],
        numbers["psnr"],
        numbers["topology"]["kl"],
        numbers["topology"]["kl_positional"],
        numbers["retrieval_r5"],
        numbers["linear_probe_macro"],
    )
    write_json(kept, record)
    return record


def check_routing(model: Any, yardstick: Yardstick) -> dict[str, Any]:
    """Which gradients are exactly zero in the trained model, with the streams isolated (stages 1-2) and not (stage 3)."""
    from muse.analysis.routing import routing_report

    return routing_report(model, yardstick.val.images[:4], yardstick.text[:4])
