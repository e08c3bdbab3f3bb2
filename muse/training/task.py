"""What a training run is about: the model, its loss, its data, its pictures. The trainer runs it.

A new kind of model is one subclass of `TrainingTask`; the tokenizer's is in `tokenizer_task.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig
from torch import Tensor, nn

from muse.models.pretrained import write_weights


class Opponent(Protocol):
    """A network that trains against the model, in the same steps, with an optimizer of its own."""

    name: str  # its gradient norm is logged as NAME_grad_norm
    optimizer: Any  # as accelerate wraps it; each group has an `lr_multiplier`
    parameters: list[nn.Parameter]
    learning_rate: float  # the model's schedule scales it
    end_lr: float | None  # at the last step; None: the model's

    def active(self, step: int) -> bool:
        """Whether it takes part in this optimizer step."""

    def backward(self, step: int) -> dict[str, Tensor]:
        """Add its gradients on what the loss showed it in this step; numbers to log, by name."""

    def restore(self, skip: Tensor) -> None:
        """Undo what the step moved outside the optimizer where `skip` is above 0."""


class TrainingTask(ABC):
    """One kind of training. The trainer calls `build`, makes the optimizer, and calls `prepare`.

    A batch is a dict of tensors (the trainer moves them to the device) and lists of strings, one
    entry a sample; `keys` holds the samples' names. The configuration has the sections `training`,
    `optimizer`, `lr_scheduler` and `experiment`; others are the task's own.
    """

    opponents: Sequence[Opponent] = ()

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg

    # ------------------------------------------------------------------------------- building
    @abstractmethod
    def build(self, accelerator: Any) -> nn.Module:
        """The model on the accelerator's device; the tensors that learn have `requires_grad`.

        It has a method `portable_config()`, which goes into config.json beside its weights, unless
        the task writes these files itself (`write_model`).
        """

    @abstractmethod
    def empty_model(self) -> nn.Module:
        """A model built like the one of `build`; its weights will be overwritten."""

    def loss_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the loss itself that the model's optimizer trains too, by name."""
        return {}

    def prepare(self) -> None:  # noqa: B027 (most tasks have nothing to add)
        """Let accelerate wrap what the task trains besides the model, which is wrapped by now."""

    def leaves_tensors_unused(self) -> bool:
        """Whether a tensor that learns may get no gradient in a step, which DDP must be told.

        Asked once, after `build` and before `prepare`, by all processes together.
        """
        return False

    # ------------------------------------------------------------------------------- a step
    @abstractmethod
    def train_loader(self) -> Any:
        """Endless batches of this process: a `TrainLoader`, or what works like one.

        It iterates, has `state_dict` and `load_state_dict` (its position, JSON and tensors), and
        counts bad samples (`bad`) and repeated reads (`retries`).
        """

    def look_ahead(self, model: nn.Module, micro: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The micro-batches of an optimizer step before the first of their backward passes.

        `compute_loss` gets what is returned, in this order: the same batches, with further entries
        where its loss spans several of them. All processes call it together; it keeps nothing.

        Args:
            model: the model as accelerate wraps it.
            micro: as many batches of `train_loader` as the step accumulates.
        """
        return micro

    @abstractmethod
    def compute_loss(
        self, model: nn.Module, batch: dict[str, Any], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the model minimises on a micro-batch, and the numbers to log, detached, by name.

        It may draw from the global generators, which every process saves. They start alike on all
        processes: a task whose noise must differ seeds them by process in `prepare`.

        Args:
            model: the model as accelerate wraps it.
            batch: a batch of `train_loader` on the device, as `look_ahead` gave it.
            step: the optimizer step, counted from 0.
        """

    # ------------------------------------------------------------------------------- watching
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Numbers of the averaged model for the log; all processes call it together.

        As `pictures` and `gradient_report`, it leaves weights and global generators as they are.
        """
        return {}

    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        """Pictures (3, H, W) in [0, 1] of what the averaged model does, on the main process."""
        return {}

    def gradient_report(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """What `experiment.log_grad_every` writes, of the model as it trains and one batch."""
        return {}

    # ------------------------------------------------------------------------------- saving
    @abstractmethod
    def continues(self, saved: dict[str, Any]) -> bool:
        """Whether a run of the configuration `saved` may be resumed with the task's own."""

    def differences(self, saved: dict[str, Any]) -> list[str]:
        """What keeps it from that, for the message: such as `model.dim=512 there, 384 here`."""
        return []

    def left_out(self) -> Collection[str]:
        """Names of the model's tensors that checkpoints do not hold: `build` gives them again."""
        return ()

    def write_model(
        self, folder: Path, model: nn.Module, weights: dict[str, Tensor], final: bool
    ) -> None:
        """The files of the model in a new folder, on the main process.

        Args:
            folder: of a checkpoint or `final`.
            model: what trains; its own tensors may be sharded.
            weights: its full tensors by name, in a checkpoint without those of `left_out`.
            final: whether the folder is `final`; its weights are the averages.
        """
        write_weights(folder, weights, model.portable_config())

    def state_dict(self) -> dict[str, Any]:
        """What moves besides the model, its averages and its optimizer; full tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore what `state_dict` gave; `state` may hold other keys."""
