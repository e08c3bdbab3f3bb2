"""Files that are whole or not there at all: atomic writes of text, JSON and directories; hashes; versions for a protocol."""

import hashlib
import json
import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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


def file_sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Installed versions of the packages that a result depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON so that `path` is always whole."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: str | Path, content: str) -> None:
    """Write a text so that `path` is always whole: beside it, then renamed."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise MuseError(f"{target}: cannot be written ({error.strerror})") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def writable_directory(path: str | Path) -> Path:
    """Make the directory and prove that a file can be made in it, or `CheckpointError` in one line."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror})") from None
    return folder


class atomic_directory:
    """`with atomic_directory(target) as folder`: fill `folder`; it becomes `target` at the end, or nothing does."""

    def __init__(self, target: str | Path):
        self.target = Path(target)

    def __enter__(self) -> Path:
        if self.target.exists() and not self.target.is_dir():
            raise CheckpointError(f"{self.target}: exists and is not a directory")
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(
                tempfile.mkdtemp(prefix=f".{self.target.name}.", dir=self.target.parent)
            )
        except OSError as error:
            raise CheckpointError(f"{self.target}: cannot be written ({error.strerror})") from None
        self.folder.chmod(0o755)
        return self.folder

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if kind is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise CheckpointError(
                    f"{self.target}: cannot be written ({error.strerror or error})"
                ) from None
            return
        for file in self.folder.iterdir():
            file.chmod(0o644)  # safetensors leaves its files to their owner alone
            _sync(file)
        _sync(self.folder)
        if (
            self.target.exists()
        ):  # two renames: between them the old one still exists under another name
            old = self.folder.with_name(self.folder.name + ".old")
            os.rename(self.target, old)
            os.rename(self.folder, self.target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(self.folder, self.target)
        _sync(self.target.parent)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
