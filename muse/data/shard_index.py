"""What lies where in a local tar shard, found by one scan of its headers and kept beside it.

`train-000000.tar.idx` belongs to `train-000000.tar`: a line of facts (format, size and time of the
shard, number of samples, what broke it off), then a line with the place of every member. It is
written once, by whichever process first needs it, and read by all others and by later runs. A shard
that has changed since is scanned again; where nothing can be written, every process scans.
"""

import json
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from webdataset.tariterators import group_by_keys

from muse.errors import MuseError
from muse.utils.io import atomic_file

logger = logging.getLogger(__name__)

INDEX_SUFFIX = ".idx"
_FORMAT = 1
META = re.compile(r"__[^/]*__($|/)")  # webdataset keeps its own notes in members of such names


class StrictTarInfo(tarfile.TarInfo):
    """Only the end marker ends an archive; tarfile itself also stops at a damaged header."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no end marker: {error}") from error


class ShardContents(NamedTuple):
    """How many whole samples a shard holds, and the fault (of SHARD_FAULTS) that ends it."""

    samples: int
    fault: str | None = None


class ShardIndex(NamedTuple):
    """Samples in order, each a key and {extension: (offset, size)}, and what ends them early."""

    samples: list[tuple[str, dict[str, tuple[int, int]]]]
    fault: str | None = None


def local_path(url: str) -> str:
    """The path of a local shard without `file:`."""
    return re.sub(r"^file:(//)?", "", url)


def index_file(path: str) -> Path:
    """Where the index of the shard at `path` is kept."""
    return Path(path + INDEX_SUFFIX)


def shard_index(url: str) -> ShardIndex:
    """The index of a local, uncompressed shard, scanned if need be. Raises OSError."""
    path = local_path(url)
    return _index(path, *_stamp(path))


def shard_contents(url: str) -> ShardContents:
    """The counts alone: the first line of the index where there is one. Raises OSError."""
    path = local_path(url)
    return _contents(path, *_stamp(path))


def _stamp(path: str) -> tuple[int, int]:
    """Size and time of the last change: another shard under the same name has others."""
    facts = os.stat(path)
    return facts.st_size, facts.st_mtime_ns


# Few, since the whole index of a large shard takes megabytes.
@lru_cache(maxsize=2)
def _index(path: str, size: int, time: int) -> ShardIndex:
    try:
        with open(index_file(path), encoding="utf-8") as file:
            facts = _facts(file.readline(), size, time)
            if facts is not None:
                samples = [(key, _places(members)) for key, members in json.loads(file.readline())]
                if len(samples) == facts.samples:
                    return ShardIndex(samples, facts.fault)
    except (OSError, ValueError, TypeError):
        logger.debug("no index of %s yet", path)
    found = scan_shard(path)
    if _stamp(path) == (size, time):  # else it was written to while it was scanned
        _keep(path, size, time, found)
    return found


@lru_cache(maxsize=1 << 16)
def _contents(path: str, size: int, time: int) -> ShardContents:
    try:
        with open(index_file(path), encoding="utf-8") as file:
            facts = _facts(file.readline(), size, time)
    except (OSError, ValueError):
        facts = None
    if facts is None:
        index = _index(path, size, time)
        facts = ShardContents(len(index.samples), index.fault)
    return facts


def _facts(line: str, size: int, time: int) -> ShardContents | None:
    """The first line of an index, None unless it is of this format and this shard."""
    try:
        facts = json.loads(line)
        if [facts["format"], facts["size"], facts["mtime_ns"]] == [_FORMAT, size, time]:
            return ShardContents(int(facts["samples"]), facts["fault"])
    except (ValueError, KeyError, TypeError):
        pass
    return None


def _places(members: dict) -> dict[str, tuple[int, int]]:
    return {extension: (int(offset), int(size)) for extension, (offset, size) in members.items()}


def _keep(path: str, size: int, time: int, index: ShardIndex) -> None:
    """Write the index; a folder that takes no files costs a scan by every process, nothing else."""
    if not os.access(os.path.dirname(path) or ".", os.W_OK):
        return
    facts = {
        "format": _FORMAT,
        "size": size,
        "mtime_ns": time,
        "samples": len(index.samples),
        "fault": index.fault,
    }
    try:
        with atomic_file(index_file(path)) as partial:
            lines = (json.dumps(part, separators=(",", ":")) for part in (facts, index.samples))
            partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except (MuseError, OSError) as error:
        logger.debug("the index of %s could not be written (%s)", path, error)


# ------------------------------------------------------------------------------------- the scan
def scan_shard(path: str) -> ShardIndex:
    """Read all headers of a plain tar. A shard that breaks off gives its whole samples and the
    fault truncated_tar.

    Raises OSError where the disk fails.
    """
    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    try:
        with tarfile.open(path, "r:", tarinfo=StrictTarInfo) as archive:
            for sample in group_by_keys(_places_of_members(archive, path), handler=keep_first):
                key = sample.pop("__key__")
                del sample["__url__"]
                samples.append((key, sample))
    except (tarfile.TarError, EOFError, zlib.error):
        return ShardIndex(samples, "truncated_tar")
    return ShardIndex(samples)


def _places_of_members(archive: tarfile.TarFile, path: str) -> Iterator[dict]:
    """Members as webdataset groups them, with their place instead of their content."""
    size = os.path.getsize(path)
    for info in archive:  # Python 3.10's next() cannot be called on an archive of no members
        archive.members = []  # tarfile would remember every header
        if not info.isreg() or META.match(info.name):
            continue
        if info.offset_data + info.size > size:
            raise tarfile.ReadError("unexpected end of data")
        yield {"fname": info.name, "data": (info.offset_data, info.size), "__url__": path}


def keep_first(error: Exception) -> bool:
    """Of two members of one name the first counts; anything else is raised."""
    if isinstance(error, ValueError) and "duplicate" in str(error):
        return True
    raise error
