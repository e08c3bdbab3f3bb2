"""A memo of teacher outputs by sample key, for data that is not augmented (the demo)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from muse.teachers.base import FrozenTeacher, TopologyTarget, log


class _Entry(NamedTuple):
    """One sample's output: its distinct tensors in float16, and which stands in each place."""

    tensors: tuple[Tensor, ...]
    places: tuple[int, ...]
    grid: tuple[int, int] | None


class CachedTeacher(FrozenTeacher):
    """`teacher(images, keys=keys)`: what the teacher says, computed once for each key.

    Without `keys` nothing is stored. Correct only where a key always comes with the same picture.
    Values are kept in float16 on the CPU; maps come back in float32 with rows that sum to 1. A
    stored and a fresh answer are the same bits, since a fresh one is rounded alike, and on a CPU
    one image is asked for at a time, so that an answer does not depend on the batch it came in.
    When `max_bytes` is reached nothing more is stored: with epochs over the same data, evicting
    would leave no hits at all.
    """

    def __init__(self, teacher: FrozenTeacher, max_bytes: int = 2 << 30):
        super().__init__()
        self.teacher, self.max_bytes = teacher, max_bytes
        self.bytes, self.hits, self.misses = 0, 0, 0
        self._entries: dict[tuple[str, tuple[int, int] | None], _Entry] = {}
        self.freeze()

    def set_precision(self, precision: str) -> "CachedTeacher":
        self.teacher.set_precision(precision)
        return super().set_precision(precision)

    @property
    def dim(self) -> int:
        """Channels of a feature teacher."""
        return self.teacher.dim

    def forward(
        self, images: Tensor, keys: Sequence[str] | None = None, grid: tuple[int, int] | None = None
    ) -> TopologyTarget | Tensor:
        """The teacher's output for images.

        Args:
            images: (B,3,H,W) in [0,1].
            keys: B names of the samples, or None to compute and forget.
            grid: handed on to the teacher; answers on different grids are kept apart.
        """
        arguments = {} if grid is None else {"grid": grid}
        if keys is None:
            return self.teacher(images, **arguments)
        if len(keys) != len(images):
            raise ValueError(f"{len(keys)} keys for {len(images)} images")
        named = [(key, grid) for key in keys]
        unknown = [index for index, name in enumerate(named) if name not in self._entries]
        self.hits, self.misses = self.hits + len(named) - len(unknown), self.misses + len(unknown)
        fresh: dict = {}
        step = 1 if images.device.type == "cpu" else max(1, len(unknown))
        for start in range(0, len(unknown), step):
            chunk = unknown[start : start + step]
            entries = _split(self.teacher(images[chunk], **arguments))
            fresh.update((named[index], entry) for index, entry in zip(chunk, entries))
        found = [self._entries.get(name) or fresh[name] for name in named]
        for name, entry in fresh.items():
            self._store(name, entry)
        return _join(found, images.device)

    def _store(self, name: tuple[str, tuple[int, int] | None], entry: _Entry) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in entry.tensors)
        if self.bytes + size <= self.max_bytes:
            self._entries[name] = entry
            self.bytes += size
        elif self.bytes < self.max_bytes:
            log.info(
                "teacher cache is full: %d samples, %d MiB; the rest is computed each time",
                len(self._entries),
                self.bytes >> 20,
            )
            self.max_bytes = self.bytes


def _split(output: TopologyTarget | Tensor) -> list[_Entry]:
    """One entry for each sample; maps that are the same tensor in several places are kept once."""
    if isinstance(output, TopologyTarget):
        maps, grid = output.maps, tuple(output.grid)
    else:
        maps, grid = (output,), None
    distinct = list({id(tensor): tensor for tensor in maps}.values())
    order = {id(tensor): index for index, tensor in enumerate(distinct)}
    places = tuple(order[id(tensor)] for tensor in maps)
    halves = [tensor.half().cpu() for tensor in distinct]
    return [
        _Entry(tuple(half[index].clone() for half in halves), places, grid)
        for index in range(len(halves[0]))
    ]


def _join(entries: Sequence[_Entry], device: torch.device) -> TopologyTarget | Tensor:
    first = entries[0]
    columns = [
        torch.stack(column).to(device).float()
        for column in zip(*(entry.tensors for entry in entries))
    ]
    if first.grid is None:
        return columns[0]
    maps = [column / column.sum(dim=-1, keepdim=True) for column in columns]
    return TopologyTarget(tuple(maps[place] for place in first.places), first.grid)
