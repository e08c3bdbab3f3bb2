"""Picture files of any size as batches of one size, each with what was done to it on reading."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from muse.errors import ConfigError, DataError
from muse.inference import find_images, has_transparency, read_image
from muse.utils.viz_utils import fit_side

HELD = 4  # batches of pictures that may wait for others of their size


class FittedPicture(NamedTuple):
    """A picture as a model gets it."""

    index: int  # of its file among all
    file: Path
    image: Tensor  # (3, H, W) in [0, 1]
    notes: tuple[str, ...]  # what reading changed: transparency, size

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)"""
        return tuple(self.image.shape[-2:])


def find_all(words: Sequence[str]) -> list[Path]:
    """The pictures of all files, folders and globs, each once, in order; `DataError` if none."""
    return list(dict.fromkeys(file for word in words for file in find_images(word)))


def check_bounds(max_side: int, batch_size: int, tile: int | None = None) -> None:
    """`ConfigError` unless each that is given is at least 1."""
    for flag, value in (("max_side", max_side), ("batch_size", batch_size), ("tile", tile)):
        if value is not None and value < 1:
            raise ConfigError(f"--{flag} must be at least 1, not {value}")


def read_picture(index: int, file: Path, max_side: int) -> FittedPicture:
    """One file, shrunk to `max_side` pixels where it is larger; `DataError` if it is no picture."""
    image = read_image(file)
    fitted = fit_side(image, max_side)
    notes = ["transparency on white"] if has_transparency(file) else []
    if fitted.shape != image.shape:
        height, width = image.shape[-2:]
        notes.append(f"shrunk from {width}x{height}")
    return FittedPicture(index, file, fitted, tuple(notes))


def batches_by_size(
    files: Sequence[Path], batch_size: int, max_side: int, failed: list[tuple[Path, str]]
) -> Iterator[list[FittedPicture]]:
    """Batches whose pictures have one size; a picture waits for others of its size.

    Args:
        files: pictures of any size.
        batch_size: pictures at a time.
        max_side: larger pictures are shrunk to this side, pixels.
        failed: gets (file, reason) of what cannot be read.
    """
    waiting: dict[tuple[int, int], list[FittedPicture]] = {}
    for index, file in enumerate(files):
        try:
            picture = read_picture(index, file, max_side)
        except DataError as error:
            failed.append((file, str(error).removeprefix(f"{file}: ")))
            continue
        waiting.setdefault(picture.size, []).append(picture)
        if len(waiting[picture.size]) == batch_size:
            yield waiting.pop(picture.size)
        elif sum(map(len, waiting.values())) >= HELD * batch_size:
            yield waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
    yield from waiting.values()
