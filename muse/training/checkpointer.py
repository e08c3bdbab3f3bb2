"""Training checkpoints: `OUTPUT/checkpoint-N/` holds all that moves, in safetensors and JSON.

config.json, model.safetensors   the model as it is (what `from_pretrained` reads)
ema.safetensors                  running means of the tensors that this stage trains
state.safetensors, state.json    optimizers, loss heads, discriminator; counters, configuration
rank-K.safetensors, rank-K.json  random generators and data position of every process
"""

import contextlib
import json
import logging
import random
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy
import torch
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from muse.config import resolved
from muse.errors import CheckpointError, ConfigError
from muse.models.ema_model import EMAModel
from muse.models.loading import EMA_FILE, latest_checkpoint
from muse.models.pretrained import WEIGHTS_FILE
from muse.training import fsdp
from muse.training.optim import load_optimizer
from muse.training.progress import Progress
from muse.training.run_directory import (
    named_if_refused,
    open_run_directory,
    prune_checkpoints,
)
from muse.training.task import TrainingTask
from muse.utils.io import atomic_directory
from muse.utils.weights import load_into, read_state_dict

log = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores the parts of a run, which share their state with the trainer.

    Args:
        cfg: the run's configuration; it names the directory and says what is kept.
        accelerator: of the run, with its scaler.
        model: what learns, not wrapped.
        averages: its running means, or None.
        optimizer: the model's, as accelerate wraps it.
        task: gives what else moves: heads of the loss, opponents.
        loader: gives the data position of this process.
        progress: the counters.
    """

    def __init__(
        self,
        cfg: DictConfig,
        accelerator: Any,
        *,
        model: nn.Module,
        averages: EMAModel | None,
        optimizer: Any,
        task: TrainingTask,
        loader: Any,
        progress: Progress,
    ):
        self.output, self.options = Path(cfg.experiment.output_dir), cfg.experiment
        self.config, self.accelerator = resolved(cfg), accelerator
        self.model, self.averages, self.optimizer = model, averages, optimizer
        self.task, self.loader, self.progress = task, loader, progress

    # ------------------------------------------------------------------------------- writing
    def open(self) -> None:
        """Make the run's directory, without what a killed run left there."""
        if self.accelerator.is_main_process:
            open_run_directory(self.output, self.config)

    def save(self) -> Path:
        """Write `checkpoint-STEP`: each process its own part, then the main one renames the folder.

        `CheckpointError` where it cannot be written; the checkpoints before it stay whole.
        """
        step, main = self.progress.step, self.accelerator.is_main_process
        target, partial = self.output / f"checkpoint-{step}", self.output / f".partial-{step}"
        # All processes together, since under FSDP each gives its shards.
        state, weights = self._state(), self._full_weights(self.task.left_out())
        means = fsdp.full_tensors(self.averages.state_dict()) if self.averages else None
        with named_if_refused(target, partial):
            if main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            own = {"rng": rng_state(), "loader": self.loader.state_dict()}
            write_tree(partial, f"rank-{self.accelerator.process_index}", own)
            self.accelerator.wait_for_everyone()
            if main:
                with atomic_directory(target) as folder:
                    self.task.write_model(folder, self.model, weights, final=False)
                    if means is not None:
                        means = {name: mean.cpu() for name, mean in means.items()}
                        save_file(means, folder / EMA_FILE)
                    write_tree(folder, "state", state)
                    for file in partial.iterdir():
                        file.rename(folder / file.name)
                partial.rmdir()
                prune_checkpoints(self.output, self.options.keep_last, self.options.keep_every)
        self.accelerator.wait_for_everyone()
        return target

    def write_final(self) -> Path:
        """The last checkpoint, if it is not there yet, and `final/`: the averages, as
        `from_pretrained` reads them.
        """
        final = self.output / "final"
        if not (self.output / f"checkpoint-{self.progress.step}").is_dir():
            self.save()
        with self.averages.swapped_in() if self.averages else contextlib.nullcontext():
            weights = self._full_weights()
            if self.accelerator.is_main_process:
                with named_if_refused(final), atomic_directory(final) as folder:
                    self.task.write_model(folder, self.model, weights, final=True)
        self.accelerator.wait_for_everyone()
        return final

    def _full_weights(self, left_out: Collection[str] = ()) -> dict[str, Tensor]:
        """The model's tensors by name; all processes together, the first one gets them."""
        state = self.model.state_dict()
        return fsdp.full_tensors({n: t for n, t in state.items() if n not in left_out})

    def _state(self) -> dict[str, Any]:
        """What moves on the run as a whole, but for the tensors of the model and its averages."""
        scaler = self.accelerator.scaler
        return {
            "step": self.progress.step,
            "images_seen": self.progress.images_seen,
            "skipped": self.progress.skipped,
            "ema_step": self.averages.step if self.averages else 0,
            "optimizer": fsdp.full_tensors(self.optimizer.state_dict()),
            "scaler": scaler.state_dict() if scaler else None,
            **self.task.state_dict(),
            "processes": self.accelerator.num_processes,
            "config": self.config,
        }

    # ------------------------------------------------------------------------------- restoring
    def restore(self) -> None:
        """Go on from the newest checkpoint of the directory, if there is one.

        `ConfigError` if `experiment.resume` is false, or if it is another model's.
        """
        path = latest_checkpoint(self.output)
        if path is None:
            return
        if not self.options.resume:
            raise ConfigError(
                f"{self.output}: holds checkpoints of an earlier run and experiment.resume=false; "
                "choose another experiment.output_dir, or remove them"
            )
        state, scaler = read_tree(path, "state"), self.accelerator.scaler
        if not self.task.continues(state["config"]):
            named = "; ".join(self.task.differences(state["config"])[:4])
            raise ConfigError(
                f"{path}: was written by another model or stage; choose another "
                "experiment.output_dir, or remove its checkpoints to start over"
                + (f" ({named})" if named else "")
            )
        own = self.model.state_dict()
        weights = fsdp.shard_like(own, read_state_dict(path / WEIGHTS_FILE))
        weights |= {name: own[name] for name in self.task.left_out()}
        load_into(self.model, weights, path)
        load_optimizer(self.optimizer, state["optimizer"])
        if scaler and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        self.task.load_state_dict(state)
        if self.averages:
            means = read_state_dict(path / EMA_FILE, "the averages")
            means = fsdp.shard_like(self.averages.state_dict(), means)
            self.averages.load_state_dict(means, state["ema_step"])
        progress = self.progress
        progress.step, progress.images_seen = state["step"], state["images_seen"]
        progress.skipped = state["skipped"]
        self._restore_process(path, state["processes"])
        steps = self.config["training"]["max_train_steps"]
        log.info("going on from %s: step %d of %d", path, progress.step, steps)

    def _restore_process(self, path: Path, processes: int) -> None:
        """The generators and the data position of this process.

        Exact with as many processes as wrote the checkpoint. With another number every process
        takes the first one's position: the data go on with the next epoch, shared out anew.
        """
        index, now = self.accelerator.process_index, self.accelerator.num_processes
        if processes == now:
            part = read_tree(path, f"rank-{index}")
            set_rng_state(part["rng"])
        else:
            log.warning(
                "%s was written by %d processes and goes on with %d: weights, averages, optimizers "
                "and schedule are exact; the data go on with the next epoch, generators of the "
                "processes start anew",
                path.name,
                processes,
                now,
            )
            part = read_tree(path, "rank-0")
        self.loader.load_state_dict(part["loader"])


# ------------------------------------------------------------------------------------- trees
def pack(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split nested dicts and lists into a JSON-able skeleton and the tensors that stood in it."""
    tensors: dict[str, Tensor] = {}

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            tensors[path] = node.detach().cpu().contiguous()
            return {"__tensor__": path}
        if isinstance(node, dict):
            return {
                "__dict__": [[key, walk(value, f"{path}/{key}")] for key, value in node.items()]
            }
        if isinstance(node, (list, tuple)):
            return [walk(value, f"{path}/{index}") for index, value in enumerate(node)]
        return node

    return walk(tree, "root"), tensors


def unpack(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `pack`; keys keep their type (optimizers number their tensors)."""
    if isinstance(skeleton, dict):
        if "__tensor__" in skeleton:
            return tensors[skeleton["__tensor__"]]
        return {key: unpack(value, tensors) for key, value in skeleton["__dict__"]}
    if isinstance(skeleton, list):
        return [unpack(value, tensors) for value in skeleton]
    return skeleton


def write_tree(folder: Path, name: str, tree: Any) -> None:
    """`name.json` and `name.safetensors` in `folder`."""
    skeleton, tensors = pack(tree)
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(skeleton))


def read_tree(folder: Path, name: str) -> Any:
    """What `write_tree` wrote; `CheckpointError` when it is missing or broken."""
    try:
        skeleton = json.loads((folder / f"{name}.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{folder / name}.json: missing or unreadable ({type(error).__name__})"
        ) from None
    return unpack(skeleton, read_state_dict(folder / f"{name}.safetensors", "a training run"))


# ------------------------------------------------------------------------------------- generators
def rng_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's global generators on this process."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = numpy.random.get_state()
    keys = torch.from_numpy(keys.astype(numpy.int64))
    state = {
        "python": [version, list(internal), gauss],
        "torch": torch.get_rng_state(),
        "numpy": [kind, keys, int(position), int(has_gauss), float(cached)],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype(numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
