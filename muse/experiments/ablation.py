"""The ablations of the paper, small: the variants, the stage runs of each, and their measurement.

A variant is a row of `VARIANTS`: a sequence of legs, each a stage's configuration and what differs
from it. Variants whose first legs are equal share those runs: every variant that keeps the paper's
first stage uses one training of it. Every run is a directory; a second call finds it and trains
nothing.
"""

import functools
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from muse.analysis.gradients import conflict, gradient_records
from muse.config import load_config, resolved, shipped_config
from muse.errors import ConfigError
from muse.evaluation.suite import Yardstick
from muse.models.loading import load_model
from muse.models.muse_vit import MUSE_ViT
from muse.training.tokenizer_task import train
from muse.utils.io import atomic_directory, write_json


@dataclass(frozen=True)
class Leg:
    """One stage of a variant."""

    config: str  # its file in configs/muse_tiny
    budget: tuple[int, ...]  # places in the plan's `steps` whose sum it trains for
    overrides: tuple[str, ...] = ()


TOPOLOGY, SEMANTICS, TUNING = Leg("stage1", (0,)), Leg("stage2", (1,)), Leg("stage3", (2,))
CURRICULUM = (TOPOLOGY, SEMANTICS, TUNING)


@dataclass(frozen=True)
class Variant:
    """One row of the table. Every variant trains for the same number of steps in all."""

    label: str
    overrides: tuple[str, ...] = ()  # of every leg
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
    # Where the objectives of stage 3 meet: in the encoder.
    "isolated": Variant(
        "MUSE, streams isolated in stage 3 too",
        (),
        (TOPOLOGY, SEMANTICS, Leg("stage3", (2,), ("model.isolate_streams=true",))),
    ),
    "slow_encoder": Variant(
        "MUSE, a tenth of the encoder's learning rate in stage 3",
        (),
        (
            TOPOLOGY,
            SEMANTICS,
            Leg("stage3", (2,), ('optimizer.lr_multipliers={"^encoder\\\\.": 0.02}',)),
        ),
    ),
    # Other teachers of structure; `paper` has the affinity of EfficientNet-Lite0.
    "teacher_vit": Variant(
        "teacher: attention of a ViT (the packaged encoder)",
        ("teacher.topology.kind=dinov3", "teacher.topology.source=internvit:muse_tiny"),
    ),
    "teacher_vit_affinity": Variant(
        "teacher: affinity of the same ViT's tokens",
        (
            "teacher.topology.source=internvit:muse_tiny",
            "teacher.topology.layers=[0, 1, 2, 3]",
        ),
    ),
    "teacher_untrained": Variant(
        "teacher: attention of a ViT with random weights",
        ("teacher.topology.kind=random", "teacher.topology.source=random"),
    ),
}
# The rows that carry the paper's claims, and what stage 3 does in the encoder.
CLAIMS = ("paper", "baseline", "shared", "no_stop_gradient", "no_nce", "isolated", "slow_encoder")
# What a set of rows is called on the command line.
SETS = {
    "claims": CLAIMS,
    "teachers": (
        "paper",
        "teacher_vit",
        "teacher_vit_affinity",
        "teacher_untrained",
        "no_topology",
    ),
    "all": tuple(VARIANTS),
}


@dataclass(frozen=True)
class StudyPlan:
    """How much of everything."""

    base_steps: int = 200  # of stage 0, where the encoder is distilled for the study
    steps: tuple[int, int, int] = (120, 180, 120)
    batch_size: int = 16
    images: int = 6000
    probe_images: int = 1000
    val_images: int | None = None  # None: all
    gradients_every: int = 20


STUDY_PLANS = {
    "default": StudyPlan(),
    "short": StudyPlan(steps=(40, 60, 40)),
    "fast": StudyPlan(6, (3, 3, 3), 8, 160, 60, 32, 2),
    "full": StudyPlan(600, (1200, 1200, 1200), 16, 6000, 2000, None, 50),
}


@dataclass(frozen=True)
class StageRun:
    """One training of one stage."""

    cfg: DictConfig
    before: "StageRun | None"  # the run it starts from; None: only the encoder is pretrained

    @property
    def folder(self) -> Path:
        """Its run directory."""
        return Path(self.cfg.experiment.output_dir)


@dataclass(frozen=True)
class Study:
    """Where the runs are, on which data, and how much of everything."""

    output: Path
    data: Path
    plan: StudyPlan
    overrides: tuple[str, ...] = ()  # of every run
    pretrained: str | None = "muse_tiny"  # None: the study distils its own encoder

    def base(self) -> DictConfig:
        """Stage 0, which distils the study's own encoder where it shall have one."""
        cfg = _load("stage0", *self._common(), f"training.max_train_steps={self.plan.base_steps}")
        return _placed(cfg, self.output / "runs" / f"base-{_digest(cfg, None)}")

    @property
    def encoder(self) -> str:
        """The one encoder that all variants start from: a packaged one, or the study's own."""
        return self.pretrained or str(Path(self.base().experiment.output_dir) / "encoder")

    def runs(self, name: str, seed: int) -> list[StageRun]:
        """The stage runs of a variant, in order. Equal runs of two variants are one directory."""
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
            name = f"{place + 1}-{leg.config}-{_digest(cfg, before)}"
            folder = self.output / "runs" / f"seed{seed}" / name
            runs.append(StageRun(_placed(cfg, folder), before))
        return runs

    def record(self, name: str, seed: int) -> Path:
        """The file of a variant's measurement; its name holds a digest of what was run."""
        digest = self.runs(name, seed)[-1].folder.name.rsplit("-", 1)[-1]
        return self.output / "measured" / f"{name}-seed{seed}-{digest}.json"

    def _common(self) -> list[str]:
        return [
            f"dataset.params.train_shards_path_or_url={self.data}/train-*.tar",
            f"dataset.params.eval_shards_path_or_url={self.data}/val-*.tar",
            f"training.per_gpu_batch_size={self.plan.batch_size}",
            *self.overrides,
        ]


@functools.cache  # a configuration takes a tenth of a second to read, and a study needs hundreds
def _load(name: str, *overrides: str) -> DictConfig:
    return load_config(shipped_config(f"muse_tiny/{name}.yaml"), overrides)


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
    """Distil the study's own encoder and save it, unless it exists or a packaged one is used."""
    if study.pretrained is None and not Path(study.encoder).is_dir():
        model = MUSE_ViT.from_pretrained(train(study.base()))
        with atomic_directory(study.encoder) as partial:
            model.encoder.save_pretrained(partial)


def train_run(run: StageRun) -> None:
    """Train a stage, unless it was trained; an interrupted run goes on from its checkpoint."""
    if not (run.folder / "final").is_dir():
        train(run.cfg)
    for checkpoint in run.folder.glob("checkpoint-*"):  # later steps read `final` alone
        shutil.rmtree(checkpoint)


def measure_variant(study: Study, name: str, seed: int, yardstick: Yardstick) -> None:
    """Write the numbers of a variant's last model and of its gradients to `study.record`."""
    runs = study.runs(name, seed)
    numbers = yardstick.measure(load_model(runs[-1].folder / "final", runs[-1].cfg.model))
    numbers["gradients"] = conflict(list(gradient_records([run.folder for run in runs])))
    record = {
        "variant": name,
        "seed": seed,
        "runs": [run.folder.name for run in runs],
        "measured": numbers,
    }
    write_json(study.record(name, seed), record)
