"""The unfinished half of a feature store: parts that outlive a stop, made by one job at a time.

Each part is a file that is complete or not there. A second start reads which samples the parts
cover, extracts the others, and then puts all rows in data-set order. A lock keeps a second job, on
the same store at the same time, waiting until the first one ends; the system frees the lock of a
job that dies.
"""

import fcntl
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy

from muse.errors import DataError
from muse.utils.distributed import all_objects, is_main_process
from muse.utils.io import atomic_file

logger = logging.getLogger(__name__)
PART_BYTES = 64 * 2**20
PART_SECONDS = 60.0  # at most so much work is lost by a stop, and a batch
POLL_SECONDS = 2.0
COVERED, BAD = "covered", "bad"  # beside the arrays of a part


class Coverage(NamedTuple):
    """What batches have covered since the last time it was asked for."""

    covered: numpy.ndarray  # int64 places in the data set, of skipped samples too
    bad: dict  # the skipped ones: a state of `BadSamples`


class Extraction(Protocol):
    """How the rows of a store are made; one object a process."""

    def batches(self, covered: numpy.ndarray) -> Iterable[dict[str, numpy.ndarray]]:
        """Name -> array with a row a sample, `indices` among them, of samples not yet covered."""

    def progress(self) -> Coverage:
        """Since the last call, up to the last batch that was handed out."""

    def notes(self, earlier: Sequence[dict]) -> dict:
        """To be kept with the store. `earlier`: the `bad` of an earlier start's parts."""


# --------------------------------------------------------------------------------------- the lock
def _take(work: Path) -> int | None:
    """A handle that holds the lock of the folder, or None where another job holds it."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        handle = os.open(work / "lock", os.O_CREAT | os.O_RDWR)
    except FileNotFoundError:  # the other job has just ended and removed the folder
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino == os.stat(work / "lock").st_ino:
            return handle
    except BlockingIOError:
        pass
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("%s: this disk has no locks (%s): start one job at a time", work, error)
        return handle
    os.close(handle)
    return None


@contextmanager
def held(work: Path, made: Path) -> Iterator[bool]:
    """`with held(work, made) as ours`: this job alone in `work`; False once `made` exists.

    Every process of the job enters. Waits while another job holds the folder.
    """
    handle, told = None, False
    while True:
        if is_main_process() and handle is None:
            handle = _take(work)
        there, ours = all_objects((made.exists(), handle is not None))[0]
        if there or ours:
            break
        if not told:
            logger.info("another job extracts these features: waiting for it (%s)", work)
            told = True
        time.sleep(POLL_SECONDS)
    try:
        if there and handle is not None:
            shutil.rmtree(work, ignore_errors=True)
        yield not there
    except DataError:  # the data have to change, and then the parts are of another store
        if handle is not None:
            shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        if handle is not None:
            os.close(handle)


# -------------------------------------------------------------------------------------- the parts
def _parts(work: Path) -> list[Path]:
    return sorted(work.glob("part-*.npz"))


def covered_places(work: Path) -> tuple[numpy.ndarray, list[dict]]:
    """Places of all samples that the parts cover, ascending, and what was skipped in each part."""
    covered, bad = [numpy.empty(0, numpy.int64)], []
    for path in _parts(work):
        with numpy.load(path) as part:
            covered.append(part[COVERED])
            bad.append(json.loads(part[BAD].tobytes()))
    return numpy.unique(numpy.concatenate(covered)), bad


def write_parts(work: Path, extraction: Extraction, covered: numpy.ndarray) -> None:
    """Extract what is not covered, a part at a time, each in its own file under a new name."""
    waiting: list[dict[str, numpy.ndarray]] = []
    size, begun = 0, time.monotonic()
    kinds: dict[str, tuple] = {}
    for batch in extraction.batches(covered):
        for name, rows in batch.items():
            kind = kinds.setdefault(name, (rows.dtype, rows.shape[1:]))
            if kind != (rows.dtype, rows.shape[1:]):
                raise DataError(
                    f"{name}: a batch of {rows.dtype} {rows.shape[1:]} after {kind[0]} {kind[1]}"
                )
        waiting.append(batch)
        size += sum(rows.nbytes for rows in batch.values())
        if size >= PART_BYTES or time.monotonic() - begun >= PART_SECONDS:
            _write_part(work, waiting, extraction.progress())
            waiting, size, begun = [], 0, time.monotonic()
    last = extraction.progress()
    if waiting or len(last.covered):
        _write_part(work, waiting, last)


def _write_part(work: Path, batches: list[dict[str, numpy.ndarray]], progress: Coverage) -> None:
    arrays = {
        name: numpy.concatenate([batch[name] for batch in batches])
        for name in (batches[0] if batches else {})
    }
    bad = numpy.frombuffer(json.dumps(progress.bad).encode(), numpy.uint8)
    with atomic_file(work / f"part-{uuid.uuid4().hex}.npz") as partial:
        numpy.savez(partial, **arrays, **{COVERED: progress.covered, BAD: bad})


def merge_parts(work: Path, folder: Path) -> None:
    """All rows of all parts -> one .npy an array in `folder`, in the order of their indices."""
    paths, indices = [], []
    for path in _parts(work):
        with numpy.load(path) as part:
            if "indices" in part:
                paths.append(path)
                indices.append(part["indices"])
    if not paths:
        raise DataError("no samples to extract features from")
    count = sum(len(each) for each in indices)
    order = numpy.argsort(numpy.concatenate(indices), kind="stable")
    places = numpy.empty(count, dtype=numpy.int64)
    places[order] = numpy.arange(count)
    if len(numpy.unique(numpy.concatenate(indices))) != count:
        raise DataError("a sample was read twice: its index occurs more than once")
    merged: dict[str, numpy.memmap] = {}
    start = 0
    for path in paths:
        with numpy.load(path) as part:
            for name in part.files:
                if name in (COVERED, BAD):
                    continue
                rows = part[name]
                if name not in merged:
                    merged[name] = numpy.lib.format.open_memmap(
                        folder / f"{name}.npy", "w+", rows.dtype, (count, *rows.shape[1:])
                    )
                merged[name][places[start : start + len(rows)]] = rows
            start += len(part["indices"])
    for array in merged.values():
        array.flush()
