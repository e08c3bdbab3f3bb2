"""WebDataset shards, byte for byte the same for the same samples, written by several processes."""

import io
import logging
import multiprocessing
import os
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from muse.experiments.demo_data.sample import Sample

logger = logging.getLogger(__name__)

_make: Callable[[str, int], Sample] | None = None  # of the worker process: (split, index) -> sample


@dataclass(frozen=True)
class Shard:
    """Samples `start` to `stop` of one split in one tar file."""

    path: Path
    split: str
    start: int
    stop: int


def plan_shards(folder: Path, split: str, images: int, shards: int) -> list[Shard]:
    """`images` samples over `shards` files of nearly equal length."""
    edges = [images * k // shards for k in range(shards + 1)]
    return [
        Shard(folder / f"{split}-{k:06d}.tar", split, edges[k], edges[k + 1]) for k in range(shards)
    ]


def write_shards(
    shards: list[Shard], make: Callable[[str, int], Sample], workers: int | None = None
) -> list[dict]:
    """Write all shards and return one record per picture (key, caption, label, names), in order.

    `make` is called in worker processes; where they are forked, they share the pictures it holds.

    Args:
        shards: from `plan_shards`.
        make: (split, index) -> sample.
        workers: processes; None: one per core.
    """
    count = min(workers or len(_cores()), len(shards))
    if count <= 1:
        _start(make)
        return [record for shard in shards for record in _write_shard(shard)]
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    records = []
    with ProcessPoolExecutor(count, multiprocessing.get_context(method), _start, (make,)) as pool:
        for shard, found in zip(shards, pool.map(_write_shard, shards), strict=True):
            logger.debug("%s: %d pictures", shard.path.name, len(found))
            records += found
    return records


def _cores() -> set[int] | range:
    return (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )


def _start(make: Callable[[str, int], Sample]) -> None:
    global _make
    _make = make


def _write_shard(shard: Shard) -> list[dict]:
    records = []
    with tarfile.open(shard.path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(shard.start, shard.stop):
            sample = _make(shard.split, index)
            key = f"{shard.split}{index:06d}"
            for extension, content in sample.members().items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mtime, info.mode = len(content), 0, 0o644
                tar.addfile(info, io.BytesIO(content))
            records.append(
                {
                    "key": key,
                    "split": shard.split,
                    "caption": sample.caption,
                    "label": sample.label,
                    **sample.names,
                }
            )
    return records
