"""Where a run differs from the paper: configuration keys, and who learns from which loss."""

import json
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from muse.analysis.routing import BLOCK_GROUPS, LOSSES, OUTER_GROUPS, routing_table
from muse.config import STREAM_KEYS, load_config, resolved, shipped_config
from muse.experiments.run_report_sources import ReportedRun

STAGE_FILES = {
    "topology_warmup": "stage1.yaml",
    "semantic_injection": "stage2.yaml",
    "synergistic_tuning": "stage3.yaml",
}
# Where things lie, what is written how often, how a machine reads: nothing that the paper states.
MACHINE = (
    "experiment.",
    "dataset.params.train_shards_path_or_url",
    "dataset.params.eval_shards_path_or_url",
    "dataset.params.num_workers_per_gpu",
    "dataset.params.cache_in_memory",
)
SECTIONS = {
    "model": "the network",
    "teacher": "its teachers",
    "losses": "losses",
    "optimizer": "optimizer",
    "lr_scheduler": "learning rate",
    "training": "training",
    "dataset": "data",
}
UNSET = "not set"
NOTHING = "–"  # of a loss: no gradient at all


class Difference(NamedTuple):
    """A key that is not as in the paper's configuration."""

    key: str
    ours: str
    paper: str


class PaperComparison(NamedTuple):
    """All of a run's differences, and what they were taken against."""

    against: str
    differences: list[Difference]
    equal: int  # keys that are the same
    routing: list[tuple[str, str, str, str]]  # loss, group, who learns here and in the paper


def compare_with_paper(run: ReportedRun) -> PaperComparison | None:
    """A tokenizer beside `configs/muse_1b` (or muse_3b) under the paper's recipe, of its stage.

    A saved model has no training, so its model section alone is compared. None for another kind.
    """
    if run.model is None:
        return None
    stage = run.config.training.stage if run.config is not None else None
    file = STAGE_FILES.get(stage or "", "stage3.yaml")
    size = "muse_3b" if "3B" in str(run.model["encoder"].get("source")) else "muse_1b"
    paper = load_config(shipped_config(f"{size}/{file}"), recipe="paper")
    mine = flat_keys(resolved(run.config) if run.config is not None else {"model": run.model})
    theirs = flat_keys(resolved(paper))
    sections = {key.split(".")[0] for key in mine}
    keys = [key for key in {**theirs, **mine} if key.split(".")[0] in sections]
    keys = [key for key in keys if not key.startswith(MACHINE)]
    differences = [
        Difference(key, _word(mine.get(key, UNSET)), _word(theirs.get(key, UNSET)))
        for key in keys
        if _word(mine.get(key, UNSET)) != _word(theirs.get(key, UNSET))
    ]
    against = f"configs/{size}/{file} with --recipe paper"
    return PaperComparison(against, differences, len(keys) - len(differences), _routing(run, paper))


def flat_keys(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; an empty section is a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flat_keys(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _routing(run: ReportedRun, paper: DictConfig) -> list[tuple[str, str, str, str]]:
    here, there = _reached(run.config, run.model), _reached(paper, None)
    groups = [name for name in (*BLOCK_GROUPS, *OUTER_GROUPS)]
    return [
        (loss, group, here[loss].get(group, NOTHING), there[loss].get(group, NOTHING))
        for loss in LOSSES
        for group in groups
    ]


def _reached(cfg: DictConfig | None, model: dict[str, Any] | None) -> dict[str, dict[str, str]]:
    """Loss -> group -> which of the blocks a gradient reaches, in words."""
    model = OmegaConf.to_container(cfg.model, resolve=False) if cfg is not None else model
    switches = {key: model.get(key) for key in STREAM_KEYS}
    if cfg is not None:
        switches |= {
            "topology_blocks": cfg.losses.topology.blocks,
            "itc_blocks": cfg.losses.itc.blocks,
        }
    table = routing_table(model["routing"], model["num_blocks"], **switches)
    words: dict[str, dict[str, str]] = {}
    for loss, groups in table.items():
        blocks: dict[str, dict[int, bool]] = {}
        row = words.setdefault(loss, {})
        for name, reached in groups.items():
            if name.startswith("muse_blocks."):
                _, index, short = name.split(".")
                blocks.setdefault(short, {})[int(index)] = reached
            else:
                row[name] = "learns" if reached else NOTHING
        row.update({short: _which_blocks(reached) for short, reached in blocks.items()})
    return words


def _which_blocks(reached: dict[int, bool]) -> str:
    found = sorted(index for index, yes in reached.items() if yes)
    if not found:
        return NOTHING
    if len(found) == len(reached):
        return "all blocks"
    last = max(reached)
    if found == [last]:
        return "last block"
    return "all but the last" if found == list(range(last)) else f"{len(found)} blocks"
