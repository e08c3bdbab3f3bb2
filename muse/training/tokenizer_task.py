"""Training MUSE's tokenizer: one stage of `stages.py`, with the losses that have a weight."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from muse.analysis.gradients import gradient_report, objectives, take_gradients
from muse.config import model_config, resolved
from muse.config_checks import check_training_crop
from muse.data.dataloader import build_eval_loader, build_train_loader, sample_images
from muse.data.train import TrainLoader
from muse.errors import ConfigError
from muse.evaluation import evaluate_reconstruction
from muse.losses.muse_loss import MuseLoss
from muse.models.loading import initial_model
from muse.models.muse_vit import MUSE_ViT
from muse.stages import STAGES, select_trainable
from muse.training import fsdp
from muse.training.adversary import Adversary
from muse.training.contrast_window import (
    draw_again,
    say_where_negatives_come_from,
    share_contrast,
)
from muse.training.reach import unreached
from muse.training.task import TrainingTask
from muse.training.trainer import Trainer
from muse.utils.viz_utils import attention_sheet, reconstruction_sheet

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> Path:
    """Run one stage to its end (an interrupted run goes on) and return its `final` directory."""
    return Trainer(cfg, TokenizerTask(cfg)).run()


class TokenizerTask(TrainingTask):
    """The student of `cfg.model`, its `MuseLoss`, and a discriminator where that has a weight."""

    model: MUSE_ViT
    loss: MuseLoss
    adversary: Adversary | None = None
    tokenize: Callable[[list[str]], list[list[int]]] | None = None

    # ------------------------------------------------------------------------------- building
    def build(self, accelerator: Any) -> MUSE_ViT:
        """The student with the tensors of its stage to learn, and its loss with the teachers."""
        check_training_crop(self.cfg)
        say_where_negatives_come_from(self.cfg)
        training, self.accelerator = self.cfg.training, accelerator
        self.model = initial_model(self.cfg)
        patterns = training.trainable
        if patterns is None:
            patterns = STAGES[training.stage].trainable
        names = select_trainable(self.model, patterns)
        self.loss = MuseLoss.from_config(self.cfg, self.model)
        if self.loss.heads() and fsdp.is_sharded(accelerator):
            raise ConfigError(
                "losses.distillation trains heads of its own, which FSDP cannot shard: start "
                "this stage with configs/accelerate/ddp.yaml"
            )
        self.model.to(accelerator.device)
        self.loss.to(accelerator.device)
        self.tokenize = self.loss.tokenizer()
        # Every step has the same shapes: the fastest convolutions are worth a search.
        torch.backends.cudnn.benchmark = accelerator.device.type == "cuda"
        if training.compile:
            for part in (self.model.decoder, *self.model.muse_blocks):
                part.compile()
        log.info(
            "stage %s trains %d tensors, %.2fM parameters; losses %s",
            training.stage,
            len(names),
            sum(p.numel() for p in self.model.parameters() if p.requires_grad) / 1e6,
            {name: term.weight for name, term in self.loss.terms.items()},
        )
        return self.model

    def empty_model(self) -> MUSE_ViT:
        return MUSE_ViT(self.model.portable_config()["model"], load_backbones=False)

    def loss_parameters(self) -> dict[str, nn.Parameter]:
        """Heads of the distillation; none for the paper's terms."""
        return self.loss.heads()

    def prepare(self) -> None:
        """Wrap a loss with heads (their gradients cross the processes), make the discriminator."""
        heads = self.loss.heads()
        self._wrapped_loss = self.accelerator.prepare(self.loss) if heads else self.loss
        if self.cfg.losses.adversarial.weight > 0:
            self.adversary = Adversary(self.cfg, self.accelerator)

    @property
    def opponents(self) -> Sequence[Adversary]:
        """The discriminator, if there is one."""
        return [self.adversary] if self.adversary else []

    def leaves_tensors_unused(self) -> bool:
        """Asked of the graph of the loss of one picture, which every choice of losses, routing and
        tensors changes. `ConfigError` where nothing would be learned.
        """
        section, named = self.cfg.losses.adversarial, list(self.model.named_parameters())
        judged = section.weight > 0
        total, reconstruction = self._loss_of_a_picture()
        left = unreached(total, named)
        always = unreached(total + reconstruction.sum(), named) if judged else left
        learning = [name for name, parameter in named if parameter.requires_grad]
        if len(always) == len(learning):
            raise ConfigError(
                f"nothing would be learned: none of the {len(learning)} tensors that the stage "
                "trains (training.trainable, such as "
                f"{learning[0]}) gets a gradient from a loss with a weight"
            )
        if len(left) == len(learning) and section.start > 0:
            raise ConfigError(
                f"nothing would be learned before step losses.adversarial.start={section.start}: "
                "no other loss reaches a tensor that the stage trains"
            )
        if always:
            log.info(
                "%d of the %d tensors that the stage trains get no gradient from its losses: %s",
                len(always),
                len(learning),
                ", ".join(always[:4]) + (", …" if len(always) > 4 else ""),
            )
        return bool(always if judged and section.start == 0 else left)

    @torch.enable_grad()
    def _loss_of_a_picture(self) -> tuple[Tensor, Tensor | None]:
        """The terms' sum for a grey picture, and its reconstruction, with their graph.

        In eval mode nothing is drawn at random; without a key no teacher remembers the picture.
        """
        side = self.cfg.dataset.preprocessing.crop_size
        images = torch.full((1, 3, side, side), 0.5, device=self.accelerator.device)
        self.model.eval()
        out = self.model(images, **self.loss.needs)
        total, _ = self.loss(out, {"images": images, "text": [""], "keys": None})
        self.model.train()
        return total, out.reconstruction

    # ------------------------------------------------------------------------------- a step
    def train_loader(self) -> TrainLoader:
        accelerator = self.accelerator
        return build_train_loader(
            self.cfg,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            pin_memory=accelerator.device.type == "cuda",
            device=accelerator.device,
            tokenize=self.tokenize,
        )

    def look_ahead(self, model: nn.Module, micro: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The contrast over all micro-batches, where `losses.itc.across_accumulation` asks it."""
        term = self.loss.terms["itc"] if "itc" in self.loss.terms else None
        if term is None or len(micro) == 1 or not self.cfg.losses.itc.across_accumulation:
            return micro
        return share_contrast(model, micro, term, self.loss.needs)

    def compute_loss(
        self, model: nn.Module, batch: dict[str, Any], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted terms, and from the discriminator's start on the generator's term."""
        draw_again(batch)
        out = model(batch["images"], **self.loss.needs)
        total, numbers = self._wrapped_loss(out, batch)
        if self.adversary and self.adversary.active(step):
            term = self.adversary.generator_term(batch["images"], out.reconstruction, step)
            numbers["generator"] = term.detach()
            total = total + self.adversary.weight * term
        return total, numbers

    # ------------------------------------------------------------------------------- watching
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """PSNR and SSIM on the evaluation set; nothing where the encoder alone is trained."""
        if self.loss.needs["encoder_only"]:
            return {}
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        loader = build_eval_loader(self.cfg, rank=rank, world=world)
        device = self.accelerator.device
        return evaluate_reconstruction(model, loader, ("psnr", "ssim"), device=device)

    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        """Reconstructions and attention of a few evaluation pictures."""
        if self.loss.needs["encoder_only"]:
            return {}
        images = sample_images(self.cfg, self.cfg.experiment.num_pictures)
        images = images.to(self.accelerator.device)
        return {
            "reconstruction": reconstruction_sheet(images, model.reconstruct(images)),
            "attention": attention_sheet(images, model.encode(images, return_attention=True)),
        }

    def gradient_report(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """Cosines and energies of the objectives' gradients on this batch, by a pass of its own."""
        model.train()
        with self.accelerator.autocast():
            out = model(batch["images"], **self.loss.needs)
        values, _ = self.loss.weighted(out, batch)
        losses = objectives(values)
        if not losses:
            return {}
        return gradient_report(take_gradients(model, losses, self.accelerator))

    # ------------------------------------------------------------------------------- saving
    def continues(self, saved: dict[str, Any]) -> bool:
        """The same stage of a model with the same outputs."""
        return not self.differences(saved)

    def differences(self, saved: dict[str, Any]) -> list[str]:
        """Keys of the stage, the architecture and the routing that are other ones here.

        A key that came later has its default there. What only one of the two spells out of a
        backbone, the other reads from its source.
        """
        try:
            theirs = outputs_of(saved["model"]) | {"training.stage": saved["training"]["stage"]}
        except ConfigError as error:  # of a version that had other keys
            return [str(error)]
        mine = outputs_of(self.cfg.model) | {"training.stage": self.cfg.training.stage}
        return [
            f"{key}={theirs[key]} there, {mine[key]} here"
            for key in mine
            if key in theirs and theirs[key] != mine[key]
        ]

    def state_dict(self) -> dict[str, Any]:
        """The heads of the loss and the discriminator with its optimizer and LeCam's means."""
        return {
            "heads": {name: head.detach() for name, head in self.loss.heads().items()},
            "adversary": self.adversary.state_dict() if self.adversary else None,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.adversary and state["adversary"]:
            self.adversary.load_state_dict(state["adversary"])
        for name, head in self.loss.heads().items():
            head.copy_(state["heads"][name])


def outputs_of(model: DictConfig | dict[str, Any]) -> dict[str, Any]:
    """The keys of a section `model` that decide its outputs, dotted, with their values.

    Sources, since a resume has all weights from the checkpoint, what the backward pass recomputes,
    the gradient's scale and stochastic depth decide none; they stand at their defaults.
    """
    model = resolved(model) if isinstance(model, DictConfig) else model
    free = ("gradient_checkpointing", "grad_scale")
    given = {key: value for key, value in model.items() if key not in free}
    for part in ("encoder", "decoder"):
        given[part] = {"config": model[part]["config"]}
    return _flat(resolved(model_config(given)), "model.")


def _flat(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
