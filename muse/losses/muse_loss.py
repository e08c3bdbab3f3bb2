"""The composite loss: a table of terms and their weighted sum (MUSE, Sec. Training).

A new term is one file (its function, its `Term`, its builder) and one line of `TERMS`. A term whose
weight is 0 is not built: it costs nothing and needs no weights.
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

# Name of the section in `losses` -> builder(cfg, student, pretrained); `pretrained=False` makes the
# networks of a term without weights. The adversarial loss is not here: it trains a second network
# with an optimizer of its own (muse/training/adversary.py).
TERMS: dict[str, Callable[[DictConfig, MUSE_ViT, bool], Term]] = {
    "reconstruction": build_reconstruction_term,
    "perceptual": build_perceptual_term,
    "topology": build_topology_term,
    "itc": build_itc_term,
    "distillation": build_distillation_term,
    "recognition": build_recognition_term,
}


class MuseLoss(nn.Module):
    """Σ weight · term over the terms whose weight is above 0.

    Args:
        terms: the active ones.
        clamp_reconstruction: the terms see reconstructions clamped to [0,1]; outside of it no
            gradient comes back (docs/fidelity.md row 44).
        judged: a discriminator reads the reconstruction, so that it is made in any case.
    """

    def __init__(self, terms: list[Term], clamp_reconstruction: bool = False, judged: bool = False):
        super().__init__()
        self.clamp_reconstruction, self.judged = clamp_reconstruction, judged
        self.terms = nn.ModuleDict({term.name: term for term in terms})

    @classmethod
    def from_config(cls, cfg: DictConfig, student: MUSE_ViT, pretrained: bool = True) -> "MuseLoss":
        """The active terms of a configuration with their teachers.

        Args:
            cfg: a whole configuration.
            student: the model that the terms are for.
            pretrained: False makes teachers and perceptual networks without their weights; no file
                is asked for beyond an architecture's own description.
        """
        active = [name for name in TERMS if cfg.losses[name].weight > 0]
        terms = [TERMS[name](cfg, student, pretrained) for name in active]
        judged = cfg.losses.adversarial.weight > 0
        return cls(terms, cfg.losses.clamp_reconstruction, judged)

    @property
    def needs(self) -> dict[str, bool]:
        """Arguments for the student's forward: only what the active terms and a judge read."""
        needs = {
            part: any(getattr(term.needs, part) for term in self.terms.values())
            for part in Needs._fields
        }
        needs["reconstruction"] |= self.judged
        return {**needs, "encoder_only": not any(needs.values())}

    def heads(self) -> dict[str, nn.Parameter]:
        """Parameters of the terms that learn beside the student (none in the paper's terms)."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def tokenizer(self) -> Callable[[list[str]], list[list[int]]] | None:
        """The text teacher's, for the loader's workers; None without one."""
        return self.terms["itc"].teacher.tokenizer() if "itc" in self.terms else None

    def weighted(
        self, out: StudentOutput, batch: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Each term times its weight, with its graph; and every number for the log, without.

        The numbers are the unweighted terms by name, and what the terms report beside their value.
        """
        if self.clamp_reconstruction and out.reconstruction is not None:
            out = out._replace(reconstruction=out.reconstruction.clamp(0, 1))
        values: dict[str, Tensor] = {}
        numbers: dict[str, Tensor] = {}
        with torch.autocast(batch["images"].device.type, enabled=False):  # losses in float32
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
