"""The demo of the multimodal model: data, five short trainings, and what the result can do.

What is done already (data, stages, measurements of the same weights) is not done again, so a
stopped run goes on.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from muse import __version__
from muse.errors import ConfigError
from muse.evaluation.measurement import Crop
from muse.experiments.generation_judge import BATCH
from muse.experiments.latent_spaces import SIDE, find_tokenizer, notes_of
from muse.experiments.multimodal_data import make_multimodal_data
from muse.experiments.multimodal_measuring import JUDGE_NETWORK, DemoMeasuring
from muse.experiments.multimodal_report import write_report_files
from muse.experiments.multimodal_stages import DemoStages, MultimodalDemoPlan
from muse.generation.extraction import STATISTICS, ExtractionPlan, extract_latents
from muse.generation.latent_tokenizer import MuseTokenizer, open_tokenizer
from muse.models.loading import weights_file
from muse.multimodal.umm_loading import open_umm
from muse.utils.io import file_sha256, versions, writable_directory, write_json

log = logging.getLogger(__name__)

MULTIMODAL_PLANS = {
    "default": MultimodalDemoPlan((300, 100, 20, 140, 40), batch=16),
    "fast": MultimodalDemoPlan(
        (8, 4, 2, 6, 4),
        images=96,
        held_out=24,
        judged=96,
        prompts=16,
        edits=20,
        sampler_steps=3,
        batch=8,
    ),
    "full": MultimodalDemoPlan(
        (3000, 1000, 100, 6000, 2500), images=12000, prompts=480, edits=480, held_out=480
    ),
}


def run_multimodal_demo(
    output: Path,
    plan: MultimodalDemoPlan,
    tokenizer: str | None = None,
    kind: str = "stamps",
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Train every stage, measure (a) prompts, (b) edits and (c) questions; write table and sheets.

    Args:
        output: the directory.
        plan: how much.
        tokenizer: a checkpoint of MUSE; None takes the packaged or the demo's own.
        kind: of demo data: stamps or shapes.
        overrides: `key=value` of the model's configuration, for every stage.

    Returns:
        What `metrics.json` holds.
    """
    started = time.perf_counter()
    if plan.held_out < max(plan.prompts, plan.edits):
        raise ConfigError(
            f"{plan.held_out} held out samples are too few to measure {plan.prompts} prompts and "
            f"{plan.edits} edits"
        )
    output = writable_directory(output).resolve()
    torch.set_flush_denormal(True)
    trained = open_tokenizer(find_tokenizer(tokenizer))
    kind = make_multimodal_data(output / "data", plan.images, plan.held_out, kind)
    extract_latents(
        trained,
        [f"{output}/data/pictures-{kind}/train-*.tar"],
        output / "latents",
        ExtractionPlan(Crop(SIDE, SIDE), batch_size=BATCH),
        notes_of(trained),
    )
    stages = DemoStages(
        output,
        output / "data",
        kind,
        trained.path,
        output / "latents" / STATISTICS,
        plan,
        overrides,
    )
    final = stages.run()
    measuring = DemoMeasuring(output, kind, plan, trained, open_umm(final))
    results: dict[str, Any] = measuring.all(file_sha256(weights_file(final)))
    results["protocol"] = _protocol(plan, trained, kind, overrides)
    results["seconds"] = round(time.perf_counter() - started, 1)
    write_json(output / "metrics.json", results)
    write_report_files(output, results)
    return results


def _protocol(
    plan: MultimodalDemoPlan, trained: MuseTokenizer, kind: str, overrides: Sequence[str]
) -> dict[str, Any]:
    return {
        "muse": __version__,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "plan": asdict(plan),
        "tokenizer": {"path": trained.path, "sha256": trained.sha256},
        "kind": kind,
        "network": JUDGE_NETWORK,
        "overrides": list(overrides),
    }
