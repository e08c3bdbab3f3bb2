"""Numbers that are not finite: no optimizer steps on one, and the run says which, at which step.

Whether a step must be skipped is a flag on the device. On a CPU it is read at once. On an
accelerator reading it means waiting, so there the fused optimizers take the flag and leave
everything as it is, and `settle` reads the flags of the skipped steps where the run waits anyway
(to log, evaluate or save).
"""

import json
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from muse.errors import MuseError
from muse.models.ema_model import EMAModel
from muse.training.progress import Progress

log = logging.getLogger(__name__)

MAX_DUMPS = 10  # of one process: a run that may skip thousands of steps must not fill the disk


class _Step(NamedTuple):
    """What is remembered of a step until its flag is read: tensors on the device, strings here."""

    number: int
    names: list[str]
    values: Tensor  # (K,) float32
    skip: Tensor  # () float32, above 0 where some process has a number that is not finite
    strings: dict[str, list[str]]


class FiniteGuard:
    """Judges each step by its numbers; beyond `limit` skipped steps the run stops with `MuseError`.

    Args:
        limit: how many steps may be skipped.
        progress: the run's counters; skipped steps and their images are counted there.
        accelerator: of the run.
        output: the folder for dumps of bad batches.
        fused: whether the optimizers are fused, and so read a flag themselves.
        lazy: leave the flags on the device until `settle`; None: where that saves a wait.
    """

    def __init__(
        self,
        limit: int,
        progress: Progress,
        accelerator: Any,
        output: Path,
        fused: bool,
        lazy: bool | None = None,
    ):
        self.limit, self.progress = limit, progress
        self.accelerator, self.output = accelerator, output
        self.lazy = (fused and accelerator.device.type != "cpu") if lazy is None else lazy
        self._dumps = 0
        self._waiting: list[_Step] = []
        self._tensors: dict[str, Tensor] = {}  # the batch of the first bad step that waits
        self._bad = torch.zeros(())  # () float32, above 0 once one of them is bad

    def judge(self, number: int, numbers: dict[str, Tensor], micro: list[dict[str, Any]]) -> Tensor:
        """The step's flag on the device, () float32: above 0 where it must be skipped.

        Args:
            number: of the step, counted from 1.
            numbers: its losses and gradient norms by name.
            micro: its batches, to be named and dumped.
        """
        # Gradients that overflow in fp16 are the scaler's business: it skips and lowers its scale.
        names = [
            name for name in numbers if self.accelerator.scaler is None or "grad_norm" not in name
        ]
        values = torch.stack([numbers[name].detach().float().reshape(()) for name in names])
        skip = (~values.isfinite()).any().float()
        if self.accelerator.num_processes > 1:
            skip = self.accelerator.reduce(skip, reduction="sum")  # all processes skip, or none
        self._remember(micro, skip)
        self._waiting.append(_Step(number, names, values, skip, _joined_strings(micro)))
        if not self.lazy:
            self.settle()
        return skip

    def take_step(self, skip: Tensor, optimizers: list[Any], averages: EMAModel | None) -> None:
        """Step the optimizers and then the averages, but for a step to be skipped.

        Where the flag is not read, the averages take in the unchanged weights once more.

        Args:
            skip: what `judge` gave.
            optimizers: as accelerate wraps them; their gradients are unscaled already.
            averages: the running means of the weights, or None.
        """
        scaler = self.accelerator.scaler
        if self.lazy or not skip > 0:
            for optimizer in optimizers:
                inner = optimizer.optimizer  # the wrapper would update the scaler after each
                if scaler is not None:
                    scaler.step(inner)
                else:
                    _step_unless(inner, skip if self.lazy else None)
            if averages is not None:
                averages.update()
        if scaler is not None:
            scaler.update()

    def settle(self) -> None:
        """Read the flags of the steps that wait; count, dump and name those that were skipped."""
        waiting, self._waiting = self._waiting, []
        tensors, self._tensors = self._tensors, {}
        if not waiting:
            return
        flags = torch.stack([step.skip for step in waiting]).tolist()  # waits for the device
        for step in [step for step, flag in zip(waiting, flags) if flag > 0]:
            self._count(step, tensors)
            tensors = {}

    def _remember(self, micro: list[dict[str, Any]], skip: Tensor) -> None:
        """Keep the tensors of one step only: those of the first bad one, chosen on the device."""
        tensors = _joined_tensors(micro)
        shapes = [{name: t.shape for name, t in each.items()} for each in (tensors, self._tensors)]
        if self._waiting and shapes[0] == shapes[1]:
            first = (skip > 0) & (self._bad == 0)
            for name, tensor in tensors.items():
                self._tensors[name] = torch.where(first, tensor, self._tensors[name])
            self._bad = self._bad + skip
        else:
            self._tensors, self._bad = tensors, skip

    def _count(self, step: _Step, tensors: dict[str, Tensor]) -> None:
        """Dump the batch, then stop the run or count the step as skipped."""
        keys, values = step.strings["keys"], dict(zip(step.names, step.values.tolist()))
        names = [name for name, value in values.items() if not math.isfinite(value)]
        # Where a loss is broken its gradients say nothing new.
        terms = [name for name in names if "grad_norm" not in name]
        self.progress.skipped += 1
        self.progress.images_seen -= len(keys) * self.accelerator.num_processes
        message = (
            f"{', '.join(terms or names) or 'a number of another process'} is not finite at step "
            f"{step.number}; samples {', '.join(keys[:8])}{' …' if len(keys) > 8 else ''}"
            f"{self._dump(step, names, values, tensors)}"
        )
        if self.progress.skipped > self.limit:
            raise MuseError(f"{message} (training.max_skipped_steps={self.limit})")
        log.warning("%s: step skipped (%d of %d)", message, self.progress.skipped, self.limit)

    def _dump(
        self, step: _Step, names: list[str], values: dict[str, float], tensors: dict[str, Tensor]
    ) -> str:
        """OUTPUT/nonfinite-STEP-rank-K.json and .safetensors; gives the words that name them.

        A full disk hides no message.
        """
        if self._dumps >= MAX_DUMPS:
            return ""
        self._dumps += 1
        path = self.output / f"nonfinite-{step.number}-rank-{self.accelerator.process_index}.json"
        numbers = {
            name: value if math.isfinite(value) else str(value) for name, value in values.items()
        }
        record = {"step": step.number, "not_finite": names, **step.strings, "numbers": numbers}
        try:
            path.write_text(json.dumps(record, indent=1) + "\n")
            if tensors:
                path = path.with_suffix(".safetensors")
                save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, path)
        except Exception as error:  # safetensors has a class of its own for what the system refuses
            return f" (its batch could not be written: {error})"
        return f"; batch in {path}"


def _joined_tensors(micro: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The tensors of a step's batches by name, one batch after another.

    Batches may be of several kinds: a name holds those of the batches that have it.
    """
    if len(micro) == 1:
        return {name: value for name, value in micro[0].items() if isinstance(value, Tensor)}
    names = _names(micro, Tensor)
    return {name: torch.cat([batch[name] for batch in micro if name in batch]) for name in names}


def _joined_strings(micro: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The lists of strings (keys, captions) of a step's batches by name."""
    names = _names(micro, list)
    return {name: [text for batch in micro for text in batch.get(name, ())] for name in names}


def _names(micro: list[dict[str, Any]], kind: type) -> dict[str, None]:
    """Names of the entries of this type, in order, each once."""
    return dict.fromkeys(
        name for batch in micro for name, value in batch.items() if isinstance(value, kind)
    )


def _step_unless(optimizer: torch.optim.Optimizer, skip: Tensor | None) -> None:
    """Step; a fused optimizer leaves everything as it is where `skip` is above 0."""
    if skip is None:
        optimizer.step()
        return
    optimizer.found_inf = (skip > 0).float()  # what torch's GradScaler gives a fused optimizer
    optimizer.step()
    del optimizer.found_inf
