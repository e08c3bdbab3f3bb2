"""The demo: pictures, stage 0, the three stages with a measurement after each, drawings, report."""

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
from muse.analysis.routing import routing_report
from muse.config import load_config, resolved, shipped_config
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

STAGES = ("stage0", "stage1", "stage2", "stage3")
# Seconds of a step of stage 0 on the machine that the default plan was made for. A slower machine
# gets fewer steps (`DemoPlan.fitted`).
REFERENCE_STEP = 0.58


@dataclass(frozen=True)
class DemoPlan:
    """How much of everything."""

    steps: tuple[int, int, int, int]  # of each stage
    images: int = 3000
    probe_images: int = 600
    val_images: int | None = None  # None: all
    limited: bool = True  # fewer steps on a slow machine

    def fitted(self, seconds_per_step: float) -> "DemoPlan":
        """On a slower machine than the reference stages 1 to 3 get fewer steps, in proportion."""
        factor = min(1.0, REFERENCE_STEP / seconds_per_step) if self.limited else 1.0
        if factor == 1.0:
            return self
        log.warning(
            "this machine takes %.2f s for a step that should take %.2f: "
            "stages 1-3 get %.0f%% of their steps",
            seconds_per_step,
            REFERENCE_STEP,
            100 * factor,
        )
        fewer = (max(20, int(count * factor)) for count in self.steps[1:])
        return replace(self, steps=(self.steps[0], *fewer))


DEMO_PLANS = {
    "default": DemoPlan((200, 160, 200, 130)),
    "fast": DemoPlan((12, 12, 10, 8), images=160, probe_images=120, val_images=64, limited=False),
    "full": DemoPlan((600, 1200, 1200, 1200), images=6000, probe_images=2000, limited=False),
}


def run_demo(
    output: Path,
    plan: DemoPlan,
    data: Path | None = None,
    kind: str = "stamps",
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Train and measure every stage that has not been done yet, and write the report.

    Args:
        output: the directory.
        plan: how many steps and pictures.
        data: a directory with train-*.tar, val-*.tar and classes.txt; None makes demo data.
        kind: of demo data: stamps or shapes.
        overrides: `key=value` for every stage.

    Returns:
        What `metrics.json` holds.
    """
    started = time.perf_counter()
    output = writable_directory(output)
    data, kind = (Path(data), "own") if data else demo_data(output, plan.images, kind)
    overrides = [
        f"dataset.params.train_shards_path_or_url={data}/train-*.tar",
        f"dataset.params.eval_shards_path_or_url={data}/val-*.tar",
        *overrides,
    ]
    cfg = load_config(shipped_config("muse_tiny/stage3.yaml"), overrides)
    yardstick = Yardstick(
        cfg,
        shared_topology_teacher(cfg, latent_grid(cfg)),
        shared_text_teacher(cfg),
        plan.probe_images,
        plan.val_images,
    )
    log.info("data and teachers ready after %.0f s", time.perf_counter() - started)
    plan, last, records = _run_stages(output, plan, overrides, yardstick)
    results = {
        "kind": kind,
        "data": str(data),
        "plan": asdict(plan),
        "baselines": yardstick.baselines,
        "stages": {name: record["measured"] for name, record in records.items()},
    }
    for key in ("train_seconds", "measure_seconds"):
        results[key] = {name: record[key] for name, record in records.items()}
    model = load_model(Path(last.experiment.output_dir) / "final", last.model)
    # Which gradients are exactly zero in the trained model, as docs/fidelity.md says they are.
    results["routing"] = routing_report(model, yardstick.val.images[:4], yardstick.text[:4])
    results["seconds"] = round(time.perf_counter() - started, 1)
    results["protocol"] = _protocol(last, plan, yardstick)
    write_report(output, results, model, yardstick, shared_topology_teacher(cfg, latent_grid(cfg)))
    write_json(output / "metrics.json", results)
    return results


def _run_stages(
    output: Path, plan: DemoPlan, overrides: Sequence[str], yardstick: Yardstick
) -> tuple[DemoPlan, DictConfig, dict[str, Any]]:
    """The plan as it was carried out, the last stage's configuration, and each stage's record."""
    records: dict[str, Any] = {}
    for index, stage in enumerate(STAGES):
        cfg = stage_config(stage, plan.steps[index], output, overrides)
        records[stage] = run_stage(cfg, yardstick)
        if index == 0:
            # The recorded time: a second run of the demo then makes the same plan, and finds its
            # stages done.
            plan = plan.fitted(records[stage]["train_seconds"] / plan.steps[0])
    return plan, cfg, records


def _protocol(cfg: DictConfig, plan: DemoPlan, yardstick: Yardstick) -> dict[str, Any]:
    return {
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
        "config": resolved(cfg),
    }


def demo_data(output: Path, images: int, kind: str) -> tuple[Path, str]:
    """(directory, kind) of the pictures; `shapes` if the packages of `stamps` are unreachable."""
    if kind == "stamps":
        try:
            make_demo_data(kind="stamps", output=output / "data-stamps", images=images)
            return output / "data-stamps", "stamps"
        except DataError as error:
            log.warning("%s; going on with drawn shapes", error)
    make_demo_data(kind="shapes", output=output / "data-shapes", images=min(images, 2000))
    return output / "data-shapes", "shapes"


def stage_config(stage: str, steps: int, output: Path, overrides: Sequence[str]) -> DictConfig:
    """The configuration of one stage in the directories of `output`."""
    before = STAGES[STAGES.index(stage) - 1] if stage != STAGES[0] else None
    own = [
        f"training.max_train_steps={steps}",
        f"experiment.output_dir={output / stage}",
        f"experiment.init_from={output / before if before else 'null'}",
        *overrides,
    ]
    return load_config(shipped_config(f"muse_tiny/{stage}.yaml"), own)


def _is_trained(cfg: DictConfig) -> bool:
    """Whether this stage was trained with these settings. A run with other settings is removed,
    with the stages after it."""
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
    """Train a stage and measure its final weights, or read the record of an equal run."""
    folder = Path(cfg.experiment.output_dir)
    kept = folder / "measured.json"
    if _is_trained(cfg) and kept.is_file():
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
