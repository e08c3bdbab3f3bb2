"""What a user writes of data (a path, a pattern, two folders, a list) as a source of records."""

import os
from collections.abc import Mapping, Sequence

import yaml

from muse.data.folders import FolderSource, is_image_folder
from muse.data.records import Source
from muse.data.tar import TarSource
from muse.errors import ConfigError


def open_source(spec: object) -> Source:
    """The source that `spec` describes. Raises DataError when it is missing or empty.

    Args:
        spec: shard pattern(s) as in shards.py; a directory of shards or of pictures (folders.py);
            `{"images": DIR, "masks": DIR}`; a mapping with `urls`; or a source. A list or a
            mapping may be written out as one string, as on a command line.
    """
    if hasattr(spec, "shards") and hasattr(spec, "read"):
        return spec
    spec = _written_out(spec)
    if isinstance(spec, Mapping):
        if "images" in spec:
            return FolderSource(spec["images"], masks=spec.get("masks"))
        if "urls" not in spec:
            raise ConfigError(f"a data source needs 'urls' (or 'images'): {dict(spec)}")
        return open_source(spec["urls"])
    if not isinstance(spec, (str, os.PathLike, Sequence)):
        raise ConfigError(
            f"not a data source: {spec!r}; give a path, a shard pattern or a list of them"
        )
    if isinstance(spec, (str, os.PathLike)) and is_image_folder(os.fspath(spec)):
        return FolderSource(os.fspath(spec))
    return TarSource(os.fspath(spec) if isinstance(spec, os.PathLike) else spec)


def _written_out(spec: object) -> object:
    """`{images: DIR, masks: DIR}` and `[FILE, FILE]` in a string, as YAML reads them.

    All else stays: braces and brackets are also signs of patterns, such as `{a,b}.tar`.
    """
    if not isinstance(spec, str) or spec[:1] + spec[-1:] not in ("{}", "[]"):
        return spec
    try:
        read = yaml.safe_load(spec)
    except yaml.YAMLError:
        return spec
    if isinstance(read, dict):
        return read if {"images", "urls"} & set(read) else spec
    return read if all(isinstance(item, str) for item in read) else spec
