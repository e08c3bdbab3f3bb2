"""What is in a set of shards: counts, sizes, faults, captions, classes. Writes their indexes."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from muse.data.decode import (
    CAPTION_EXTENSIONS,
    MASK_EXTENSION,
    PAIR,
    BadSample,
    decode_captions,
    decode_label,
    decode_picture,
    image_bytes,
)
from muse.data.masks import decode_mask
from muse.data.records import SHARD_FAULTS, Record, Source

SHOWN_CLASSES = 10


@dataclass
class ShardCheck:
    """What was found; `faults` are (shard, key, kind) in order."""

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    members: Counter = field(default_factory=Counter)  # how many samples have this extension
    faults: list[tuple[str, str, str]] = field(default_factory=list)
    per_shard: list[int] = field(default_factory=list)
    keys: Counter = field(default_factory=Counter)
    captions: Counter = field(default_factory=Counter)
    without_caption: int = 0
    classes: Counter = field(default_factory=Counter)
    sides: list[tuple[int, int]] = field(default_factory=list)  # of decoded pictures

    def fault_lines(self) -> list[str]:
        """One line a fault."""
        return [
            f"{shard}: {kind}" if kind in SHARD_FAULTS else f"{shard}: {key}: {kind}"
            for shard, key, kind in self.faults
        ]

    def facts(self) -> dict[str, Any]:
        """All numbers, as JSON; lengths are of captions in characters, sides are pixels."""
        lengths = sorted(length for text in self.captions for length in [len(text)])
        repeated = sum(count - 1 for count in self.captions.values())
        made: dict[str, Any] = {
            "shards": self.shards,
            "samples": self.samples,
            "samples_per_shard": _range(self.per_shard),
            "bytes": self.bytes,
            "members": dict(sorted(self.members.items())),
            "faults": dict(Counter(kind for _, _, kind in self.faults)),
            "repeated_keys": sum(count - 1 for count in self.keys.values()),
        }
        if self.captions:
            made["captions"] = {
                "count": sum(self.captions.values()),
                "samples_without": self.without_caption,
                "repeated": repeated,
                "characters": _range(lengths),
            }
        if self.classes:
            made["classes"] = {
                "count": len(self.classes),
                "highest": max(self.classes),
                "samples": _range(list(self.classes.values())),
                "most_common": self.classes.most_common(SHOWN_CLASSES),
                "histogram": {str(label): n for label, n in sorted(self.classes.items())},
            }
        if self.sides:
            made["shorter_side"] = _range([min(size) for size in self.sides])
            made["longer_side"] = _range([max(size) for size in self.sides])
        return made


def _range(numbers: list[int]) -> dict[str, float]:
    if not numbers:
        return {}
    return {"least": min(numbers), "median": median(numbers), "most": max(numbers)}


def check_shards(source: Source, decode: bool = False) -> ShardCheck:
    """Go through every sample of `source`.

    Args:
        source: local or remote shards, or a folder.
        decode: also decode pictures and masks, which finds broken ones and their sizes.
    """
    found = ShardCheck()
    for shard in source.shards:
        before = found.samples
        for record in source.read(shard):
            if record.fault in SHARD_FAULTS:
                found.faults.append((shard, record.key, record.fault))
            else:
                _check_record(found, record, shard, decode)
        found.shards += 1
        found.per_shard.append(found.samples - before)
    return found


def _check_record(found: ShardCheck, record: Record, shard: str, decode: bool) -> None:
    found.samples += 1
    found.keys[record.key] += 1
    members = record.load().members
    if record.fault:
        found.faults.append((shard, record.key, record.fault))
        return
    found.bytes += sum(map(len, members.values()))
    found.members.update(members.keys())
    for kind in _faults_of(found, members, decode):
        found.faults.append((shard, record.key, kind))


def _faults_of(found: ShardCheck, members: dict[str, bytes], decode: bool) -> Iterator[str]:
    if members.keys() & set(CAPTION_EXTENSIONS):
        try:
            found.captions.update(decode_captions(members))
        except BadSample as error:
            found.without_caption += 1
            # An empty caption is a fault only of runs that read captions: it is counted.
            if error.kind != "missing_caption":
                yield error.kind
    else:
        found.without_caption += 1
    if "cls" in members:
        try:
            found.classes[decode_label(members)] += 1
        except BadSample as error:
            yield error.kind
    if members.keys() == {"safetensors"}:  # latents have no picture
        return
    is_pair = any(name.startswith(f"{PAIR[0]}.") for name in members)
    sizes = []
    for side in PAIR if is_pair else (None,):
        try:
            data = image_bytes(members, side)
            if decode:
                picture = decode_picture(data)
                sizes.append((picture.image.size, picture.turn))
                found.sides.append(picture.image.size)
            elif not data:
                yield "empty_file"
        except BadSample as error:
            yield error.kind
    if decode and MASK_EXTENSION in members:
        yield from _mask_faults(members, sizes)


def _mask_faults(members: dict[str, bytes], sizes: list) -> Iterator[str]:
    try:
        mask = decode_mask(members)
    except BadSample as error:
        yield error.kind
        return
    for size, turn in sizes[:1]:
        if (mask if turn is None else mask.transpose(turn)).size != size:
            yield "mask_size"
