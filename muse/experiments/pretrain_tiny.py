"""How the packaged model `muse_tiny` is made: data, distilled encoder, three stages, measurements.

Every part is skipped where an equal one is there already, and a stage that was interrupted goes on
from its checkpoint.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

import muse
from muse.config import load_config, shipped_config
from muse.errors import MuseError
from muse.evaluation.suite import Pictures, Yardstick, latent_grid
from muse.experiments.demo_data import make_demo_data
from muse.models.loading import load_model
from muse.models.muse_vit import MUSE_ViT
from muse.models.pretrained import write_weights
from muse.teachers.build import shared_text_teacher, shared_topology_teacher
from muse.training.run_directory import was_run_with
from muse.training.tokenizer_task import train
from muse.utils.io import atomic_directory, versions, writable_directory, write_json
from muse.utils.viz_utils import reconstruction_sheet, save_image
from muse.utils.weights import read_state_dict

log = logging.getLogger(__name__)

STAGES = ("stage0", "stage1", "stage2", "stage3")
# Column of the table -> shards that are measured (docs/muse_tiny.md).
SPLITS = {
    "unseen photo-like objects": "val",
    "seen photo-like objects, new pictures": "seen",
    "unseen drawn objects": "drawn",
    "seen drawn objects, new pictures": "seendrawn",
}
PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
PICTURES = 24  # on the sheet of reconstructions


@dataclass(frozen=True)
class PretrainPlan:
    """How much of everything.

    Two processes of one thread lose less beside other programs on two cores than one process of two
    threads, whose threads wait for each other at every layer.
    """

    images: int = 24000  # of the training part
    val_images: int | None = None  # of each other part; None: 240
    probe_images: int = 1500  # training pictures that the probes learn from
    scale: float = 1.0  # factor on the steps of every stage
    processes: int = 1  # of one thread each


def pretrain(
    output: Path, plan: PretrainPlan, data: Path | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Do everything that is not there yet; returns what `metrics.json` holds.

    Args:
        output: run directories `stage0` to `stage3`, `metrics.json`, `reconstructions-*.png` and
            `package/`.
        plan: how much of everything.
        data: a folder of `make_demo_data.py --kind everything`; made under `output` when None.
        overrides: `key=value` for every stage.
    """
    output = writable_directory(output)
    if data is None:
        data = output / "data"
        make_demo_data("everything", data, images=plan.images, val_images=plan.val_images)
    seconds = {
        stage: _run(stage, _stage_overrides(stage, output, data, plan, overrides), plan.processes)
        for stage in STAGES
    }
    cfg = load_config(
        _file(STAGES[-1]),
        _stage_overrides(STAGES[-1], output, data, plan, overrides),
    )
    final = Path(cfg.experiment.output_dir) / "final"
    chosen = export(final, output / "package", cfg, data)
    results = {
        "train_seconds": seconds,
        "precision": chosen,
        "splits": measure(load_model(output / "package", cfg.model), cfg, data, plan, output),
        "protocol": {
            "muse": muse.__version__,
            "versions": versions(),
            "seed": cfg.training.seed,
            "threads": torch.get_num_threads(),
            "probe_images": plan.probe_images,
            "data": json.loads((Path(data) / "manifest.json").read_text()),
        },
    }
    write_json(output / "metrics.json", results)
    return results


def _file(stage: str) -> Path:
    return shipped_config(f"muse_tiny/pretrain_{stage}.yaml")


def _stage_overrides(
    stage: str, output: Path, data: Path, plan: PretrainPlan, overrides: Sequence[str]
) -> list[str]:
    """What this run changes in one stage's configuration: directories, steps, batch."""
    training = load_config(_file(stage)).training
    before = output / STAGES[STAGES.index(stage) - 1] if stage != STAGES[0] else "null"
    return [
        f"dataset.params.train_shards_path_or_url={data}/train-*.tar",
        f"dataset.params.eval_shards_path_or_url={data}/val-*.tar",
        f"experiment.output_dir={output / stage}",
        f"experiment.init_from={before}",
        f"training.max_train_steps={max(1, round(training.max_train_steps * plan.scale))}",
        f"training.per_gpu_batch_size={max(1, training.per_gpu_batch_size // plan.processes)}",
        *overrides,
    ]


def _run(stage: str, overrides: Sequence[str], processes: int) -> float:
    """Train a stage that is not finished with these settings; the seconds of all its sittings."""
    file = _file(stage)
    cfg = load_config(file, overrides)
    folder = Path(cfg.experiment.output_dir)
    clock = folder / "seconds.json"
    spent = json.loads(clock.read_text()) if clock.is_file() else 0.0
    if (folder / "final").is_dir() and was_run_with(folder, cfg):
        log.info("%s is there already", folder)
        return spent
    started = time.perf_counter()
    try:
        if processes == 1:
            train(cfg)
        else:
            _launch(stage, file, overrides, processes)
    finally:
        spent = round(spent + time.perf_counter() - started, 1)
        if folder.is_dir():
            write_json(clock, spent)
    return spent


def _launch(stage: str, file: Path, overrides: Sequence[str], processes: int) -> None:
    """A stage in several processes of one thread each.

    A signal to this process is passed on: the stage saves and ends. Raises MuseError when it ends
    with another code than 0.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = Path(muse.__file__).parents[1] / "scripts" / f"train_{stage}.py"
    command = [sys.executable, *launcher, str(script), "--config", str(file), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(command, env=environment) as process:
        before = {
            number: signal.signal(number, lambda *_: process.terminate())
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if code:
        raise MuseError(f"{stage} ended with code {code}; the same command goes on from there")


# ---------------------------------------------------------------------------------------- shipping
def export(final: Path, target: Path, cfg: DictConfig, data: Path) -> dict[str, Any]:
    """Write `target` in the 16-bit format that costs less PSNR; says what each costs."""
    batches = Pictures.load(cfg, f"{data}/val-*.tar").batches()
    state = read_state_dict(final / "model.safetensors")
    full = load_model(final, cfg.model)
    reference = _psnr(full, batches)
    costs = {}
    for name, dtype in PRECISIONS.items():
        rounded = MUSE_ViT(full.portable_config()["model"], load_backbones=False).eval()
        rounded.load_state_dict({key: value.to(dtype).float() for key, value in state.items()})
        costs[name] = round(reference - _psnr(rounded, batches), 5)
    chosen = min(costs, key=lambda name: abs(costs[name]))
    with atomic_directory(target) as folder:
        state = {key: value.to(PRECISIONS[chosen]) for key, value in state.items()}
        write_weights(folder, state, full.portable_config())
    size = (target / "model.safetensors").stat().st_size
    log.info("%s in %s: %.2f MB; dB lost by rounding: %s", target, chosen, size / 1e6, costs)
    return {"chosen": chosen, "psnr_lost": costs, "psnr_float32": reference, "bytes": size}


@torch.no_grad()
def _psnr(model: MUSE_ViT, batches: Sequence[dict[str, torch.Tensor]]) -> float:
    """Mean over pictures, dB."""
    errors = [
        (model.reconstruct(b["images"]) - b["images"]).square().mean((1, 2, 3)) for b in batches
    ]
    return float((-10 * torch.cat(errors).log10()).mean())


# --------------------------------------------------------------------------------------- measuring
def measure(
    model: MUSE_ViT, cfg: DictConfig, data: Path, plan: PretrainPlan, output: Path
) -> dict[str, Any]:
    """The demo's measurements on every split, and a sheet of reconstructions of each."""
    topology = shared_topology_teacher(cfg, latent_grid(cfg))
    text = shared_text_teacher(cfg)
    found = {}
    for title, split in SPLITS.items():
        own = [
            f"dataset.params.train_shards_path_or_url={data}/train-*.tar",
            f"dataset.params.eval_shards_path_or_url={data}/{split}-*.tar",
        ]
        section = load_config(_file(STAGES[-1]), own)
        yardstick = Yardstick(section, topology, text, plan.probe_images, plan.val_images)
        numbers = yardstick.measure(model)
        found[split] = {"title": title, "measured": numbers, "baselines": yardstick.baselines}
        log.info("%s: %s", title, summary_line(numbers))
        images = yardstick.val.images[:PICTURES]
        with torch.no_grad():
            sheet = reconstruction_sheet(images, model.reconstruct(images))
        save_image(sheet, output / f"reconstructions-{split}.png")
    return found


def summary_line(numbers: dict[str, Any]) -> str:
    """The figures of one split that docs/muse_tiny.md quotes."""
    topology = numbers["topology"]
    return (
        f"PSNR {numbers['psnr']:.2f} dB, R@5 {numbers['retrieval_r5']:.3f}, "
        f"zero-shot macro {numbers['zero_shot_macro']:.3f}, "
        f"probe macro {numbers['linear_probe_macro']:.3f}, "
        f"foreground IoU {numbers['foreground_iou']:.3f}, topology KL {topology['kl']:.3f} "
        f"(prior {topology['kl_positional']:.3f}), AUC {topology['auc']:.3f}"
    )
