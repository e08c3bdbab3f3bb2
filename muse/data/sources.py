"""Where samples come from: tar shards here, image folders in folders.py, one interface for both.

A source has `shards` (the units that ranks and workers share out) and `read(shard)`, which yields `Record`s: the key
and the places of a sample's members, so that samples can be passed over (resume, another rank's share) without reading
them.
"""

import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from webdataset.gopen import Pipe, gopen, set_options
from webdataset.tariterators import group_by_keys

from muse.data import shards as shard_lists
from muse.data.decode import SAMPLE_EXTENSIONS
from muse.errors import ConfigError

_READ_ERRORS = (OSError, EOFError, tarfile.TarError, zlib.error)

_META = re.compile(r"__[^/]*__($|/)")  # webdataset keeps its own notes in members of such names
SHARD_FAULTS = ("truncated_tar", "unreadable_shard")


class Span(NamedTuple):
    """Bytes that lie in a file; `size` -1 is all of it."""

    path: str
    offset: int
    size: int


@dataclass(slots=True)
class Record:
    """One sample before decoding; `fault` says what is wrong with it, if anything; `prepared` is a cache's place."""

    key: str
    shard: str
    members: dict[str, bytes | Span] = field(default_factory=dict)
    fault: str | None = None
    prepared: object = None

    def load(self) -> "Record":
        """Read the members' bytes, if that was not yet done."""
        try:
            for name, member in self.members.items():
                if isinstance(member, Span):
                    self.members[name] = _read_span(member)
        except (OSError, EOFError):
            self.members, self.fault = {}, "unreadable_file"
        return self


def _read_span(span: Span) -> bytes:
    with open(span.path, "rb") as file:
        file.seek(span.offset)
        data = file.read(span.size)
    if len(data) < span.size:
        raise EOFError(span.path)
    return data


class Source(Protocol):
    """What loaders read from."""

    name: str
    shards: Sequence[str]
    local: bool  # samples can be listed without reading them
    one_per_shard: bool  # a shard is a sample: shuffling shards shuffles samples

    def read(self, shard: str) -> Iterator[Record]: ...


class _StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged or missing header for the end of the archive; here only the end marker is the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no end marker: {error}") from error


class TarSource:
    """WebDataset shards: members of one key (file name up to the first dot) lie side by side and make a sample.

    A shard that breaks off gives its whole samples and then a record with one of SHARD_FAULTS; remote shards, and local
    ones whose disk fails, are tried again first, `attempts` times with doubling waits from `first_wait` seconds.
    """

    one_per_shard = False

    def __init__(self, urls: str | Sequence[str], attempts: int = 5, first_wait: float = 1.0):
        self.shards = shard_lists.expand_urls(urls)
        self.name = urls if isinstance(urls, str) else f"the list of {len(self.shards)} shards from {self.shards[0]}"
        self.local = not any(map(shard_lists.needs_stream, self.shards))
        self.attempts, self.first_wait = attempts, first_wait
        self.retries = 0  # reads begun anew, in this process

    def _count_retry(self) -> None:
        self.retries += 1

    def read(self, shard: str) -> Iterator[Record]:
        # A local file that is cut short stays so; a stream may do better at the next try.
        retry_on = _READ_ERRORS if shard_lists.is_remote(shard) else (OSError,)
        try:
            yield from shard_lists.with_retries(
                lambda: _read_tar(shard), retry_on, shard, self.attempts, self.first_wait, on_retry=self._count_retry
            )
        except (tarfile.TarError, EOFError, zlib.error):
            yield Record(shard, shard, fault="truncated_tar")
        except OSError:
            yield Record(shard, shard, fault="unreadable_shard")


def _read_tar(url: str) -> Iterator[Record]:
    """Records of one shard. Raises one of _READ_ERRORS where it breaks off."""
    stream = gopen(url, "rb")
    finished = False
    try:
        streamed = shard_lists.needs_stream(url)
        with tarfile.open(fileobj=stream, mode="r|*" if streamed else "r:", tarinfo=_StrictTarInfo) as archive:
            members = _tar_members(archive, url, None if streamed else stream.name)
            for sample in group_by_keys(members, handler=_keep_first):
                key, shard = sample.pop("__key__"), sample.pop("__url__")
                yield Record(key, shard, {name: data for name, data in sample.items() if name in SAMPLE_EXTENSIONS})
        while isinstance(stream, Pipe) and stream.read(1 << 16):
            pass  # a command that is cut off by our closing its pipe would report an error
        finished = True
    except tarfile.TarError:
        finished = True  # closing tells whether the command failed: a better reason than the tar error
        stream.close()
        raise
    finally:
        if not finished:
            set_options(stream, ignore_errors=True)
        stream.close()


def _tar_members(archive: tarfile.TarFile, url: str, path: str | None) -> Iterator[dict]:
    """Members as webdataset's grouping wants them; the data is a Span where the archive is a plain file at `path`."""
    size = os.path.getsize(path) if path else 0
    while (info := archive.next()) is not None:
        archive.members = []  # tarfile would remember every header
        if not info.isreg() or _META.match(info.name):
            continue
        if path is None:
            data = archive.extractfile(info).read()
        elif info.offset_data + info.size > size:
            raise tarfile.ReadError("unexpected end of data")
        else:
            data = Span(path, info.offset_data, info.size)
        yield {"fname": info.name, "data": data, "__url__": url}


def _keep_first(error: Exception) -> bool:
    """Of two members of one name the first counts; anything else is raised."""
    if isinstance(error, ValueError) and "duplicate" in str(error):
        return True
    raise error


class InMemory:
    """A source whose records stay in memory, with what was decoded from them; for some thousand small pictures."""

    def __init__(self, source: Source):
        self.name, self.shards, self.local = source.name, source.shards, source.local
        self.one_per_shard = source.one_per_shard
        self._source = source
        self._records: dict[str, list[Record]] = {}

    @property
    def retries(self) -> int:
        return getattr(self._source, "retries", 0)

    def read(self, shard: str) -> Iterator[Record]:
        if shard not in self._records:
            self._records[shard] = list(self._source.read(shard))
        return iter(self._records[shard])


def open_source(spec: object) -> Source:
    """The source that `spec` describes.

    spec: shard pattern(s) as in shards.py; a directory of shards or of pictures (folders.py); `{"images": DIR, "masks":
    DIR}`; a mapping with `urls`; or a source. Raises DataError when it is missing or empty.
    """
    from muse.data.folders import FolderSource, is_image_folder

    if hasattr(spec, "shards") and hasattr(spec, "read"):
        return spec
    if isinstance(spec, Mapping):
        if "images" in spec:
            return FolderSource(spec["images"], masks=spec.get("masks"))
        if "urls" not in spec:
            raise ConfigError(f"a data source needs 'urls' (or 'images'): {dict(spec)}")
        return open_source(spec["urls"])
    if not isinstance(spec, (str, os.PathLike, Sequence)):
        raise ConfigError(f"not a data source: {spec!r}; give a path, a shard pattern or a list of them")
    if isinstance(spec, (str, os.PathLike)) and is_image_folder(os.fspath(spec)):
        return FolderSource(os.fspath(spec))
    return TarSource(os.fspath(spec) if isinstance(spec, os.PathLike) else spec)
