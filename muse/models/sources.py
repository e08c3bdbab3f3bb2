"""Where pretrained weights lie: hub ids and directories, safetensors read lazily by name, JSON beside them."""
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from muse.errors import CheckpointError


class TensorFiles:
    """The safetensors of a directory (single, or sharded with an index) or of one file, read lazily by name."""

    def __init__(self, source: str | Path):
        from safetensors import SafetensorError, safe_open

        path = Path(source)
        files = [path] if path.is_file() else self._files(path)
        self._handles, self._where = {}, {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from None
            self._handles[file] = handle
            self._where.update(dict.fromkeys(handle.keys(), file))

    @staticmethod
    def _files(directory: Path) -> list[Path]:
        indices = sorted(directory.glob("*.safetensors.index.json"))
        if indices:
            names = sorted(set(read_mapping(indices[0], "weight_map").values()))
            missing = [name for name in names if not (directory / name).is_file()]
            if missing:
                raise CheckpointError(f"{directory}: the index names {missing[0]}, which is missing")
            return [directory / name for name in names]
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{directory}: holds no .safetensors file")
        return files

    def keys(self) -> list[str]:
        return list(self._where)

    def __getitem__(self, name: str) -> Tensor:
        return self._handles[self._where[name]].get_tensor(name)


def locate(source: str, patterns: list[str]) -> Path:
    """The local directory of `source`: itself, or its snapshot in the hub cache (downloaded when it is reachable)."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise CheckpointError(f"{source}: no such directory, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{source}: neither a local directory nor reachable on the hub ({reason}); "
                              "download it once and pass its directory as the source") from None


def read_config(directory: Path) -> dict[str, Any]:
    """A directory's config.json; `CheckpointError` where there is none."""
    file = directory / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{directory}: holds no config.json")
    return read_mapping(file)


def read_mapping(file: Path, key: str | None = None) -> dict[str, Any]:
    """A JSON file's mapping, or the mapping under one key of it."""
    try:
        content = json.loads(file.read_text())
        content = content if key is None else content[key]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{file}: cannot be used ({type(error).__name__}: {' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds no mapping of names")
    return content
