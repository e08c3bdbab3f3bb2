"""Training for a time instead of a number of steps, and the faster precision of this machine.

The demo runs on machines of any speed, which other programs use as well. A number of steps that is
planned from the first steps' time is wrong as soon as that changes, so the clock decides: where the
learning rate stands in its schedule, and when the stage ends.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from muse.config import resolved
from muse.models.muse_vit import MUSE_ViT
from muse.training.optim import lr_at
from muse.training.tokenizer_task import TokenizerTask
from muse.training.trainer import Trainer
from muse.utils.io import write_text

log = logging.getLogger(__name__)

FINEST = 10_000  # parts of the time that the schedule of the learning rate knows
LEAST_STEPS = 20  # of a stage, however slow the machine is
PRECISIONS = ("no", "bf16")
TRIAL_PICTURES = 4
CLEAR = 2.0  # times as slow: further passes would only cost time


class TimedTrainer(Trainer):
    """A run that ends after so many seconds, or at `training.max_train_steps` if that comes first.

    The learning rate follows the share of the time that has passed (its warm-up still counts
    steps), so it ends where the schedule ends on any machine. The seconds begin with the first
    step: networks that load and a checkpoint that is read do not count.

    Args:
        cfg: the run's configuration.
        task: what is trained.
        seconds: how long.
        clock: gives the time in seconds.
    """

    def __init__(
        self,
        cfg: DictConfig,
        task: TokenizerTask,
        seconds: float,
        clock: Callable[[], float] = time.perf_counter,
    ):
        super().__init__(cfg, task)
        self.seconds, self.clock = seconds, clock
        self.began: float | None = None
        self._rate = (-1, 0.0)  # of the latest step, so that the log has the one that was used

    def share(self) -> float:
        """The share of the time that has passed, 0 before the first step, 1 at most."""
        if self.began is None:
            self.began = self.clock()
        return min(1.0, (self.clock() - self.began) / max(self.seconds, 1e-9))

    def finished(self) -> bool:
        """Whether the time is over or all steps are taken; never before LEAST_STEPS."""
        if super().finished():
            return True
        over = self.share() >= 1.0 and self.progress.step >= LEAST_STEPS
        if over:
            self.guard.settle()
        return over

    def _lr(self, step: int) -> float:
        options = self.cfg.lr_scheduler.params
        rate = self.cfg.optimizer.params.learning_rate
        if step < options.warmup_steps:
            return super()._lr(step)
        if step != self._rate[0]:
            self._rate = (step, self._rate_now(options, rate))
        return self._rate[1]

    def _rate_now(self, options: Any, rate: float) -> float:
        return lr_at(
            round(self.share() * (FINEST - 1)),
            base=rate,
            end=min(options.end_lr, rate),
            warmup=0,
            total=FINEST,
            hold_fraction=options.hold_fraction,
            schedule=self.cfg.lr_scheduler.scheduler,
        )


def train_for(cfg: DictConfig, seconds: float) -> int:
    """Train a stage for so many seconds; gives the number of steps that it took.

    The run's config.yaml then names that number, so that the configuration says what was done.
    """
    trainer = TimedTrainer(cfg, TokenizerTask(cfg), seconds)
    trainer.run()
    steps = trainer.progress.step
    done: dict[str, Any] = resolved(cfg)
    done["training"]["max_train_steps"] = steps
    file = Path(cfg.experiment.output_dir) / "config.yaml"
    write_text(file, OmegaConf.to_yaml(OmegaConf.create(done)))
    return steps


def fastest_precision(
    cfg: DictConfig, repeats: int = 3, clock: Callable[[], float] = time.perf_counter
) -> str:
    """`no` (float32) or `bf16`: with which a training pass on this CPU takes less time.

    Processors with instructions for bfloat16 train faster with it, others several times slower. The
    best of some passes of each, in turns, so that another program's burst does not decide.

    Args:
        cfg: the model, and the size of a picture.
        repeats: how many passes of each are timed, after one that is not.
        clock: gives the time in seconds.
    """
    side = cfg.dataset.preprocessing.crop_size
    with torch.random.fork_rng(devices=[]):
        model = MUSE_ViT(cfg.model).train()
        images = torch.rand(TRIAL_PICTURES, 3, side, side)
    best = dict.fromkeys(PRECISIONS, float("inf"))
    for repeat in range(repeats + 1):
        for name in PRECISIONS:
            began = clock()
            with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
                out = model(images)
                error = (out.reconstruction.float() - images).square().mean()
            error.backward()
            passed = clock() - began
            if repeat:
                best[name] = min(best[name], passed)
        if repeat and max(best.values()) > CLEAR * min(best.values()):
            break
    chosen = min(best, key=best.get)
    log.info(
        "a pass of %d pictures takes %.2f s in float32 and %.2f s in bfloat16: %s",
        len(images),
        best["no"],
        best["bf16"],
        "bfloat16" if chosen == "bf16" else "float32",
    )
    return chosen
