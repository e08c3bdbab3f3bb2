"""Adversarial terms: hinge losses and the LeCam regulariser (Tseng et al., 2021), with a delayed start."""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def hinge_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """(mean relu(1 - real) + mean relu(1 + fake)) / 2; a float32 scalar."""
    return (F.relu(1 - logits_real.float()).mean() + F.relu(1 + logits_fake.float()).mean()) / 2


def hinge_generator_loss(logits_fake: Tensor) -> Tensor:
    """-mean(fake); a float32 scalar."""
    return -logits_fake.float().mean()


def lecam_penalty(
    logits_real: Tensor, logits_fake: Tensor, ema_real: Tensor, ema_fake: Tensor
) -> Tensor:
    """relu(mean real - ema_fake)^2 + relu(ema_real - mean fake)^2, a float32 scalar.

    As in the release it acts on the batch's mean logits, not on every logit as in LeCam's own paper: it keeps the two
    averages from drifting apart and leaves single patches free.
    """
    real, fake = logits_real.float().mean(), logits_fake.float().mean()
    return (F.relu(real - ema_fake).square() + F.relu(ema_real - fake).square()).sum()


class DiscriminatorTerms(NamedTuple):
    """`total` is what the discriminator descends: hinge + lecam_weight * lecam; all scalars."""

    total: Tensor
    hinge: Tensor
    lecam: Tensor


class AdversarialLoss(nn.Module):
    """Hinge GAN with LeCam. The moving means of the logits are buffers, so that a checkpoint holds them.

    start: optimizer step at which the adversary begins; before it both terms are 0 and nothing need be run (`active`).
    lecam_weight, lecam_decay: 0.001 and 0.999 in the release; weight 0 switches the regulariser off.
    """

    def __init__(self, start: int = 0, lecam_weight: float = 0.001, lecam_decay: float = 0.999):
        super().__init__()
        self.start, self.lecam_weight, self.lecam_decay = start, lecam_weight, lecam_decay
        self.register_buffer("ema_real", torch.zeros(()))
        self.register_buffer("ema_fake", torch.zeros(()))

    def active(self, step: int) -> bool:
        """Whether the adversary plays at this optimizer step."""
        return step >= self.start

    def generator(self, logits_fake: Tensor, step: int) -> Tensor:
        """The generator's term for logits (B,1,h,w) of reconstructions that carry gradient; 0 before the start."""
        return hinge_generator_loss(logits_fake) * float(self.active(step))

    def discriminator(
        self, logits_real: Tensor, logits_fake: Tensor, step: int
    ) -> DiscriminatorTerms:
        """The discriminator's terms for logits (B,1,h,w) of images and of detached reconstructions; 0 before the start.

        In training mode, and once started, the moving means take these logits in, after they served the penalty.
        """
        factor = float(self.active(step))
        hinge = hinge_discriminator_loss(logits_real, logits_fake) * factor
        lecam = hinge.new_zeros(())
        if self.lecam_weight > 0:
            # Copies: the means move in place below, while the penalty still waits for its backward pass.
            lecam = factor * lecam_penalty(
                logits_real, logits_fake, self.ema_real.clone(), self.ema_fake.clone()
            )
            if self.training and factor:
                self._update(logits_real, logits_fake)
        return DiscriminatorTerms(hinge + self.lecam_weight * lecam, hinge.detach(), lecam.detach())

    @torch.no_grad()
    def _update(self, logits_real: Tensor, logits_fake: Tensor) -> None:
        means = torch.stack([logits_real.float().mean(), logits_fake.float().mean()])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(means)
            means /= dist.get_world_size()
        self.ema_real.lerp_(means[0], 1 - self.lecam_decay)
        self.ema_fake.lerp_(means[1], 1 - self.lecam_decay)
