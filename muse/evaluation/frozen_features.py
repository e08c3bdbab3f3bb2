"""Frozen features of a data set for a probe: extracted once, kept on disk, memory-mapped.

A store is a folder named by the hash of what the features depend on. Every process writes its own
rows as they come (one batch in memory at a time); process 0 then puts all rows in data-set order.
1.28 million images of 512 float32 features are 2.6 GB of disk, and reading them back takes page
cache, not memory of the process.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy
import torch

from muse import __version__
from muse.config import plain
from muse.data.decode import IMAGE_EXTENSIONS, MASK_EXTENSION
from muse.data.records import Span
from muse.errors import DataError
from muse.evaluation import measurement
from muse.evaluation.measurement import Setup
from muse.evaluation.probed_network import ProbedNetwork
from muse.utils.distributed import all_objects, is_main_process, process_index

logger = logging.getLogger(__name__)
COPY_ROWS = 8192
PARTS = ("train", "val")


class FeatureSet(NamedTuple):
    """Memory-mapped features, (N,C) or (N,C,h,w), with labels (N,) or masks (N,H,W), and facts."""

    features: numpy.ndarray
    targets: numpy.ndarray
    facts: dict


def frozen_sets(
    setup: Setup, network: ProbedNetwork, target: str, **options
) -> tuple[FeatureSet, FeatureSet]:
    """`frozen_features` of the training and of the validation set."""
    train, val = (frozen_features(setup, network, target, part, **options) for part in PARTS)
    return train, val


def probe_facts(network: ProbedNetwork, recipe: dict, train: FeatureSet, val: FeatureSet) -> dict:
    """For the protocol: what was probed, how, on which data."""
    return {"network": network.facts, "probe": recipe, "train": train.facts, "val": val.facts}


def frozen_features(
    setup: Setup,
    network: ProbedNetwork,
    target: str,
    part: str,
    *,
    pooled: bool,
    relabel: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **options,
) -> FeatureSet:
    """Features and targets of a whole set, extracted once per network, feature, crop and data.

    DataError when the rows are not the whole set.

    Args:
        setup: which data, which crop, where the store is.
        network: what is probed.
        target: labels or masks.
        part: train or val.
        pooled: vectors, not maps.
        relabel: changes masks before they are stored; its name stands for it in the store's key.
        options: further options of the loader.
    """
    loader = measurement.eval_data(setup, part, ("images", target), **options)
    facts = {
        **network.facts,
        "crop": asdict(setup.picture_crop()),
        "precision": setup.protocol_facts()["precision"],
        **options,
        "target": target,
        "pooled": pooled,
        "relabel": relabel and relabel.__name__,
        "selection": measurement.selection(setup, loader),
        "shards": source_facts(loader.stream.source),
        "model": plain(setup.cfg.model),
    }
    arrays, notes = stored_features(
        setup.cache_dir or f"{setup.output_dir}/features",
        facts,
        lambda: _extract(loader, network, target, pooled, relabel),
        lambda: measurement.data_facts(setup, loader),
    )
    # a store may be from a run that allowed more
    measurement.check_share(notes["samples"], setup.cfg.dataset.max_bad_fraction)
    measurement.check_count(loader, notes, len(arrays[target]))
    classes = {"class_names": list(loader.classes)} if loader.classes else {}
    return FeatureSet(
        arrays["features"],
        arrays[target],
        {**notes, **classes, "images": len(arrays[target])},
    )


@torch.no_grad()
def _extract(
    loader: Iterable[dict],
    network: ProbedNetwork,
    target: str,
    pooled: bool,
    relabel: Callable[[torch.Tensor], torch.Tensor] | None,
) -> Iterator[dict[str, numpy.ndarray]]:
    """Batch by batch: features, targets and indices of this process's samples."""
    for batch in loader:
        maps = network.features(batch["images"]).float()
        if not torch.isfinite(maps).all():
            raise DataError(f"features of {batch['keys'][0]} and its batch contain NaN or infinity")
        values = relabel(batch[target]) if relabel else batch[target]
        yield {
            "features": (network.pool(maps) if pooled else maps).cpu().numpy(),
            target: values.to(torch.int64 if target == "labels" else torch.int32).numpy(),
            "indices": batch["indices"].numpy(),
        }


# -------------------------------------------------------------------------------------- the store
def read_rows(array, index: torch.Tensor | slice) -> torch.Tensor:
    """Rows of a tensor, or of a memory-mapped array without reading the rest."""
    if isinstance(array, torch.Tensor):
        return array[index]
    return torch.from_numpy(
        numpy.array(array[index if isinstance(index, slice) else index.numpy()])
    )


def store_key(facts: dict) -> str:
    """Sixteen hex digits that stand for `facts` (JSON values) and this package's version."""
    text = json.dumps([__version__, facts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def source_facts(source) -> list:
    """A data source's files, with size and time of local ones: shards; or pictures and masks.

    They are part of a store's key: no store outlives a change of its data. A label in a folder is
    the folder's name, so it is part of the picture's path. Captions are not read for features.
    """
    return [source.name, [_file_facts(path) for path in _source_files(source)]]


def _source_files(source) -> Iterator[str]:
    for shard in source.shards:
        if not source.one_per_shard:
            yield shard
            continue
        for record in source.read(shard):
            for extension, member in record.members.items():
                if extension in (*IMAGE_EXTENSIONS, MASK_EXTENSION) and isinstance(member, Span):
                    yield member.path


def _file_facts(path: str) -> list:
    try:
        stat = os.stat(path.removeprefix("file:"))
    except OSError:  # remote, or a command: its text is all that is known
        return [path]
    return [path, stat.st_size, stat.st_mtime_ns]


def stored_features(
    folder: str | Path,
    facts: dict,
    extract: Callable[[], Iterable[dict[str, numpy.ndarray]]],
    notes: Callable[[], dict] = dict,
) -> tuple[dict[str, numpy.ndarray], dict]:
    """The store of `facts`, or a new one: name -> memory-mapped array in data-set order, and notes.

    DataError when there were no samples.

    Args:
        folder: where stores lie.
        facts: what the arrays depend on.
        extract: yields this process's batches, name -> array with one row a sample, `indices` among
            them.
        notes: asked once after it, kept with the store and given back whenever it is read.
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
    if is_main_process():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    all_objects(None)  # everyone waits for the folder
    try:
        parts = [
            part for part in all_objects(_write_rows(partial, process_index(), extract())) if part
        ]
        noted = notes()
        if is_main_process():
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
    """Append every array of every batch to its own raw file.

    Returns name -> (file, dtype, shape of a row, rows).
    """
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
                        f"{name}: a batch of {rows.dtype} {rows.shape[1:]} after "
                        f"{numpy.dtype(dtype)} {shape}"
                    )
                files[name].write(numpy.ascontiguousarray(rows).tobytes())
                described[name] = (str(path), dtype, shape, count + len(rows))
    return described


def _merge(folder: Path, parts: list[dict]) -> None:
    """Raw files of all processes -> one .npy an array, rows by index; the raw files are removed."""
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
