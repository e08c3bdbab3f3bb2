"""One training step, counted and not run: parameters, operations, memory.

No weights, no device, no network. The step of a configuration (student, losses, teachers,
discriminator) is walked with tensors that have a shape and a precision but no numbers (torch's
FakeTensorMode, built on the meta device). torch's FLOP counter counts the operations, and the
tensors that autograd keeps are summed. One multiply-add is two operations; only matrix products,
convolutions and attention count.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from muse.analysis.counters import FlopCounter, MovedBytes, SavedTensors
from muse.analysis.step_sizes import (
    MODULES,
    TEACHERS,
    Parts,
    activation_rows,
    largest_recomputed,
    owners,
    parameters_by_part,
    step_memory,
)
from muse.config import plain
from muse.config_checks import check_training_crop
from muse.losses.adversarial import (
    build_discriminator,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from muse.losses.muse_loss import MuseLoss
from muse.models.muse_vit import MUSE_ViT, StudentOutput
from muse.stages import STAGES, select_trainable
from muse.teachers.build import chosen_precision

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Walk(NamedTuple):
    """What was counted over one step."""

    steps: dict[str, int]  # operations of each piece of the step
    forward: dict[str, int]  # operations of the student's parts, forward
    kept: dict[str, int]  # bytes kept for the backward pass, by row
    recomputed: int  # bytes that the largest recomputed piece keeps while it is computed again
    moved: int  # bytes that all other operations read and write


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
        walk = _walk(parts, images, PRECISIONS[cfg.training.mixed_precision])
    flops = {name: count / batch for name, count in walk.steps.items()}
    accumulated = cfg.training.gradient_accumulation_steps > 1
    if "itc" in parts.loss.terms and cfg.losses.itc.across_accumulation and accumulated:
        rest = walk.forward["latent"] + walk.forward["decoder"]
        flops["student forward, first pass"] = (walk.forward["total"] - rest) / batch
    total = sum(flops.values())
    by_precision = _by_precision(flops, cfg)
    return {
        "parameters": parameters_by_part(parts),
        "flops_forward": {name: count / batch for name, count in walk.forward.items()},
        "flops_training": flops | {"total": total},
        "flops_by_precision": by_precision,
        "float32_share": by_precision["float32"] / total,
        "activations": walk.kept | {"total": sum(walk.kept.values())},
        "bytes_moved": walk.moved / batch,
        "memory": step_memory(cfg, parts, sum(walk.kept.values()), walk.recomputed),
    }


def _walk(parts: Parts, images: Tensor, dtype: torch.dtype) -> Walk:
    """One step, piece by piece; what is kept counts when the backward pass begins."""
    names = [str(number) for number in range(len(images))]
    batch = {"images": images, "text": names, "keys": names}
    half = dtype != torch.float32
    autocast = torch.autocast("cpu", dtype if half else torch.bfloat16, enabled=half)
    recomputed = largest_recomputed(parts.student, images, autocast)
    student, discriminator = parts.student.train(), parts.discriminator
    with MovedBytes() as moved:
        with SavedTensors(*parts, rows=activation_rows(parts)) as saved:
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
            kept = saved.by_row()
        with FlopCounter() as losses_backward:
            if total.requires_grad:  # not where the adversarial term alone has a weight
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
    return Walk(steps, _by_part(forward), kept, recomputed, moved.total)


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
        for own, leaf in zip(output_tensors(out), output_tensors(cut))
        if own.requires_grad and leaf.grad is not None
    ]
    torch.autograd.backward([own for own, _ in pairs], [grad for _, grad in pairs])


def output_tensors(out: StudentOutput) -> list[Tensor]:
    """Every tensor of a student's output."""
    found = [value for field in out for value in (field if isinstance(field, tuple) else (field,))]
    return [value for value in found if isinstance(value, Tensor)]


def _by_part(counter: FlopCounter) -> dict[str, int]:
    """Operations of the student's parts by the table's rows."""
    rows, owner = dict.fromkeys(MODULES, 0), owners()
    for path, count in counter.by_module().items():
        part, _, inner = path.removeprefix("MUSE_ViT.").partition(".")
        # Each part is called once as a module, but for the list of blocks: there each block is.
        if part in owner and (not inner or part == "muse_blocks" and inner.isdigit()):
            rows[owner[part]] += count
    return rows | {"total": counter.get_total_flops()}


def _by_precision(flops: dict[str, float], cfg: DictConfig) -> dict[str, float]:
    """Operations an image in float32, in TF32 and in 16 bits.

    Of the losses only the perceptual networks multiply matrices worth mentioning.
    """
    student = "float32" if cfg.training.mixed_precision == "no" else "bf16"
    teachers = chosen_precision(cfg, cfg.teacher.precision)
    perceptual = chosen_precision(cfg, cfg.losses.perceptual.precision)
    sums = {"float32": 0.0, "tf32": 0.0, "bf16": 0.0}
    for name, count in flops.items():
        of_loss = perceptual if name.startswith("losses") else student
        sums[teachers if name in TEACHERS.values() else of_loss] += count
    return sums
