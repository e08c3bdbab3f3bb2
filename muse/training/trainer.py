"""The one loop that trains every stage, on one process or many (accelerate): load, then step, log, evaluate, save.

What a stage trains stands in `stages.py`, what it costs and how fast it learns in the configuration.
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
from torch import Tensor

from muse.analysis.gradients import report_of
from muse.config import plain, resolved
from muse.errors import ConfigError
from muse.losses.muse_loss import MuseLoss
from muse.models.ema_model import EMAModel
from muse.models.loading import initial_model
from muse.models.muse_vit import MUSE_ViT
from muse.stages import STAGES, select_trainable
from muse.training import fsdp
from muse.training.accelerator import build_accelerator
from muse.training.adversary import Adversary
from muse.training.logger import RunLog
from muse.training.nonfinite import FiniteGuard, take_step
from muse.training.optim import (
    build_adamw,
    gradient_norms,
    load_optimizer,
    lr_at,
    parameter_groups,
    set_lr,
)
from muse.training.run_directory import prepare, resume, save_checkpoint, write_final
from muse.training.signals import StopSignal

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> Path:
    """Run one stage to its end (going on where an interrupted run stopped) and return its `final` directory."""
    return Trainer(cfg).run()


class Trainer:
    """Everything that moves in a run, and the loop that moves it."""

    def __init__(self, cfg: DictConfig):
        self.cfg, self.output = cfg, Path(cfg.experiment.output_dir)
        self.accelerator = build_accelerator(cfg)
        self._check_global_batch()
        if self.accelerator.device.type == "cpu":
            torch.set_flush_denormal(True)  # denormals slow a trained decoder threefold on CPUs
        set_seed(cfg.training.seed)  # the same start on every process

        self.model = initial_model(cfg)
        trainable = (
            cfg.training.trainable
            if cfg.training.trainable is not None
            else STAGES[cfg.training.stage].trainable
        )
        names = select_trainable(self.model, trainable)
        self.loss = MuseLoss.from_config(cfg, self.model)
        self.model.to(self.accelerator.device)
        self.loss.to(self.accelerator.device)
        log.info(
            "stage %s trains %d tensors, %.2fM parameters; losses %s",
            cfg.training.stage,
            len(names),
            sum(p.numel() for p in self.model.parameters() if p.requires_grad) / 1e6,
            {name: term.weight for name, term in self.loss.terms.items()},
        )

        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        named += [(f"loss.{name}", p) for name, p in self.loss.heads().items()]
        options = cfg.optimizer.params
        groups = parameter_groups(named, options.weight_decay, plain(cfg.optimizer.lr_multipliers))
        adamw = build_adamw(groups, options.learning_rate, (options.beta1, options.beta2))
        self.student, self.optimizer = fsdp.prepare_student(
            self.accelerator, self.model, adamw, bool(self.loss.heads())
        )
        if self.loss.heads():
            self.loss = self.accelerator.prepare(self.loss)
        self.raw_loss: MuseLoss = self.accelerator.unwrap_model(self.loss)
        self.adversary = (
            Adversary(cfg, self.accelerator) if cfg.losses.adversarial.weight > 0 else None
        )
        self.ema = EMAModel(self.model, cfg.training.ema_decay) if cfg.training.use_ema else None
        from muse.data.dataloader import build_train_loader

        self.loader = build_train_loader(cfg, self.accelerator)
        self.guard = FiniteGuard(
            cfg.training.max_skipped_steps, self.accelerator, self.output, adamw.defaults["fused"]
        )
        self.step, self.images_seen = 0, 0

    # ------------------------------------------------------------------------------------------------ the loop
    def run(self) -> Path:
        """Train to `max_train_steps`; a stop signal saves at the next step boundary and ends the process politely."""
        cfg, every = self.cfg, self.cfg.experiment
        prepare(self)
        resume(self)
        with (
            RunLog(cfg, self.accelerator, self.output, self.step) as run_log,
            StopSignal(self.accelerator) as stop,
        ):
            batches = self._batches()
            while self.step < cfg.training.max_train_steps:
                waited = time.perf_counter()
                micro = [next(batches) for _ in range(cfg.training.gradient_accumulation_steps)]
                waited = time.perf_counter() - waited
                if every.log_grad_every and (self.step + 1) % every.log_grad_every == 0:
                    run_log.record(self.step + 1, {"gradients": report_of(self, micro[-1])})
                numbers = self.train_step(micro)
                stopped = stop.requested()
                if stopped or self._waits_for_the_device():
                    self.settle()
                run_log.step(self.step, self.images_seen, numbers, waited, self._lr(self.step - 1))
                if self._due(every.eval_every):
                    run_log.record(self.step, {"eval": self.evaluate()})
                if self._due(every.generate_every):
                    self.draw(run_log)
                if stopped:
                    self.save()
                    log.warning(
                        "stopped at step %d on a signal; the same command goes on from there",
                        self.step,
                    )
                    raise SystemExit(0)
                if self._due(every.save_every) and self.step < cfg.training.max_train_steps:
                    self.save()
        return write_final(self)

    def train_step(self, micro: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One optimizer step over the micro-batches; gives the numbers of the step by name."""
        cfg, share = self.cfg, 1 / len(micro)
        self.model.train()
        playing = self.adversary is not None and self.adversary.active(self.step)
        sums: dict[str, Tensor] = {}
        kept: list[tuple[Tensor, Tensor]] = []
        for index, batch in enumerate(micro):
            with self._no_sync(last=index == len(micro) - 1):
                out = self.student(batch["images"], **self.raw_loss.needs)
                total, numbers = self.loss(out, batch)
                if playing:
                    term = self.adversary.generator_term(out.reconstruction, self.step)
                    numbers["generator"] = term.detach()
                    total = total + self.adversary.weight * term
                    kept.append((batch["images"], out.reconstruction.detach()))
                numbers["loss"] = total.detach()
                self.accelerator.backward(total * share)
            for name, value in numbers.items():
                sums[name] = sums.get(name, 0) + value * share
        if playing:
            sums.update(self.adversary.accumulate(kept, self.step, share))
        if cfg.experiment.log_grad_every and (self.step + 1) % cfg.experiment.log_grad_every == 0:
            sums.update(gradient_norms(self.model))
        sums["grad_norm"] = self._clip()
        optimizers = [self.optimizer]
        if playing:
            rate = self._lr(self.step, cfg.optimizer.params.discriminator_learning_rate)
            sums["discriminator_grad_norm"] = self.adversary.clip(rate)
            optimizers.append(self.adversary.optimizer)
        numbers = {name: fsdp.number(value) for name, value in sums.items()}
        refused = self.guard.judge(self.step + 1, numbers, micro)
        if refused is not True:  # False, or a flag that the optimizers read
            set_lr(self.optimizer, self._lr(self.step))
            take_step(self.accelerator, optimizers, refused)
            if self.ema:
                self.ema.update()
        if playing and refused is not False:
            self.adversary.take_back(refused)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if refused is not True:
            self.images_seen += (
                sum(len(batch["images"]) for batch in micro) * self.accelerator.num_processes
            )
        return numbers

    # ------------------------------------------------------------------------------------------------ parts of a step
    def _batches(self) -> Iterator[dict[str, Any]]:
        device = self.accelerator.device
        for batch in self.loader:
            yield {**batch, "images": batch["images"].to(device, non_blocking=True)}

    def _no_sync(self, last: bool) -> contextlib.AbstractContextManager:
        """Gradients cross the processes once a step, with the last micro-batch."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.student)

    def _clip(self) -> Tensor:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        limit = self.cfg.training.max_grad_norm or float("inf")
        return fsdp.clip_gradients(self.accelerator, parameters, limit)

    def _lr(self, step: int, base: float | None = None) -> float:
        params, schedule = self.cfg.lr_scheduler.params, self.cfg.lr_scheduler.scheduler
        base = self.cfg.optimizer.params.learning_rate if base is None else base
        return lr_at(
            step,
            base=base,
            end=min(params.end_lr, base),
            warmup=params.warmup_steps,
            total=self.cfg.training.max_train_steps,
            hold_fraction=params.hold_fraction,
            schedule=schedule,
        )

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def _waits_for_the_device(self) -> bool:
        """Whether this step reads something from the device anyway: to log, look, save or finish."""
        every = self.cfg.experiment
        return self.step == self.cfg.training.max_train_steps or any(
            self._due(n)
            for n in (every.log_every, every.eval_every, every.generate_every, every.save_every)
        )

    def settle(self) -> None:
        """Hear of steps that the device refused to take; their images do not count as seen."""
        self.images_seen -= self.guard.settle() * self.accelerator.num_processes

    # ------------------------------------------------------------------------------------------------ looking at it
    @contextlib.contextmanager
    def averaged(self) -> Iterator[MUSE_ViT]:
        """The student with its running means (or its own weights, without EMA), in eval mode."""
        self.model.eval()
        with self.ema.swapped_in() if self.ema else contextlib.nullcontext():
            yield fsdp.plain_copy(self.model, self.accelerator)
        self.model.train()

    def evaluate(self) -> dict[str, float]:
        """PSNR and SSIM of the averaged weights on the evaluation set."""
        if self.raw_loss.needs["encoder_only"]:
            return {}
        from muse.data.dataloader import build_eval_loader
        from muse.evaluation import evaluate_reconstruction

        with self.averaged() as model:
            return evaluate_reconstruction(
                model,
                build_eval_loader(self.cfg, self.accelerator),
                ("psnr", "ssim"),
                device=self.accelerator.device,
            )

    def draw(self, run_log: RunLog | None = None) -> None:
        """Reconstructions and attention of a few evaluation pictures, under OUTPUT/images and in the tracker."""
        alone = not fsdp.is_sharded(self.accelerator)  # else the weights come from every process
        if self.raw_loss.needs["encoder_only"] or (alone and not self.accelerator.is_main_process):
            return
        from muse.data.dataloader import sample_images
        from muse.utils.viz_utils import attention_sheet, reconstruction_sheet, save_image

        images = sample_images(self.cfg, self.cfg.experiment.num_pictures).to(
            self.accelerator.device
        )
        with self.averaged() as model, torch.no_grad():
            if not self.accelerator.is_main_process:
                return
            sheets = {
                "reconstruction": reconstruction_sheet(images, model.reconstruct(images)),
                "attention": attention_sheet(images, model.encode(images, return_attention=True)),
            }
        for name, sheet in sheets.items():
            save_image(sheet, self.output / "images" / f"{name}-{self.step}.png")
            if run_log is not None:
                run_log.picture(self.step, name, sheet)

    # ------------------------------------------------------------------------------------------------ saving
    def save(self) -> Path:
        """Write `checkpoint-STEP` (see `run_directory.py`)."""
        return save_checkpoint(self)

    def state_dict(self) -> dict[str, Any]:
        """All that moves on this run as a whole; each process' own part (generators, data position) is saved beside it.

        All processes call it together: shared-out tensors (FSDP) are made whole.
        """
        return {
            "step": self.step,
            "images_seen": self.images_seen,
            "skipped": self.guard.skipped,
            "ema_step": self.ema.step if self.ema else 0,
            "optimizer": fsdp.whole(self.optimizer.state_dict()),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "heads": {name: p.detach() for name, p in self.raw_loss.heads().items()},
            "adversary": self.adversary.state_dict() if self.adversary else None,
            "processes": self.accelerator.num_processes,
            "config": resolved(self.cfg),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, but for the model's and the averages' own tensors."""
        load_optimizer(self.optimizer, state["optimizer"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.adversary and state["adversary"]:
            self.adversary.load_state_dict(state["adversary"])
        with torch.no_grad():
            for name, parameter in self.raw_loss.heads().items():
                parameter.copy_(state["heads"][name])
        self.step, self.images_seen, self.guard.skipped = (
            state["step"],
            state["images_seen"],
            state["skipped"],
        )

    def _check_global_batch(self) -> None:
        """A recipe is images as much as steps: what the configuration promises must be what these processes do."""
        training, processes = self.cfg.training, self.accelerator.num_processes
        actual = training.per_gpu_batch_size * training.gradient_accumulation_steps * processes
        if training.global_batch_size not in (None, actual):
            raise ConfigError(
                f"training.global_batch_size={training.global_batch_size} but {training.per_gpu_batch_size} per "
                f"process x {training.gradient_accumulation_steps} accumulated x {processes} processes = {actual}"
            )
        images = actual * training.max_train_steps
        if training.total_images not in (None, images):
            raise ConfigError(
                f"training.total_images={training.total_images} but {actual} a step x {training.max_train_steps} steps = "
                f"{images}"
            )
        log.info(
            "%d images a step over %d processes, %d in %d steps",
            actual,
            processes,
            images,
            training.max_train_steps,
        )
