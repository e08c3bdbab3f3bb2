"""Loading: YAML files and key=value overrides over the schema's defaults, typed, validated, frozen.

A file may name others under `base:` (paths beside it), which are read first, so a stage or a size
states only its differences. Environment variables (`${oc.env:NAME}`) are resolved when a value is
used, not when the file is read.
"""

import dataclasses
import re
from collections.abc import Collection, Sequence
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

from muse.config_checks import check_model, check_together
from muse.config_fields import check_keys, nearest, restore_words, walk
from muse.config_model import ROUTING_CELLS, STREAM_KEYS, ModelConfig
from muse.config_schema import Config
from muse.errors import ConfigError
from muse.stages import STAGES

# The configurations that come with muse: in an installed package, in a clone.
SHIPPED = (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")


# ----------------------------------------------------------------------------------------- loading
def load_config(
    path: str | Path, overrides: Sequence[str] = (), recipe: str | None = None
) -> DictConfig:
    """Read a YAML file and its `base:` files, apply `key=value` overrides, validate, freeze.

    Values with `${oc.env:NAME}` are resolved on use.

    Args:
        path: where there is no such file, it may name a configuration that comes with muse, such as
            `muse_tiny/stage3`.
        overrides: `key=value`; they win.
        recipe: a file of `configs/recipes`, such as `release`, laid between the two.

    Raises:
        ConfigError: on a missing file, an unknown key (naming the nearest known one), a wrong type,
            or keys that exclude each other.
    """
    path = Path(path).expanduser()
    file = path if path.is_file() else _shipped(path) or path
    layers = [*_file_layers(file), _overrides(overrides)]
    if recipe is not None:
        stage = _merge(Config, layers).training.stage
        layers[-1:-1] = _recipe_layers(recipe, stage)
    config = _merge(Config, layers)
    check_keys(config, Config)
    fill_routing(config.model)
    cells = ROUTING_CELLS[config.model.routing]
    config.losses.topology.blocks = config.losses.topology.blocks or cells["topology"]
    config.losses.itc.blocks = config.losses.itc.blocks or cells["itc"]
    check_together(config)
    OmegaConf.set_readonly(config, True)
    return config


def load_config_as(schema: type, path: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """`load_config` for a file of another form: the sections of `schema` in place of `Config`'s.

    Which keys exclude each other is the caller's to check.
    """
    path = Path(path).expanduser()
    file = path if path.is_file() else _shipped(path) or path
    config = _merge(schema, [*_file_layers(file), _overrides(overrides)])
    check_keys(config, schema)
    OmegaConf.set_readonly(config, True)
    return config


def shipped_config(name: str) -> Path:
    """The file of a configuration that comes with muse, such as `muse_tiny/stage3.yaml`.

    It is found in a clone and in an installed package.
    """
    if file := _shipped(Path(name)):
        return file
    raise ConfigError(
        f"{name}: no such configuration comes with muse{nearest(name, _shipped_names())}"
    )


def stage_files(directory: str | Path) -> list[Path]:
    """Every stage of a variant, in order: of a directory, or of one that comes with muse, by name;
    `ConfigError` where there is none.
    """
    path = Path(directory).expanduser()
    for folder in (path, *(root / _short(path) for root in SHIPPED)):
        if files := sorted(folder.glob("stage*.yaml")):
            return files
    known = {Path(one).parent.as_posix() for one in _shipped_names() if "stage" in one}
    raise ConfigError(
        f"{directory}: no stage*.yaml in that directory{nearest(str(_short(path)), known)}"
    )


def model_config(values: Any) -> DictConfig:
    """A complete, typed model section from a dict, a `ModelConfig` or a loaded section."""
    if not isinstance(values, DictConfig):
        values = (
            OmegaConf.create(values) if isinstance(values, dict) else OmegaConf.structured(values)
        )
    config = _merge(ModelConfig, [values], prefix="model.")
    check_keys(config, ModelConfig, "model.")
    fill_routing(config)
    check_model(config)
    OmegaConf.set_readonly(config, True)
    return config


def read_section(
    values: Any, schema: type, where: str, choices: dict[str, Collection] | None = None
) -> dict[str, Any]:
    """A section as one plain dict: `values` over the defaults of `schema`, resolved and checked.

    Args:
        values: a dict or a node of a loaded configuration; a null key takes its default.
        schema: the section's class.
        where: its dotted name, for messages.
        choices: by key, choices that hold instead of the schema's.

    Raises:
        ConfigError: on an unknown key (naming the nearest known one), a wrong type, or a value
            that is none of the choices or out of range.
    """
    given = {name: value for name, value in (plain(values) or {}).items() if value is not None}
    known = [field.name for field in dataclasses.fields(schema)]
    for name in given:
        if name not in known:
            raise ConfigError(f"unknown key {where}.{name}{nearest(name, known)}")
    config = _merge(schema, [OmegaConf.create(given)], prefix=f"{where}.")
    check_keys(config, schema, f"{where}.", choices)
    return plain(config)


def fill_routing(model: DictConfig) -> None:
    """Give every stream key that stands at null the value of the chosen routing."""
    for name in STREAM_KEYS:
        if model[name] is None:
            model[name] = ROUTING_CELLS[model.routing][name]


def plain(node: Any) -> Any:
    """A node as plain dicts and lists, resolved; `ConfigError` for an unset variable."""
    try:
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    except InterpolationResolutionError as error:
        raise ConfigError(unset_variable(error)) from None


def resolved(config: DictConfig) -> dict[str, Any]:
    """All as plain values, environment variables resolved where they are set and kept where not."""

    def values_of(node: DictConfig) -> dict[str, Any]:
        values = {}
        for key in node:
            try:
                child = node[key]
                values[key] = values_of(child) if isinstance(child, DictConfig) else plain(child)
            except (InterpolationResolutionError, ConfigError):
                values[key] = OmegaConf.to_container(node, resolve=False)[key]
        return values

    return values_of(config)


def unset_variable(error: Exception) -> str:
    """One line about an interpolation that failed, with the key that needs it."""
    first = str(error).splitlines()[0]
    if name := re.search(r"Environment variable '([^']+)' not found", first):
        first = f"environment variable {name[1]} is not set"
    key = getattr(error, "full_key", None)
    return f"{first} (needed by {key})" if key else first


def _short(path: Path) -> Path:
    return path.relative_to("configs") if path.is_relative_to("configs") else path


def _shipped(path: Path) -> Path | None:
    """The shipped file of this name, which may lack `.yaml` and may begin with `configs/`."""
    name = _short(path)
    files = [folder / f"{name}{ending}" for folder in SHIPPED for ending in ("", ".yaml")]
    return next((file for file in files if file.is_file()), None)


def _shipped_names() -> set[str]:
    """Names of all configurations that come with muse, such as `muse_tiny/stage3.yaml`."""
    return {one.relative_to(root).as_posix() for root in SHIPPED for one in root.rglob("*.yaml")}


def _file_layers(path: Path, seen: tuple[Path, ...] = ()) -> list[DictConfig]:
    if path.is_dir():
        held = sorted(file.name for file in path.glob("*.yaml"))
        hint = f"; it holds {', '.join(held[:6])}" if held else ""
        raise ConfigError(f"{path}: is a directory, a configuration file was expected{hint}")
    if not path.is_file():
        end = "" if path.suffix == ".yaml" else ".yaml"  # suggested in the form that was given
        known = [name.removesuffix(end) for name in _shipped_names()]
        hint = "" if path.is_absolute() else nearest(_short(path).as_posix(), known)
        raise ConfigError(f"{path}: no such configuration file{hint}")
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


def _recipe_layers(name: str, stage: str) -> list[DictConfig]:
    """The keys of `configs/recipes/NAME.yaml`, then those that it holds under `stages.STAGE`."""
    file = _shipped(Path("recipes") / name)
    if file is None:
        known = sorted({path.stem for root in SHIPPED for path in root.glob("recipes/*.yaml")})
        raise ConfigError(f"{name}: no such recipe; there are {', '.join(known)}")
    layers = []
    for layer in _file_layers(file):
        of_stages = layer.pop("stages", None) or {}
        for one in of_stages:
            if one not in STAGES:
                raise ConfigError(f"{file}: unknown stage {one}{nearest(one, STAGES)}")
        layers += [layer, of_stages.get(stage) or OmegaConf.create()]
    return layers


def _overrides(overrides: Sequence[str]) -> DictConfig:
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"{item!r} is not an override of the form key=value")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except Exception as error:  # a value that is no YAML
        raise ConfigError(f"overrides not readable: {' '.join(str(error).split())[:200]}") from None


def _merge(schema: type, layers: Sequence[DictConfig], prefix: str = "") -> DictConfig:
    """The defaults of `schema` under the layers in order; `ConfigError` names what does not fit."""
    for layer in layers:
        _check_sections(schema, layer, prefix)
    try:
        config = OmegaConf.merge(OmegaConf.structured(schema), *layers)
    except (ConfigKeyError, ConfigAttributeError) as error:
        name = prefix + (error.full_key or str(error.key))
        known = [prefix + known for known, _ in walk(schema)]
        raise ConfigError(f"unknown key {name}{nearest(name, known)}") from None
    except ValidationError as error:
        raise ConfigError(
            f"wrong type for {prefix}{error.full_key}: {str(error).splitlines()[0]}"
        ) from None
    except ReadonlyConfigError as error:
        raise ConfigError(f"{prefix}{error.full_key} cannot be changed") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"configuration not valid: {str(error).splitlines()[0]}") from None
    restore_words(config, schema)
    return config


def _check_sections(schema: type, layer: DictConfig, prefix: str) -> None:
    """OmegaConf does not say which section it was that got a value in place of keys."""
    for field in dataclasses.fields(schema):
        if not dataclasses.is_dataclass(field.type) or field.name not in layer:
            continue
        given = layer._get_node(field.name)
        if not isinstance(given, DictConfig):
            raise ConfigError(
                f"wrong type for {prefix}{field.name}: a section of keys was expected, "
                f"got {given!r}"
            )
        _check_sections(field.type, given, f"{prefix}{field.name}.")
