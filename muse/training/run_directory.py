"""OUTPUT of a run: made and proved writable at the start, checkpoints written whole or not at all, resumed from, finished."""

import contextlib
import logging
import shutil
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file

from muse.config import resolved
from muse.errors import ConfigError
from muse.models.loading import EMA_FILE
from muse.models.pretrained import WEIGHTS_FILE, load_weights, read_weights, write_weights
from muse.training import checkpointer, fsdp
from muse.utils.io import atomic_directory, writable_directory

if TYPE_CHECKING:
    from pathlib import Path

    from muse.training.trainer import Trainer

log = logging.getLogger(__name__)


def prepare(run: "Trainer") -> None:
    """The directories and `config.yaml` (resolved), without what a killed run left; `CheckpointError` where nothing can be written."""
    if run.accelerator.is_main_process:
        writable_directory(run.output / "images")
        if left := checkpointer.clean(run.output):
            log.info("removed what an interrupted run had not finished: %s", ", ".join(left))
        with checkpointer.writing(run.output / "config.yaml"):
            (run.output / "config.yaml").write_text(
                OmegaConf.to_yaml(OmegaConf.create(resolved(run.cfg)))
            )


def was_run_with(folder: "Path", cfg: DictConfig) -> bool:
    """Whether a run directory was made with exactly this configuration."""
    file = folder / "config.yaml"
    return file.is_file() and OmegaConf.to_container(OmegaConf.load(file)) == resolved(cfg)


def save_checkpoint(run: "Trainer") -> "Path":
    """Write `checkpoint-STEP`; every process writes its own part, then the main one renames the folder.

    `CheckpointError` where it cannot be written; the checkpoints before it stay whole.
    """
    target, partial = run.output / f"checkpoint-{run.step}", run.output / f".partial-{run.step}"
    state, weights = (
        run.state_dict(),
        fsdp.whole(run.model.state_dict()),
    )  # together: FSDP's tensors are made whole
    means = fsdp.whole(run.ema.state_dict()) if run.ema else None
    with checkpointer.writing(target, partial):
        if run.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        run.accelerator.wait_for_everyone()
        checkpointer.write_tree(
            partial,
            f"rank-{run.accelerator.process_index}",
            {"rng": checkpointer.rng_state(), "loader": run.loader.state_dict()},
        )
        run.accelerator.wait_for_everyone()
        if run.accelerator.is_main_process:
            with atomic_directory(target) as folder, checkpointer.writing(target):
                write_weights(folder, weights, run.model.portable_config())
                if means is not None:
                    save_file({name: mean.cpu() for name, mean in means.items()}, folder / EMA_FILE)
                checkpointer.write_tree(folder, "state", state)
                for file in partial.iterdir():
                    file.rename(folder / file.name)
            partial.rmdir()
            checkpointer.prune(
                run.output, run.cfg.experiment.keep_last, run.cfg.experiment.keep_every
            )
    run.accelerator.wait_for_everyone()
    return target


def resume(run: "Trainer") -> None:
    """Go on from the newest checkpoint of the output directory; `ConfigError` if there is one and `experiment.resume` is false."""
    path = checkpointer.latest(run.output)
    if path is None:
        return
    if not run.cfg.experiment.resume:
        raise ConfigError(
            f"{run.output}: holds checkpoints of an earlier run and experiment.resume=false; choose another "
            "experiment.output_dir, or remove them"
        )
    state, mine = checkpointer.read_tree(path, "state"), resolved(run.cfg)
    if (
        state["config"]["model"] != mine["model"]
        or state["config"]["training"]["stage"] != run.cfg.training.stage
    ):
        raise ConfigError(
            f"{path}: was written by another model or stage; choose another experiment.output_dir, or "
            "remove its checkpoints to start over"
        )
    own = run.model.state_dict()
    weights = {
        name: fsdp.like(own.get(name), tensor)
        for name, tensor in read_weights(path / WEIGHTS_FILE).items()
    }
    load_weights(run.model, weights, str(path))
    run.load_state_dict(state)
    if run.ema:
        run.ema.load_state_dict(_averages(run, path), state["ema_step"])
    _resume_rank(run, path, state["processes"])
    log.info("going on from %s: step %d of %d", path, run.step, run.cfg.training.max_train_steps)


def _averages(run: "Trainer", path: "Path") -> dict:
    own = run.ema.state_dict()
    return {
        name: fsdp.like(own.get(name), mean) for name, mean in read_weights(path / EMA_FILE).items()
    }


def _resume_rank(run: "Trainer", path: "Path", processes: int) -> None:
    """The generators and the data position of this process; exact with as many processes as wrote the checkpoint.

    With another number every process takes the first one's position: the data go on with the next epoch, complete and shared out anew.
    """
    index, now = run.accelerator.process_index, run.accelerator.num_processes
    if processes == now:
        part = checkpointer.read_tree(path, f"rank-{index}")
        checkpointer.set_rng_state(part["rng"])
    else:
        log.warning(
            "%s was written by %d processes and goes on with %d: weights, averages, optimizers and schedule are exact; the data "
            "go on with the next epoch, generators of the processes start anew",
            path.name,
            processes,
            now,
        )
        part = checkpointer.read_tree(path, "rank-0")
    run.loader.load_state_dict(part["loader"])


def write_final(run: "Trainer") -> "Path":
    """The last checkpoint, if it is not there yet, and `final/`: the averaged weights, as `from_pretrained` reads them."""
    final = run.output / "final"
    if not (run.output / f"checkpoint-{run.step}").is_dir():
        save_checkpoint(run)
    with run.ema.swapped_in() if run.ema else contextlib.nullcontext():
        weights = fsdp.whole(run.model.state_dict())
        if run.accelerator.is_main_process:
            with (
                checkpointer.writing(final),
                atomic_directory(final) as folder,
                checkpointer.writing(final),
            ):
                write_weights(folder, weights, run.model.portable_config())
    if run.accelerator.is_main_process:
        log.info(
            "data: %s; %d reads were tried again", run.loader.bad.summary(), run.loader.retries
        )
        log.info("done: %d steps, %d images; weights in %s", run.step, run.images_seen, final)
    run.accelerator.wait_for_everyone()
    return final
