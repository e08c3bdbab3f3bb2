"""What a run costs, computed and not measured: parameters, operations, memory, hours; no weights, no device, no network.

The training step of the configuration (student, losses, teachers, discriminator) is walked with tensors that have a shape and a
precision but no numbers (torch's FakeTensorMode, built on the meta device). torch's FLOP counter counts the operations, and the
tensors that autograd keeps are summed. One multiply-add is two operations; only matrix products, convolutions and attention count.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Self

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from muse.analysis.unloaded import Parts, build_parts
from muse.config import plain
from muse.losses.adversarial import hinge_discriminator_loss, hinge_generator_loss
from muse.models.muse_vit import StudentOutput
from muse.stages import STAGES, select_trainable

MODULES = {
    "encoder": ("encoder",),
    "adapter": ("adapter_mlp",),
    "blocks": ("muse_blocks",),
    "latent": ("to_latent",),
    "projector": ("semantic_projector", "logit_scale"),
    "decoder": ("decoder_adapter", "decoder"),
}
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ASSUMPTIONS = (
    "computed, not measured: a real step also spends time on normalisations, activations, data and communication; the utilisation stands "
    "for them",
    "teachers and losses run in float32, outside of autocast, as the trainer runs them; the rest at training.mixed_precision",
    "every caption is embedded once a step; a memory of captions or maps saves more",
    "weights, gradients, AdamW's two moments and the running means in float32",
    "activations: what autograd keeps for the backward pass with fused attention, 16-bit copies of weights included; no workspace, no "
    "fragmentation, no CUDA context",
)


# ------------------------------------------------------------------------------------------------------- counting
def _convolution_backward(
    grad_out: tuple,
    x: tuple,
    weight: tuple,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    mask: tuple[bool, ...],
    out_shape: Any = None,
    **_: Any,
) -> int:
    """torch's own formula counts the weight's gradient of a grouped convolution `groups` times; each gradient costs one forward pass."""
    places = math.prod((x if transposed else grad_out)[2:])
    return 2 * x[0] * places * math.prod(weight) * (bool(mask[0]) + bool(mask[1]))


def _attention(
    query: tuple, key: tuple, value: tuple, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad: tuple, query: tuple, key: tuple, value: tuple, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


class FlopCounter(FlopCounterMode):
    """torch's counter, silent, with grouped convolutions counted once and the CPU's fused attention like that of GPUs."""

    def __init__(self) -> None:
        aten = torch.ops.aten
        super().__init__(
            display=False,
            custom_mapping={
                aten.convolution_backward: _convolution_backward,
                aten._scaled_dot_product_flash_attention_for_cpu: _attention,
                aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
            },
        )


class SavedTensors:
    """Within the block: bytes of the distinct storages that autograd keeps for the backward pass, those of `modules` left out."""

    def __init__(self, *modules: nn.Module | None):
        self._own = {
            tensor.untyped_storage()._cdata
            for module in modules
            if module is not None
            for tensor in (*module.parameters(), *module.buffers())
        }
        self._kept: dict[int, tuple[StorageWeakRef, int]] = {}
        self._hooks = saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._kept[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return tensor

    def bytes(self) -> int:
        """Of the storages that are still held."""
        return sum(size for storage, size in self._kept.values() if not storage.expired())

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


@contextlib.contextmanager
def _autocast(dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast(
        "cpu", dtype if dtype != torch.float32 else torch.bfloat16, enabled=dtype != torch.float32
    ):
        yield


# ------------------------------------------------------------------------------------------------------- the step
def count_step(cfg: DictConfig, batch: int) -> dict[str, Any]:
    """Parameters, operations (an image) and memory (bytes) of one training step over `batch` images in one process."""
    parts = build_parts(cfg)
    patterns = (
        cfg.training.trainable
        if cfg.training.trainable is not None
        else STAGES[cfg.training.stage].trainable
    )
    select_trainable(parts.student, plain(patterns))
    networks = [
        parts.student,
        parts.loss,
        *(teacher.network for teacher in parts.teachers.values()),
    ]
    networks += [parts.discriminator] if parts.discriminator else []
    side = cfg.dataset.preprocessing.crop_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        for network in networks:
            network.to_empty(device="cpu")
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
    """One step: operations of its pieces, of the student's modules forward, and the bytes kept when the backward pass begins."""
    batch = {"images": images, "text": [str(number) for number in range(len(images))], "keys": []}
    steps: dict[str, int] = {}
    with torch.no_grad():
        for name, teacher in parts.teachers.items():
            with FlopCounter() as counter:
                teacher.run(images)
            steps[f"{name} teacher"] = counter.get_total_flops()
    parts.student.train()
    with SavedTensors(parts.student, parts.loss, parts.discriminator) as saved:
        with FlopCounter() as forward, _autocast(dtype):
            out = parts.student(images, **parts.loss.needs)
        cut = _cut(out)
        with FlopCounter() as losses:
            total, _ = parts.loss(cut, batch)
        generator = None
        if parts.discriminator:
            parts.discriminator.requires_grad_(False)
            with FlopCounter() as judged, _autocast(dtype):
                generator = hinge_generator_loss(parts.discriminator(cut.reconstruction))
            parts.discriminator.requires_grad_(True)
        kept = saved.bytes()
    with FlopCounter() as losses_backward:
        total.backward()
    steps |= {
        "student forward": forward.get_total_flops(),
        "losses forward": losses.get_total_flops(),
        "losses backward": losses_backward.get_total_flops(),
    }
    if parts.discriminator:
        with FlopCounter() as adversary:
            generator.backward()
            with _autocast(dtype):
                real, fake = parts.discriminator(
                    torch.cat([images, cut.reconstruction.detach()])
                ).chunk(2)
            hinge_discriminator_loss(real, fake).backward()
        steps["discriminator"] = judged.get_total_flops() + adversary.get_total_flops()
    with FlopCounter() as backward:
        pairs = [
            (own, leaf.grad.to(own.dtype))
            for own, leaf in zip(_tensors(out), _tensors(cut))
            if own.requires_grad and leaf.grad is not None
        ]
        torch.autograd.backward([own for own, _ in pairs], [grad for _, grad in pairs])
    steps["student backward"] = backward.get_total_flops()
    return steps, _by_module(forward), kept


def _tensors(out: StudentOutput) -> list[Tensor]:
    found = [value for field in out for value in (field if isinstance(field, tuple) else (field,))]
    return [value for value in found if isinstance(value, Tensor)]


def _cut(out: StudentOutput) -> StudentOutput:
    """The student's outputs as the losses get them (float32, as accelerate hands them on), with the graph before them cut off."""

    def leaf(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(leaf(one) for one in value)
        return (
            value.detach().float().requires_grad_(value.requires_grad)
            if isinstance(value, Tensor)
            else value
        )

    return StudentOutput(*(leaf(field) for field in out))


def _by_module(counter: FlopCounterMode) -> dict[str, int]:
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    result = {}
    for part, prefixes in MODULES.items():
        names = [f"MUSE_ViT.{prefix}" for prefix in prefixes]
        result[part] = sum(
            count
            for name, count in counts.items()
            if name in names
            or name.rpartition(".")[0] in names
            and name.rpartition(".")[0] == "MUSE_ViT.muse_blocks"
        )
    return result | {"total": counter.get_total_flops()}


def _float32_flops(flops: dict[str, float], cfg: DictConfig) -> float:
    if cfg.training.mixed_precision == "no":
        return sum(flops.values())
    return sum(
        count
        for name, count in flops.items()
        if name.endswith("teacher") or name.startswith("losses")
    )


# ------------------------------------------------------------------------------------------------------- sizes
def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _parameters(parts: Parts) -> dict[str, dict[str, int]]:
    """Of the student by module (and how many of them learn), and of the networks beside it."""
    named = list(parts.student.named_parameters())
    modules = {
        part: [p for name, p in named if name.split(".")[0] in prefixes]
        for part, prefixes in MODULES.items()
    }
    student = {part: _count(parameters) for part, parameters in modules.items()}
    learning = {
        part: _count(p for p in parameters if p.requires_grad)
        for part, parameters in modules.items()
    }
    beside = {
        f"{name} teacher": _count(teacher.network.parameters())
        for name, teacher in parts.teachers.items()
    }
    if "perceptual" in parts.loss.terms:
        beside |= {
            part: _count(network.parameters())
            for part, network in parts.loss.terms["perceptual"].network.parts.items()
        }
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
    student, learning = (
        _count(parts.student.parameters()),
        _count(p for p in parts.student.parameters() if p.requires_grad),
    )
    heads = _count(parts.loss.heads().values())
    discriminator = _count(parts.discriminator.parameters()) if parts.discriminator else 0
    frozen = (
        _count(parts.loss.parameters())
        - heads
        + sum(_count(teacher.network.parameters()) for teacher in parts.teachers.values())
    )
    trained = learning + heads + discriminator
    memory = {
        "weights": 4 * (student + heads + discriminator),
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "ema": 4 * learning if cfg.training.use_ema else 0,
        "teachers": 4 * frozen,
        "activations": saved,
    }
    return memory | {"total": sum(memory.values()), "buckets": 4 * trained}


# ------------------------------------------------------------------------------------------------------- hours
def run_cost(
    cfg: DictConfig,
    *,
    batch: int | None = None,
    gpus: int = 8,
    utilisation: float = 0.4,
    peak: float = 989.0,
    peak_float32: float = 67.0,
) -> dict[str, Any]:
    """`count_step` and what the whole stage takes.

    batch: images of one process, for the memory; default: the configuration's. gpus: processes, which with the configuration's batch
    give the images of a step unless `training.global_batch_size` does. utilisation: share of the peaks that is reached. peak,
    peak_float32: 10^12 operations a second and GPU in mixed precision and in float32.
    """
    training = cfg.training
    step = count_step(cfg, batch or training.per_gpu_batch_size)
    images = (
        training.global_batch_size
        or training.per_gpu_batch_size * training.gradient_accumulation_steps * gpus
    )
    total, share = step["flops_training"]["total"], step["float32_share"]
    half = peak if training.mixed_precision != "no" else peak_float32
    everything = images * training.max_train_steps
    mixed, single = (
        total * everything * part / (limit * 1e12 * utilisation * 3600)
        for part, limit in ((1 - share, half), (share, peak_float32))
    )
    whole = {
        "steps": training.max_train_steps,
        "global_batch": images,
        "images": everything,
        "flops": total * everything,
        "gpu_hours": mixed + single,
        "gpu_hours_float32": single if half != peak_float32 else mixed + single,
        "gpus": gpus,
        "hours": (mixed + single) / gpus,
    }
    assumed = {
        "utilisation": utilisation,
        "peak_tflops": peak,
        "peak_tflops_float32": peak_float32,
        "notes": list(ASSUMPTIONS),
    }
    return {
        "stage": training.stage,
        "mixed_precision": training.mixed_precision,
        "crop": cfg.dataset.preprocessing.crop_size,
        "batch": batch or training.per_gpu_batch_size,
        **step,
        "recipe": whole,
        "assumptions": assumed,
    }
