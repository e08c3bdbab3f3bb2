"""Pictures out of a measurement: a folder of PNG files, or the field's npz with `arr_0`.

They are written as they come, by one process or by several, in the order of the set.
"""

import contextlib
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from muse.errors import DataError
from muse.utils.distributed import all_objects
from muse.utils.viz_utils import to_uint8

_NUMBERED = re.compile(r"\d{6,}\.png")


@contextlib.contextmanager
def image_writer(target: str | Path) -> Iterator[Callable[[Tensor, Tensor | None], None]]:
    """`with image_writer(target) as add`: a folder of PNG files, or an npz with arr_0.

    `add(images, indices)` takes (B,3,H,W) in [0,1], rounded to bytes. Pictures are numbered from 0
    in the order of `indices` (B,), which several processes need and one may leave out. All
    processes enter and leave together. The target is there whole at the end, or not at all.

    Raises DataError for a folder that holds anything but numbered PNG files.
    """
    target = Path(target).expanduser()
    as_array = target.suffix == ".npz"
    partial = target.with_name(f".{target.name}.partial")
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0:
        _check_target(target, as_array)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    all_objects(None)  # everyone waits for the folder
    try:
        with _Rows(partial, rank, as_array) as rows:
            yield rows.add
        parts = all_objects((rows.path, rows.shape, rows.indices))
        if rank == 0:
            (_finish_array if as_array else _finish_folder)(partial, target, parts)
        all_objects(None)
    finally:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


def _check_target(target: Path, as_array: bool) -> None:
    if as_array and target.is_dir():
        raise DataError(f"{target} is a folder, not an npz file")
    if not as_array and target.exists():
        strange = None if target.is_dir() else target.name
        if target.is_dir():
            others = (p.name for p in target.iterdir() if not _NUMBERED.fullmatch(p.name))
            strange = next(others, None)
        if strange is not None:
            raise DataError(f"{target} holds {strange!r}, which pictures would replace")


class _Rows:
    """One process's pictures: PNG files by their index, or rows of a raw file."""

    def __init__(self, folder: Path, rank: int, as_array: bool):
        self.folder, self.path = folder, folder / f"{rank}.raw"
        self.indices: list[int] = []
        self.shape: tuple[int, ...] | None = None
        self._file = open(self.path, "wb") if as_array else None

    def __enter__(self) -> "_Rows":
        return self

    def __exit__(self, *error) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, images: Tensor, indices: Tensor | None = None) -> None:
        """See `image_writer`."""
        if indices is None and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError("in several processes pictures are written with their indices")
        first = len(self.indices)
        numbers = range(first, first + len(images)) if indices is None else indices.tolist()
        pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()  # (B,H,W,3)
        if self._file is not None:
            self.shape = self.shape or pixels.shape[1:]
            if pixels.shape[1:] != self.shape:
                raise DataError(f"pictures of {pixels.shape[1:]} after {self.shape} in one array")
            self._file.write(numpy.ascontiguousarray(pixels).tobytes())
        else:
            for number, picture in zip(numbers, pixels, strict=True):
                Image.fromarray(picture).save(self.folder / f"{number:020d}.png")
        self.indices += numbers


def _finish_folder(partial: Path, target: Path, parts: list) -> None:
    """Numbers without gaps, also where samples were skipped."""
    finished = partial / "finished"
    finished.mkdir()
    for number, file in enumerate(sorted(partial.glob("*.png"))):
        file.rename(finished / f"{number:06d}.png")
    if target.exists():
        shutil.rmtree(target)
    finished.rename(target)


def _finish_array(partial: Path, target: Path, parts: list) -> None:
    """The rows of all processes by ascending index, as `numpy.savez` would write them."""
    parts = [part for part in parts if part[2]]
    if not parts:
        raise DataError(f"no pictures for {target}")
    shape = parts[0][1]
    if any(other != shape for _, other, _ in parts):
        raise DataError("pictures of two sizes in one array")
    rows = [
        numpy.memmap(path, numpy.uint8, "r", shape=(len(numbers), *shape))
        for path, _, numbers in parts
    ]
    places = sorted(
        (index, part, row)
        for part, (_, _, numbers) in enumerate(parts)
        for row, index in enumerate(numbers)
    )
    finished = partial / "finished.npz"
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(places), *shape)}
    with (
        zipfile.ZipFile(finished, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        numpy.lib.format.write_array_header_1_0(file, header)
        for _, part, row in places:
            file.write(rows[part][row].tobytes())
    finished.replace(target)
