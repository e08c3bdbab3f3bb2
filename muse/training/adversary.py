"""The discriminator with its loss, optimizer and schedule: the one term that trains a network against the student."""

import math
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from muse.losses.adversarial import AdversarialLoss
from muse.models.discriminator import PatchDiscriminator
from muse.training import fsdp
from muse.training.optim import build_adamw, load_optimizer, parameter_groups, set_lr


class Adversary:
    """`generator_term` for the student's step, then `accumulate` and `clip` for the discriminator's own, on the same pictures."""

    def __init__(self, cfg: DictConfig, accelerator: Any):
        section, optimizer = cfg.losses.adversarial, cfg.optimizer.params
        self.weight, self.accelerator = section.weight, accelerator
        self.max_grad_norm = cfg.training.max_grad_norm or float("inf")
        width = section.base_channels
        discriminator = PatchDiscriminator(
            width=width, stages=section.num_stages, groups=math.gcd(32, width)
        ).to(accelerator.device)
        self.loss = AdversarialLoss(section.start, section.lecam_weight, section.lecam_decay).to(
            accelerator.device
        )
        self._means_before: list[Tensor] = []
        groups = parameter_groups(discriminator.named_parameters(), optimizer.weight_decay, {})
        adamw = build_adamw(
            groups, optimizer.discriminator_learning_rate, (optimizer.beta1, optimizer.beta2)
        )
        self.discriminator, self.optimizer = fsdp.prepare_small(accelerator, discriminator, adamw)

    def active(self, step: int) -> bool:
        """Whether the adversary plays at this optimizer step."""
        return self.loss.active(step)

    def generator_term(self, reconstruction: Tensor, step: int) -> Tensor:
        """-mean logits of the reconstruction; the discriminator itself learns nothing from it."""
        if fsdp.is_sharded(
            self.accelerator
        ):  # FSDP keeps requires_grad as it was: `accumulate` drops these gradients
            return self.loss.generator(self.discriminator(reconstruction), step)
        self.discriminator.requires_grad_(False)
        term = self.loss.generator(
            self.accelerator.unwrap_model(self.discriminator)(reconstruction), step
        )
        self.discriminator.requires_grad_(True)
        return term

    def accumulate(
        self, pairs: list[tuple[Tensor, Tensor]], step: int, share: float
    ) -> dict[str, Tensor]:
        """Add the gradients of each micro-batch (images, reconstruction), weighted by its `share` of the step; gives the terms' sums."""
        self._means_before = [mean.clone() for mean in self.loss.buffers()]
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for images, reconstruction in pairs:
            # One pass over both halves: DDP allows a single forward before each backward.
            logits = self.discriminator(torch.cat([images, reconstruction.detach()]))
            real, fake = logits.chunk(2)
            terms = self.loss.discriminator(real, fake, step)
            self.accelerator.backward(terms.total * share)
            for name, value in (("discriminator", terms.hinge), ("lecam", terms.lecam)):
                sums[name] = sums.get(name, 0) + value.detach() * share
        return sums

    def clip(self, lr: float) -> Tensor:
        """Set the rate and clip the gradients that were added (unscaled already); gives their norm before."""
        set_lr(self.optimizer, lr)
        norm = torch.nn.utils.clip_grad_norm_(self.discriminator.parameters(), self.max_grad_norm)
        return fsdp.number(norm.detach())

    def take_back(self, flag: Tensor | bool) -> None:
        """Where the step was not taken (`flag`: see `FiniteGuard.judge`), LeCam's means are again what they were before it."""
        for mean, before in zip(self.loss.buffers(), self._means_before):
            mean.copy_(torch.where(torch.as_tensor(flag, device=mean.device) > 0, before, mean))

    def state_dict(self) -> dict[str, Any]:
        """Discriminator, LeCam means, optimizer; all processes call it together."""
        return fsdp.whole(
            {
                "discriminator": self.accelerator.unwrap_model(self.discriminator).state_dict(),
                "loss": self.loss.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        network = self.accelerator.unwrap_model(self.discriminator)
        own = network.state_dict()
        network.load_state_dict(
            {
                name: fsdp.like(own.get(name), tensor)
                for name, tensor in state["discriminator"].items()
            }
        )
        self.loss.load_state_dict(state["loss"])
        load_optimizer(self.optimizer, state["optimizer"])
