"""Tar shards as a source, in WebDataset's layout.

A local, uncompressed shard is read by offset: its members need not be read to be passed over. Every
other one is read as a stream.
"""

import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence

from webdataset.gopen import Pipe, gopen, set_options
from webdataset.tariterators import group_by_keys

from muse.data import shards
from muse.data.decode import SAMPLE_EXTENSIONS
from muse.data.records import Record, Span

_READ_ERRORS = (OSError, EOFError, tarfile.TarError, zlib.error)
_META = re.compile(r"__[^/]*__($|/)")  # webdataset keeps its own notes in members of such names


class _StrictTarInfo(tarfile.TarInfo):
    """Only the end marker ends an archive; tarfile itself also stops at a damaged header."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no end marker: {error}") from error


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
        try:
            yield from shards.with_retries(
                lambda: _read_tar(shard),
                retry_on,
                shard,
                self.attempts,
                self.first_wait,
                on_retry=self._count_retry,
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
        streamed = shards.needs_stream(url)
        with tarfile.open(
            fileobj=stream, mode="r|*" if streamed else "r:", tarinfo=_StrictTarInfo
        ) as archive:
            members = _tar_members(archive, url, None if streamed else stream.name)
            for sample in group_by_keys(members, handler=_keep_first):
                key, shard = sample.pop("__key__"), sample.pop("__url__")
                yield Record(
                    key,
                    shard,
                    {name: data for name, data in sample.items() if name in SAMPLE_EXTENSIONS},
                )
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


def _tar_members(archive: tarfile.TarFile, url: str, path: str | None) -> Iterator[dict]:
    """Members for webdataset's grouping, with Spans in place of data in a plain file at `path`."""
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
