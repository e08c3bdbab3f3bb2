"""Which tar shards there are, who reads which, and how a failing read is tried again.

A shard is a local path or anything webdataset opens (`pipe:COMMAND`, `https://`, `gs://`, `hf://`,
...; `s3://` becomes a pipe of the aws command line). Patterns: braces (`train-{000..127}.tar`),
globs, a directory of shards, a list, or several joined by `::`.
"""

import glob
import logging
import os
import re
import shlex
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from braceexpand import UnbalancedBracesError, braceexpand
from webdataset.gopen import gopen_schemes

from muse.errors import DataError

logger = logging.getLogger(__name__)

SHARD_SUFFIXES = (".tar", ".tgz", ".tar.gz")
T = TypeVar("T")


def is_remote(url: str) -> bool:
    """True for `scheme:` urls other than `file:`, which nobody can look into beforehand."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", url)
    return scheme is not None and scheme.group(1).lower() != "file"


def needs_stream(url: str) -> bool:
    """True where a sample cannot be reached by its offset: remote or compressed shards."""
    return is_remote(url) or not url.endswith(".tar")


def expand_urls(urls: str | os.PathLike | Iterable[str | os.PathLike]) -> list[str]:
    """All shards that a pattern, or a list of patterns, names; each pattern's own shards sorted.

    Raises DataError, naming the pattern, when it matches nothing or one of its files is missing.
    """
    if isinstance(urls, (str, os.PathLike)):
        patterns = os.fspath(urls).split("::")
    else:
        patterns = [part for item in urls for part in os.fspath(item).split("::")]
    shards = [shard for pattern in patterns for shard in _expand_pattern(pattern.strip())]
    if not shards:
        raise DataError(f"no shards: the list of urls is empty ({urls!r})")
    return shards


def _expand_pattern(pattern: str) -> list[str]:
    if not pattern:
        raise DataError(
            "an empty shard url: give a path, a pattern such as 'DIR/train-{000..009}.tar', "
            "or a directory"
        )
    try:
        names = list(braceexpand(pattern))
    except (UnbalancedBracesError, ValueError) as error:
        raise DataError(f"shard pattern {pattern!r} cannot be expanded: {error}") from error
    shards, missing = [], []
    for name in names:
        found = _remote(name) if is_remote(name) else _local(name)
        shards += found
        if not found:
            missing.append(name)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(
            f"no such shard: {missing[0]}{more} (from {pattern!r}, {len(names)} expected)"
        )
    return shards


def _remote(url: str) -> list[str]:
    scheme = url.split(":", 1)[0].lower()
    if scheme == "s3":
        return [f"pipe:aws s3 cp {shlex.quote(url)} -"]
    if scheme not in gopen_schemes:
        raise DataError(
            f"cannot read {url!r}: unknown scheme {scheme!r}; "
            "'pipe:COMMAND' reads what a command writes"
        )
    return [url]


def _local(name: str) -> list[str]:
    path = re.sub(r"^file:(//)?", "", name)
    if os.path.isdir(path):
        shards = sorted(
            os.path.join(path, f) for f in os.listdir(path) if f.endswith(SHARD_SUFFIXES)
        )
        if not shards:
            raise DataError(f"directory {path} holds no *.tar shards")
        return shards
    if os.path.isfile(path):
        if not os.access(path, os.R_OK):
            raise DataError(f"shard {path} may not be read (permission denied)")
        if not path.endswith(SHARD_SUFFIXES) and not tarfile.is_tarfile(path):
            raise DataError(f"{path} is not a tar shard")
        return [path]
    return sorted(p for p in glob.glob(path) if os.path.isfile(p)) if glob.has_magic(path) else []


def split_shards(shards: Sequence[T], part: int, parts: int) -> list[T]:
    """What reader `part` of `parts` reads: every parts-th shard, so that together they read all."""
    return list(shards[part::parts])


def check_enough(count: int, world: int, workers: int, what: str) -> None:
    """DataError unless each of the world × workers readers gets a shard: one without would hang
    all.
    """
    readers = world * max(1, workers)
    if count < readers:
        fewer = f"use at most {count // world} workers per rank, " if count >= world else ""
        raise DataError(
            f"{what} has {count} shards for {world} ranks x {max(1, workers)} workers = {readers} "
            f"readers: {fewer}write at least {readers} shards, or set resampled: true"
        )


def with_retries(
    start: Callable[[], Iterator[T]],
    retry_on: tuple[type[Exception], ...],
    what: str,
    attempts: int = 5,
    first_wait: float = 1.0,
    sleep: Callable[[float], None] = time.sleep,
    on_retry: Callable[[], None] = lambda: None,
) -> Iterator[T]:
    """Items of `start()`, started again after a failure without repeating what was handed out.

    Args:
        start: a new iterator from the first item on.
        retry_on: the errors that count as failures; the last one is raised.
        what: the name of what is read, for the log.
        attempts: failures in a row, without an item in between.
        first_wait: seconds after the first failure; each wait is twice the one before.
        sleep: how to wait.
        on_retry: called before each new start.
    """
    done, failures = 0, 0
    while True:
        try:
            for item in islice(start(), done, None):
                yield item
                done, failures = done + 1, 0
            return
        except retry_on as error:
            failures += 1
            if failures >= attempts:
                logger.error(
                    "reading %s given up after %d tries and %d samples (%s)",
                    what,
                    failures,
                    done,
                    error,
                )
                raise
            wait = first_wait * 2 ** (failures - 1)
            logger.warning(
                "reading %s failed after %d samples (%s); trying again in %.1f s",
                what,
                done,
                error,
                wait,
            )
            sleep(wait)
            on_retry()
