"""Features on disk: extracted once, then memory-mapped.

A store is a folder named by the hash of what the features depend on. Every process writes its own rows as they come
(one batch in memory at a time); process 0 then puts all rows in data-set order. 1.28 million images of 512 float32
features are 2.6 GB of disk, and reading them back takes page cache, not memory of the process.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy
import torch.distributed as dist

from muse.errors import DataError
from muse.utils.distributed import all_objects, is_main

logger = logging.getLogger(__name__)
COPY_ROWS = 8192


def store_key(facts: dict) -> str:
    """Sixteen hex digits that stand for `facts` (JSON values)."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def source_facts(source) -> list:
    """A data source's shards or pictures, with size and time of local files: a store outlives no change of its data."""
    facts = []
    for shard in source.shards:
        path = os.path.join(getattr(source, "root", ""), shard)
        stat = os.stat(path) if os.path.exists(path) else None
        facts.append([shard, stat.st_size, stat.st_mtime_ns] if stat else [shard])
    return [source.name, facts]


def stored_features(
    folder: str | Path,
    facts: dict,
    extract: Callable[[], Iterable[dict[str, numpy.ndarray]]],
    notes: Callable[[], dict] = dict,
) -> tuple[dict[str, numpy.ndarray], dict]:
    """The store of `facts`, or a new one from `extract()`: name -> memory-mapped array in data-set order, and notes.

    extract: yields this process's batches, name -> array with one row a sample, `indices` among them. notes: asked
    once after it, kept with the store and given back whenever it is read. DataError when there were no samples.
    """
    target = Path(folder) / store_key(facts)
    if all(all_objects((target / "facts.json").exists())):
        logger.info("features from %s", target)
    else:
        _fill(target, facts, extract, notes)
    arrays = {path.stem: numpy.load(path, mmap_mode="r") for path in sorted(target.glob("*.npy"))}
    return arrays, json.loads((target / "facts.json").read_text())["notes"]


def _fill(target: Path, facts: dict, extract: Callable, notes: Callable[[], dict]) -> None:
    partial = target.with_name(f".{target.name}.partial")
    if is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    all_objects(None)  # everyone waits for the folder
    rank = dist.get_rank() if dist.is_initialized() else 0
    try:
        parts = [part for part in all_objects(_write_rows(partial, rank, extract())) if part]
        noted = notes()
        if is_main():
            if not parts:
                raise DataError("no samples to extract features from")
            _merge(partial, parts)
            (partial / "facts.json").write_text(
                json.dumps({"facts": facts, "notes": noted}, default=str)
            )
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
        all_objects(None)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_rows(folder: Path, rank: int, batches: Iterable[dict[str, numpy.ndarray]]) -> dict:
    """Append every array of every batch to its own raw file; returns name -> (file, dtype, shape of a row, rows)."""
    described: dict[str, tuple] = {}
    with contextlib.ExitStack() as stack:
        files = {}
        for batch in batches:
            for name, rows in batch.items():
                path = folder / f"{name}.{rank}.raw"
                if name not in files:
                    files[name] = stack.enter_context(open(path, "wb"))
                    described[name] = (str(path), rows.dtype.str, rows.shape[1:], 0)
                _, dtype, shape, count = described[name]
                if rows.dtype.str != dtype or rows.shape[1:] != tuple(shape):
                    raise DataError(
                        f"{name}: a batch of {rows.dtype} {rows.shape[1:]} after {numpy.dtype(dtype)} {shape}"
                    )
                files[name].write(numpy.ascontiguousarray(rows).tobytes())
                described[name] = (str(path), dtype, shape, count + len(rows))
    return described


def _merge(folder: Path, parts: list[dict]) -> None:
    """Raw files of all processes -> one .npy an array, rows by ascending index; the raw files go."""
    indices = numpy.concatenate(
        [numpy.fromfile(part["indices"][0], dtype=part["indices"][1]) for part in parts]
    )
    places = numpy.empty(len(indices), dtype=numpy.int64)
    places[numpy.argsort(indices, kind="stable")] = numpy.arange(len(indices))
    if len(numpy.unique(indices)) != len(indices):
        raise DataError("a sample was read twice: its index occurs more than once")
    for name in parts[0]:
        if name == "indices":
            continue
        _, dtype, shape, _ = parts[0][name]
        merged = numpy.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(len(indices), *shape)
        )
        start = 0
        for part in parts:
            path, _, _, count = part[name]
            rows = numpy.memmap(path, dtype=dtype, mode="r", shape=(count, *shape))
            for first in range(0, count, COPY_ROWS):
                block = rows[first : first + COPY_ROWS]
                merged[places[start + first : start + first + len(block)]] = block
            start += count
        merged.flush()
    for path in folder.glob("*.raw"):
        path.unlink()
