"""Tar shards as a source, in WebDataset's layout.

A local, uncompressed shard is read by offset, from its index (shard_index.py): samples need not be
read to be passed over, and no header is read twice. Every other shard is read as a stream.
"""

import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from webdataset.gopen import Pipe, gopen, set_options
from webdataset.tariterators import group_by_keys

from muse.data import shards
from muse.data.decode import SAMPLE_EXTENSIONS
from muse.data.records import Record, SharedFile, Span, count_by_reading
from muse.data.shard_index import (
    META,
    ShardContents,
    StrictTarInfo,
    keep_first,
    local_path,
    shard_contents,
    shard_index,
)

_READ_ERRORS = (OSError, EOFError, tarfile.TarError, zlib.error)
T = TypeVar("T")


class TarSource:
    """Shards whose members of one key (file name up to the first dot) lie together and make a
    sample.

    A shard that breaks off gives its complete samples and then a record with one of SHARD_FAULTS.
    Remote shards, and local ones whose disk fails, are tried again first.

    Args:
        urls: shard pattern(s) as in shards.py.
        attempts: reads of a shard without any sample in between.
        first_wait: seconds before the second attempt; each wait is twice the one before.
    """

    one_per_shard = False

    def __init__(self, urls: str | Sequence[str], attempts: int = 5, first_wait: float = 1.0):
        self.shards = shards.expand_urls(urls)
        self.name = (
            urls
            if isinstance(urls, str)
            else f"the list of {len(self.shards)} shards from {self.shards[0]}"
        )
        self.local = not any(map(shards.needs_stream, self.shards))
        self.attempts, self.first_wait = attempts, first_wait
        self.retries = 0  # reads begun anew, in this process

    def _count_retry(self) -> None:
        self.retries += 1

    def read(self, shard: str) -> Iterator[Record]:
        # A local file that is cut short stays so; a stream may do better at the next try.
        retry_on = _READ_ERRORS if shards.is_remote(shard) else (OSError,)
        start = _read_stream if shards.needs_stream(shard) else _read_indexed
        try:
            yield from self._tried(lambda: start(shard), retry_on, shard)
        except (tarfile.TarError, EOFError, zlib.error):
            yield Record(shard, shard, fault="truncated_tar")
        except OSError:
            yield Record(shard, shard, fault="unreadable_shard")

    def contents(self, shard: str) -> ShardContents:
        """How many samples `read` gives, and the fault after them, without building a record."""
        if shards.needs_stream(shard):
            return count_by_reading(self, shard)
        try:
            return next(self._tried(lambda: iter([shard_contents(shard)]), (OSError,), shard))
        except OSError:
            return ShardContents(0, "unreadable_shard")

    def _tried(
        self, start: Callable[[], Iterator[T]], retry_on: tuple[type[Exception], ...], shard: str
    ) -> Iterator[T]:
        return shards.with_retries(
            start, retry_on, shard, self.attempts, self.first_wait, on_retry=self._count_retry
        )


def _read_indexed(url: str) -> Iterator[Record]:
    """Records of a local shard, by their places. Raises OSError."""
    path, index = local_path(url), shard_index(url)
    file = SharedFile(path)
    for key, members in index.samples:
        spans = {
            name: Span(path, offset, size)
            for name, (offset, size) in members.items()
            if name in SAMPLE_EXTENSIONS
        }
        yield Record(key, url, spans, file=file)
    if index.fault:
        yield Record(url, url, fault=index.fault)


def _read_stream(url: str) -> Iterator[Record]:
    """Records of one shard from its beginning. Raises one of _READ_ERRORS where it breaks off."""
    stream = gopen(url, "rb")
    finished = False
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=StrictTarInfo) as archive:
            for sample in group_by_keys(_tar_members(archive, url), handler=keep_first):
                key, shard = sample.pop("__key__"), sample.pop("__url__")
                members = {name: sample[name] for name in sample if name in SAMPLE_EXTENSIONS}
                yield Record(key, shard, members)
        while isinstance(stream, Pipe) and stream.read(1 << 16):
            pass  # a command that is cut off by our closing its pipe would report an error
        finished = True
    except tarfile.TarError:
        finished = True
        stream.close()  # where the command failed, this raises: a better reason than the tar error
        raise
    finally:
        if not finished:
            set_options(stream, ignore_errors=True)
        stream.close()


def _tar_members(archive: tarfile.TarFile, url: str) -> Iterator[dict]:
    """Members for webdataset's grouping."""
    while (info := archive.next()) is not None:
        archive.members = []  # tarfile would remember every header
        if info.isreg() and not META.match(info.name):
            data = archive.extractfile(info).read()
            yield {"fname": info.name, "data": data, "__url__": url}
