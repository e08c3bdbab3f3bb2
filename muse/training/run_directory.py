"""OUTPUT of a run: made and proved writable at the start, checkpoints written whole or not at all, resumed from, finished."""
import logging
from typing import TYPE_CHECKING

from omegaconf import OmegaConf
from safetensors.torch import save_file

from muse.config import resolved
from muse.errors import ConfigError
from muse.models.base_model import WEIGHTS_FILE, atomic_directory, load_weights, read_weights, write_weights
from muse.models.loading import EMA_FILE
from muse.training import checkpoint as ckpt
from muse.utils.cli import writable_directory

if TYPE_CHECKING:
    from pathlib import Path

    from muse.training.trainer import Trainer

log = logging.getLogger(__name__)


def prepare(run: "Trainer") -> None:
    """The directories and `config.yaml` (resolved); `CheckpointError` where nothing can be written."""
    if run.accelerator.is_main_process:
        writable_directory(run.output / "images")
        (run.output / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(resolved(run.cfg))))


def save_checkpoint(run: "Trainer") -> "Path":
    """Write `checkpoint-STEP`; every process writes its own part, then the main one renames the folder."""
    target, partial = run.output / f"checkpoint-{run.step}", run.output / f".partial-{run.step}"
    if run.accelerator.is_main_process:
        partial.mkdir(parents=True, exist_ok=True)
    run.accelerator.wait_for_everyone()
    ckpt.write_tree(partial, f"rank-{run.accelerator.process_index}",
                    {"rng": ckpt.rng_state(), "loader": run.loader.state_dict()})
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        with atomic_directory(target) as folder:
            write_weights(folder, run.model.state_dict(), run.model.portable_config())
            if run.ema:
                save_file({name: mean.cpu() for name, mean in run.ema.state_dict().items()}, folder / EMA_FILE)
            ckpt.write_tree(folder, "state", run.state_dict())
            for file in partial.iterdir():
                file.rename(folder / file.name)
        partial.rmdir()
        ckpt.prune(run.output, run.cfg.experiment.keep_last, run.cfg.experiment.keep_every)
    run.accelerator.wait_for_everyone()
    return target


def resume(run: "Trainer") -> None:
    """Go on from the newest checkpoint of the output directory; `ConfigError` if there is one and `experiment.resume` is false."""
    path = ckpt.latest(run.output)
    if path is None:
        return
    if not run.cfg.experiment.resume:
        raise ConfigError(f"{run.output}: holds checkpoints of an earlier run and experiment.resume=false; choose another "
                          "experiment.output_dir, or remove them")
    state, mine = ckpt.read_tree(path, "state"), resolved(run.cfg)
    if state["config"]["model"] != mine["model"] or state["config"]["training"]["stage"] != run.cfg.training.stage:
        raise ConfigError(f"{path}: was written by another model or stage; choose another experiment.output_dir, or "
                          "remove its checkpoints to start over")
    load_weights(run.model, read_weights(path / WEIGHTS_FILE), str(path))
    run.load_state_dict(state)
    if run.ema:
        run.ema.load_state_dict(read_weights(path / EMA_FILE), state["ema_step"])
    own = f"rank-{run.accelerator.process_index}"
    if (path / f"{own}.json").is_file():  # absent where the run goes on with more processes than before
        part = ckpt.read_tree(path, own)
        run.loader.load_state_dict(part["loader"])
        ckpt.set_rng_state(part["rng"])
    log.info("going on from %s: step %d of %d", path, run.step, run.cfg.training.max_train_steps)


def write_final(run: "Trainer") -> "Path":
    """The last checkpoint, if it is not there yet, and `final/`: the averaged weights, as `from_pretrained` reads them."""
    final = run.output / "final"
    if not (run.output / f"checkpoint-{run.step}").is_dir():
        save_checkpoint(run)
    if run.accelerator.is_main_process:
        with run.averaged() as model:
            model.save_pretrained(final)
        log.info("done: %d steps, %d images; weights in %s", run.step, run.images_seen, final)
    run.accelerator.wait_for_everyone()
    return final
