"""Adversarial loss: hinge terms and the LeCam regulariser (Tseng et al., 2021), delayed start.

Not a `Term`: it trains a second network, the discriminator, with an optimizer of its own
(muse/training/adversary.py). Logits are (B,1,h,w), one for each patch of the picture.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from muse.models.discriminator import PatchDiscriminator
from muse.utils.distributed import all_sum, world_size


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

    As in the release it acts on the batch's mean logits, not on every logit as in LeCam's own
    paper: it keeps the two averages from drifting apart and leaves single patches free.
    """
    real, fake = logits_real.float().mean(), logits_fake.float().mean()
    return (F.relu(real - ema_fake).square() + F.relu(ema_real - fake).square()).sum()


class DiscriminatorTerms(NamedTuple):
    """What the discriminator minimises, and its parts without graph; all scalars."""

    total: Tensor  # hinge + lecam_weight * lecam
    hinge: Tensor
    lecam: Tensor


class AdversarialLoss(nn.Module):
    """Hinge GAN with LeCam. The moving means of the logits are buffers: a checkpoint holds them.

    Args:
        start: optimizer step at which the discriminator becomes active; before it both terms are 0
            and nothing need be run (`active`).
        lecam_weight: 0.001 in the release; 0 switches the regulariser off.
        lecam_decay: of the moving means, 0.999 in the release.
    """

    def __init__(self, start: int = 0, lecam_weight: float = 0.001, lecam_decay: float = 0.999):
        super().__init__()
        self.start, self.lecam_weight, self.lecam_decay = start, lecam_weight, lecam_decay
        self.register_buffer("ema_real", torch.zeros(()))
        self.register_buffer("ema_fake", torch.zeros(()))

    def active(self, step: int) -> bool:
        """Whether the discriminator is active at this optimizer step."""
        return step >= self.start

    def generator(self, logits_fake: Tensor, step: int) -> Tensor:
        """The generator's term for logits of reconstructions with gradient; 0 before the start."""
        return hinge_generator_loss(logits_fake) * float(self.active(step))

    def discriminator(
        self, logits_real: Tensor, logits_fake: Tensor, step: int
    ) -> DiscriminatorTerms:
        """The terms for logits of images and of detached reconstructions; 0 before the start.

        In training mode, once started, the logits then move the means, after the penalty has used
        these as they were.
        """
        factor = float(self.active(step))
        hinge = hinge_discriminator_loss(logits_real, logits_fake) * factor
        lecam = hinge.new_zeros(())
        if self.lecam_weight > 0:
            # Copies: the means move in place below, before the penalty's backward pass.
            means = self.ema_real.clone(), self.ema_fake.clone()
            lecam = factor * lecam_penalty(logits_real, logits_fake, *means)
            if self.training and factor:
                self._update(logits_real, logits_fake)
        return DiscriminatorTerms(hinge + self.lecam_weight * lecam, hinge.detach(), lecam.detach())

    @torch.no_grad()
    def _update(self, logits_real: Tensor, logits_fake: Tensor) -> None:
        means = torch.stack([logits_real.float().mean(), logits_fake.float().mean()])  # (2,)
        means = all_sum(means) / world_size()
        self.ema_real.lerp_(means[0], 1 - self.lecam_decay)
        self.ema_fake.lerp_(means[1], 1 - self.lecam_decay)


def build_discriminator(cfg: DictConfig) -> PatchDiscriminator:
    """The discriminator of `losses.adversarial`."""
    section = cfg.losses.adversarial
    width = section.base_channels
    return PatchDiscriminator(
        width=width,
        stages=section.num_stages,
        groups=math.gcd(32, width),
        full_precision=section.precision == "float32",
    )
