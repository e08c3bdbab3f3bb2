"""One training step, counted and not run: parameters, operations, memory.

No weights, no device, no network. The step of a configuration (student, losses, teachers,
discriminator) is walked with tensors that have a shape and a precision but no numbers (torch's
FakeTensorMode, built on the meta device). torch's FLOP counter counts the operations, and the
tensors that autograd keeps are summed. One multiply-add is two operations; only matrix products,
convolutions and attention count.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from muse.analysis.counters import FlopCounter, SavedTensors
from muse.config import plain
from muse.config_checks import check_training_crop
from muse.losses.adversarial import (
    build_discriminator,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from muse.losses.muse_loss import MuseLoss
from muse.models.discriminator import PatchDiscriminator
from muse.models.muse_vit import MUSE_ViT, StudentOutput
from muse.stages import STAGES, select_trainable

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
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Parts(NamedTuple):
    """All networks of a run."""

    student: MUSE_ViT
    loss: MuseLoss
    discriminator: PatchDiscriminator | None


def build_parts(cfg: DictConfig) -> Parts:
    """What a training run builds, without weights and on the meta device.

    Raises ConfigError or CheckpointError where an architecture cannot be known.
    """
    with _quiet(), torch.device("meta"):
        student = MUSE_ViT(cfg.model, load_backbones=False)
        loss = MuseLoss.from_config(cfg, student, pretrained=False)
        adversarial = cfg.losses.adversarial.weight > 0
        return Parts(student, loss, build_discriminator(cfg) if adversarial else None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Libraries warn where they find no weights: here that is the point."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def count_step(cfg: DictConfig, batch: int) -> dict[str, Any]:
    """Parameters, operations (an image) and memory (bytes) of a step of one process.

    `batch` is the number of images.
    """
    check_training_crop(cfg)
    parts = build_parts(cfg)
    patterns = cfg.training.trainable
    if patterns is None:
        patterns = STAGES[cfg.training.stage].trainable
    select_trainable(parts.student, plain(patterns))
    side = cfg.dataset.preprocessing.crop_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        for network in filter(None, parts):
            for module in network.modules():  # each once, though lpips names some of its own twice
                module.to_empty(device="cpu", recurse=False)
        images = torch.empty(batch, 3, side, side)
        steps, forward, saved = _walk(parts, images, PRECISIONS[cfg.training.mixed_precision])
    flops = {name: count / batch for name, count in steps.items()}
    return {
        "parameters": _parameters(parts),
        "flops_forward": {name: count / batch for name, count in forward.items()},
        "flops_training": flops | {"total": sum(flops.values())},
        "float32_share": _float32_flops(flops, cfg) / sum(flops.values()),
        "memory": _memory(cfg, parts, saved),
    }


def _walk(
    parts: Parts, images: Tensor, dtype: torch.dtype
) -> tuple[dict[str, int], dict[str, int], int]:
    """Operations of the step's pieces and of the student's modules forward, and bytes kept.

    The bytes are those that autograd holds when the backward pass begins.
    """
    names = [str(number) for number in range(len(images))]
    batch = {"images": images, "text": names, "keys": names}
    half = dtype != torch.float32
    autocast = torch.autocast("cpu", dtype if half else torch.bfloat16, enabled=half)
    student, discriminator = parts.student.train(), parts.discriminator
    with SavedTensors(*parts) as saved:
        with FlopCounter() as forward, autocast:
            out = student(images, **parts.loss.needs)
        cut = _cut(out)
        with FlopCounter() as losses:
            total, _ = parts.loss(cut, batch)
        if discriminator:
            discriminator.requires_grad_(False)
            with FlopCounter() as judged, autocast:
                generator = hinge_generator_loss(discriminator(cut.reconstruction))
            discriminator.requires_grad_(True)
        kept = saved.bytes()
    with FlopCounter() as losses_backward:
        total.backward()
    teachers, in_teachers = _teachers(parts.loss, losses)
    steps = teachers | {
        "student forward": forward.get_total_flops(),
        "losses forward": losses.get_total_flops() - in_teachers,
        "losses backward": losses_backward.get_total_flops(),
    }
    if discriminator:
        with FlopCounter() as adversary:
            generator.backward()
            with autocast:
                both = torch.cat([images, cut.reconstruction.detach()])  # (2B,3,H,W)
                real, fake = discriminator(both).chunk(2)  # each (B,1,h,w)
            hinge_discriminator_loss(real, fake).backward()
        steps["discriminator"] = judged.get_total_flops() + adversary.get_total_flops()
    with FlopCounter() as backward:
        _backward_through(out, cut)
    steps["student backward"] = backward.get_total_flops()
    return steps, _by_part(forward), kept


def _teachers(loss: MuseLoss, counter: FlopCounter) -> tuple[dict[str, int], int]:
    """Operations of each teacher by the table's rows, and of all that happens inside teachers.

    Where a teacher has an extractor, it alone is counted: cosines of a few hundred places are not.
    """
    rows, inside, counts = {}, 0, counter.by_module()
    for term, row in TEACHERS.items():
        if term in loss.terms:
            path = f"MuseLoss.terms.{term}.teacher"
            everything = counts.get(path, 0)
            rows[row] = counts.get(f"{path}.extractor", everything)
            inside += everything
    return rows, inside


def _cut(out: StudentOutput) -> StudentOutput:
    """The student's outputs as the losses get them, with the graph before them cut off.

    In float32, as accelerate hands them on.
    """

    def leaf(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(leaf(one) for one in value)
        if not isinstance(value, Tensor):
            return value
        return value.detach().float().requires_grad_(value.requires_grad)

    return StudentOutput(*(leaf(field) for field in out))


def _backward_through(out: StudentOutput, cut: StudentOutput) -> None:
    """Hand the gradients that the losses left at `cut` on to the student."""
    pairs = [
        (own, leaf.grad.to(own.dtype))
        for own, leaf in zip(_tensors(out), _tensors(cut))
        if own.requires_grad and leaf.grad is not None
    ]
    torch.autograd.backward([own for own, _ in pairs], [grad for _, grad in pairs])


def _tensors(out: StudentOutput) -> list[Tensor]:
    found = [value for field in out for value in (field if isinstance(field, tuple) else (field,))]
    return [value for value in found if isinstance(value, Tensor)]


def _by_part(counter: FlopCounter) -> dict[str, int]:
    """Operations of the student's parts by the table's rows."""
    rows, owner = dict.fromkeys(MODULES, 0), _owners()
    for path, count in counter.by_module().items():
        part, _, inner = path.removeprefix("MUSE_ViT.").partition(".")
        # Each part is called once as a module, but for the list of blocks: there each block is.
        if part in owner and (not inner or part == "muse_blocks" and inner.isdigit()):
            rows[owner[part]] += count
    return rows | {"total": counter.get_total_flops()}


def _owners() -> dict[str, str]:
    return {part: row for row, parts in MODULES.items() for part in parts}


def _float32_flops(flops: dict[str, float], cfg: DictConfig) -> float:
    if cfg.training.mixed_precision == "no":
        return sum(flops.values())
    return sum(
        count
        for name, count in flops.items()
        if name.endswith("teacher") or name.startswith("losses")
    )


# ------------------------------------------------------------------------------------------- sizes
def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _parameters(parts: Parts) -> dict[str, dict[str, int]]:
    """Of the student by part (and how many of them learn), and of the networks beside it."""
    student, learning = dict.fromkeys(MODULES, 0), dict.fromkeys(MODULES, 0)
    owner, terms = _owners(), parts.loss.terms
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


def _memory(cfg: DictConfig, parts: Parts, saved: int) -> dict[str, int]:
    """Bytes of one process; `buckets` is what DDP adds on more than one."""
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
        "teachers": 4 * (_count(parts.loss.parameters()) - heads),
        "activations": saved,
    }
    return memory | {"total": sum(memory.values()), "buckets": 4 * trained}
