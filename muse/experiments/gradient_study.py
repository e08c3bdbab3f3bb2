"""MUSE beside the baseline of Fig. 3: both trained from one start with their gradients taken as they go, or read from runs."""

import json
import logging
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

import muse
from muse.analysis.gradients import conflict, gradient_records
from muse.config import STREAM_KEYS, load_config
from muse.errors import CheckpointError, ConfigError
from muse.experiments.gradient_figure import ARMS, NOTHING, PAIR_STYLES, draw_gradients
from muse.utils.io import file_sha256, versions, write_json, write_text

log = logging.getLogger(__name__)

Arms = dict[str, list[list[dict[str, Any]]]]  # arm -> one list of records a seed


def read_runs(words: Sequence[str]) -> Arms:
    """`muse=DIR,DIR baseline=DIR …`: directories of one training in order; an arm that is named again is another seed."""
    arms: Arms = {arm: [] for arm in ARMS}
    for word in words:
        arm, _, folders = word.partition("=")
        if arm not in arms or not folders:
            raise ConfigError(f"--runs {word}: not of the form muse=DIR,DIR or baseline=DIR,DIR")
        records = list(gradient_records([Path(folder) for folder in folders.split(",")]))
        if not records:
            raise ConfigError(
                f"{folders}: was trained without experiment.log_grad_every, so its gradients were not taken"
            )
        arms[arm].append(records)
    if missing := [arm for arm, seeds in arms.items() if not seeds]:
        raise ConfigError(f"--runs: no {' and no '.join(missing)} among them")
    return arms


def compare(args: Namespace, output: Path) -> Arms:
    """Train both arms for `args.steps` steps of the configuration, with gradients every `args.every`."""
    if not args.config:
        raise ConfigError("--config is needed (or --runs, to read runs that are there)")
    if args.steps < 1 or args.every < 1 or args.every > args.steps:
        raise ConfigError("--steps and --every must be 1 or more, and --every no more than --steps")
    from muse.training.run_directory import was_run_with
    from muse.training.tokenizer_task import train

    arms: Arms = {}
    for arm in ARMS:
        folder = output / "runs" / arm
        cfg = arm_config(args, arm, folder)
        if (folder / "config.yaml").is_file() and not was_run_with(folder, cfg):
            raise ConfigError(
                f"{folder}: holds a run of other settings; choose another --output_dir"
            )
        train(cfg)
        arms[arm] = [list(gradient_records([folder]))]
    return arms


def arm_config(args: Namespace, arm: str, folder: Path) -> DictConfig:
    """The configuration of one arm: equal but for the routing. All three objectives must have a weight."""
    own = [
        *args.overrides,
        f"training.max_train_steps={args.steps}",
        f"experiment.log_grad_every={args.every}",
        f"experiment.output_dir={folder}",
        f"experiment.save_every={args.steps}",
        "experiment.eval_every=0",
        "experiment.generate_every=0",
        "experiment.log_every=1",
    ]
    if args.frozen:
        own += ["optimizer.params.learning_rate=0", "training.use_ema=false"]
    if arm == "baseline":
        own += [
            "model.routing=shared",
            *(f"model.{key}=null" for key in STREAM_KEYS),
            "losses.topology.blocks=null",
            "losses.itc.blocks=null",
        ]
    cfg = load_config(args.config, [*own, *start(args, arm, own, folder)])
    silent = [
        name for name in ("reconstruction", "topology", "itc") if cfg.losses[name].weight == 0
    ]
    if silent:
        raise ConfigError(
            f"losses.{silent[0]}.weight is 0 in {args.config}: take a configuration in which all objectives learn, such "
            "as stage 2 or 3, or set the weight"
        )
    return cfg


def start(args: Namespace, arm: str, own: Sequence[str], folder: Path) -> list[str]:
    """Overrides that let an arm start at the checkpoint. Blocks of another routing do not fit; the encoder is taken from it then."""
    if args.checkpoint is None:
        return ["experiment.init_from=null"]
    from muse.models.loading import load_model, weights_file
    from muse.utils.io import atomic_directory

    cfg = load_config(args.config, own)
    try:
        load_model(args.checkpoint, cfg.model)
        return [f"experiment.init_from={args.checkpoint}"]
    except CheckpointError:
        if arm != "baseline":
            raise
    encoder = (
        folder.parent / f"encoder-{file_sha256(weights_file(args.checkpoint))[:8]}"
    )  # another checkpoint, another name
    if not encoder.is_dir():
        model = load_model(args.checkpoint, load_config(args.config, args.overrides).model)
        with atomic_directory(encoder) as partial:
            model.encoder.save_pretrained(partial)
    log.info("baseline: encoder of %s, all else new: the routings' blocks differ", args.checkpoint)
    return ["experiment.init_from=null", f"model.encoder.source={encoder}"]


def write(arms: Arms, output: Path, protocol: Mapping[str, Any]) -> list[str]:
    """gradients.jsonl, gradients.png and metrics.json in `output`; gives lines for a terminal."""
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
    return [*summary_lines(summary), f"figure: {picture}; every step: {output / 'gradients.jsonl'}"]


def summary_lines(summary: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
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
