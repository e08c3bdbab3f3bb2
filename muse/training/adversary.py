"""The discriminator with its loss, optimizer and schedule: the one term that trains a network against the student."""
import math
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from muse.losses.adversarial import AdversarialLoss
from muse.models.discriminator import PatchDiscriminator
from muse.training.optim import build_adamw, load_optimizer, parameter_groups, set_lr


class Adversary:
    """`generator_term` for the student's step, then `step` for the discriminator's own, on the same pictures."""

    def __init__(self, cfg: DictConfig, accelerator: Any):
        section, optimizer = cfg.losses.adversarial, cfg.optimizer.params
        self.weight, self.accelerator = section.weight, accelerator
        self.max_grad_norm = cfg.training.max_grad_norm or float("inf")
        width = section.base_channels
        discriminator = PatchDiscriminator(width=width, stages=section.num_stages, groups=math.gcd(32, width)).to(accelerator.device)
        self.loss = AdversarialLoss(section.start, section.lecam_weight, section.lecam_decay).to(accelerator.device)
        groups = parameter_groups(discriminator.named_parameters(), optimizer.weight_decay, {})
        adamw = build_adamw(groups, optimizer.discriminator_learning_rate, (optimizer.beta1, optimizer.beta2))
        self.discriminator, self.optimizer = accelerator.prepare(discriminator, adamw)

    def active(self, step: int) -> bool:
        """Whether the adversary plays at this optimizer step."""
        return self.loss.active(step)

    def generator_term(self, reconstruction: Tensor, step: int) -> Tensor:
        """-mean logits of the reconstruction; the discriminator itself gets no gradient from it."""
        self.discriminator.requires_grad_(False)
        term = self.loss.generator(self.accelerator.unwrap_model(self.discriminator)(reconstruction), step)
        self.discriminator.requires_grad_(True)
        return term

    def accumulate(self, images: Tensor, reconstruction: Tensor, step: int, share: float) -> dict[str, Tensor]:
        """Add the gradient of one micro-batch, weighted by its `share` of the step; gives the terms by name."""
        # One pass over both halves: DDP allows a single forward before each backward.
        logits = self.discriminator(torch.cat([images, reconstruction.detach()]))
        real, fake = logits.chunk(2)
        terms = self.loss.discriminator(real, fake, step)
        self.accelerator.backward(terms.total * share)
        return {"discriminator": terms.hinge.detach(), "lecam": terms.lecam.detach()}

    def step(self, lr: float) -> None:
        """Clip and step with the gradients that were added."""
        set_lr(self.optimizer, lr)
        self.accelerator.clip_grad_norm_(self.discriminator.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Discriminator, LeCam means, optimizer."""
        return {"discriminator": self.accelerator.unwrap_model(self.discriminator).state_dict(),
                "loss": self.loss.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.accelerator.unwrap_model(self.discriminator).load_state_dict(state["discriminator"])
        self.loss.load_state_dict(state["loss"])
        load_optimizer(self.optimizer, state["optimizer"])
