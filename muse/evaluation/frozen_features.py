"""Frozen features of a data set for a probe: extracted once, kept on disk, memory-mapped.

A store is a folder named by the hash of what the features depend on. Every process writes its own
rows in parts of at most 64 MB as they come; process 0 then puts all rows in data-set order. After
a stop the next start extracts what no part covers (feature_parts.py). 1.28 million images of 512
float32 features are 2.6 GB of disk, half of it where the network ran in 16 bits, and reading them
back takes page cache, not memory of the process.
"""

import copy
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy
import torch

from muse import __version__
from muse.config import plain
from muse.data.decode import IMAGE_EXTENSIONS, MASK_EXTENSION
from muse.data.eval import EvalLoader
from muse.data.faults import BadSamples
from muse.data.records import Span
from muse.errors import DataError
from muse.evaluation import measurement
from muse.evaluation.feature_parts import (
    Coverage,
    Extraction,
    covered_places,
    held,
    merge_parts,
    write_parts,
)
from muse.evaluation.measurement import Setup
from muse.evaluation.probed_network import ProbedNetwork
from muse.utils.distributed import all_objects, is_main_process
from muse.utils.io import atomic_directory

logger = logging.getLogger(__name__)
PARTS = ("train", "val")


class FeatureSet(NamedTuple):
    """Memory-mapped features, (N,C) or (N,C,h,w), with labels (N,) or masks (N,H,W), and facts."""

    features: numpy.ndarray
    targets: numpy.ndarray
    facts: dict
    indices: numpy.ndarray  # (N,) places in the data set, without the skipped samples


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
        LoaderExtraction(setup, loader, network, target, pooled, relabel),
    )
    # a store may be from a run that allowed more
    measurement.check_share(notes["samples"], setup.cfg.dataset.max_bad_fraction)
    measurement.check_count(loader, notes, len(arrays[target]))
    classes = {"class_names": list(loader.classes)} if loader.classes else {}
    return FeatureSet(
        arrays["features"],
        arrays[target],
        {**notes, **classes, "images": len(arrays[target]), "dtype": str(arrays["features"].dtype)},
        arrays["indices"],
    )


@dataclass
class LoaderExtraction:
    """Features, targets and indices of this process's samples, batch by batch.

    Where the network runs in less than float32, the features are kept in float16.
    """

    setup: Setup
    loader: EvalLoader
    network: ProbedNetwork
    target: str
    pooled: bool
    relabel: Callable[[torch.Tensor], torch.Tensor] | None = None
    _asked: int = 0  # samples of this start that `progress` has told of
    _bad: dict | None = None

    def batches(self, covered: numpy.ndarray) -> Iterator[dict[str, numpy.ndarray]]:
        """Of the samples at other places; shards that are read as streams give all of theirs."""
        if len(covered):
            stream = self.loader.stream
            stream.places = numpy.setdiff1d(stream.places, covered, assume_unique=True).tolist()
            self.loader.max_bad_fraction = 1.0  # `notes` holds the limit, for the whole set
        self._asked, self._bad = 0, None
        for batch in self.loader:
            yield {
                "features": self._features(batch),
                self.target: self._targets(batch),
                "indices": batch["indices"].numpy(),
            }

    @torch.no_grad()
    def _features(self, batch: dict) -> numpy.ndarray:
        network, precision = self.network, self.setup.protocol_facts()["precision"]
        with self.setup.autocast():
            compute = network.vectors if self.pooled else network.features
            values = compute(batch["images"]).float()
        if not torch.isfinite(values).all():
            raise DataError(f"features of {batch['keys'][0]} and its batch contain NaN or infinity")
        if precision != "float32":
            values = values.half()
            if not torch.isfinite(values).all():
                raise DataError(
                    f"features of {batch['keys'][0]} and its batch are above 65504, which 16 bits "
                    "do not hold: --precision float32"
                )
        return values.cpu().numpy()

    def _targets(self, batch: dict) -> numpy.ndarray:
        values = batch[self.target]
        values = self.relabel(values) if self.relabel else values
        return values.to(torch.int64 if self.target == "labels" else torch.int32).numpy()

    def progress(self) -> Coverage:
        """See `feature_parts.Extraction`; shards read as streams have no places to tell."""
        bad = self.loader.bad.state_dict()
        before = self._bad or {"seen": 0, "counts": {}, "keys": {}}
        new = {
            "seen": bad["seen"] - before["seen"],
            "counts": {k: n - before["counts"].get(k, 0) for k, n in bad["counts"].items()},
            "keys": {k: keys[len(before["keys"].get(k, ())) :] for k, keys in bad["keys"].items()},
        }
        stream, covered = self.loader.stream, []
        if stream.source.local:
            first, _ = stream.span()
            covered = stream.places[first + self._asked : first + bad["seen"]]
        self._asked, self._bad = bad["seen"], copy.deepcopy(bad)
        return Coverage(numpy.array(covered, numpy.int64), new)

    def notes(self, earlier: Sequence[dict]) -> dict:
        """`measurement.data_facts`, with what earlier starts have read and skipped."""
        bad = self.loader.bad
        for state in earlier if is_main_process() else ():
            both = BadSamples(1.0)
            both.load_state_dict(state)
            bad.seen += both.seen
            for kind, count in both.counts.items():
                bad.counts[kind] = bad.counts.get(kind, 0) + count
                bad.keys[kind] = (both.keys.get(kind, []) + bad.keys.get(kind, []))[: bad.keep]
        return measurement.data_facts(self.setup, self.loader)


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
    folder: str | Path, facts: dict, extraction: Extraction
) -> tuple[dict[str, numpy.ndarray], dict]:
    """The store of `facts`, or a new one: name -> memory-mapped array in data-set order, and notes.

    DataError when there were no samples.

    Args:
        folder: where stores lie.
        facts: what the arrays depend on.
        extraction: makes the rows that are not there, in every process its own.
    """
    target = Path(folder) / store_key(facts)
    made = target / "facts.json"
    if all(all_objects(made.exists())):
        logger.info("features from %s", target)
    else:
        work = target.with_name(f".{target.name}.parts")
        with held(work, made) as ours:
            if ours:
                _fill(target, work, facts, extraction)
        all_objects(None)  # everyone waits for the store
    arrays = {path.stem: numpy.load(path, mmap_mode="r") for path in sorted(target.glob("*.npy"))}
    return arrays, json.loads(made.read_text())["notes"]


def _fill(target: Path, work: Path, facts: dict, extraction: Extraction) -> None:
    covered, earlier = all_objects(covered_places(work) if is_main_process() else None)[0]
    if len(covered):
        logger.info("%d samples are extracted already: going on with the others", len(covered))
    elif is_main_process():  # parts that cannot say what they cover, of shards read as streams
        earlier = []
        for path in work.glob("part-*.npz"):
            path.unlink()
    earlier = all_objects(earlier)[0]
    write_parts(work, extraction, covered)
    all_objects(None)  # everyone waits for the last part
    noted = extraction.notes(earlier)
    if is_main_process():
        with atomic_directory(target) as folder:
            merge_parts(work, folder)
            content = json.dumps({"facts": facts, "notes": noted}, default=str)
            (folder / "facts.json").write_text(content)
        shutil.rmtree(work, ignore_errors=True)
