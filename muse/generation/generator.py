"""A generator as it is saved: config.json, model.safetensors, statistics.safetensors.

config.json has the network's arguments (`generator`), the `tokenizer` whose latents it makes (path,
sha256, sizes), how times were drawn in training (`flow`), and how it samples unless told otherwise
(`sampling`). A file published with LightningDiT, whose names are ours, opens with a configuration.
"""

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from muse.config import plain
from muse.errors import CheckpointError, ConfigError
from muse.generation.extraction import STATISTICS
from muse.generation.latent_shards import LatentShards
from muse.generation.latents import LatentStatistics
from muse.generation.lightningdit import LightningDiT
from muse.models.loading import EMA_FILE, latest_checkpoint
from muse.models.pretrained import CONFIG_FILE, WEIGHTS_FILE, write_weights
from muse.utils.io import atomic_directory
from muse.utils.weights import load_into, locate, read_mapping, read_state_dict

PUBLISHED = ("ema", "model")  # where published files keep their weights, the better ones first


@dataclass
class Generator:
    """A network with what its latents need.

    Args:
        net: in eval mode.
        statistics: normalise what it learns and de-normalise what it makes.
        facts: `tokenizer`, `flow` and `sampling` of config.json.
    """

    net: LightningDiT
    statistics: LatentStatistics
    facts: dict[str, Any]

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the directory, or leave an old one as it is."""
        self.net.facts = self.facts
        with atomic_directory(directory) as folder:
            write_weights(folder, self.net.state_dict(), self.net.portable_config())
            self.statistics.save(folder / STATISTICS)

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str | torch.device = "cpu") -> "Generator":
        """From a saved directory, a training `checkpoint-N`, a run's directory or a hub id.

        Running means, where the checkpoint has them, lie over the weights they are of.
        `CheckpointError` where something does not fit.
        """
        path = _directory(source)
        config = read_mapping(path / CONFIG_FILE)
        if config.get("model_type") != "muse_generator":
            raise CheckpointError(
                f"{path}: not a generator but {config.get('model_type', 'something else')!r}"
            )
        facts = {key: config.get(key) for key in ("tokenizer", "flow", "sampling")}
        if None in facts.values():
            raise CheckpointError(f"{path / CONFIG_FILE}: lacks {_first_none(facts)}")
        net = _network(config.get("generator"), path)
        state = read_state_dict(path / WEIGHTS_FILE, "the generator")
        if (path / EMA_FILE).is_file():  # the fixed table of positions has no running mean
            state |= read_state_dict(path / EMA_FILE, "the generator's averages")
        load_into(net, state, path, "the generator")
        statistics = LatentStatistics.load(path / STATISTICS, facts["tokenizer"]["sha256"])
        net.facts = facts
        return cls(net.to(device).eval(), statistics, facts)

    @classmethod
    def from_published(
        cls, file: str | Path, cfg: DictConfig, device: str | torch.device = "cpu"
    ) -> "Generator":
        """From a weights file alone (`.pt` with `ema` or `model`, `.safetensors`).

        Args:
            file: read without running code from it.
            cfg: its architecture, the latents it was trained on, how it samples.
            device: where it goes.
        """
        shards = LatentShards(plain(cfg.latents.path))
        net = build_network(cfg, shards.shape)
        load_into(net, read_weights_file(file), file, "the generator")
        statistics = LatentStatistics.load(shards.folder / STATISTICS, shards.tokenizer_sha256)
        net.facts = generator_facts(cfg, shards)
        return cls(net.to(device).eval(), statistics, net.facts)


def build_network(cfg: DictConfig, shape: tuple[int, ...]) -> LightningDiT:
    """The network of a configuration for latents of `shape` (C, h, w).

    `ConfigError` where `latents.shape` says otherwise, or the patches do not fit.
    """
    wanted = plain(cfg.latents.shape)
    if wanted is not None and tuple(wanted) != tuple(shape):
        raise ConfigError(
            f"latents.shape={wanted}, but {plain(cfg.latents.path)} holds latents of {list(shape)}"
        )
    try:
        return LightningDiT(input_size=shape[1:], in_channels=shape[0], **plain(cfg.generator))
    except ValueError as error:
        raise ConfigError(f"generator: {error}") from None


def generator_facts(cfg: DictConfig, shards: LatentShards) -> dict[str, Any]:
    """What a generator's config.json says beside the network's arguments."""
    made_by = shards.notes.get("checkpoint", {})
    return {
        "tokenizer": {
            "path": cfg.tokenizer.checkpoint or made_by.get("path"),
            "sha256": shards.tokenizer_sha256,
            "model": shards.notes.get("config", {}).get("model"),
            "image_size": cfg.tokenizer.image_size,
        },
        "flow": plain(cfg.flow),
        "sampling": plain(cfg.sampling),
    }


def read_weights_file(file: str | Path) -> dict[str, torch.Tensor]:
    """A generator's tensors by name from one file, as published or of safetensors."""
    state = read_state_dict(file, "the generator", PUBLISHED)
    names = list(state)
    if names and all(name.startswith("module.") for name in names):  # saved out of DDP
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _directory(source: str | Path) -> Path:
    """The directory that holds the weights; a run's directory stands for its `final`."""
    path = Path(source).expanduser()
    if path.is_file():
        raise CheckpointError(
            f"{path}: a file of weights alone: give --config with its architecture and latents, or "
            "a directory with config.json"
        )
    if (path / "final").is_dir():
        return path / "final"
    if path.is_dir() and not (path / CONFIG_FILE).is_file():
        path = latest_checkpoint(path) or path
    found = locate(str(path), [CONFIG_FILE, WEIGHTS_FILE, STATISTICS])
    if not (found / CONFIG_FILE).is_file():
        raise CheckpointError(f"{found}: holds no {CONFIG_FILE}, so it is no generator")
    return found


def _network(arguments: Any, path: Path) -> LightningDiT:
    known = inspect.signature(LightningDiT).parameters
    try:
        arguments = {**arguments, "input_size": tuple(arguments["input_size"])}
        unknown = [name for name in arguments if name not in known]
        if unknown:
            raise ValueError(f"unknown argument {unknown[0]}")
        return LightningDiT(**arguments)
    except (TypeError, ValueError, KeyError) as error:
        words = json.dumps(str(error))
        raise CheckpointError(f"{path / CONFIG_FILE}: no network can be built ({words})") from None


def _first_none(facts: dict[str, Any]) -> str:
    return next(key for key, value in facts.items() if value is None)
