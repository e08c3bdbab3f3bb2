"""Numbers that are not finite: the optimizers never step on one, and the run says which, at which step, of which samples.

On a CPU every step is judged at once. On an accelerator asking costs a wait for the device, so there the judgement stays on it: a flag
makes the fused optimizers leave everything as it is, and `settle` reads the flags of all steps since, where the run waits anyway
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

log = logging.getLogger(__name__)

MAX_DUMPS = 10  # files of one process; a run that may skip thousands of steps should not fill the disk with them


class _Step(NamedTuple):
    """What is remembered of a step until it is settled; tensors are on the device, the batch's strings on the host."""

    number: int
    names: list[str]
    values: Tensor  # (K,) float32
    anywhere: Tensor  # () float32, above 0 where some process has a number that is not finite
    keys: list[str]
    text: list[str]


class FiniteGuard:
    """Judges the numbers of each step. `skipped` counts the steps not taken; beyond `limit` the run stops with `MuseError`.

    lazy: leave the judgement on the device (None: wherever the device is no CPU and the optimizer is fused, which honours the flag).
    """

    def __init__(
        self, limit: int, accelerator: Any, output: Path, fused: bool, lazy: bool | None = None
    ):
        self.limit, self.accelerator, self.output = limit, accelerator, output
        self.lazy = (fused and accelerator.device.type != "cpu") if lazy is None else lazy
        self.skipped, self._dumps = 0, 0
        self._waiting: list[_Step] = []
        self._images: Tensor | None = None  # of the first bad step among those that wait
        self._bad: Tensor | None = None  # () float32, above 0 once one of them is bad

    def judge(
        self, number: int, numbers: dict[str, Tensor], micro: list[dict[str, Any]]
    ) -> Tensor | bool:
        """Whether step `number` must not be taken: True or False, or a flag on the device, () float32, where it is not asked yet."""
        # Gradients that overflow in fp16 are the scaler's business: it leaves the step out and lowers its scale.
        names = [
            name for name in numbers if self.accelerator.scaler is None or "grad_norm" not in name
        ]
        values = torch.stack([numbers[name].detach().float().reshape(()) for name in names])
        anywhere = (~values.isfinite()).any().float()
        if self.accelerator.num_processes > 1:
            anywhere = self.accelerator.reduce(
                anywhere, reduction="sum"
            )  # all processes skip, or none
        step = _Step(
            number,
            names,
            values,
            anywhere,
            [key for batch in micro for key in batch["keys"]],
            [text for batch in micro for text in batch["text"]],
        )
        if self.lazy:
            images = torch.cat([batch["images"] for batch in micro])
            # Pictures of one step only are kept: those of the first bad one, chosen on the device.
            if not self._waiting or self._images.shape != images.shape:
                self._images, self._bad = images, anywhere
            else:
                self._images = torch.where((anywhere > 0) & (self._bad == 0), images, self._images)
                self._bad = self._bad + anywhere
            self._waiting.append(step)
            return anywhere
        if not anywhere:
            return False
        self._refuse(step, torch.cat([batch["images"] for batch in micro]))
        return True

    def settle(self) -> int:
        """Read the flags of the steps that wait; gives how many images of this process were in those not taken. Waits for the device."""
        waiting, self._waiting = self._waiting, []
        images, self._images = self._images, None
        if not waiting:
            return 0
        flags = torch.stack([step.anywhere for step in waiting]).tolist()
        bad = [step for step, flag in zip(waiting, flags) if flag > 0]
        for step in bad:
            self._refuse(step, images)
            images = None
        return sum(len(step.keys) for step in bad)

    def _refuse(self, step: _Step, images: Tensor | None) -> None:
        """Dump the batch, then stop the run or count the step as skipped."""
        values = dict(zip(step.names, step.values.tolist()))
        names = [name for name, value in values.items() if not math.isfinite(value)]
        terms = [
            name for name in names if "grad_norm" not in name
        ]  # where a loss is broken its gradients say nothing new
        self.skipped += 1
        message = (
            f"{', '.join(terms or names) or 'a number of another process'} is not finite at step {step.number}; samples "
            f"{', '.join(step.keys[:8])}{' …' if len(step.keys) > 8 else ''}{self._dump(step, names, values, images)}"
        )
        if self.skipped > self.limit:
            raise MuseError(f"{message} (training.max_skipped_steps={self.limit})")
        log.warning("%s: step skipped (%d of %d)", message, self.skipped, self.limit)

    def _dump(
        self, step: _Step, names: list[str], values: dict[str, float], images: Tensor | None
    ) -> str:
        """OUTPUT/nonfinite-STEP-rank-K.json and .safetensors; gives the words that name them. A full disk hides no message."""
        if self._dumps >= MAX_DUMPS:
            return ""
        self._dumps += 1
        path = self.output / f"nonfinite-{step.number}-rank-{self.accelerator.process_index}.json"
        record = {
            "step": step.number,
            "not_finite": names,
            "keys": step.keys,
            "text": step.text,
            "numbers": {
                name: value if math.isfinite(value) else str(value)
                for name, value in values.items()
            },
        }
        try:
            path.write_text(json.dumps(record, indent=1) + "\n")
            if images is not None:
                save_file(
                    {"images": images.detach().cpu().contiguous()}, path.with_suffix(".safetensors")
                )
        except (
            Exception
        ) as error:  # safetensors has an error class of its own for what the system refuses
            return f" (its batch could not be written: {error})"
        return f"; batch in {path if images is None else path.with_suffix('.safetensors')}"


def take_step(accelerator: Any, optimizers: list[Any], flag: Tensor | bool) -> None:
    """Step all optimizers; where `flag` is a tensor that holds more than 0 they leave everything as it is, without asking the device.

    Gradients were unscaled before (to clip them); one scaler serves all, and is updated once.
    """
    scaler = accelerator.scaler
    for optimizer in optimizers:
        inner = optimizer.optimizer  # accelerate's wrapper would update the scaler after each
        if scaler is not None:
            scaler.step(inner)
        elif isinstance(flag, Tensor):
            inner.found_inf = (flag > 0).float()  # what torch's GradScaler gives a fused optimizer
            inner.step()
            del inner.found_inf
        else:
            inner.step()
    if scaler is not None:
        scaler.update()
