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
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from muse.config import plain, resolved
from muse.errors import CheckpointError, ConfigError, MuseError
from muse.losses.muse_loss import MuseLoss
from muse.models.base_model import atomic_directory, write_weights
from muse.models.ema_model import EMAModel
from muse.models.loading import EMA_FILE, initial_model
from muse.models.muse_vit import MUSE_ViT
from muse.training import checkpoint as ckpt
from muse.training.adversary import Adversary
from muse.training.lr_schedulers import lr_at
from muse.training.optim import build_adamw, parameter_groups, select_trainable, set_lr
from muse.training.stages import STAGES
from muse.utils.distributed import StopSignal, build_accelerator
from muse.utils.logger import RunLog

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
        torch.manual_seed(cfg.training.seed)  # the same start on every process

        self.model = initial_model(cfg)
        trainable = cfg.training.trainable if cfg.training.trainable is not None else STAGES[cfg.training.stage].trainable
        names = select_trainable(self.model, trainable)
        self.loss = MuseLoss.from_config(cfg, self.model)
        self.model.to(self.accelerator.device)
        self.loss.to(self.accelerator.device)
        log.info("stage %s trains %d tensors, %.2fM parameters; losses %s", cfg.training.stage, len(names),
                 sum(p.numel() for p in self.model.parameters() if p.requires_grad) / 1e6,
                 {name: term.weight for name, term in self.loss.terms.items()})

        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        named += [(f"loss.{name}", p) for name, p in self.loss.heads().items()]
        options = cfg.optimizer.params
        groups = parameter_groups(named, options.weight_decay, plain(cfg.optimizer.lr_multipliers))
        adamw = build_adamw(groups, options.learning_rate, (options.beta1, options.beta2))
        self.student, self.optimizer = self.accelerator.prepare(self.model, adamw)
        if self.loss.heads():
            self.loss = self.accelerator.prepare(self.loss)
        self.raw_loss: MuseLoss = self.accelerator.unwrap_model(self.loss)
        self.adversary = Adversary(cfg, self.accelerator) if cfg.losses.adversarial.weight > 0 else None
        self.ema = EMAModel(self.model, cfg.training.ema_decay) if cfg.training.use_ema else None
        from muse.training.data import build_train_loader

        self.loader = build_train_loader(cfg, self.accelerator)
        self.step, self.images_seen, self.skipped = 0, 0, 0

    # ------------------------------------------------------------------------------------------------ the loop
    def run(self) -> Path:
        """Train to `max_train_steps`; a stop signal saves at the next step boundary and ends the process politely."""
        cfg, every = self.cfg, self.cfg.experiment
        self._prepare_output()
        self._resume()
        with RunLog(cfg, self.accelerator, self.output, self.step) as run_log, StopSignal() as stop:
            batches = self._batches()
            while self.step < cfg.training.max_train_steps:
                waited = time.perf_counter()
                micro = [next(batches) for _ in range(cfg.training.gradient_accumulation_steps)]
                waited = time.perf_counter() - waited
                numbers = self.train_step(micro)
                run_log.step(self.step, self.images_seen, numbers, waited, self._lr(self.step - 1))
                if every.eval_every and self.step % every.eval_every == 0:
                    run_log.record(self.step, {"eval": self.evaluate()})
                if every.generate_every and self.step % every.generate_every == 0:
                    self.draw()
                if stop.requested(self.accelerator):
                    self.save()
                    log.warning("stopped at step %d on a signal; the same command goes on from there", self.step)
                    raise SystemExit(0)
                if every.save_every and self.step % every.save_every == 0 and self.step < cfg.training.max_train_steps:
                    self.save()
        return self._finish()

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
                if not self._finite(numbers, micro):
                    return self._skip(numbers)
                self.accelerator.backward(total * share)
            for name, value in numbers.items():
                sums[name] = sums.get(name, 0) + value * share
        if playing:
            for images, reconstruction in kept:
                for name, value in self.adversary.accumulate(images, reconstruction, self.step, share).items():
                    sums[name] = sums.get(name, 0) + value * share
            self.adversary.step(self._lr(self.step, cfg.optimizer.params.discriminator_learning_rate))
        sums["grad_norm"] = self._clip()
        if not self._finite({"grad_norm": sums["grad_norm"]}, micro):
            return self._skip(sums)
        set_lr(self.optimizer, self._lr(self.step))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update()
        self._count(micro)
        return sums

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
        return torch.as_tensor(self.accelerator.clip_grad_norm_(parameters, limit)).detach()

    def _lr(self, step: int, base: float | None = None) -> float:
        params, schedule = self.cfg.lr_scheduler.params, self.cfg.lr_scheduler.scheduler
        base = self.cfg.optimizer.params.learning_rate if base is None else base
        return lr_at(step, base=base, end=min(params.end_lr, base), warmup=params.warmup_steps,
                     total=self.cfg.training.max_train_steps, hold_fraction=params.hold_fraction, schedule=schedule)

    def _finite(self, numbers: dict[str, Tensor], micro: list[dict[str, Any]]) -> bool:
        """Whether the step may be taken. A number that is not finite stops the run by name, or is skipped while it may be."""
        scaled = self.cfg.training.mixed_precision == "fp16" and "grad_norm" in numbers  # the scaler handles those itself
        bad = [] if scaled else [name for name, value in numbers.items() if not bool(torch.isfinite(value).all())]
        flag = torch.tensor(float(bool(bad)), device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            flag = self.accelerator.reduce(flag, reduction="sum")  # all processes skip, or none
        if not flag:
            return True
        keys = [key for batch in micro for key in batch["keys"]]
        self.skipped += 1
        message = (f"{', '.join(bad) or 'a number of another process'} is not finite at step {self.step + 1}; "
                   f"samples {', '.join(keys[:8])}{' …' if len(keys) > 8 else ''}")
        if self.skipped > self.cfg.training.max_skipped_steps:
            raise MuseError(f"{message} (training.max_skipped_steps={self.cfg.training.max_skipped_steps})")
        log.warning("%s: step skipped (%d of %d)", message, self.skipped, self.cfg.training.max_skipped_steps)
        return False

    def _skip(self, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        if self.adversary:
            self.adversary.optimizer.zero_grad(set_to_none=True)
        self._count([])
        return numbers

    def _count(self, micro: list[dict[str, Any]]) -> None:
        self.step += 1
        self.images_seen += sum(len(batch["images"]) for batch in micro) * self.accelerator.num_processes

    # ------------------------------------------------------------------------------------------------ looking at it
    @contextlib.contextmanager
    def averaged(self) -> Iterator[MUSE_ViT]:
        """The student with its running means (or its own weights, without EMA), in eval mode."""
        self.model.eval()
        with self.ema.swapped_in() if self.ema else contextlib.nullcontext():
            yield self.model
        self.model.train()

    def evaluate(self) -> dict[str, float]:
        """PSNR and SSIM of the averaged weights on the evaluation set."""
        if self.raw_loss.needs["encoder_only"]:
            return {}
        from muse.evaluation import evaluate_reconstruction
        from muse.training.data import build_eval_loader

        with self.averaged() as model:
            return evaluate_reconstruction(model, build_eval_loader(self.cfg, self.accelerator), ("psnr", "ssim"),
                                           device=self.accelerator.device)

    def draw(self) -> None:
        """Reconstructions and attention of a few evaluation pictures, under OUTPUT/images."""
        if self.raw_loss.needs["encoder_only"] or not self.accelerator.is_main_process:
            return
        from muse.training.data import sample_images
        from muse.utils.viz_utils import attention_sheet, reconstruction_sheet, save_image

        images = sample_images(self.cfg, self.cfg.experiment.num_pictures).to(self.accelerator.device)
        with self.averaged() as model, torch.no_grad():
            save_image(reconstruction_sheet(images, model.reconstruct(images)), self.output / "images" / f"reconstruction-{self.step}.png")
            save_image(attention_sheet(images, model.encode(images, return_attention=True)),
                       self.output / "images" / f"attention-{self.step}.png")

    # ------------------------------------------------------------------------------------------------ saving
    def save(self) -> Path:
        """Write `checkpoint-STEP`; every process writes its own part, then the main one renames the folder."""
        target, main = self.output / f"checkpoint-{self.step}", self.accelerator.is_main_process
        partial = self.output / f".partial-{self.step}"
        if main:
            partial.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        ckpt.write_tree(partial, f"rank-{self.accelerator.process_index}",
                        {"rng": ckpt.rng_state(), "loader": self.loader.state_dict()})
        self.accelerator.wait_for_everyone()
        if main:
            with atomic_directory(target) as folder:
                write_weights(folder, self.model.state_dict(), self.model.portable_config())
                if self.ema:
                    from safetensors.torch import save_file

                    save_file({k: v.cpu() for k, v in self.ema.state_dict().items()}, folder / EMA_FILE)
                ckpt.write_tree(folder, "state", self._state())
                for file in partial.iterdir():
                    file.rename(folder / file.name)
            partial.rmdir()
            ckpt.prune(self.output, self.cfg.experiment.keep_last, self.cfg.experiment.keep_every)
        self.accelerator.wait_for_everyone()
        return target

    def _state(self) -> dict[str, Any]:
        return {"step": self.step, "images_seen": self.images_seen, "skipped": self.skipped,
                "ema_step": self.ema.step if self.ema else 0, "optimizer": self.optimizer.state_dict(),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
                "heads": {name: p.detach() for name, p in self.raw_loss.heads().items()},
                "adversary": self.adversary.state_dict() if self.adversary else None,
                "processes": self.accelerator.num_processes, "config": resolved(self.cfg)}

    def _resume(self) -> None:
        """Go on from the newest checkpoint of the output directory, if there is one and `experiment.resume` allows it."""
        path = ckpt.latest(self.output) if self.cfg.experiment.resume else None
        if path is None:
            return
        from muse.models.base_model import WEIGHTS_FILE, load_weights, read_weights

        state = ckpt.read_tree(path, "state")
        if state["config"]["model"] != resolved(self.cfg)["model"] or state["config"]["training"]["stage"] != self.cfg.training.stage:
            raise ConfigError(f"{path}: was written by another model or stage; choose another experiment.output_dir, or "
                              "experiment.resume=false to start over")
        load_weights(self.model, read_weights(path / WEIGHTS_FILE), str(path))
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.load_state_dict(read_weights(path / EMA_FILE), state["ema_step"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.adversary and state["adversary"]:
            self.adversary.load_state_dict(state["adversary"])
        with torch.no_grad():
            for name, parameter in self.raw_loss.heads().items():
                parameter.copy_(state["heads"][name])
        self.step, self.images_seen, self.skipped = state["step"], state["images_seen"], state["skipped"]
        rank = self.accelerator.process_index
        if (path / f"rank-{rank}.json").is_file():
            mine = ckpt.read_tree(path, f"rank-{rank}")
            self.loader.load_state_dict(mine["loader"])
            ckpt.set_rng_state(mine["rng"])
        log.info("going on from %s: step %d of %d", path, self.step, self.cfg.training.max_train_steps)

    def _prepare_output(self) -> None:
        if not self.accelerator.is_main_process:
            return
        from muse.utils.cli import writable_directory

        writable_directory(self.output / "images")
        text = OmegaConf.to_yaml(OmegaConf.create(resolved(self.cfg)))
        (self.output / "config.yaml").write_text(text)

    def _finish(self) -> Path:
        final = self.output / "final"
        if not (self.output / f"checkpoint-{self.step}").is_dir():
            self.save()
        if self.accelerator.is_main_process:
            with self.averaged() as model:
                model.save_pretrained(final)
            log.info("done: %d steps, %d images; weights in %s", self.step, self.images_seen, final)
        self.accelerator.wait_for_everyone()
        return final

    def _check_global_batch(self) -> None:
        training, processes = self.cfg.training, self.accelerator.num_processes
        actual = training.per_gpu_batch_size * training.gradient_accumulation_steps * processes
        if training.global_batch_size not in (None, actual):
            raise ConfigError(f"training.global_batch_size={training.global_batch_size} but {training.per_gpu_batch_size} per "
                              f"process x {training.gradient_accumulation_steps} accumulated x {processes} processes = {actual}")
