"""Fetch the weights that a configuration needs from the hub into one directory.

The directory is what `CHECKPOINT_DIR` names: a part OWNER/NAME lies in DIRECTORY/NAME, where every
command looks before it asks the hub. Nothing calls this but `muse download`.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from omegaconf import DictConfig, OmegaConf

from muse.config import plain
from muse.errors import CheckpointError
from muse.teachers.hub import INTERNVIT
from muse.utils.io import file_sha256, write_json
from muse.utils.weights import SOURCE_FILES, packaged

MANIFEST = "muse_download.json"
# Of a text tower also its vocabulary; of open_clip's its own configuration; never code or pickles.
TEXT_FILES = (*SOURCE_FILES, "*.json", "*.txt", "*.model")
TEACHER_FILES = (*SOURCE_FILES, "preprocessor_config.json")


class NeededWeights(NamedTuple):
    """A part of a configuration whose weights come from the hub."""

    key: str  # of the configuration, such as model.encoder.source
    repo_id: str
    patterns: tuple[str, ...]


class Download(NamedTuple):
    """What became of one part."""

    needed: NeededWeights
    folder: Path
    bytes: int
    problem: str  # "" where it is there and verified


def needed_weights(cfg: DictConfig, hub_id_of: Callable[[str], str]) -> list[NeededWeights]:
    """The parts of a configuration with a hub id as their source, each repository once.

    Args:
        cfg: a configuration.
        hub_id_of: the repository of open_clip's MODEL/TAG; "" where it comes from elsewhere.
    """
    found: dict[str, NeededWeights] = {}
    for key, source, patterns in _sources(cfg, hub_id_of):
        named = str(source)
        local = packaged(named) or Path(named).expanduser().exists() or named.startswith((".", "~"))
        if named.count("/") == 1 and not local and ":" not in named and not named.startswith("/"):
            old = found.get(named)
            wanted = tuple(dict.fromkeys([*(old.patterns if old else ()), *patterns]))
            found[named] = NeededWeights(f"{old.key}, {key}" if old else key, named, wanted)
    return list(found.values())


def _sources(
    cfg: DictConfig, hub_id_of: Callable[[str], str]
) -> Iterator[tuple[str, Any, Sequence[str]]]:
    """(key, source, files) of every part that is read from somewhere."""
    for part in ("encoder", "decoder"):
        yield f"model.{part}.source", plain(cfg.model[part].source), SOURCE_FILES
    for name in ("topology", "feature"):
        teacher = cfg.teacher[name]
        source = str(plain(teacher.source))
        files = SOURCE_FILES if source.startswith(INTERNVIT) else TEACHER_FILES
        if teacher.kind not in ("none", "random"):
            yield f"teacher.{name}.source", source.removeprefix(INTERNVIT), files
    text = cfg.teacher.text
    source = str(plain(text.source))
    if text.kind == "open_clip":
        hub = source.removeprefix("hf-hub:") if source.startswith("hf-hub:") else hub_id_of(source)
        yield "teacher.text.source", hub, TEXT_FILES
    elif text.kind == "sentence":
        yield "teacher.text.source", source, TEXT_FILES


def open_clip_hub_id(source: str) -> str:
    """The repository of open_clip's MODEL/TAG; "" where it is not on the hub."""
    import open_clip  # noqa: PLC0415 - heavy, and of an extra

    name, _, tag = source.partition("/")
    return open_clip.get_pretrained_cfg(name, tag).get("hf_hub", "").rstrip("/")


def fetch_weights(
    needed: Sequence[NeededWeights], root: Path, token: str | None = None
) -> list[Download]:
    """Download and verify each part; one that fails does not stop the others.

    A folder that is complete by its manifest is verified again and not fetched. The manifest is
    written last, so that a folder without one is not taken for complete.
    """
    return [_fetch_one(part, root / part.repo_id.partition("/")[2], token) for part in needed]


def _fetch_one(part: NeededWeights, folder: Path, token: str | None) -> Download:
    problem = ""
    try:
        if not (folder / MANIFEST).is_file():
            info = HfApi(token=token).repo_info(part.repo_id, files_metadata=True)
            snapshot_download(
                part.repo_id,
                revision=info.sha,
                allow_patterns=list(part.patterns),
                local_dir=folder,
                token=token,
            )
            _write_manifest(part, folder, info)
        size = verify(folder, part.repo_id)
    except GatedRepoError:
        size, problem = (
            0,
            (
                f"gated: log in with `hf auth login`, ask for access on "
                f"https://huggingface.co/{part.repo_id} and accept its licence, then run this again"
            ),
        )
    except RepositoryNotFoundError:
        size, problem = 0, "no such repository, or a private one (`hf auth login`)"
    except CheckpointError as error:
        size, problem = 0, str(error)
    except (HfHubHTTPError, OSError, ValueError) as error:
        size, problem = 0, f"cannot be fetched ({' '.join(str(error).split())[:200]})"
    return Download(part, folder, size, problem)


def _write_manifest(part: NeededWeights, folder: Path, info: Any) -> None:
    """What the hub says of each fetched file: size, and sha256 of those that it stores as LFS."""
    said = {}
    for one in info.siblings:
        if (folder / one.rfilename).is_file():
            sha256 = one.lfs.sha256 if one.lfs is not None else None
            size = one.size if one.size is not None else (folder / one.rfilename).stat().st_size
            said[one.rfilename] = {"bytes": size, "sha256": sha256}
    if not said:
        raise CheckpointError(f"{part.repo_id}: holds none of {', '.join(part.patterns)}")
    _check_files(folder, said, part.repo_id)
    content = {"repo_id": part.repo_id, "revision": info.sha, "files": said}
    write_json(folder / MANIFEST, content)


def verify(folder: Path, repo_id: str) -> int:
    """Bytes of a fetched folder; `CheckpointError` at the first file that is not as the hub said.

    Args:
        folder: with its manifest.
        repo_id: of which repository it must be.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, named = manifest["files"], manifest["repo_id"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: cannot be used ({error})") from None
    if named != repo_id:
        raise CheckpointError(f"{folder}: holds {named}; choose another --output")
    _check_files(folder, files, repo_id)
    return sum(one["bytes"] for one in files.values())


def _check_files(folder: Path, files: dict[str, dict[str, Any]], repo_id: str) -> None:
    for name, said in files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != said["bytes"]:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "nothing"
            raise CheckpointError(
                f"{file}: {found} in place of {said['bytes']} bytes of {repo_id}; remove "
                f"{folder} and run this again"
            )
        if said["sha256"] and file_sha256(file) != said["sha256"]:
            raise CheckpointError(
                f"{file}: its sha256 is not the hub's; remove {folder} and run this again"
            )


def other_sources(cfg: DictConfig, needed: Sequence[NeededWeights]) -> list[str]:
    """Lines about networks that no hub id names: their libraries fetch these on first use."""
    lines = []
    perceptual = cfg.losses.perceptual
    if perceptual.weight and perceptual.name not in ("none", "random", "efficientnet_lite0"):
        lines.append(
            f"losses.perceptual.name={perceptual.name}: fetched by its library on first use"
        )
    for key in ("teacher.topology.source", "teacher.feature.source", "teacher.text.source"):
        source = str(OmegaConf.select(cfg, key) or "")
        if source.startswith("timm:"):
            lines.append(f"{key}={source}: fetched by timm on first use")
    return lines
