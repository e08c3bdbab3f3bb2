"""A run's directory: its configuration, what a killed run left, old checkpoints, full disks."""

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from muse.config import resolved
from muse.errors import CheckpointError
from muse.models.loading import checkpoints
from muse.utils.io import WRITE_ERRORS, writable_directory, write_text

log = logging.getLogger(__name__)

# What a killed process was writing, replacing or removing: no reader takes it for a checkpoint.
UNFINISHED = tuple(
    f".{name}*" for name in ("partial-", "checkpoint-", "final.", "removed-", "config.", "metrics.")
)


def open_run_directory(output: Path, config: dict[str, Any]) -> None:
    """Make the folder, prove it writable, remove what a killed run left, and write config.yaml.

    Raises `MuseError` where nothing can be written.
    """
    writable_directory(output / "images")
    if left := remove_unfinished(output):
        log.info("removed what an interrupted run had not finished: %s", ", ".join(left))
    write_text(output / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))


def was_run_with(folder: Path, cfg: DictConfig) -> bool:
    """Whether a run directory was made with exactly this configuration."""
    file = folder / "config.yaml"
    return file.is_file() and OmegaConf.to_container(OmegaConf.load(file)) == resolved(cfg)


def remove_unfinished(output: Path) -> list[str]:
    """Remove what a killed run, of however many processes, had not finished; gives the names."""
    found = sorted(path for pattern in UNFINISHED for path in output.glob(pattern))
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in found]


def prune_checkpoints(output: Path, keep_last: int, keep_every: int | None) -> None:
    """Remove old checkpoints.

    Args:
        output: the run's directory.
        keep_last: so many of the newest stay.
        keep_every: those whose step is a multiple of it stay too.
    """
    for step, path in checkpoints(output)[: -keep_last or None]:
        if not (keep_every and step % keep_every == 0):
            # Renamed first: a folder that is half removed must not look like a checkpoint.
            removed = path.with_name(f".removed-{step}")
            path.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)


@contextlib.contextmanager
def named_if_refused(target: Path, *leftovers: Path) -> Iterator[None]:
    """Turn a full disk, or a folder that may not be written, into one line; remove `leftovers`."""
    try:
        yield
    except (*WRITE_ERRORS, CheckpointError) as error:
        for path in leftovers:
            shutil.rmtree(path, ignore_errors=True)
        message = str(error)  # of a CheckpointError: it names the target already
        if not isinstance(error, CheckpointError):
            reason = getattr(error, "strerror", None) or " ".join(message.split())
            message = f"{target}: cannot be written ({reason})"
        raise CheckpointError(f"{message}; checkpoints before it are whole") from None
