"""The composite loss: a table of terms, each with its weight, its teacher and what it needs of the student (MUSE, Sec. Training).

A term whose weight is 0 is not built: it costs nothing and needs no weights. A new term is one class and one line of `TERMS`.
"""
import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from muse.config import plain
from muse.errors import ConfigError
from muse.losses.contrastive import caption_positives, itc_loss, passive_distillation_loss
from muse.losses.distillation import FeatureDistillation, PixelHead
from muse.losses.reconstruction import pixel_loss
from muse.losses.topology import resize_attention, select_blocks, topology_kl
from muse.models.muse_vit import MUSE_ViT, StudentOutput
from muse.models.teachers.cache import CachedTeacher


class Needs(NamedTuple):
    """Which parts of `StudentOutput` a term reads."""

    topology: bool = False
    semantics: bool = False
    reconstruction: bool = False


class Term(nn.Module):
    """One weighted objective. `forward` gives its unweighted value and further numbers worth a log line."""

    name: str
    needs = Needs()

    def __init__(self, weight: float):
        super().__init__()
        self.weight = weight

    def forward(self, out: StudentOutput, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError


def ask(teacher: nn.Module, batch: dict[str, Any]) -> Any:
    """The teacher's answer for a batch; one that remembers is told the samples' keys."""
    return teacher(batch["images"], keys=batch["keys"]) if isinstance(teacher, CachedTeacher) else teacher(batch["images"])


class ReconstructionTerm(Term):
    name, needs = "reconstruction", Needs(reconstruction=True)

    def __init__(self, weight: float, kind: str):
        super().__init__(weight)
        self.kind = kind

    def forward(self, out: StudentOutput, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return pixel_loss(out.reconstruction, batch["images"], self.kind), {}


class PerceptualTerm(Term):
    name, needs = "perceptual", Needs(reconstruction=True)

    def __init__(self, weight: float, network: nn.Module):
        super().__init__(weight)
        self.network = network

    def forward(self, out: StudentOutput, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.network(out.reconstruction, batch["images"]), {}


class TopologyTerm(Term):
    """Structure: 1/(L·H) Σ KL(Ψ(A_T) ‖ A_S); the teacher is an attribute of the term, never of the student."""

    name, needs = "topology", Needs(topology=True)

    def __init__(self, weight: float, teacher: nn.Module, blocks: str, heads: str, transpose: bool = False):
        super().__init__(weight)
        self.teacher, self.blocks, self.heads, self.transpose = teacher, blocks, heads, transpose

    def targets(self, batch: dict[str, Any], grid: tuple[int, int]) -> tuple[Tensor, ...]:
        """The teacher's maps on the student's grid: L tensors (B, 1 or heads, N, N). Equal maps are resized once."""
        target = ask(self.teacher, batch)
        resized: dict[int, Tensor] = {}
        for maps in target.maps:
            if id(maps) not in resized:
                resized[id(maps)] = resize_attention(maps, target.grid, grid, self.transpose)
        return tuple(resized[id(maps)] for maps in target.maps)

    def forward(self, out: StudentOutput, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        targets = self.targets(batch, out.grid)
        if self.heads == "per_head" and targets[0].shape[1] not in (1, out.log_topology[0].shape[1]):
            raise ConfigError(f"losses.topology.heads=per_head: the teacher has {targets[0].shape[1]} heads, the student "
                              f"{out.log_topology[0].shape[1]}; use heads=mean")
        each = topology_kl(select_blocks(out.log_topology, self.blocks), select_blocks(targets, self.blocks), self.heads)
        return each.mean(), {f"topology_block{i}": value.detach() for i, value in enumerate(each)} if len(each) > 1 else {}


class ITCTerm(Term):
    """Semantics: contrast of each block's mean S, through the one projector, with the caption's embedding."""

    name, needs = "itc", Needs(semantics=True)

    def __init__(self, weight: float, teacher: nn.Module, blocks: str, gather: bool, objective: str):
        super().__init__(weight)
        self.teacher, self.blocks, self.gather, self.objective = teacher, blocks, gather, objective

    def forward(self, out: StudentOutput, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        text = self.teacher(batch["text"]).to(out.image_embeds.device)
        images = select_blocks(out.image_embeds, self.blocks)
        if self.objective == "distillation":
            # The scale has no part in a regression; a zero keeps its gradient defined, so no rank waits for it.
            return passive_distillation_loss(images, text) + 0 * out.logit_scale, {}
        positives = caption_positives(batch["text"], self.gather, images.device)
        loss = itc_loss(images, text, out.logit_scale, positives, self.gather)
        return loss, {"logit_scale": out.logit_scale.detach()}


class DistillationTerm(Term):
    """Stand-in for a pretrained encoder where none can be had: a frozen network's features, and the pixels, from its tokens."""

    name = "distillation"

    def __init__(self, weight: float, teacher: nn.Module, pixel_weight: float, student: MUSE_ViT):
        super().__init__(weight)
        width = student.encoder.config.hidden_size
        self.teacher, self.pixel_weight = teacher, pixel_weight
        self.features = FeatureDistillation(width, teacher.dim)
        self.pixels = PixelHead(width, student.patch_size)

    def forward(self, out: StudentOutput, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.features(out.encoder_tokens, ask(self.teacher, batch))
        pixels = self.pixels(out.encoder_tokens, batch["images"])
        return features + self.pixel_weight * pixels, {"distillation_cosine": features.detach(), "distillation_pixels": pixels.detach()}


# --------------------------------------------------------------------------------------------------- the table
def _perceptual(cfg: DictConfig, student: MUSE_ViT, grid: tuple[int, int]) -> Term:
    from muse.models.perceptual_loss import PerceptualLoss

    section = cfg.losses.perceptual
    return PerceptualTerm(section.weight, PerceptualLoss(section.name, plain(section.weights), plain(section.blocks)))


@functools.lru_cache(maxsize=4)
def _teacher(kind: str, options: str, *arguments: Any) -> nn.Module:
    """Teachers are frozen, so successive stages of one process share one, with all that it remembers."""
    from muse.models import teachers

    # What is drawn here must not move the run's own generator (a teacher that is there already would draw nothing), nor depend on it.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return getattr(teachers, f"build_{kind}_teacher")(json.loads(options), *arguments)


def shared_topology_teacher(cfg: DictConfig, grid: tuple[int, int]) -> nn.Module:
    """The topology teacher of a configuration, for a student with this latent grid."""
    options = {**plain(cfg.teacher.topology), "heads": cfg.losses.topology.heads}
    return _teacher("topology", json.dumps(options, sort_keys=True), cfg.model.num_blocks, tuple(grid))


def shared_text_teacher(cfg: DictConfig) -> nn.Module:
    """The text teacher of a configuration; `ConfigError` when its width is not the model's."""
    teacher = _teacher("text", json.dumps(plain(cfg.teacher.text), sort_keys=True))
    if teacher.dim != cfg.model.semantic_dim:
        raise ConfigError(f"model.semantic_dim={cfg.model.semantic_dim} but the text teacher {cfg.teacher.text.source} embeds "
                          f"in {teacher.dim} dimensions")
    return teacher


def _topology(cfg: DictConfig, student: MUSE_ViT, grid: tuple[int, int]) -> Term:
    section = cfg.losses.topology
    return TopologyTerm(section.weight, shared_topology_teacher(cfg, grid), section.blocks, section.heads, section.transpose)


def _itc(cfg: DictConfig, student: MUSE_ViT, grid: tuple[int, int]) -> Term:
    section = cfg.losses.itc
    return ITCTerm(section.weight, shared_text_teacher(cfg), section.blocks, section.gather, section.objective)


def _distillation(cfg: DictConfig, student: MUSE_ViT, grid: tuple[int, int]) -> Term:
    from muse.models.teachers import build_feature_teacher

    section = cfg.losses.distillation
    return DistillationTerm(section.weight, build_feature_teacher(plain(cfg.teacher.feature)), section.pixel_weight, student)


# name of the section in `losses` -> how its term is built. The adversarial term has an optimizer of its own: see the trainer.
TERMS: dict[str, Callable[[DictConfig, MUSE_ViT, tuple[int, int]], Term]] = {
    "reconstruction": lambda cfg, student, grid: ReconstructionTerm(cfg.losses.reconstruction.weight, cfg.losses.reconstruction.type),
    "perceptual": _perceptual,
    "topology": _topology,
    "itc": _itc,
    "distillation": _distillation,
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
        return cls([build(cfg, student, (side, side)) for name, build in TERMS.items() if cfg.losses[name].weight > 0])

    @property
    def needs(self) -> dict[str, bool]:
        """Arguments for the student's forward: only what the active terms read."""
        needs = {part: any(getattr(term.needs, part) for term in self.terms.values()) for part in Needs._fields}
        return {**needs, "encoder_only": not any(needs.values())}

    def heads(self) -> dict[str, nn.Parameter]:
        """Parameters of the terms themselves that learn beside the student (none for the paper's terms)."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def weighted(self, out: StudentOutput, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
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

    def forward(self, out: StudentOutput, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and every number by name (see `weighted`)."""
        values, numbers = self.weighted(out, batch)
        return sum(values.values(), torch.zeros((), device=batch["images"].device)), numbers
