"""The training loader beside the plain way, and the time of a late resume.

Rates are by the processor's time, which other programs on the machine change less than the clock's;
the ratios by the clock stand beside them.
"""

import io
import statistics
import tarfile
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from muse.data.dataloader import train_loader
from muse.data.decode import decode_image
from muse.data.ordering import Places
from muse.data.records import Record
from muse.data.shard_index import ShardContents
from muse.data.train import StreamSpec, WorkerStream, start_position
from muse.data.transforms import Transform, generator_for, to_float
from muse.errors import ConfigError

EDGE, CROP, BATCH = 256, 224, 32
SIZES = ((500, 375), (1024, 768))
CLOCKS = {"processor": time.process_time, "clock": time.perf_counter}


# ------------------------------------------------------------------------------------- the pictures
def photographs() -> list[Image.Image]:
    """Photographs of scikit-image, which a development installation has."""
    try:
        from skimage import data  # noqa: PLC0415 - of the development requirements
    except ImportError as error:
        raise ConfigError("the benchmark needs scikit-image (requirements-dev.txt)") from error
    return [Image.fromarray(getattr(data, name)()) for name in ("astronaut", "coffee", "rocket")]


def write_shard(path: Path, size: tuple[int, int], count: int) -> None:
    """JPEGs of `size` (width, height), quality 90, each with a caption."""
    sources = photographs()
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            picture = sources[number % len(sources)].resize(size, Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=90)
            for name, data in (("jpg", buffer.getvalue()), ("txt", b"a photograph")):
                info = tarfile.TarInfo(f"{number:06d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


# ----------------------------------------------------------------------------------- the plain way
def plain_epoch(path: Path) -> int:
    """What the loader did before: headers read with tarfile, a file opened for every member, the
    whole picture decoded and resized by Pillow, float32 batches.
    """
    transform, done, batch = Transform(EDGE, CROP, True, True), 0, []
    with tarfile.open(path) as archive:
        members = [(info.name, info.offset_data, info.size) for info in archive]
    for pair in zip(members[::2], members[1::2]):
        parts = {}
        for name, offset, size in pair:
            with open(path, "rb") as file:
                file.seek(offset)
                parts[name.partition(".")[2]] = file.read(size)
        pixels, _ = transform.resize(decode_image(parts["jpg"]))
        batch.append(transform.crop(pixels, rng=generator_for(0, pair[0][0]))[0])
        if len(batch) == BATCH:
            to_float(torch.stack(batch))
            done, batch = done + BATCH, []
    return done


def loader_epoch(path: Path, count: int, draft: bool) -> int:
    """The same number of pictures by the loader."""
    loader = train_loader(
        str(path),
        batch_size=BATCH,
        resize_shorter_edge=EDGE,
        crop_size=CROP,
        shuffle_buffer=1,
        jpeg_draft=draft,
    )
    batches = iter(loader)
    return sum(len(next(batches)["keys"]) for _ in range(count // BATCH))


def loader_rates(size: tuple[int, int], count: int, repeats: int) -> dict[str, Any]:
    """Medians of images/s and the ratio to the plain way of the same round."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        write_shard(path, size, count)
        ways = {
            "plain": lambda: plain_epoch(path),
            "loader": lambda: loader_epoch(path, count, draft=True),
            "loader_without_draft": lambda: loader_epoch(path, count, draft=False),
        }
        rates = {clock: {name: [] for name in ways} for clock in CLOCKS}
        for name in ways:  # the first round writes the index and warms the file cache
            ways[name]()
        for _ in range(repeats):
            for name, way in ways.items():
                begin = {clock: now() for clock, now in CLOCKS.items()}
                done = way()
                for clock, now in CLOCKS.items():
                    rates[clock][name].append(done / (now() - begin[clock]))
    made: dict = {"size": list(size), "rounds": repeats}
    for name, values in rates["processor"].items():
        made[f"{name}_images_per_s"] = round(statistics.median(values), 1)
    for clock, by_name in rates.items():
        for name in ("loader", "loader_without_draft"):
            ratios = [a / b for a, b in zip(by_name[name], by_name["plain"])]
            made[f"{name}_over_plain_{clock}"] = round(statistics.median(ratios), 2)
    return made


# --------------------------------------------------------------------------------------- the resume
class SyntheticShards:
    """Shards that are an index alone, as `contents` and `read` would give it."""

    local, one_per_shard = True, False

    def __init__(self, shards: int, per_shard: int):
        self.name, self.per_shard = "synthetic", per_shard
        self.shards = [f"{number:06d}" for number in range(shards)]

    def contents(self, shard: str) -> ShardContents:
        return ShardContents(self.per_shard)

    def read(self, shard: str):
        return (Record(f"{shard}/{number}", shard) for number in range(self.per_shard))


class KeyMaker:
    """In the place of a SampleMaker: keys alone, no picture."""

    def prepare(self, record: Record) -> Record:
        return record

    def finish(self, record: Record, rng: object) -> Record:
        return record

    def collate(self, samples: list[Record]) -> dict:
        return {"keys": [record.key for record in samples]}


def resume_seconds(samples: int) -> dict[str, float]:
    """Time from a position after `samples` of one reader's epoch to its next batch; and that of
    the plain way, which walks through all records, for a hundredth of it.
    """
    source = SyntheticShards(samples // 1000 + 100, 1000)
    spec = StreamSpec((source,), (1.0,), KeyMaker(), BATCH)
    position = start_position(1)
    position["drawn"], position["sources"][0][1] = samples, samples
    begin = {clock: now() for clock, now in CLOCKS.items()}
    next(iter(WorkerStream(spec, 0, position)))
    seconds = {f"seconds_{clock}": now() - begin[clock] for clock, now in CLOCKS.items()}
    begin = time.process_time()
    places = Places(source, source.shards)
    few = max(1, samples // 100)
    for _ in islice(places.read(0), few):
        pass
    walking = (time.process_time() - begin) * samples / few
    return {"resumed_after": samples, **seconds, "walking_seconds_estimate": walking}


def bench_loader(
    images: int = 96, repeats: int = 7, samples: int = 10_000_000
) -> dict[str, dict[str, Any]]:
    """`WIDTHxHEIGHT` -> images/s of the loader and of the plain way; `resume` -> its seconds.

    One thread, one process. `loader_without_draft` decodes each JPEG whole.

    Args:
        images: pictures of a round, at least a batch of 32.
        repeats: rounds, whose medians are given.
        samples: what a run had drawn before it is resumed.
    """
    if images < BATCH or repeats < 1 or samples < 100:
        raise ConfigError(f"loader: images at least {BATCH}, repeats 1, samples 100")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = {f"{one[0]}x{one[1]}": loader_rates(one, images, repeats) for one in SIZES}
        return {**rows, "resume": resume_seconds(samples)}
    finally:
        torch.set_num_threads(threads)
