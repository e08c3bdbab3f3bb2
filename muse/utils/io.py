"""Files that are complete or not there at all: atomic writes; hashes and versions for a protocol.

A write goes to another name in the same folder and is renamed at the end, since renaming within one
folder is a single step for the system: whoever opens the final name sees the old content or the new
one, never a part. No torch here: `muse.cli` imports this file, and `--help` must not wait for it.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from muse.errors import CheckpointError, MuseError

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "diffusers",
    "open_clip_torch",
    "timm",
    "accelerate",
    "webdataset",
    "torch-fidelity",
    "lpips",
)
# What a full disk or a missing permission raises; safetensors has a class of its own for it.
WRITE_ERRORS = (OSError, SafetensorError)


# -------------------------------------------------------------------------------------------- files
@contextmanager
def atomic_file(path: str | Path, durable: bool = False) -> Iterator[Path]:
    """`with atomic_file(target) as partial`: write `partial`; at the end it becomes `target`.

    Args:
        path: the final name; missing folders above it are made.
        durable: also wait until the disk has the bytes, for what is hard to make again (weights).

    Raises:
        MuseError: the system refused to write. Any other error of the body passes through; in both
            cases `path` is as it was and `partial` is removed.
    """
    target = Path(path)
    partial = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The suffix stays last, since Pillow and matplotlib read the format from it.
        handle, name = tempfile.mkstemp(
            prefix=f".{target.stem}.", suffix=target.suffix, dir=target.parent
        )
        os.close(handle)
        partial = Path(name)
        yield partial
        partial.chmod(0o644)  # mkstemp makes files for their owner alone
        if durable:
            _sync(partial)
        partial.replace(target)
        if durable:
            _sync(target.parent)
    except BaseException as error:
        if partial is not None:
            partial.unlink(missing_ok=True)
        if isinstance(error, WRITE_ERRORS):
            raise MuseError(_refusal(target, error)) from None
        raise


def write_text(path: str | Path, content: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as partial:
        partial.write_text(content, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file atomically; ValueError for NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


# -------------------------------------------------------------------------------------- directories
@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """`with atomic_directory(target) as folder`: fill `folder`; at the end it becomes `target`.

    The files are on the disk before the name changes. An old `target` is removed after that; when
    the body fails, it stays and `folder` is removed.

    Raises:
        CheckpointError: the system refused to write, or `path` is a file.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target}: exists and is not a directory")
    folder = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        folder.chmod(0o755)
        yield folder
        for file in folder.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors makes files for their owner alone
            _sync(file)
        _sync(folder)
        _take_place(folder, target)
    except BaseException as error:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, WRITE_ERRORS):
            raise CheckpointError(_refusal(target, error)) from None
        raise


def _take_place(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`."""
    if not target.exists():
        folder.rename(target)
    else:  # a directory cannot be renamed over another one, so the old one is moved aside first
        old = folder.with_name(folder.name + ".old")
        target.rename(old)
        try:
            folder.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)


def writable_directory(path: str | Path) -> Path:
    """Make the directory and a trial file in it; `CheckpointError` where that is refused."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(_refusal(folder, error)) from None
    return folder


def _refusal(target: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return f"{target}: cannot be written ({reason})"


def _sync(path: Path) -> None:
    """Wait until the system has written a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -------------------------------------------------------------------------------------------- facts
def file_sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Installed versions of the packages that a result depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
