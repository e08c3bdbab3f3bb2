"""MUSE beside the baseline of Fig. 3: trained from one start, or read from runs."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

import muse
from muse.analysis.gradients import conflict, gradient_records
from muse.config import STREAM_KEYS, load_config
from muse.errors import CheckpointError, ConfigError
from muse.experiments.gradient_figure import ARMS, NOTHING, PAIR_STYLES, draw_gradients
from muse.models.loading import load_model, weights_file
from muse.training.run_directory import was_run_with
from muse.training.tokenizer_task import train
from muse.utils.io import atomic_directory, file_sha256, versions, write_json, write_text

log = logging.getLogger(__name__)

Arms = dict[str, list[list[dict[str, Any]]]]  # arm -> one list of gradient records a seed


@dataclass(frozen=True)
class Comparison:
    """What both arms are trained with."""

    config: str  # file with the objectives to compare
    checkpoint: str | None = None  # where both start; None: as the configuration says
    steps: int = 60
    every: int = 2  # steps between two measurements
    frozen: bool = False  # the weights do not change
    overrides: Sequence[str] = ()


def read_arms(words: Sequence[str]) -> Arms:
    """The records of `muse=DIR,DIR baseline=DIR …`: the directories of one training in order.

    An arm that is given several times has several seeds.
    """
    arms: Arms = {arm: [] for arm in ARMS}
    for word in words:
        arm, _, folders = word.partition("=")
        if arm not in arms or not folders:
            raise ConfigError(f"--runs {word}: not of the form muse=DIR,DIR or baseline=DIR,DIR")
        records = list(gradient_records([Path(folder) for folder in folders.split(",")]))
        if not records:
            raise ConfigError(
                f"{folders}: was trained without experiment.log_grad_every, so its gradients were "
                "not taken"
            )
        arms[arm].append(records)
    if missing := [arm for arm, seeds in arms.items() if not seeds]:
        raise ConfigError(f"--runs: no {' and no '.join(missing)} among them")
    return arms


def train_arms(wanted: Comparison, output: Path) -> Arms:
    """Train both arms in `output`, or read them where they are trained already."""
    if not 1 <= wanted.every <= wanted.steps:
        raise ConfigError("--steps and --every must be 1 or more, and --every no more than --steps")
    arms: Arms = {}
    for arm in ARMS:
        folder = output / "runs" / arm
        cfg = arm_config(wanted, arm, folder)
        if (folder / "config.yaml").is_file() and not was_run_with(folder, cfg):
            raise ConfigError(
                f"{folder}: holds a run of other settings; choose another --output_dir"
            )
        train(cfg)
        arms[arm] = [list(gradient_records([folder]))]
    return arms


def arm_config(wanted: Comparison, arm: str, folder: Path) -> DictConfig:
    """The configuration of one arm. The arms differ in the routing alone; all three objectives
    must have a weight."""
    own = [
        *wanted.overrides,
        f"training.max_train_steps={wanted.steps}",
        f"experiment.log_grad_every={wanted.every}",
        f"experiment.output_dir={folder}",
        f"experiment.save_every={wanted.steps}",
        "experiment.eval_every=0",
        "experiment.generate_every=0",
        "experiment.log_every=1",
    ]
    if wanted.frozen:
        own += ["optimizer.params.learning_rate=0", "training.use_ema=false"]
    if arm == "baseline":
        own += [
            "model.routing=shared",
            *(f"model.{key}=null" for key in STREAM_KEYS),
            "losses.topology.blocks=null",
            "losses.itc.blocks=null",
        ]
    cfg = load_config(wanted.config, [*own, *_initial_weights(wanted, arm, own, folder)])
    objectives = ("reconstruction", "topology", "itc")
    silent = [name for name in objectives if cfg.losses[name].weight == 0]
    if silent:
        raise ConfigError(
            f"losses.{silent[0]}.weight is 0 in {wanted.config}: take a configuration in which all "
            "objectives learn, such as stage 2 or 3, or set the weight"
        )
    return cfg


def _initial_weights(wanted: Comparison, arm: str, own: Sequence[str], folder: Path) -> list[str]:
    """Overrides that let an arm start at the checkpoint.

    Blocks of another routing do not fit into the baseline, which then takes the encoder alone.
    """
    if wanted.checkpoint is None:
        return ["experiment.init_from=null"]
    cfg = load_config(wanted.config, own)
    try:
        load_model(wanted.checkpoint, cfg.model)
        return [f"experiment.init_from={wanted.checkpoint}"]
    except CheckpointError:
        if arm != "baseline":
            raise
    digest = file_sha256(weights_file(wanted.checkpoint))[:8]  # another checkpoint, another name
    encoder = folder.parent / f"encoder-{digest}"
    if not encoder.is_dir():
        cfg = load_config(wanted.config, wanted.overrides)
        model = load_model(wanted.checkpoint, cfg.model)
        with atomic_directory(encoder) as partial:
            model.encoder.save_pretrained(partial)
    log.info(
        "baseline: only the encoder of %s is loaded; the blocks of its routing differ",
        wanted.checkpoint,
    )
    return ["experiment.init_from=null", f"model.encoder.source={encoder}"]


def write_study(arms: Arms, output: Path, protocol: Mapping[str, Any]) -> list[str]:
    """Write gradients.jsonl, gradients.png and metrics.json; returns lines for a terminal.

    Args:
        arms: what was measured.
        output: the directory.
        protocol: the caller's facts for metrics.json.
    """
    lines = [
        json.dumps({"arm": arm, "seed": seed, **record}) + "\n"
        for arm, seeds in arms.items()
        for seed, records in enumerate(seeds)
        for record in records
    ]
    write_text(output / "gradients.jsonl", "".join(lines))
    picture = draw_gradients(arms, output / "gradients.png")
    summary = {arm: [conflict(records) for records in seeds] for arm, seeds in arms.items()}
    facts = {"muse": muse.__version__, "versions": versions(), **protocol}
    write_json(output / "metrics.json", {"arms": summary, "protocol": facts})
    return [*_summary(summary), f"figure: {picture}; every step: {output / 'gradients.jsonl'}"]


def _summary(summary: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Mean |cosine| of each pair in the two subspaces, baseline and MUSE."""
    lines = []
    for pair in PAIR_STYLES:
        for space in ("W_QK", "W_V"):
            cells = []
            for arm, seeds in summary.items():
                each = [seed[pair][space] for seed in seeds if seed.get(pair, {}).get(space)]
                mean = sum(one["abs"] for one in each) / max(1, len(each))
                cells.append(
                    f"{arm} {mean:.3f} ({each[0]['steps']} of {each[0]['measured']} steps)"
                    if each
                    else f"{arm} {NOTHING}"
                )
            lines.append(f"mean |cos| of {pair} on {space}: {', '.join(cells)}")
    return lines
