"""Pictures to latents on disk: one shard of latents for each shard of pictures, each written once.

Shards are shared out over the processes. A shard that is there already, of the same tokenizer and
the same pictures, is not made again, so a run that was stopped goes on; `latents.json` and
`statistics.safetensors` are written when none is missing.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muse.data.dataloader import eval_loader
from muse.data.eval import EvalLoader
from muse.data.records import Record, Source
from muse.data.sources import open_source
from muse.errors import DataError
from muse.evaluation.measurement import Crop, check_share
from muse.generation.latent_shards import (
    INDEX,
    LatentRecord,
    ShardHead,
    read_latent_shard,
    read_shard_head,
    write_latent_index,
    write_latent_shard,
)
from muse.generation.latent_tokenizer import LatentTokenizer
from muse.generation.latents import LatentStatistics, check_tokenizer
from muse.utils.distributed import all_objects, is_main_process, process_index, world_size
from muse.utils.io import writable_directory

log = logging.getLogger(__name__)

STATISTICS = "statistics.safetensors"


@dataclass(frozen=True)
class ExtractionPlan:
    """How pictures become latents.

    Args:
        crop: shorter edge and side of the square in its middle.
        flip: store the latent of the mirrored picture too.
        dtype: in which latents are stored.
        statistics: by "channel" or by "position".
        images_per_shard: of image folders; shards of pictures keep their size.
        batch_size: pictures at a time.
        num_workers: loader processes.
        max_bad_fraction: share of unreadable pictures above which nothing is finished.
        autocast: precision of the encoder where it is not float32.
        device: where the tokenizer is.
    """

    crop: Crop
    flip: bool = False
    dtype: str = "float16"
    statistics: str = "channel"
    images_per_shard: int = 1000
    batch_size: int = 32
    num_workers: int = 0
    max_bad_fraction: float = 0.01
    autocast: torch.dtype | None = None
    device: str = "cpu"


@dataclass
class Part:
    """Some shards of a source, as a source of its own; one latent shard is made of it."""

    source: Source
    shards: Sequence[str]
    name: str

    def __post_init__(self) -> None:
        self.local, self.one_per_shard = self.source.local, self.source.one_per_shard

    def read(self, shard: str) -> Iterator[Record]:
        return self.source.read(shard)


def extract_latents(
    tokenizer: LatentTokenizer,
    sources: Sequence[object],
    output: str | Path,
    plan: ExtractionPlan,
    notes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write all latents of `sources`, their statistics and their index, which is returned.

    Every process calls it and takes its share of the shards.

    Args:
        tokenizer: encodes, on the plan's device.
        sources: whatever muse.data reads, with labels: shard patterns or class folders.
        output: the folder; what an earlier call with the same arguments finished there stays.
        plan: see there.
        notes: kept in the index.

    Raises:
        DataError: unreadable or too many bad pictures, or a folder that holds other latents.
        CheckpointError: the folder holds latents of another tokenizer.
    """
    output = writable_directory(output)
    parts = list(_parts(sources, plan.images_per_shard))
    files = [output / f"latents-{number:06d}.tar" for number in range(len(parts))]
    origins = [_origin(part, plan) for part in parts]
    failures = all_objects(_refusal(tokenizer, output, files, origins))
    if refusal := next(filter(None, failures), None):
        raise refusal  # by every process: none waits for one that has stopped
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    all_objects(None)  # nobody writes before everybody has looked
    if missing and is_main_process():
        (output / INDEX).unlink(missing_ok=True)
        log.info("%d of %d shards of latents to write", len(missing), len(files))
    kinds: dict[str, int] = {}
    for number in missing[process_index() :: world_size()]:
        _write(tokenizer, parts[number], files[number], origins[number], plan, kinds)
    all_objects(None)
    _check_skipped([read_shard_head(file) for file in files], all_objects(kinds), plan)
    _write_statistics(tokenizer, files, output, plan)
    index = write_latent_index(output, notes) if is_main_process() else None
    return all_objects(index)[0]


# ------------------------------------------------------------------------------------------- parts
def _parts(sources: Sequence[object], images_per_shard: int) -> Iterator[Part]:
    """What each latent shard is made of: a shard of pictures, or so many pictures of a folder."""
    for spec in sources:
        source = open_source(spec)
        if not source.one_per_shard:
            for shard in source.shards:
                yield Part(source, [shard], str(shard))
            continue
        count = -(-len(source.shards) // images_per_shard)
        for number in range(count):
            # Every count-th picture, since folders are sorted by class and a shard should mix them.
            chosen = source.shards[number::count]
            yield Part(source, chosen, f"{source.name} {number}/{count} of {len(source.shards)}")


def _origin(part: Part, plan: ExtractionPlan) -> str:
    crop = plan.crop
    words = f"{part.name}, resized to {crop.resize_shorter_edge}, cropped to {crop.crop_size}"
    return words + (", with mirror images" if plan.flip else "")


def _refusal(
    tokenizer: LatentTokenizer, output: Path, files: list[Path], origins: list[str]
) -> Exception | None:
    """Why the folder cannot take these latents, if it cannot."""
    try:
        for file in sorted(output.glob("*.tar")):
            head = read_shard_head(file)
            check_tokenizer(file, head.tokenizer_sha256, tokenizer.sha256)
            if file not in files or head.origin != origins[files.index(file)]:
                raise DataError(
                    f"{file}: latents of other pictures ({head.origin or 'unknown'}); "
                    "choose another --output or remove them"
                )
    except Exception as error:
        return error
    return None


# ------------------------------------------------------------------------------------------- shards
def _write(
    tokenizer: LatentTokenizer,
    part: Part,
    file: Path,
    origin: str,
    plan: ExtractionPlan,
    kinds: dict[str, int],
) -> None:
    """One shard of latents; counts the pictures that could not be used in `kinds`."""
    loader = eval_loader(
        part,
        batch_size=plan.batch_size,
        fields=("images", "labels"),
        **plan.crop._asdict(),
        num_workers=plan.num_workers,
        max_bad_fraction=1.0,  # a share of all pictures, which is known at the end
    )
    records = list(_encoded(tokenizer, loader, plan))
    for kind, count in loader.bad.counts.items():
        kinds[kind] = kinds.get(kind, 0) + count
    if not records:
        raise DataError(f"{part.name}: none of its pictures can be used: {loader.bad.summary()}")
    if loader.bad.total:
        log.warning("%s: %s", part.name, loader.bad.summary())
    write_latent_shard(
        file, records, tokenizer.sha256, plan.dtype, skipped=loader.bad.total, origin=origin
    )


def _encoded(
    tokenizer: LatentTokenizer, loader: EvalLoader, plan: ExtractionPlan
) -> Iterator[LatentRecord]:
    kind = torch.device(plan.device).type
    for batch in loader:
        images = batch["images"].to(plan.device)
        views = [images, images.flip(-1)] if plan.flip else [images]
        with torch.autocast(kind, plan.autocast, enabled=plan.autocast is not None):
            latents = torch.stack([tokenizer.encode(view) for view in views], 1)  # (B,V,C,h,w)
        for key, latent, label in zip(batch["keys"], latents.cpu(), batch["labels"].tolist()):
            # WebDataset ends a key at the first dot.
            yield LatentRecord(key.replace(".", "_"), latent, label)


def _check_skipped(
    heads: Sequence[ShardHead], kinds: Sequence[dict[str, int]], plan: ExtractionPlan
) -> None:
    """`DataError` when more than `max_bad_fraction` of all pictures were skipped."""
    written = sum(head.count for head in heads)
    skipped = sum(head.skipped for head in heads)
    now: dict[str, int] = {}
    for counts in kinds:
        for kind, count in counts.items():
            now[kind] = now.get(kind, 0) + count
    before = skipped - sum(now.values())  # by a run that was stopped
    now |= {"earlier": before} if before else {}
    samples = {"read": written + skipped, "kinds": now, "keys": {kind: [] for kind in now}}
    check_share(samples, plan.max_bad_fraction)


def _write_statistics(
    tokenizer: LatentTokenizer, files: Sequence[Path], output: Path, plan: ExtractionPlan
) -> None:
    """Of all stored latents, mirror images included, as training will read them."""
    statistics = LatentStatistics(plan.statistics, tokenizer.sha256)
    for file in files[process_index() :: world_size()]:
        waiting: list[Tensor] = []
        for record in read_latent_shard(file, tokenizer.sha256):
            waiting.append(record.latents)  # (V, C, h, w)
            if len(waiting) == 256:
                statistics.update(torch.cat(waiting))
                waiting = []
        if waiting:
            statistics.update(torch.cat(waiting))
    total = statistics.gathered()
    if is_main_process():
        total.save(output / STATISTICS)
