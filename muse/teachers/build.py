"""Teachers from the configuration's `teacher.*` sections."""

import functools
import json
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from muse.config import plain, read_section
from muse.config_fields import same_key
from muse.config_schema import (
    FeatureTeacherConfig,
    TextTeacherConfig,
    TopologyLossConfig,
    TopologyTeacherConfig,
)
from muse.errors import ConfigError
from muse.teachers.affinity import build_affinity_teacher
from muse.teachers.base import FrozenTeacher
from muse.teachers.cache import CachedTeacher
from muse.teachers.features import build_features
from muse.teachers.hub import local_source
from muse.teachers.text import TextTeacher, build_text
from muse.teachers.vit_attention import build_attention_teacher

DEFAULT_CACHE_MB = 2048


@dataclass
class TopologyOptions(TopologyTeacherConfig):
    """What a topology teacher is built from: its section, and which heads the loss compares."""

    heads: str = same_key(TopologyLossConfig, "heads")


# What `kind: random` (tests) builds where `config` is empty.
SMALL_DINO = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "patch_size": 8,
}
TOPOLOGY_TEACHERS = {
    "dinov3": build_attention_teacher,
    "affinity": build_affinity_teacher,
    "random": lambda options, num_maps, grid: build_attention_teacher(
        options | {"source": "random", "config": options["config"] or SMALL_DINO}, num_maps, grid
    ),
}


def build_topology_teacher(
    cfg: Any, num_maps: int, grid: tuple[int, int] | None = None, pretrained: bool = True
) -> FrozenTeacher | None:
    """The teacher of `teacher.topology`; None for `none`.

    A key that another kind uses is ignored. Raises ConfigError on an unknown key or value,
    CheckpointError where weights are missing or refused.

    Args:
        cfg: a dict or OmegaConf node with keys of `TopologyOptions`.
        num_maps: how many maps, one for each student block that learns.
        grid: the student's token grid (h, w).
        pretrained: False makes the architecture alone, without weights and without memory.
    """
    kinds = ("none", *TOPOLOGY_TEACHERS)  # the table may hold more than the configuration names
    options = read_section(cfg, TopologyOptions, "teacher.topology", {"kind": kinds})
    if options["kind"] == "none":
        return None
    options |= {"pretrained": pretrained, "source": local_source(options["source"], pretrained)}
    teacher = TOPOLOGY_TEACHERS[options["kind"]](options, num_maps, grid)
    return _cached(teacher, pretrained and options["cache"])


def build_text_teacher(cfg: Any, pretrained: bool = True) -> TextTeacher | None:
    """The teacher of `teacher.text`; None for `none`. `pretrained` and errors as above."""
    options = read_section(cfg, TextTeacherConfig, "teacher.text")
    if options["kind"] == "none":
        return None
    options |= {"pretrained": pretrained, "source": local_source(options["source"], pretrained)}
    return build_text(options)


def build_feature_teacher(
    cfg: Any, grid: tuple[int, int] | None = None, pretrained: bool = True
) -> FrozenTeacher | None:
    """The teacher of `teacher.feature`; None for `none`. Arguments and errors as above."""
    options = read_section(cfg, FeatureTeacherConfig, "teacher.feature")
    if options["kind"] == "none":
        return None
    options |= {"pretrained": pretrained, "source": local_source(options["source"], pretrained)}
    return _cached(build_features(options, grid), pretrained and options["cache"])


def _cached(teacher: FrozenTeacher, cache: bool | int) -> FrozenTeacher:
    if not cache:
        return teacher
    megabytes = DEFAULT_CACHE_MB if cache is True else int(cache)
    return CachedTeacher(teacher, max_bytes=megabytes << 20)


def chosen_precision(cfg: DictConfig, chosen: str | None) -> str:
    """How frozen networks compute where a key `precision` says `chosen`; null: as the run does."""
    return chosen or ("bf16" if cfg.training.mixed_precision == "bf16" else "float32")


@functools.lru_cache(maxsize=4)
def _teacher(kind: str, options: str, precision: str, *arguments: Any) -> nn.Module:
    """Teachers are frozen, so successive stages of one process share one and its memo."""
    # Building draws random numbers and a teacher that is shared draws none, so the run's own
    # generator must not move here, nor decide what is drawn.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return _BUILDERS[kind](json.loads(options), *arguments).set_precision(precision)


_BUILDERS = {"topology": build_topology_teacher, "text": build_text_teacher}


def shared_topology_teacher(
    cfg: DictConfig, grid: tuple[int, int], pretrained: bool = True
) -> nn.Module:
    """The topology teacher of a configuration, for a student with this latent grid.

    A teacher without weights (`pretrained=False`) is not shared: it is the caller's own.
    """
    options = {**plain(cfg.teacher.topology), "heads": cfg.losses.topology.heads}
    precision, blocks = chosen_precision(cfg, cfg.teacher.precision), cfg.model.num_blocks
    if not pretrained:
        teacher = build_topology_teacher(options, blocks, grid, pretrained=False)
        return teacher.set_precision(precision)
    text = json.dumps(options, sort_keys=True)
    return _teacher("topology", text, precision, blocks, tuple(grid))


def shared_text_teacher(cfg: DictConfig, pretrained: bool = True) -> nn.Module:
    """The text teacher of a configuration; ConfigError when its width is not the model's.

    `pretrained` as above.
    """
    options, precision = plain(cfg.teacher.text), chosen_precision(cfg, cfg.teacher.precision)
    if pretrained:
        teacher = _teacher("text", json.dumps(options, sort_keys=True), precision)
    else:
        teacher = build_text_teacher(options, pretrained=False).set_precision(precision)
    if teacher.dim != cfg.model.semantic_dim:
        raise ConfigError(
            f"model.semantic_dim={cfg.model.semantic_dim} but the text teacher "
            f"{cfg.teacher.text.source} embeds in {teacher.dim} dimensions"
        )
    return teacher
