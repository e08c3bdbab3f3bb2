"""A configuration key states everything at its field: type, default, choices, range, one sentence.

The sections are dataclasses in config_schema.py, config_model.py and config_run.py, with fields
made by `key` and `section`. Validation and `configs/default.yaml` are read off these fields.
"""

import copy
import dataclasses
import difflib
import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from muse.errors import ConfigError

# YAML reads these words as booleans, so `mixed_precision: no` arrives as false.
BOOLEAN_WORDS = {"False": ("no", "off", "false"), "True": ("yes", "on", "true")}


def key(
    default: Any,
    sentence: str = "",
    *,
    choices: Collection[Any] | None = None,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    was: dict[str, str] | None = None,
) -> Any:
    """A field of a section.

    Args:
        default: its value where no file and no override gives one.
        sentence: what it does, for `configs/default.yaml`.
        choices: the only values it may have; a table that grows later may stand here.
        least: the smallest number it may be; infinity is refused with it.
        above: the number it must be larger than; infinity is refused with it.
        below: the number it must be smaller than.
        was: values of older files, as text, and the choice that each of them means today.
    """
    about = {"sentence": sentence, "choices": choices, "was": was}
    about |= {"least": least, "above": above, "below": below}
    if isinstance(default, dict | list):  # a copy for every instance
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=about)
    return dataclasses.field(default=default, metadata=about)


def section(schema: type, sentence: str = "") -> Any:
    """A field that is itself a section of keys."""
    return dataclasses.field(default_factory=schema, metadata={"sentence": sentence})


def same_key(schema: type, name: str) -> Any:
    """A field with the default, sentence, choices and range of another section's key."""
    field = next(field for field in dataclasses.fields(schema) if field.name == name)
    return dataclasses.field(default=field.default, metadata=field.metadata)


def walk(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Dotted name and field of every key and section in order, a section before its keys."""
    for field in dataclasses.fields(schema):
        yield prefix + field.name, field
        if dataclasses.is_dataclass(field.type):
            yield from walk(field.type, f"{prefix}{field.name}.")


def restore_words(config: DictConfig, schema: type) -> None:
    """Give a key whose choices are words the word back that YAML has read as a boolean.

    A value that a key had in older files becomes the choice that it means today.
    """
    for name, field in walk(schema):
        choices = field.metadata.get("choices")
        if not choices:
            continue
        value = str(OmegaConf.select(config, name))
        today = (field.metadata.get("was") or {}).get(value)
        words = (today,) if today else BOOLEAN_WORDS.get(value, ())
        meant = [word for word in words if word in choices]
        if len(meant) == 1:
            OmegaConf.update(config, name, meant[0])


def check_keys(
    config: DictConfig, schema: type, prefix: str = "", choices: dict[str, Collection] | None = None
) -> None:
    """Raise `ConfigError` where a key is none of its choices or out of its range; null passes.

    Args:
        config: a section with the keys of `schema`.
        schema: the section's class.
        prefix: what stands before a key's name in a message, such as `model.`.
        choices: by key, choices that hold instead of those at the field.
    """
    for name, field in walk(schema):
        allowed = (choices or {}).get(name, field.metadata.get("choices"))
        least, above, below = (field.metadata.get(kind) for kind in ("least", "above", "below"))
        if allowed is None and least is None and above is None and below is None:
            continue  # not looked at: it may need an environment variable that is not set
        value = OmegaConf.select(config, name)
        if value is None:
            continue
        if allowed is not None and value not in allowed:
            words = ", ".join(map(str, allowed))
            raise ConfigError(f"{prefix}{name} must be one of {words}, got {value!r}")
        if least is not None and not (value >= least and math.isfinite(value)):
            bound = {0: "zero or more", 1: "positive"}.get(least, f"{least} or more")
            raise ConfigError(f"{prefix}{name} must be {bound}, got {value}")
        if above is not None and not (value > above and math.isfinite(value)):
            raise ConfigError(f"{prefix}{name} must be above {above}, got {value}")
        if below is not None and not value < below:
            raise ConfigError(f"{prefix}{name} must be below {below}, got {value}")


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` with the nearest known name, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""
