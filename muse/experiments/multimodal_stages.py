"""How the multimodal demo trains: the stages of configs/umm_tiny, one after the other."""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from muse.config import shipped_config
from muse.experiments.multimodal_data import training_texts
from muse.experiments.multimodal_text import write_text_tokenizer
from muse.multimodal.umm_loading import open_umm
from muse.multimodal.umm_run_config import load_umm_config
from muse.multimodal.umm_task import train_umm
from muse.training.run_directory import was_run_with

log = logging.getLogger(__name__)

FRESH = "projector_start"  # the trained language model with a projector that knows nothing
UMM_DEMO_STAGES = ("language", "projector", "stage1", "stage2", "stage3")
# What each stage starts from. The generator is random at first, so stage 1, which freezes it, can
# teach the connector little; it is short.
_STARTS = {
    "language": "null",
    "projector": FRESH,
    "stage1": "projector",
    "stage2": "stage1",
    "stage3": "stage2",
}
_ORDER = ("language", FRESH, "projector", "stage1", "stage2", "stage3")
_CAPTIONS_SHARE = 0.3  # of what the language model learns from


@dataclass(frozen=True)
class MultimodalDemoPlan:
    """How much of everything.

    Args:
        steps: of each of `UMM_DEMO_STAGES`.
        images: training samples of each kind.
        held_out: samples of each other part.
        judged: real pictures that the judge learns from, and pairs.
        prompts: pictures that are made from text, and measured.
        edits: pictures that are edited, and measured.
        sampler_steps: of the solver.
        guidance: of the solver.
        batch: samples of a training step.
        seed: of everything.
    """

    steps: tuple[int, int, int, int, int]
    images: int = 3000
    held_out: int = 240
    judged: int = 3000
    prompts: int = 240
    edits: int = 240
    sampler_steps: int = 20
    guidance: float = 3.0
    batch: int = 32
    seed: int = 0


@dataclass
class DemoStages:
    """The runs of one demo.

    Args:
        output: a directory for each run is in it.
        data: has pictures-KIND, edits-KIND, questions-KIND, captions-KIND.
        kind: see there.
        tokenizer: a checkpoint of MUSE.
        statistics: of its latents.
        plan: how much.
        overrides: `key=value` of every stage's configuration.
    """

    output: Path
    data: Path
    kind: str
    tokenizer: str
    statistics: Path
    plan: MultimodalDemoPlan
    overrides: Sequence[str] = ()

    def config(self, stage: str) -> DictConfig:
        """The configuration of a stage."""
        file = shipped_config(f"umm_tiny/{stage}.yaml")
        base = load_umm_config(file)
        steps = self.plan.steps[UMM_DEMO_STAGES.index(stage)]
        start = _STARTS[stage]
        own = [
            f"model.tokenizer.source={self.tokenizer}",
            f"model.text_tokenizer={self.output / 'text'}",
            f"model.latent_statistics={self.statistics}",
            f"training.max_train_steps={steps}",
            f"training.per_gpu_batch_size={self.plan.batch}",
            f"training.seed={self.plan.seed}",
            f"lr_scheduler.params.warmup_steps="
            f"{min(base.lr_scheduler.params.warmup_steps, steps // 4)}",
            f"experiment.output_dir={self.output / stage}",
            f"experiment.init_from={start if start == 'null' else self.output / start}",
        ]
        for key in ("train_shards_path_or_url", "eval_shards_path_or_url"):
            sources = OmegaConf.to_container(base.dataset.params, resolve=False)[key]
            own.append(f"dataset.params.{key}={json.dumps(self._sources(stage, sources))}")
        return load_umm_config(file, [*own, *self.overrides])

    def _sources(self, stage: str, sources: list[dict]) -> list[dict]:
        """Those of the configuration in this demo's folders."""
        found = []
        for one in sources:
            folder, _, shards = one["urls"].rpartition("/")
            urls = f"{self.data}/{Path(folder).name}-{self.kind}/{shards}"
            found.append({**one, "urls": urls})
        if stage == "language":
            (questions,) = found
            captions = questions["urls"].replace(
                f"/questions-{self.kind}/", f"/captions-{self.kind}/"
            )
            found = [
                {**questions, "weight": 1 - _CAPTIONS_SHARE},
                {**questions, "urls": captions, "weight": _CAPTIONS_SHARE},
            ]
        return found

    def run(self) -> Path:
        """Train what is not trained, or go on; the final directory of the last stage."""
        vocabulary = load_umm_config(shipped_config("umm_tiny/language.yaml"), self.overrides)
        write_text_tokenizer(
            training_texts(self.data, self.kind),
            self.output / "text",
            vocabulary.model.language_model.config.text_config.vocab_size,
        )
        for stage in UMM_DEMO_STAGES:
            if stage == "projector" and not (self.output / FRESH).is_dir():
                forget_projector(self.output / "language", self.output / FRESH, self.plan.seed)
            self._train(stage)
        return self.output / UMM_DEMO_STAGES[-1] / "final"

    def _train(self, stage: str) -> None:
        """One stage; if it was run with other settings, it and what came of it are made anew."""
        cfg, folder = self.config(stage), self.output / stage
        if (folder / "config.yaml").is_file() and not was_run_with(folder, cfg):
            log.info("%s was trained with other settings: starting it again", folder)
            for later in _ORDER[_ORDER.index(stage) :]:
                shutil.rmtree(self.output / later, ignore_errors=True)
        if (folder / "final").is_dir():
            log.info("%s is there already", folder)
            return
        train_umm(cfg)


def forget_projector(source: Path, target: Path, seed: int) -> None:
    """The model of `source` with its projector drawn anew, in `target`."""
    umm = open_umm(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in umm.internvl.model.multi_modal_projector.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    umm.save_pretrained(target)
