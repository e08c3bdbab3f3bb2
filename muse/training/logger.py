"""A run's records: `metrics.jsonl` (one JSON object a log step), a progress bar, trackers."""

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm
from typing_extensions import Self

from muse.config import resolved
from muse.inference import read_image
from muse.utils.io import write_text
from muse.utils.viz_utils import to_uint8

log = logging.getLogger(__name__)


class RunLog:
    """A run's log. It drops records of later steps, left by a run killed after its last checkpoint.

    Args:
        cfg: the run's configuration.
        accelerator: reduces numbers over the processes and holds the trackers.
        output: the run's directory.
        step: the step that the run starts at.
    """

    def __init__(self, cfg: DictConfig, accelerator: Any, output: Path, step: int):
        self.cfg, self.accelerator, self.main = cfg, accelerator, accelerator.is_main_process
        self.path, self.every = output / "metrics.jsonl", cfg.experiment.log_every
        self._clock, self._images, self._waited, self._seen = time.perf_counter(), None, 0.0, step
        self._kept: dict[str, Tensor] = {}
        if self.main:
            self._keep_until(step)
        shown = self.main and not os.environ.get("TQDM_DISABLE")
        terminal = sys.stderr.isatty()
        self._lines = shown and not terminal  # a bar in a file is a line for every redrawing
        self._bar = tqdm(
            total=cfg.training.max_train_steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            mininterval=2.0,
            desc=cfg.experiment.name,
            disable=not (shown and terminal),
        )

    def __enter__(self) -> Self:
        if self.cfg.experiment.tracker != "none":
            self.accelerator.init_trackers(
                self.cfg.experiment.name, config=_flat(resolved(self.cfg))
            )
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self.cfg.experiment.tracker != "none":
            self.accelerator.end_training()

    def step(
        self,
        step: int,
        images: int,
        numbers: dict[str, Tensor],
        waited: float,
        lr: float | Mapping[str, float],
    ) -> None:
        """Count a step; on a log step read the numbers from the device and write them.

        Args:
            step: steps done.
            images: images seen since the run began.
            numbers: the step's numbers. Those with a `/` in their name (norms by module, made now
                and then) stay on the device until the next log step.
            waited: seconds spent on the batch.
            lr: the rate, or rates by name (`lr`, `lr/discriminator`).
        """
        self._bar.update(1)
        self._waited += waited
        self._kept.update({name: value for name, value in numbers.items() if "/" in name})
        if self._images is None:
            self._images, self._seen = images, step
        if step % self.every and step != self.cfg.training.max_train_steps:
            return
        now = time.perf_counter()
        passed, steps = now - self._clock, max(1, step - self._seen)
        values = self._over_processes({**self._kept, **numbers})
        rate, waited = (
            (images - self._images) / passed if images > self._images else 0.0,
            self._waited / steps,
        )
        record = {
            "images": images,
            **values,
            **(dict(lr) if isinstance(lr, Mapping) else {"lr": lr}),
            "images_per_s": round(rate, 2),
            "data_time": round(waited, 4),
            "memory_gb": round(memory_in_use(self.accelerator.device) / 1e9, 3),
        }
        words = (
            f"loss {values.get('loss', float('nan')):.4f}, {rate:.1f} images/s, data {waited:.2f} s"
        )
        self._bar.set_postfix_str(words, refresh=False)
        if self._lines:
            log.info("step %d of %d: %s", step, self.cfg.training.max_train_steps, words)
        self.record(step, record)
        self._clock, self._images, self._waited, self._seen, self._kept = now, images, 0.0, step, {}

    def _over_processes(self, numbers: dict[str, Tensor]) -> dict[str, float]:
        """The numbers' means over all processes, which each saw its own part of the batch."""
        stacked = torch.stack([value.detach().float().reshape(()) for value in numbers.values()])
        if self.accelerator.num_processes > 1:
            stacked = self.accelerator.reduce(stacked, reduction="mean")
        return dict(zip(numbers, stacked.tolist()))

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Append one object to `metrics.jsonl` and tell the trackers."""
        if not self.main:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.cfg.experiment.tracker != "none":
            self.accelerator.log(_flat(values), step=step)

    def picture(self, step: int, name: str, image: Tensor | str | Path) -> None:
        """Show a picture in the tracker, if there is one.

        Args:
            step: the step it belongs to.
            name: its name in the tracker.
            image: (3, H, W) in [0, 1], or the path of a file.
        """
        if not self.main or self.cfg.experiment.tracker == "none":
            return
        pixels = (
            to_uint8(image if isinstance(image, Tensor) else read_image(image))
            .permute(1, 2, 0)
            .numpy()
        )
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: [pixels]}, step=step)

    def _keep_until(self, step: int) -> None:
        if not self.path.exists():
            return
        lines = []
        for line in self.path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    lines.append(line)
            except (
                json.JSONDecodeError,
                KeyError,
            ):  # the last line of a run that was killed while it wrote
                continue
        write_text(self.path, "".join(line + "\n" for line in lines if step > 0))


def memory_in_use(device: torch.device) -> int:
    """Bytes of this process: the peak of its tensors on a GPU, else its resident memory now."""
    return (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else psutil.Process().memory_info().rss
    )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}/"))
        elif (
            value is not None
        ):  # such as the cosine of gradients that share no tensor: there is nothing to draw
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat
