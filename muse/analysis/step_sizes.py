"""The sizes of one training step: parameters by part, bytes of one process by what they hold."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple

from omegaconf import DictConfig
from torch import Tensor, nn

from muse.analysis.counters import OTHER, SavedTensors
from muse.losses.muse_loss import MuseLoss
from muse.models.discriminator import PatchDiscriminator
from muse.models.muse_vit import MUSE_ViT

MODULES = {  # row of the table -> parts of the student
    "encoder": ("encoder",),
    "adapter": ("adapter_mlp",),
    "blocks": ("muse_blocks",),
    "latent": ("to_latent",),
    "projector": ("semantic_projector", "logit_scale"),
    "decoder": ("decoder_adapter", "decoder"),
}
TEACHERS = {  # term with a teacher -> row of the table
    "topology": "topology teacher",
    "itc": "text teacher",
    "distillation": "feature teacher",
}


class Parts(NamedTuple):
    """All networks of a run."""

    student: MUSE_ViT
    loss: MuseLoss
    discriminator: PatchDiscriminator | None


def owners() -> dict[str, str]:
    """Part of the student -> row of the table."""
    return {part: row for row, parts in MODULES.items() for part in parts}


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _nbytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def parameters_by_part(parts: Parts) -> dict[str, dict[str, int]]:
    """Of the student by part (and how many of them learn), and of the networks beside it."""
    student, learning = dict.fromkeys(MODULES, 0), dict.fromkeys(MODULES, 0)
    owner, terms = owners(), parts.loss.terms
    for name, parameter in parts.student.named_parameters():
        row = owner[name.split(".")[0]]
        student[row] += parameter.numel()
        learning[row] += parameter.numel() if parameter.requires_grad else 0
    beside = {
        row: _count(terms[term].teacher.parameters())
        for term, row in TEACHERS.items()
        if term in terms
    }
    if "perceptual" in terms:
        networks = terms["perceptual"].network.parts
        beside |= {part: _count(network.parameters()) for part, network in networks.items()}
    if parts.loss.heads():
        beside["loss heads"] = _count(parts.loss.heads().values())
    if parts.discriminator:
        beside["discriminator"] = _count(parts.discriminator.parameters())
    return {
        "student": student | {"total": sum(student.values())},
        "learning": learning | {"total": sum(learning.values())},
        "beside": beside,
    }


def activation_rows(parts: Parts) -> dict[nn.Module, str]:
    """The modules by which activations are counted, and their rows."""
    rows: dict[nn.Module, str] = {}
    for name, row in owners().items():
        part = getattr(parts.student, name)
        if isinstance(part, nn.ModuleList):
            rows.update(dict.fromkeys(part, row))
        elif isinstance(part, nn.Module):
            rows[part] = row
    for name, term in parts.loss.terms.items():
        networks = term.network.parts if name == "perceptual" else {}
        rows |= {network: part for part, network in networks.items()} or {term: f"loss {name}"}
    if parts.discriminator:
        rows[parts.discriminator] = "discriminator"
    return rows


def largest_recomputed(student: MUSE_ViT, images: Tensor, autocast: AbstractContextManager) -> int:
    """Bytes that the largest piece keeps which the backward pass computes again; 0 without any.

    In eval mode nothing is recomputed, so that each piece shows what it would keep.
    """
    mode, units = student.config.gradient_checkpointing, []
    if mode != "none":
        units += student.muse_blocks
    if mode == "all":
        units += [unit for stage in student.decoder.up_blocks for unit in stage]
        units += student.encoder.encoder.layer
    rows = {unit: str(index) for index, unit in enumerate(units)}
    if not rows:
        return 0
    with SavedTensors(student, rows=rows) as saved, autocast:
        out = student.eval()(images)
        kept = saved.by_row()
    del out
    return max(size for row, size in kept.items() if row != OTHER)


def step_memory(cfg: DictConfig, parts: Parts, saved: int, recomputed: int) -> dict[str, int]:
    """Bytes of one process; `buckets` is what DDP adds on more than one.

    Args:
        cfg: the run's configuration.
        parts: its networks.
        saved: bytes of activations.
        recomputed: bytes of the largest piece that is computed again.
    """
    student = _count(parts.student.parameters())
    learning = _count(p for p in parts.student.parameters() if p.requires_grad)
    heads = _count(parts.loss.heads().values())
    discriminator = _count(parts.discriminator.parameters()) if parts.discriminator else 0
    trained = learning + heads + discriminator
    memory = {
        "weights": 4 * (student + heads + discriminator),
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "ema": 4 * learning if cfg.training.use_ema else 0,
        "teachers": _nbytes(parts.loss.parameters()) - 4 * heads,
        "activations": saved,
    }
    if recomputed:
        memory["recomputed"] = recomputed
    return memory | {"total": sum(memory.values()), "buckets": 4 * trained}
