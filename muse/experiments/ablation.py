"""The ablations of the paper, small: a table of variants, the stage runs they consist of, and their measurement.

A variant is a row of `VARIANTS`: a sequence of legs (a stage's configuration and what differs). Legs that are equal from the start on
are trained once: every variant that keeps the paper's first stage shares it. Every run is a directory that a second call finds done.
"""

import functools
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import muse
from muse.analysis.gradients import conflict, gradient_records
from muse.config import load_config, resolved
from muse.errors import ConfigError
from muse.utils.io import write_json

CONFIGS = Path(muse.__file__).parents[1] / "configs" / "muse_tiny"


@dataclass(frozen=True)
class Leg:
    """One stage of a variant: its file in configs/muse_tiny, which entries of the plan's steps it gets, and what differs."""

    config: str
    budget: tuple[int, ...]
    overrides: tuple[str, ...] = ()


TOPOLOGY, SEMANTICS, TUNING = Leg("stage1", (0,)), Leg("stage2", (1,)), Leg("stage3", (2,))
CURRICULUM = (TOPOLOGY, SEMANTICS, TUNING)


@dataclass(frozen=True)
class Variant:
    """One row: what a reader sees, what it changes in every leg, and its legs. Each variant gets the same number of steps."""

    label: str
    overrides: tuple[str, ...] = ()
    legs: tuple[Leg, ...] = CURRICULUM


VARIANTS: dict[str, Variant] = {
    "paper": Variant("MUSE (`routing=paper`)"),
    "release": Variant("`routing=release`", ("model.routing=release",)),
    "shared": Variant(
        "shared W_QKV (`routing=shared`), same curriculum", ("model.routing=shared",)
    ),
    "baseline": Variant(
        "shared W_QKV, objectives summed from the start",
        ("model.routing=shared",),
        (Leg("stage2", (0, 1)), TUNING),
    ),
    "no_stop_gradient": Variant(
        "without stop-gradients",
        (
            "model.isolate_streams=false",
            "model.shield_attention=false",
            "model.shield_semantics=false",
        ),
    ),
    "no_topology": Variant("without the topology loss", ("losses.topology.weight=0",)),
    "distillation": Variant(
        "passive distillation instead of NCE", ("losses.itc.objective=distillation",)
    ),
    "no_nce": Variant("without NCE", ("losses.itc.weight=0",)),
    "not_joined": Variant("semantics not joined to the values", ("model.join_semantics=false",)),
    "reversed": Variant(
        "reversed curriculum: semantics before topology",
        (),
        (
            Leg("stage2", (0,), ("losses.topology.weight=0",)),
            Leg("stage2", (1,), ("losses.topology.weight=1.0",)),
            TUNING,
        ),
    ),
}


@dataclass(frozen=True)
class Plan:
    """How much: steps of the shared stand-in for pretraining, steps of the three stages, batch, pictures, how often to look at
    gradients."""

    base_steps: int = 200
    steps: tuple[int, int, int] = (40, 60, 40)
    batch_size: int = 16
    images: int = 3000
    probe_images: int = 600
    val_images: int | None = None
    gradients_every: int = 10


PLANS = {
    "default": Plan(),
    "fast": Plan(6, (3, 3, 3), 8, 160, 60, 32, 2),
    "full": Plan(600, (1200, 1200, 1200), 16, 6000, 2000, None, 50),
}


@dataclass(frozen=True)
class StageRun:
    """One training of one stage: its configuration, and the run it starts from (None: the pretrained encoder alone)."""

    cfg: DictConfig
    before: "StageRun | None"

    @property
    def folder(self) -> Path:
        """Its run directory."""
        return Path(self.cfg.experiment.output_dir)


@dataclass(frozen=True)
class Study:
    """Where the runs lie, on which data, how much of everything, and overrides for all of them."""

    output: Path
    data: Path
    plan: Plan
    overrides: tuple[str, ...] = ()

    def base(self) -> DictConfig:
        """The stand-in for a pretrained encoder (the demo's stage 0), one for the whole study."""
        cfg = _load("stage0", *self._common(), f"training.max_train_steps={self.plan.base_steps}")
        return _placed(cfg, self.output / "runs" / f"base-{_digest(cfg, None)}")

    @property
    def encoder(self) -> Path:
        """The distilled encoder alone, in InternVL's layout: what a hub id is at full size."""
        return Path(self.base().experiment.output_dir) / "encoder"

    def runs(self, name: str, seed: int) -> list[StageRun]:
        """The stage runs of a variant, in order. Legs that are equal from the start on have one directory."""
        if name not in VARIANTS:
            raise ConfigError(f"{name!r} is no variant; there are: {', '.join(VARIANTS)}")
        variant, runs = VARIANTS[name], []
        for place, leg in enumerate(variant.legs):
            before = runs[-1] if runs else None
            steps = sum(self.plan.steps[index] for index in leg.budget)
            cfg = _load(
                leg.config,
                *self._common(),
                f"model.encoder.source={self.encoder}",
                f"training.seed={seed}",
                f"training.max_train_steps={steps}",
                f"experiment.log_grad_every={self.plan.gradients_every}",
                *variant.overrides,
                *leg.overrides,
                f"experiment.init_from={before.folder if before else 'null'}",
            )
            folder = (
                self.output
                / "runs"
                / f"seed{seed}"
                / f"{place + 1}-{leg.config}-{_digest(cfg, before)}"
            )
            runs.append(StageRun(_placed(cfg, folder), before))
        return runs

    def record(self, name: str, seed: int) -> Path:
        """Where a variant's measurement is kept; its name changes with what was run."""
        return (
            self.output
            / "measured"
            / f"{name}-seed{seed}-{self.runs(name, seed)[-1].folder.name.rsplit('-', 1)[-1]}.json"
        )

    def _common(self) -> list[str]:
        return [
            f"dataset.params.train_shards_path_or_url={self.data}/train-*.tar",
            f"dataset.params.eval_shards_path_or_url={self.data}/val-*.tar",
            f"training.per_gpu_batch_size={self.plan.batch_size}",
            *self.overrides,
        ]


@functools.lru_cache(
    maxsize=None
)  # reading a configuration takes a tenth of a second, and a study asks for hundreds
def _load(name: str, *overrides: str) -> DictConfig:
    return load_config(CONFIGS / f"{name}.yaml", overrides)


def _placed(cfg: DictConfig, folder: Path) -> DictConfig:
    """The configuration with another output directory."""
    cfg = cfg.copy()
    OmegaConf.set_readonly(cfg, False)
    cfg.experiment.output_dir = str(folder)
    OmegaConf.set_readonly(cfg, True)
    return cfg


def _digest(cfg: DictConfig, before: StageRun | None) -> str:
    own = {key: value for key, value in resolved(cfg).items() if key != "experiment"}
    start = before.folder.name if before else ""
    return hashlib.sha256(json.dumps([own, start], sort_keys=True).encode()).hexdigest()[:8]


def train_base(study: Study) -> None:
    """Train the stand-in and save its encoder, unless that is there already."""
    from muse.models.muse_vit import MUSE_ViT
    from muse.training.tokenizer_task import train
    from muse.utils.io import atomic_directory

    if not study.encoder.is_dir():
        model = MUSE_ViT.from_pretrained(train(study.base()))
        with atomic_directory(study.encoder) as partial:
            model.encoder.save_pretrained(partial)


def train_run(run: StageRun) -> None:
    """Train a stage, unless it is there already; an interrupted run goes on from its checkpoint."""
    from muse.training.tokenizer_task import train

    if not (run.folder / "final").is_dir():
        train(run.cfg)
    for checkpoint in run.folder.glob(
        "checkpoint-*"
    ):  # `final` is what the next stage and the measurement read
        shutil.rmtree(checkpoint)


def measure(study: Study, name: str, seed: int, yardstick: Any) -> None:
    """Keep the numbers of a variant's last model and of its gradients, unless they are there already."""
    from muse.models.loading import load_model

    kept, runs = study.record(name, seed), study.runs(name, seed)
    if kept.is_file():
        return
    numbers = yardstick.measure(load_model(runs[-1].folder / "final", runs[-1].cfg.model))
    numbers["gradients"] = conflict(list(gradient_records([run.folder for run in runs])))
    write_json(
        kept,
        {
            "variant": name,
            "seed": seed,
            "runs": [run.folder.name for run in runs],
            "measured": numbers,
        },
    )
