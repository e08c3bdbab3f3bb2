"""Samples into tar shards: by several processes, each shard complete or not there at all."""

import hashlib
import io
import logging
import multiprocessing
import random
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from muse.data.decode import IMAGE_EXTENSIONS, MASK_EXTENSION, BadSample, decode_image, open_image
from muse.data.faults import BadSamples
from muse.data.records import Record
from muse.data.shard_builders import Members, ShardItems
from muse.data.shard_index import shard_contents
from muse.errors import ConfigError, DataError
from muse.utils.io import atomic_file, write_text

logger = logging.getLogger(__name__)

_AS_THEY_ARE = {"JPEG": "jpg", "PNG": "png"}  # formats that are copied; others become PNG


@dataclass(frozen=True)
class WritePlan:
    """How shards are written.

    Args:
        output: folder.
        name: shards are NAME-000000.tar and so on.
        per_shard: samples of each, the last may have fewer.
        workers: processes.
        seed: of the order of samples; None keeps the source's.
        max_side: pixels of the longer side; larger pictures are made smaller.
        verify: decode every picture.
        resume: keep the shards that are there already.
        max_bad_fraction: of the samples may be left out.
    """

    output: Path
    name: str = "train"
    per_shard: int = 1000
    workers: int = 1
    seed: int | None = 0
    max_side: int | None = None
    verify: bool = False
    resume: bool = False
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        for what in ("per_shard", "workers"):
            if getattr(self, what) < 1:
                raise ConfigError(f"--{what} must be positive, not {getattr(self, what)}")
        if self.max_side is not None and self.max_side < 1:
            raise ConfigError(f"--max_side must be positive, not {self.max_side}")

    def shard(self, number: int) -> Path:
        return self.output / f"{self.name}-{number:06d}.tar"


def write_shards_of(items: ShardItems, plan: WritePlan) -> BadSamples:
    """Write the shards, `classes.txt` where there are classes; gives what was left out.

    Raises DataError: shards are there already (and `resume` was not asked for, or they are of other
    samples); too many samples cannot be used.
    """
    samples = list(items.samples)
    if plan.seed is not None:
        random.Random(plan.seed).shuffle(samples)
    parts = [samples[i : i + plan.per_shard] for i in range(0, len(samples), plan.per_shard)]
    _prepare_folder(plan, _digest(samples, plan), len(parts))
    if items.classes:
        _write_classes(plan.output / "classes.txt", items.classes)
    waiting = [number for number in range(len(parts)) if not plan.shard(number).exists()]
    if len(waiting) < len(parts):
        logger.info("%d of %d shards are there already", len(parts) - len(waiting), len(parts))
    bad, begin, written = BadSamples(plan.max_bad_fraction), time.monotonic(), 0
    for done, (number, count, faults) in enumerate(_results(parts, waiting, plan), 1):
        bad.add(count, faults)
        written += count - len(faults)
        rate = written / max(1e-9, time.monotonic() - begin)
        left = (len(waiting) - done) * plan.per_shard / max(rate, 1e-9)
        logger.info(
            "%s: %d samples; %d of %d shards, %.0f samples/s, about %.0f s left",
            plan.shard(number).name,
            count - len(faults),
            len(parts) - len(waiting) + done,
            len(parts),
            rate,
            left,
        )
        bad.check()
    bad.check(final=True)
    return bad


def _results(
    parts: Sequence[list[Members]], waiting: Sequence[int], plan: WritePlan
) -> Iterator[tuple[int, int, list[tuple[str, str]]]]:
    write = partial(_write_shard, plan)
    if plan.workers == 1 or len(waiting) < 2:
        yield from (write(number, parts[number]) for number in waiting)
        return
    # A forked process need not import everything again.
    kinds = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in kinds else None)
    with ProcessPoolExecutor(min(plan.workers, len(waiting)), context) as pool:
        jobs = [pool.submit(write, number, parts[number]) for number in waiting]
        try:
            yield from (job.result() for job in as_completed(jobs))
        finally:
            for job in jobs:
                job.cancel()


# --------------------------------------------------------------------------------------- the folder
def _digest(samples: Sequence[Members], plan: WritePlan) -> str:
    """What the content of the shards depends on; a resume with another one would mix two sets."""
    facts = repr((samples, plan.per_shard, plan.max_side)).encode("utf-8", "surrogateescape")
    return hashlib.sha256(facts).hexdigest()


def _prepare_folder(plan: WritePlan, digest: str, shards: int) -> None:
    there = sorted(plan.output.glob(f"{plan.name}-*.tar")) if plan.output.is_dir() else []
    note = plan.output / f".{plan.name}.plan"
    if there and not plan.resume:
        raise DataError(
            f"{plan.output} holds {there[0].name} already: --resume goes on, or give another "
            "--output or --name"
        )
    if there and (not note.is_file() or note.read_text(encoding="utf-8").strip() != digest):
        raise DataError(
            f"{plan.output}: its {plan.name} shards were made of other samples or with another "
            "--per_shard, --max_side or order; give another --output or --name"
        )
    for left in plan.output.glob(f".{plan.name}-*.tar"):  # of a process that was killed
        left.unlink()
    write_text(note, digest + "\n")
    logger.info("%d shards in %s", shards, plan.output)


def _write_classes(path: Path, classes: Sequence[str]) -> None:
    content = "".join(f"{name}\n" for name in classes)
    if path.is_file() and path.read_text(encoding="utf-8") != content:
        raise DataError(f"{path} names other classes; give another --output")
    write_text(path, content)


# ------------------------------------------------------------------------------------- one shard
def _write_shard(
    plan: WritePlan, number: int, samples: Sequence[Members]
) -> tuple[int, int, list[tuple[str, str]]]:
    """(number, samples, faults) after the shard and its index are written."""
    faults, kept = [], 0
    with atomic_file(plan.shard(number)) as partial_file:
        with tarfile.open(partial_file, "w", format=tarfile.GNU_FORMAT) as tar:
            for place, members in enumerate(samples, number * plan.per_shard):
                try:
                    ready = _ready(members, plan)
                except BadSample as error:
                    faults.append((error.kind, _origin(members)))
                    continue
                kept += 1
                for extension, content in ready.items():
                    info = tarfile.TarInfo(f"{place:08d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        if samples and not kept:
            kinds = sorted({kind for kind, _ in faults})
            raise DataError(
                f"none of the {len(samples)} samples of {plan.shard(number).name} can be used "
                f"({', '.join(kinds)}; the first is {faults[0][1]})"
            )
    shard_contents(str(plan.shard(number)))
    return number, len(samples), faults


def _origin(members: Members) -> str:
    for part in members.values():
        if not isinstance(part, bytes):
            return part.path
    return "a row of the table"


def _ready(members: Members, plan: WritePlan) -> dict[str, bytes]:
    """The members' bytes as they go into the shard. Raises BadSample."""
    record = Record("", "", dict(members)).load()
    if record.fault:
        raise BadSample(record.fault)
    found: dict[str, bytes] = {}
    size = None
    for name, data in record.members.items():
        if name.rpartition(".")[2] in IMAGE_EXTENSIONS and name != MASK_EXTENSION:
            prefix = name.rpartition(".")[0]
            extension, content, size = _fitting(data, plan)
            found[f"{prefix}.{extension}" if prefix else extension] = content
        else:
            found[name] = data
    if MASK_EXTENSION in found and size is not None:
        found[MASK_EXTENSION] = _smaller_mask(found[MASK_EXTENSION], size)
    return found


def _fitting(data: bytes, plan: WritePlan) -> tuple[str, bytes, tuple[int, int] | None]:
    """(extension, content, new size): the file itself where it is a JPEG or PNG that fits."""
    if plan.verify:
        decode_image(data)
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind, size = image.format, image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadSample("not_an_image" if data else "empty_file", str(error)) from error
    scale = min(1.0, (plan.max_side or max(size)) / max(size))
    if scale == 1.0 and kind in _AS_THEY_ARE:
        return _AS_THEY_ARE[kind], data, None
    image = open_image(data)  # as it is stored, for masks and EXIF lie so
    new = tuple(max(1, round(side * scale)) for side in size)
    if scale < 1.0:
        image = _smaller(image, new)
    # Its EXIF block still turns it.
    options = {"exif": image.info["exif"]} if "exif" in image.info else {}
    buffer = io.BytesIO()
    if kind == "JPEG":
        image.save(buffer, "JPEG", quality=95, subsampling=0, **options)
    else:
        image = image if image.mode in ("RGB", "RGBA", "L", "LA", "I;16") else image.convert("RGBA")
        image.save(buffer, "PNG", **options)
    return _AS_THEY_ARE.get(kind, "png"), buffer.getvalue(), new if scale < 1.0 else None


def _smaller(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if image.mode in ("P", "PA", "1"):  # indices of colours have no mean
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    small = image.resize(size, Image.Resampling.BICUBIC)
    small.info = dict(image.info)
    return small


def _smaller_mask(data: bytes, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    open_image(data).resize(size, Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()
