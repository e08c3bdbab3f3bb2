"""The composite loss: a table of terms, each with its weight, its teacher and what it needs of the student (MUSE, Sec. Training).

A term whose weight is 0 is not built: it costs nothing and needs no weights. A new term is one class and one line of `TERMS`.
"""

from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from muse.losses.contrastive import build_itc_term
from muse.losses.distillation import build_distillation_term
from muse.losses.perceptual import build_perceptual_term
from muse.losses.recognition import build_recognition_term
from muse.losses.reconstruction import build_reconstruction_term
from muse.losses.term import Needs, Term
from muse.losses.topology import build_topology_term
from muse.models.muse_vit import MUSE_ViT, StudentOutput

# name of the section in `losses` -> how its term is built. The adversarial term has an optimizer of its own: see the trainer.
TERMS: dict[str, Callable[[DictConfig, MUSE_ViT, tuple[int, int]], Term]] = {
    "reconstruction": build_reconstruction_term,
    "perceptual": build_perceptual_term,
    "topology": build_topology_term,
    "itc": build_itc_term,
    "distillation": build_distillation_term,
    "recognition": build_recognition_term,
}


class MuseLoss(nn.Module):
    """Σ weight · term over the terms whose weight is above 0."""

    def __init__(self, terms: list[Term]):
        super().__init__()
        self.terms = nn.ModuleDict({term.name: term for term in terms})

    @classmethod
    def from_config(cls, cfg: DictConfig, student: MUSE_ViT) -> "MuseLoss":
        """The active terms of a configuration with their teachers; `grid` is the latent grid at the training crop."""
        side = cfg.dataset.preprocessing.crop_size // student.cell
        return cls(
            [
                build(cfg, student, (side, side))
                for name, build in TERMS.items()
                if cfg.losses[name].weight > 0
            ]
        )

    @property
    def needs(self) -> dict[str, bool]:
        """Arguments for the student's forward: only what the active terms read."""
        needs = {
            part: any(getattr(term.needs, part) for term in self.terms.values())
            for part in Needs._fields
        }
        return {**needs, "encoder_only": not any(needs.values())}

    def heads(self) -> dict[str, nn.Parameter]:
        """Parameters of the terms themselves that learn beside the student (none for the paper's terms)."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }

    def weighted(
        self, out: StudentOutput, batch: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Each term times its weight, with graph; and every number by name: the unweighted terms, and what they report."""
        values: dict[str, Tensor] = {}
        numbers: dict[str, Tensor] = {}
        with torch.autocast(batch["images"].device.type, enabled=False):  # float32 under autocast
            for name, term in self.terms.items():
                value, further = term(out, batch)
                values[name] = term.weight * value
                numbers[name] = value.detach()
                numbers.update(further)
        return values, numbers

    def forward(
        self, out: StudentOutput, batch: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and every number by name (see `weighted`)."""
        values, numbers = self.weighted(out, batch)
        return sum(values.values(), torch.zeros((), device=batch["images"].device)), numbers
