"""The discriminator with its loss and optimizer: the network that trains against the student."""

from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from muse.losses.adversarial import AdversarialLoss, build_discriminator
from muse.training import fsdp
from muse.training.optim import build_adamw, load_optimizer, parameter_groups


class Adversary:
    """An `Opponent` (see `task.py`): `generator_term` in the student's loss, then `backward`."""

    name = "discriminator"

    def __init__(self, cfg: DictConfig, accelerator: Any):
        section, options = cfg.losses.adversarial, cfg.optimizer.params
        self.weight, self.accelerator = section.weight, accelerator
        self.learning_rate = options.discriminator_learning_rate
        self.end_lr = cfg.lr_scheduler.params.discriminator_end_lr
        self._clamp = cfg.losses.clamp_reconstruction
        discriminator = build_discriminator(cfg).to(accelerator.device)
        if cfg.training.compile:
            discriminator.compile()
        self.loss = AdversarialLoss(section.start, section.lecam_weight, section.lecam_decay)
        self.loss.to(accelerator.device)
        self._pairs: list[tuple[Tensor, Tensor]] = []  # (images, reconstruction) a micro-batch
        self._means_before: list[Tensor] = []
        groups = parameter_groups(discriminator.named_parameters(), options.weight_decay)
        adamw = build_adamw(groups, self.learning_rate, (options.beta1, options.beta2))
        self.discriminator, self.optimizer = fsdp.prepare_unit(
            accelerator, discriminator, adamw, discriminator.full_precision
        )
        self.parameters = list(self.discriminator.parameters())

    def active(self, step: int) -> bool:
        """Whether the discriminator is active at this optimizer step."""
        return self.loss.active(step)

    def generator_term(self, images: Tensor, reconstruction: Tensor, step: int) -> Tensor:
        """-mean logits of the reconstruction, in the student's loss; keeps both for `backward`."""
        if self._clamp:  # as in the other terms: no gradient from outside of [0, 1]
            reconstruction = reconstruction.clamp(0, 1)
        self._pairs.append((images, reconstruction.detach()))
        if fsdp.is_sharded(self.accelerator):
            # FSDP needs requires_grad to stay as it is: `backward` drops these gradients.
            return self.loss.generator(self.discriminator(reconstruction), step)
        network = self.accelerator.unwrap_model(self.discriminator)
        self.discriminator.requires_grad_(False)
        term = self.loss.generator(network(reconstruction), step)
        self.discriminator.requires_grad_(True)
        return term

    def backward(self, step: int) -> dict[str, Tensor]:
        """Add the discriminator's gradients over the micro-batches; gives its terms' means."""
        pairs, self._pairs = self._pairs, []
        self._means_before = [mean.clone() for mean in self.loss.buffers()]
        self.optimizer.zero_grad(set_to_none=True)
        share, sums = 1 / len(pairs), {"discriminator": 0, "lecam": 0}
        for images, reconstruction in pairs:
            # One pass over both halves: DDP allows a single forward before each backward.
            logits = self.discriminator(torch.cat([images, reconstruction]))  # (2B, 1, h, w)
            real, fake = logits.chunk(2)
            terms = self.loss.discriminator(real, fake, step)
            self.accelerator.backward(terms.total * share)
            sums["discriminator"] += terms.hinge.detach() * share
            sums["lecam"] += terms.lecam.detach() * share
        return sums

    def restore(self, skip: Tensor) -> None:
        """Give LeCam's means their values from before the step where `skip` is above 0."""
        for mean, before in zip(self.loss.buffers(), self._means_before):
            mean.copy_(torch.where(skip > 0, before, mean))

    def state_dict(self) -> dict[str, Any]:
        """Discriminator, LeCam's means, optimizer; all processes call it together."""
        network = self.accelerator.unwrap_model(self.discriminator)
        return fsdp.full_tensors(
            {
                "discriminator": network.state_dict(),
                "loss": self.loss.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        network = self.accelerator.unwrap_model(self.discriminator)
        network.load_state_dict(fsdp.shard_like(network.state_dict(), state["discriminator"]))
        self.loss.load_state_dict(state["loss"])
        load_optimizer(self.optimizer, state["optimizer"])
