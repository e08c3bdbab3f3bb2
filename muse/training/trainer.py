"""The one loop that trains every task, on one process or many (accelerate): step, log, look, save.

What is trained, on what and towards what is a `TrainingTask` (see `task.py`); rates, steps and
intervals stand in the configuration.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from omegaconf import DictConfig
from torch import Tensor, nn

from muse.models.ema_model import EMAModel
from muse.training import fsdp
from muse.training.accelerator import build_accelerator, find_unused_parameters
from muse.training.checkpointer import Checkpointer
from muse.training.logger import RunLog
from muse.training.nonfinite import FiniteGuard
from muse.training.optim import (
    build_adamw,
    gradient_norms,
    parameter_groups,
    scheduled_lr,
    set_lr,
)
from muse.training.progress import Progress, check_global_batch
from muse.training.signals import StopSignal
from muse.training.task import TrainingTask
from muse.utils.viz_utils import save_image

log = logging.getLogger(__name__)


class Trainer:
    """Everything that moves in a run, and the loop that moves it."""

    def __init__(self, cfg: DictConfig, task: TrainingTask):
        self.cfg, self.task, self.output = cfg, task, Path(cfg.experiment.output_dir)
        self.accelerator = build_accelerator(cfg)
        check_global_batch(cfg, self.accelerator.num_processes)
        if self.accelerator.device.type == "cpu":
            torch.set_flush_denormal(True)  # denormals slow a trained decoder threefold on CPUs
        set_seed(cfg.training.seed)  # the same start on every process

        self.model = task.build(self.accelerator)
        find_unused_parameters(self.accelerator, cfg, task.leaves_tensors_unused())
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        named += [(f"loss.{name}", p) for name, p in task.loss_parameters().items()]
        options = cfg.optimizer.params
        groups = parameter_groups(
            named, options.weight_decay, cfg.optimizer.lr_multipliers, cfg.optimizer.no_decay
        )
        adamw = build_adamw(groups, options.learning_rate, (options.beta1, options.beta2))
        self.wrapped, self.optimizer = fsdp.prepare_model(self.accelerator, self.model, adamw)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        task.prepare()
        # What a step draws (stochastic depth) is another on every process.
        set_seed(cfg.training.seed, device_specific=True)

        self.ema = EMAModel(self.model, cfg.training.ema_decay) if cfg.training.use_ema else None
        self.loader, self.progress = task.train_loader(), Progress()
        self.guard = FiniteGuard(
            cfg.training.max_skipped_steps,
            self.progress,
            self.accelerator,
            self.output,
            adamw.defaults["fused"],
        )
        self.checkpointer = Checkpointer(
            cfg,
            self.accelerator,
            model=self.model,
            averages=self.ema,
            optimizer=self.optimizer,
            task=task,
            loader=self.loader,
            progress=self.progress,
        )

    # ------------------------------------------------------------------------------- the loop
    def run(self) -> Path:
        """Train to `max_train_steps`; gives the `final` directory.

        A stop signal saves at the next step boundary and ends the process with status 0.
        """
        accumulated = self.cfg.training.gradient_accumulation_steps
        self.checkpointer.open()
        self.checkpointer.restore()
        with (
            RunLog(self.cfg, self.accelerator, self.output, self.progress.step) as run_log,
            StopSignal(self.accelerator) as stop,
        ):
            batches = self.batches()
            while not self.finished():
                began = time.perf_counter()
                micro = [next(batches) for _ in range(accumulated)]
                waited = time.perf_counter() - began
                if self._reports_gradients():
                    report = {"gradients": self.gradient_report(micro[-1])}
                    run_log.record(self.progress.step + 1, report)
                numbers = self.train_step(micro)
                stopped = stop.requested()
                if stopped or self._waits_for_the_device():
                    self.guard.settle()
                rate = self._lr(self.progress.step - 1)
                run_log.step(self.progress.step, self.progress.images_seen, numbers, waited, rate)
                self._look(run_log)
                if stopped:
                    self.checkpointer.save()
                    log.warning(
                        "stopped at step %d on a signal; the same command goes on from there",
                        self.progress.step,
                    )
                    raise SystemExit(0)
                if self._due(self.cfg.experiment.save_every) and not self.finished():
                    self.checkpointer.save()
            final = self.checkpointer.write_final()
        self._log_the_end(final)
        return final

    def finished(self) -> bool:
        """Whether the run has taken all of its steps."""
        return self.progress.step >= self.cfg.training.max_train_steps

    def train_step(self, micro: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One optimizer step over the micro-batches; gives the numbers of the step by name."""
        step, share = self.progress.step, 1 / len(micro)
        opponents = [each for each in self.task.opponents if each.active(step)]
        numbers: dict[str, Tensor] = {}
        self.model.train()

        # Forward and backward. Gradients cross the processes once, with the last micro-batch.
        for index, batch in enumerate(self.task.look_ahead(self.wrapped, micro)):
            with self._sync_gradients(last=index == len(micro) - 1):
                loss, terms = self.task.compute_loss(self.wrapped, batch, step)
                self.accelerator.backward(loss * share)
            for name, value in {**terms, "loss": loss.detach()}.items():
                numbers[name] = numbers.get(name, 0) + value * share
        for opponent in opponents:
            numbers.update(opponent.backward(step))

        # Clip.
        self.accelerator.unscale_gradients()
        if self._reports_gradients():
            numbers.update(gradient_norms(self.model))
        limit = self.cfg.training.max_grad_norm or float("inf")
        numbers["grad_norm"] = fsdp.clip_gradients(self.parameters, limit)
        for opponent in opponents:
            norm = fsdp.clip_gradients(opponent.parameters, limit)
            numbers[f"{opponent.name}_grad_norm"] = norm

        # Step, unless a number is not finite.
        skip = self.guard.judge(step + 1, numbers, micro)
        set_lr(self.optimizer, self._lr(step))
        for opponent in opponents:
            rate = scheduled_lr(self.cfg, step, opponent.learning_rate, opponent.end_lr)
            set_lr(opponent.optimizer, rate)
        optimizers = [self.optimizer, *(opponent.optimizer for opponent in opponents)]
        self.guard.take_step(skip, optimizers, self.ema)
        for opponent in opponents:
            opponent.restore(skip)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

        self.progress.step += 1
        samples = sum(len(batch["keys"]) for batch in micro)
        self.progress.images_seen += samples * self.accelerator.num_processes
        return numbers

    # ---------------------------------------------------------------------------- parts of a step
    def batches(self) -> Iterator[dict[str, Any]]:
        """The loader's batches with their tensors on the device."""
        device = self.accelerator.device
        for batch in self.loader:
            yield {
                name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }

    def _sync_gradients(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def _lr(self, step: int) -> float:
        return scheduled_lr(self.cfg, step, self.cfg.optimizer.params.learning_rate)

    def _due(self, every: int) -> bool:
        return bool(every) and self.progress.step % every == 0

    def _reports_gradients(self) -> bool:
        """Whether the step that comes is one of `log_grad_every`."""
        every = self.cfg.experiment.log_grad_every
        return bool(every) and (self.progress.step + 1) % every == 0

    def _waits_for_the_device(self) -> bool:
        """Whether this step reads from the device anyway: to log, look, save or finish."""
        every = self.cfg.experiment
        return self.progress.step == self.cfg.training.max_train_steps or any(
            self._due(n)
            for n in (every.log_every, every.eval_every, every.generate_every, every.save_every)
        )

    # ------------------------------------------------------------------------------- looking at it
    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model with its running means (without EMA its own weights), in eval mode."""
        self.model.eval()
        with self.ema.swapped_in() if self.ema else contextlib.nullcontext():
            yield fsdp.unsharded(self.model, self.accelerator, self.task.empty_model)
        self.model.train()

    def gradient_report(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The task's report; FSDP gives gradients to its hooks alone, so it gets a copy there."""
        model = fsdp.unsharded(self.model, self.accelerator, self.task.empty_model)
        return self.task.gradient_report(model, batch)

    def evaluate(self) -> dict[str, float]:
        """The task's numbers for the averaged weights."""
        with self.averaged() as model, torch.no_grad():
            return self.task.evaluate(model)

    def draw(self, run_log: RunLog) -> None:
        """The task's pictures, under OUTPUT/images and in the tracker."""
        main = self.accelerator.is_main_process
        if not main and not fsdp.is_sharded(self.accelerator):
            return  # sharded weights come from every process
        with self.averaged() as model, torch.no_grad():
            sheets = self.task.pictures(model) if main else {}
        for name, sheet in sheets.items():
            save_image(sheet, self.output / "images" / f"{name}-{self.progress.step}.png")
            run_log.picture(self.progress.step, name, sheet)

    def _look(self, run_log: RunLog) -> None:
        if self._due(self.cfg.experiment.eval_every):
            run_log.record(self.progress.step, {"eval": self.evaluate()})
        if self._due(self.cfg.experiment.generate_every):
            self.draw(run_log)

    def _log_the_end(self, final: Path) -> None:
        if self.accelerator.is_main_process:
            bad, retries = self.loader.bad.summary(), self.loader.retries
            log.info("data: %s; %d reads were tried again", bad, retries)
            step, images = self.progress.step, self.progress.images_seen
            log.info("done: %d steps, %d images; weights in %s", step, images, final)
