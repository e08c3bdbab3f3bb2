"""Typed configuration: dataclasses give names, types and defaults; YAML files and key=value overrides give values.

`configs/default.yaml` shows every key with a comment; a test holds that it equals the defaults here. A file may name others under
`base:` (paths beside it), which are read first, so a stage or a size states only its differences.
Environment variables (`${oc.env:NAME}`) are resolved when a value is used, not when the file is read.
"""

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ReadonlyConfigError,
    ValidationError,
)

from muse.config_schema import Config, ModelConfig
from muse.errors import ConfigError

# ---------------------------------------------------------------------------------------------------- routing
# FIDELITY's table: what each routing means for the keys that stand at null.
ROUTING_CELLS: dict[str, dict[str, Any]] = {
    "paper": {
        "isolate_streams": True,
        "shield_attention": True,
        "join_semantics": True,
        "shield_semantics": True,
        "topology": "all",
        "itc": "all",
    },
    "release": {
        "isolate_streams": False,
        "shield_attention": True,
        "join_semantics": False,
        "shield_semantics": True,
        "topology": "last",
        "itc": "last",
    },
    "shared": {
        "isolate_streams": False,
        "shield_attention": False,
        "join_semantics": False,
        "shield_semantics": True,
        "topology": "all",
        "itc": "last",
    },
}
STREAM_KEYS = ("isolate_streams", "shield_attention", "join_semantics", "shield_semantics")

CHOICES: dict[str, tuple[Any, ...]] = {
    "model.routing": tuple(ROUTING_CELLS),
    "teacher.topology.kind": ("dinov3", "affinity", "random", "none"),
    "teacher.text.kind": ("open_clip", "sentence", "random", "none"),
    "losses.reconstruction.type": ("l1", "l2"),
    "losses.topology.blocks": ("all", "last"),
    "losses.topology.heads": ("mean", "per_head"),
    "losses.itc.blocks": ("all", "last"),
    "losses.itc.objective": ("nce", "distillation"),
    "optimizer.name": ("adamw",),
    "lr_scheduler.scheduler": ("cosine", "constant"),
    "training.mixed_precision": ("no", "bf16", "fp16"),
    "experiment.tracker": ("none", "tensorboard", "wandb"),
}
POSITIVE = (
    "model.dim",
    "model.num_heads",
    "model.num_blocks",
    "model.unshuffle",
    "model.latent_dim",
    "model.semantic_dim",
    "training.max_train_steps",
    "training.per_gpu_batch_size",
    "training.gradient_accumulation_steps",
    "dataset.preprocessing.resize_shorter_edge",
    "dataset.preprocessing.crop_size",
    "dataset.params.eval_batch_size",
    "experiment.log_every",
)
NOT_NEGATIVE = (
    "losses.reconstruction.weight",
    "losses.perceptual.weight",
    "losses.topology.weight",
    "losses.itc.weight",
    "losses.adversarial.weight",
    "losses.distillation.weight",
    "losses.recognition.weight",
    "dataset.params.num_workers_per_gpu",
    "optimizer.params.learning_rate",
    "lr_scheduler.params.warmup_steps",
    "dataset.max_bad_fraction",
    "training.max_skipped_steps",
    "training.max_grad_norm",
    "experiment.keep_last",
    "experiment.save_every",
    "experiment.eval_every",
    "experiment.generate_every",
)


# ---------------------------------------------------------------------------------------------------- loading
def load_config(path: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Read a YAML file (and its `base:` files), apply `key=value` overrides, validate; the result cannot be changed.

    Raises `ConfigError` on a missing file, an unknown key (naming the nearest known one), a wrong type, or keys that exclude
    each other. Values with `${oc.env:NAME}` are resolved on use.
    """
    layers = [*_file_layers(Path(path)), _overrides(overrides)]
    config = _merge(OmegaConf.structured(Config), layers)
    fill_routing(config.model)
    cells = ROUTING_CELLS[config.model.routing]
    config.losses.topology.blocks = config.losses.topology.blocks or cells["topology"]
    config.losses.itc.blocks = config.losses.itc.blocks or cells["itc"]
    validate(config)
    OmegaConf.set_readonly(config, True)
    return config


def model_config(values: Any) -> DictConfig:
    """A complete, typed model section from a dict, a `ModelConfig` or a section of a loaded configuration."""
    if not isinstance(values, DictConfig):
        values = (
            OmegaConf.create(values) if isinstance(values, dict) else OmegaConf.structured(values)
        )
    config = _merge(OmegaConf.structured(ModelConfig), [values], prefix="model.")
    fill_routing(config)
    _check_model(config)
    OmegaConf.set_readonly(config, True)
    return config


def fill_routing(model: DictConfig) -> None:
    """Give every stream key that stands at null the value of the chosen routing."""
    if model.routing not in ROUTING_CELLS:
        raise ConfigError(
            f"model.routing must be one of {', '.join(ROUTING_CELLS)}, got {model.routing!r}"
        )
    for name in STREAM_KEYS:
        if model[name] is None:
            model[name] = ROUTING_CELLS[model.routing][name]


def plain(node: Any) -> Any:
    """A configuration node as plain dicts and lists, resolved; raises `ConfigError` for an unset environment variable."""
    try:
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    except InterpolationResolutionError as error:
        raise ConfigError(unset_variable(error)) from None


def resolved(config: DictConfig) -> dict[str, Any]:
    """The whole configuration as plain values, environment variables resolved where they are set and kept where not."""

    def walk(node: DictConfig) -> dict[str, Any]:
        values = {}
        for key in node:
            try:
                child = node[key]
                values[key] = walk(child) if isinstance(child, DictConfig) else plain(child)
            except (InterpolationResolutionError, ConfigError):
                values[key] = OmegaConf.to_container(node, resolve=False)[key]
        return values

    return walk(config)


def unset_variable(error: Exception) -> str:
    """One line about an interpolation that failed, with the key that needs it."""
    first = str(error).splitlines()[0]
    if name := re.search(r"Environment variable '([^']+)' not found", first):
        first = f"environment variable {name[1]} is not set"
    key = getattr(error, "full_key", None)
    return f"{first} (needed by {key})" if key else first


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` with the nearest known name, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def _file_layers(path: Path, seen: tuple[Path, ...] = ()) -> list[DictConfig]:
    path = path.expanduser()
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    if path.resolve() in seen:
        raise ConfigError(f"{path}: names itself through `base`")
    try:
        content = OmegaConf.load(path)
    except Exception as error:  # any YAML error: its class depends on the parser in use
        raise ConfigError(
            f"{path}: not readable as YAML ({' '.join(str(error).split())[:200]})"
        ) from None
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path}: a configuration must be a mapping of sections")
    bases = content.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, (list, ListConfig)) or not all(
        isinstance(base, str) for base in bases
    ):
        raise ConfigError(
            f"{path}: base must be a file name or a list of file names, got {bases!r}"
        )
    layers = [
        layer
        for base in bases
        for layer in _file_layers(path.parent / base, (*seen, path.resolve()))
    ]
    return [*layers, content]


def _overrides(overrides: Sequence[str]) -> DictConfig:
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"{item!r} is not an override of the form key=value")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except Exception as error:  # a value that is no YAML
        raise ConfigError(f"overrides not readable: {' '.join(str(error).split())[:200]}") from None


def _merge(schema: DictConfig, layers: Sequence[DictConfig], prefix: str = "") -> DictConfig:
    for layer in layers:
        _check_sections(schema, layer, prefix)
    try:
        return OmegaConf.merge(schema, *layers)
    except (ConfigKeyError, ConfigAttributeError) as error:
        name = error.full_key or str(error.key)
        raise ConfigError(
            f"unknown key {prefix}{name}{nearest(prefix + name, _all_keys(schema, prefix))}"
        ) from None
    except ValidationError as error:
        raise ConfigError(
            f"wrong type for {prefix}{error.full_key}: {str(error).splitlines()[0]}"
        ) from None
    except ReadonlyConfigError as error:
        raise ConfigError(f"{prefix}{error.full_key} cannot be changed") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"configuration not valid: {str(error).splitlines()[0]}") from None


def _check_sections(schema: DictConfig, layer: DictConfig, prefix: str) -> None:
    """OmegaConf does not say which section it was that got a value in place of keys."""
    for name in layer:
        mine, given = schema._get_node(name, validate_access=False), layer._get_node(name)
        if isinstance(mine, DictConfig) and not isinstance(given, DictConfig):
            raise ConfigError(
                f"wrong type for {prefix}{name}: a section of keys was expected, got {given!r}"
            )
        if isinstance(mine, DictConfig):
            _check_sections(mine, given, f"{prefix}{name}.")


def _all_keys(node: DictConfig, prefix: str) -> list[str]:
    keys = []
    for name in node:
        keys.append(prefix + str(name))
        child = OmegaConf.to_container(node, resolve=False)[name]
        if isinstance(child, dict) and isinstance(node._get_node(name), DictConfig):
            keys += _all_keys(node[name], f"{prefix}{name}.")
    return keys


# ---------------------------------------------------------------------------------------------------- validation
def validate(config: DictConfig) -> None:
    """Raise `ConfigError` on values outside their range and on keys that cannot stand beside each other."""
    from muse.stages import STAGES

    if config.training.stage not in STAGES:
        raise ConfigError(
            f"training.stage must be one of {', '.join(STAGES)}, got {config.training.stage!r}"
        )
    for key, allowed in CHOICES.items():
        value = OmegaConf.select(config, key)
        if value not in allowed:
            raise ConfigError(f"{key} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    for key in POSITIVE:
        if OmegaConf.select(config, key) <= 0:
            raise ConfigError(f"{key} must be positive, got {OmegaConf.select(config, key)}")
    for key in NOT_NEGATIVE:
        value = OmegaConf.select(config, key)
        if not (value >= 0 and math.isfinite(value)):
            raise ConfigError(f"{key} must be zero or more, got {value}")
    _check_model(config.model)
    _check_latent(config.model)
    _check_losses(config)
    _check_crop(config)


def _check_model(model: DictConfig) -> None:
    if model.dim % model.num_heads or (model.dim // model.num_heads) % 2:
        raise ConfigError(
            f"model.dim={model.dim} must be model.num_heads={model.num_heads} times an even head width"
        )
    if model.routing == "shared" and model.join_semantics:
        raise ConfigError(
            "model.join_semantics=true is impossible with model.routing=shared: there S is the value stream"
        )


def _check_latent(model: DictConfig) -> None:
    # Not part of `_check_model`: a saved model with a `decoder_adapter` has two widths and the source `random`.
    channels = model.decoder.config.get("latent_channels")
    if channels is not None and channels != model.latent_dim and model.decoder.source == "random":
        raise ConfigError(
            f"model.latent_dim={model.latent_dim} but model.decoder.config.latent_channels={channels}"
        )


def _check_losses(config: DictConfig) -> None:
    for term, teacher in (("topology", "topology"), ("itc", "text"), ("distillation", "feature")):
        if config.losses[term].weight > 0 and config.teacher[teacher].kind == "none":
            raise ConfigError(
                f"losses.{term}.weight={config.losses[term].weight} needs a teacher, but "
                f"teacher.{teacher}.kind is none"
            )
    if not any(config.losses[term].weight > 0 for term in config.losses):
        raise ConfigError("every loss has weight 0: nothing would be learned")


def _check_crop(config: DictConfig) -> None:
    crop, resize = (
        config.dataset.preprocessing.crop_size,
        config.dataset.preprocessing.resize_shorter_edge,
    )
    if crop > resize:
        raise ConfigError(
            f"dataset.preprocessing.crop_size={crop} is larger than resize_shorter_edge={resize}"
        )
    patch = config.model.encoder.config.get("patch_size", 14)
    patch = patch if isinstance(patch, int) else patch[0]
    cell = patch * config.model.unshuffle
    if crop % cell:
        raise ConfigError(
            f"dataset.preprocessing.crop_size={crop} is not a multiple of {cell} "
            f"(encoder patch {patch} x model.unshuffle {config.model.unshuffle})"
        )
