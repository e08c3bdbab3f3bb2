"""Statistics of a tokenizer's latents, with which a generator's data are normalised.

One object normalises and de-normalises, and names the tokenizer whose latents it saw: latents are
never de-normalised that were not normalised, nor decoded by another tokenizer.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from muse.errors import CheckpointError, DataError, MuseError
from muse.utils.distributed import all_objects

KINDS = ("channel", "position")
FORMAT = "muse latent statistics 1"
MIN_STD = 1e-6  # of a channel that never changes: it becomes 0 and comes back as its mean


class LatentStatistics:
    """Mean and standard deviation, streamed in float64 and mergeable: batches do not matter.

    Args:
        kind: "channel" (one mean for each of C) or "position" (one for each of C x h x w).
        tokenizer_sha256: of the weights that encode; "" where nobody asks.
    """

    def __init__(self, kind: str = "channel", tokenizer_sha256: str = ""):
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind, self.tokenizer_sha256 = kind, tokenizer_sha256
        self.count = 0  # latents seen
        self.shape: tuple[int, ...] | None = None  # (C, h, w) of each
        self._mean = self._deviation = torch.zeros(1, 1, 1, dtype=torch.float64)

    def update(self, latents: Tensor) -> None:
        """Add latents (B, C, h, w).

        `ValueError` on another shape than before, `DataError` on NaN or infinity.
        """
        if latents.ndim != 4:
            raise ValueError(f"latents must have shape (B, C, h, w), got {tuple(latents.shape)}")
        if not len(latents):
            return
        values = latents.detach().to("cpu", torch.float64)
        if not torch.isfinite(values).all():
            raise DataError("latents contain NaN or infinity: their statistics would too")
        part = LatentStatistics(self.kind, self.tokenizer_sha256)
        part.count, part.shape = len(values), tuple(values.shape[1:])
        over = (0, 2, 3) if self.kind == "channel" else (0,)
        part._mean = values.mean(over, keepdim=True)[0]  # (C, 1, 1) or (C, h, w)
        part._deviation = (values - part._mean).square().sum(over, keepdim=True)[0]
        self.merge(part)

    def merge(self, other: "LatentStatistics") -> None:
        """Add all that `other` saw (the pairwise update of Chan, Golub and LeVeque).

        `ValueError` where kinds or shapes differ, `CheckpointError` where tokenizers do.
        """
        if other.kind != self.kind:
            raise ValueError(f"statistics by {self.kind} cannot take up statistics by {other.kind}")
        check_tokenizer("the statistics to merge", other.tokenizer_sha256, self.tokenizer_sha256)
        if not other.count:
            return
        if self.shape not in (None, other.shape):
            raise ValueError(f"latents of {other.shape} after latents of {self.shape}")
        self.shape = other.shape
        total = self.count + other.count
        share = other.count / total
        delta = other._mean - self._mean
        values = self._values(self.count) * share  # n1 * n2 / (n1 + n2), in values
        self._deviation = self._deviation + other._deviation + delta.square() * values
        self._mean = self._mean + delta * share
        self.count = total

    def gathered(self) -> "LatentStatistics":
        """The statistics of all processes together, the same on each; every process calls it."""
        total = LatentStatistics(self.kind, self.tokenizer_sha256)
        for part in all_objects(self):
            total.merge(part)
        return total

    def _values(self, latents: int) -> int:
        """Values behind one mean."""
        return latents * (self.shape[1] * self.shape[2] if self.kind == "channel" else 1)

    @property
    def mean(self) -> Tensor:
        """(C, 1, 1) or (C, h, w), float64."""
        self._require()
        return self._mean

    @property
    def std(self) -> Tensor:
        """Population standard deviation, (C, 1, 1) or (C, h, w), float64, at least `MIN_STD`."""
        self._require()
        return (self._deviation / self._values(self.count)).sqrt().clamp_min(MIN_STD)

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) as the tokenizer gives them -> float32 of mean 0 and deviation 1."""
        mean, std = self._tables(latents)
        return (latents.float() - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """What `normalise` gave -> float32 latents as the tokenizer decodes them."""
        mean, std = self._tables(latents)
        return latents.float() * std + mean

    def _tables(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (table.to(latents.device, torch.float32) for table in (self.mean, self.std))
        whole = latents.shape[-3:] if self.kind == "position" else latents.shape[-3:-2]
        if latents.ndim < 3 or tuple(whole) != self.shape[: len(whole)]:
            raise ValueError(f"latents of {tuple(latents.shape)}, statistics of {self.shape}")
        return mean, std

    def _require(self) -> None:
        if not self.count:
            raise ValueError("statistics of no latents: update them first")

    def save(self, path: str | Path) -> None:
        """One safetensors file: `mean` and `std` in float64; the rest as metadata."""
        facts = {
            "format": FORMAT,
            "kind": self.kind,
            "count": str(self.count),
            "shape": ",".join(map(str, self.shape or ())),
            "tokenizer_sha256": self.tokenizer_sha256,
        }
        tensors = {"mean": self.mean.contiguous(), "std": self.std.contiguous()}
        with replacing(path) as file:
            file.write(save(tensors, metadata=facts))

    @classmethod
    def load(cls, path: str | Path, tokenizer_sha256: str | None = None) -> "LatentStatistics":
        """Read a file of `save`; it may be updated and merged further.

        `CheckpointError` where the file is missing or no such file, or its tokenizer is not the one
        of the given hash.
        """
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                mean, std = file.get_tensor("mean"), file.get_tensor("std")
            if facts.get("format") != FORMAT:
                raise ValueError(f"its format is {facts.get('format')!r}, not {FORMAT!r}")
            statistics = cls(facts["kind"], facts["tokenizer_sha256"])
            statistics.count = int(facts["count"])
            statistics.shape = tuple(int(side) for side in facts["shape"].split(","))
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            said = " ".join(str(error).split())
            raise CheckpointError(f"{path}: not statistics of latents ({said})") from None
        if tokenizer_sha256 is not None:
            check_tokenizer(path, statistics.tokenizer_sha256, tokenizer_sha256)
        statistics._mean = mean
        statistics._deviation = std.square() * statistics._values(statistics.count)
        return statistics


def check_tokenizer(where: str | Path, recorded: str, given: str) -> None:
    """`CheckpointError` unless `where` was made with the given tokenizer (sha256 of weights)."""
    if recorded != given:
        recorded, given = recorded[:12] or "(none)", given[:12] or "(none)"
        raise CheckpointError(
            f"{where}: latents of another tokenizer: the sha256 of its weights begins with "
            f"{recorded}, that of the one in use with {given}"
        )


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write bytes into; it becomes `path` at the end of the block, or nothing does."""
    target = Path(path)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise MuseError(f"{target}: cannot be written ({reason})") from None
        raise
