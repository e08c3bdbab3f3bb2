"""Sets of pictures for a measurement, in the forms that the field hands round.

    a folder of pictures, tar shards      whatever muse.data reads
    samples.npz                           arr_0, (N,H,W,3) uint8, read in blocks
    reference.npz                         mu and sigma of Inception's features (ADM's also mu_s and
                                          sigma_s, for sFID), with arr_0 or without

image_writer.py writes the first two.
"""

import contextlib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from muse.data.crops import PictureCrop
from muse.data.decode import BadSample, decode_image, image_bytes
from muse.data.eval import EvalStream, count_samples
from muse.data.samples import SampleMaker
from muse.data.sources import open_source
from muse.data.transforms import to_float
from muse.errors import DataError

STATISTICS = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}


@dataclass
class ImageSet:
    """Pictures, statistics, or both.

    Args:
        name: as it was given.
        count: number of pictures, 0 where there are statistics alone; None for remote shards.
        statistics: metric (fid, sfid) -> mean (D,) and covariance (D,D) that stand for the
            pictures' own.
        read: (batch size, workers, part of parts) -> batches (B,3,H,W) in [0,1], in order.
    """

    name: str
    count: int | None
    read: Callable[[int, int, int, int], Iterator[Tensor]]
    statistics: dict[str, tuple[numpy.ndarray, numpy.ndarray]] = field(default_factory=dict)

    def batches(
        self, batch_size: int = 64, num_workers: int = 0, part: int = 0, parts: int = 1
    ) -> Iterator[Tensor]:
        """Pictures in order, (B,3,H,W) in [0,1]. DataError for one that cannot be used.

        Args:
            batch_size: pictures at a time.
            num_workers: loader processes.
            part: which stretch of the set, from 0.
            parts: equal stretches; more than one need a set that can be counted.
        """
        if parts > 1 and self.count is None:
            raise DataError(
                f"{self.name} is read as a stream, which several processes cannot share out: start "
                "one process, or name local files"
            )
        return self.read(batch_size, num_workers, part, parts)


def open_image_set(source: object, crop: PictureCrop | None = None) -> ImageSet:
    """The set behind a path, or behind anything else that muse.data reads.

    Args:
        source: folder, shard pattern or npz file.
        crop: how pictures are cut; None takes them as they are, all of one size.
    """
    if str(source).endswith(".npz"):
        return _open_npz(Path(str(source)), crop)
    opened = open_source(source)
    counts = count_samples(opened) if opened.local else []

    def read(batch_size: int, num_workers: int, part: int, parts: int) -> Iterator[Tensor]:
        maker = SampleMaker(transform=crop or _OneSize(_first_size(opened)), fields=("images",))
        stream = EvalStream(opened, maker, batch_size, part, parts, counts=counts)
        for batch, _, faults in DataLoader(stream, batch_size=None, num_workers=num_workers):
            for kind, key in faults:
                raise DataError(f"{opened.name}: {key} {_REASONS.get(kind, f'({kind})')}")
            yield batch["images"]

    return ImageSet(str(opened.name), sum(counts) if opened.local else None, read)


# ------------------------------------------------------------------------------ folders and shards
_OTHER_SIZE = "other_size"
_REASONS = {
    _OTHER_SIZE: "is not of the first picture's size: give --resize and --crop, or a --protocol"
}


@dataclass(frozen=True)
class _OneSize:
    """In the place of a `Transform`: pictures as they are, all of one (width, height)."""

    size: tuple[int, int]

    def resize(self, image: Image.Image, mask=None) -> tuple[Tensor, None]:
        if image.size != self.size:
            raise BadSample(_OTHER_SIZE)
        return torch.from_numpy(numpy.array(image)).permute(2, 0, 1), None

    def crop(self, pixels: Tensor, mask=None, rng=None) -> tuple[Tensor, None]:
        return pixels, None


def _first_size(source) -> tuple[int, int]:
    for record in source.read(source.shards[0]):
        try:
            return decode_image(image_bytes(record.load().members)).size
        except BadSample as error:
            raise DataError(f"{source.name}: {record.key} ({error.kind})") from error
    raise DataError(f"{source.name} holds no samples")


# -------------------------------------------------------------------------------------------- npz
def _open_npz(path: Path, crop: PictureCrop | None) -> ImageSet:
    if not path.is_file():
        raise DataError(f"no such file: {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = {Path(name).stem for name in archive.namelist() if name.endswith(".npy")}
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is not an npz file") from error
    found = {
        metric: _statistics(path, keys)
        for metric, keys in STATISTICS.items()
        if names.issuperset(keys)
    }
    if "arr_0" not in names and "fid" not in found:
        raise DataError(
            f"{path} holds neither arr_0 (pictures) nor mu and sigma (statistics), but "
            f"{', '.join(sorted(names)) or 'nothing'}"
        )
    count = 0
    if "arr_0" in names:
        with _array(path) as (_, shape):
            count = shape[0]

    def read(batch_size: int, num_workers: int, part: int, parts: int) -> Iterator[Tensor]:
        first, last = count * part // parts, count * (part + 1) // parts
        for block in _npz_blocks(path, batch_size, first, last):
            if crop is None:
                yield to_float(torch.from_numpy(block).permute(0, 3, 1, 2).contiguous())
            else:
                yield to_float(torch.stack([crop(Image.fromarray(image)) for image in block]))

    return ImageSet(str(path), count, read, found)


def _statistics(path: Path, keys: tuple[str, str]) -> tuple[numpy.ndarray, numpy.ndarray]:
    try:
        with numpy.load(path, allow_pickle=False) as arrays:
            mean, covariance = (arrays[key] for key in keys)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: {' and '.join(keys)} cannot be read ({error})") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise DataError(
            f"{path}: {keys[0]} must be (D,) and {keys[1]} (D, D), not {mean.shape} and "
            f"{covariance.shape}"
        )
    return mean, covariance


@contextlib.contextmanager
def _array(path: Path):
    """The open file of arr_0 after its header, and its (N,H,W,3)."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        try:
            version = numpy.lib.format.read_magic(file)
            header = {
                (1, 0): numpy.lib.format.read_array_header_1_0,
                (2, 0): numpy.lib.format.read_array_header_2_0,
            }[version](file)
        except (ValueError, KeyError) as error:
            raise DataError(f"{path}: arr_0 has no header that numpy can read") from error
        shape, by_columns, dtype = header
        if dtype != numpy.uint8 or len(shape) != 4 or shape[3] != 3 or by_columns or not shape[0]:
            raise DataError(
                f"{path}: arr_0 must be (N,H,W,3) of uint8 with N above 0, not {shape} of {dtype}"
            )
        yield file, shape


def _npz_blocks(path: Path, rows: int, first: int, last: int) -> Iterator[numpy.ndarray]:
    """arr_0[first:last] in blocks of (rows,H,W,3): what is not in a block is not in memory."""
    with _array(path) as (file, shape):
        size = shape[1] * shape[2] * shape[3]
        if first:
            file.seek(first * size, 1)
        for start in range(first, last, rows):
            count = min(rows, last - start)
            try:
                data = file.read(count * size)
            except (zipfile.BadZipFile, OSError, EOFError) as error:
                raise DataError(f"{path} is damaged at picture {start}: {error}") from error
            if len(data) < count * size:
                raise DataError(f"{path} ends after {start + len(data) // size} of {shape[0]}")
            yield numpy.frombuffer(bytearray(data), numpy.uint8).reshape(count, *shape[1:])
