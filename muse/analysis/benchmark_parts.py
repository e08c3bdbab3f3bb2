"""Parts of the tokenizer, timed beside the plain way to the same numbers; weights are random.

Every row has the time of both ways from one run, their ratio, and the largest difference of their
results over the largest value, which must be small, or the comparison is refused.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from muse.analysis.benchmark_clock import (
    count_flops,
    matrix_peak,
    peak_bytes,
    time_ways,
)
from muse.analysis.counters import FlopCounter
from muse.analysis.step_count import output_tensors
from muse.config import plain
from muse.errors import ConfigError
from muse.losses.muse_loss import MuseLoss
from muse.models.dc_blocks import LinearAttention
from muse.models.muse_vit import MUSE_ViT
from muse.stages import STAGES, select_trainable
from muse.teachers.build import shared_topology_teacher
from muse.teachers.vit_attention import AttentionTeacher

# Relative difference beyond which two ways do not give the same numbers; a GPU's frozen networks
# compute in 16 bits.
SAME = {"cpu": 1e-3, "cuda": 3e-2}
GROWTH = (224, 448, 896, 1792)


@dataclass
class Bench:
    """What all parts share.

    Args:
        cfg: the configuration of one stage; the weights are random.
        device: cpu or cuda.
        batch: images.
        size: their side in pixels; None: the configuration's crop.
        repeats: measurements of each way.
    """

    cfg: DictConfig
    device: str = "cpu"
    batch: int = 4
    size: int | None = None
    repeats: int = 5
    peaks: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.size = self.size or self.cfg.dataset.preprocessing.crop_size
        torch.manual_seed(0)
        self.model = MUSE_ViT(self.cfg.model, load_backbones=False).to(self.device).eval()

    def images(self, size: int | None = None, batch: int | None = None) -> Tensor:
        """(batch, 3, size, size) in [0, 1], always the same."""
        generator = torch.Generator().manual_seed(1)
        shape = (batch or self.batch, 3, size or self.size, size or self.size)
        return torch.rand(shape, generator=generator).to(self.device)

    def peak(self, precision: str) -> float:
        """The machine's measured operations a second: the best of all measurements so far."""
        if precision not in self.peaks:
            self.measure_peak(precision)
        return self.peaks[precision]

    def measure_peak(self, precision: str) -> None:
        """Measure it again: a machine's speed drifts, and a peak of a slow moment flatters."""
        found = matrix_peak(self.device, precision)
        self.peaks[precision] = max(found, self.peaks.get(precision, 0.0))

    def row(
        self, name: str, ours: Callable[[], Any], slow: Callable[[], Any], flops: int | None = None
    ) -> dict[str, Any]:
        """Both ways' times, their agreement, and what follows for `ours`."""
        difference = require_same(name, ours(), slow(), SAME[self.device.partition(":")[0]])
        flops = count_flops(ours) if flops is None else flops
        self.measure_peak("float32")
        times = time_ways({"ours": ours, "plain": slow}, self.device, self.repeats)
        self.measure_peak("float32")
        seconds = times["ours"]["seconds"]
        return {
            **times,
            "ratio": times["plain"]["seconds"] / seconds,
            "difference": difference,
            "flops": flops,
            "share_of_peak": flops / seconds / self.peak("float32"),
            "images_per_second": self.batch / seconds,
            "peak_bytes": peak_bytes(ours, self.device),
        }


def require_same(name: str, ours: Any, slow: Any, tolerance: float) -> float:
    """The largest relative difference of two results; AssertionError beyond `tolerance`."""
    difference = max(
        float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-12))
        for a, b in zip(_flat(ours), _flat(slow), strict=True)
    )
    if not difference <= tolerance:
        raise AssertionError(f"{name}: the two ways differ by {difference:.2g} of the largest")
    return difference


def _flat(result: Any) -> list[Tensor]:
    """The tensors of nested tuples, whatever else these hold."""
    if isinstance(result, Tensor):
        return [result.detach()]
    inside = result if isinstance(result, tuple | list) else ()
    return [tensor for one in inside for tensor in _flat(one)]


@contextlib.contextmanager
def written_out_attention() -> Iterator[None]:
    """Within it every attention matrix is made whole: no fused kernel, no linear order."""
    fused, linear = F.scaled_dot_product_attention, LinearAttention._linear

    def naive(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        if attn_mask is not None or dropout_p or is_causal:
            return fused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return (query @ key.transpose(-1, -2) * scale).softmax(dim=-1) @ value

    F.scaled_dot_product_attention = naive
    LinearAttention._linear = lambda self, query, key, value: self._quadratic(query, key, value)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused
        LinearAttention._linear = linear


def _plainly(way: Callable[[], Any]) -> Callable[[], Any]:
    def slow() -> Any:
        with written_out_attention():
            return way()

    return slow


# -------------------------------------------------------------------------------------------- parts
@torch.inference_mode()
def bench_student(bench: Bench, part: str) -> dict[str, Any]:
    """encode, decode or reconstruct; on CUDA also in bf16, and with the decoder compiled."""
    model, images = bench.model, bench.images()
    latent = model.encode(images).latent.clone()
    ways = {
        "encode": lambda: model.encode(images).latent,
        "decode": lambda: model.decode(latent),
        "reconstruct": lambda: model.reconstruct(images),
    }
    row = bench.row(part, ways[part], _plainly(ways[part]))
    if bench.device.startswith("cuda"):
        row["bf16"] = in_16_bits(bench, ways[part], row["flops"])
        if part != "encode":
            whole = model.decoder.forward
            model.decoder.forward = torch.compile(whole)
            try:
                row["bf16_compiled"] = in_16_bits(bench, ways[part], row["flops"])
            finally:
                model.decoder.forward = whole
    return row


def in_16_bits(bench: Bench, way: Callable[[], Any], flops: int) -> dict[str, Any]:
    """A way's time under autocast, and its share of the peak in bf16."""

    def half() -> Any:
        with torch.autocast(bench.device.partition(":")[0], torch.bfloat16):
            return way()

    times = time_ways({"ours": half}, bench.device, bench.repeats, warmup=3)["ours"]
    share = flops / times["seconds"] / bench.peak("bf16")
    return {**times, "share_of_peak": share, "images_per_second": bench.batch / times["seconds"]}


@torch.inference_mode()
def bench_teacher(bench: Bench) -> dict[str, Any]:
    """The topology teacher's maps beside every layer's attention written out, as the release does;
    `over_forward`: beside the bare network with fused attention in all layers.
    """
    grid = tuple(bench.model.encode(bench.images(batch=1)).grid)
    options, blocks = plain(bench.cfg.teacher.topology), len(bench.model.muse_blocks)
    teacher = shared_topology_teacher(bench.cfg, grid, pretrained=False)
    if not isinstance(teacher, AttentionTeacher):
        raise ConfigError(f"part teacher: teacher.topology.kind={options['kind']} has no attention")
    teacher = teacher.to(bench.device)
    images = bench.images()

    def ours() -> tuple[Tensor, ...]:
        return teacher(images).maps

    row = bench.row("teacher", ours, _plainly(ours))
    fused = partial(teacher.forward_fused, images)
    bare = time_ways({"ours": ours, "fused": fused}, bench.device, bench.repeats)
    row |= {"fused": bare["fused"], "maps": blocks}
    row["over_forward"] = bare["ours"]["seconds"] / bare["fused"]["seconds"]
    return row


def bench_step(bench: Bench, part: str) -> dict[str, Any]:
    """losses: the loss and its backward pass on given outputs; train_step: the student too."""
    model, images = bench.model.train(), bench.images()
    patterns = bench.cfg.training.trainable
    patterns = STAGES[bench.cfg.training.stage].trainable if patterns is None else patterns
    select_trainable(model, plain(patterns))
    loss = MuseLoss.from_config(bench.cfg, model, pretrained=False).to(bench.device)
    names = [str(number) for number in range(bench.batch)]
    batch = {"images": images, "text": names, "keys": names}

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        total, _ = loss(model(images, **loss.needs), batch)
        total.backward()
        return total

    with torch.no_grad():
        given = model(images, **loss.needs)
    leaves = [value.requires_grad_() for value in output_tensors(given) if value.ndim]

    def losses() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        total, _ = loss(given, batch)
        total.backward()
        return total

    way = step if part == "train_step" else losses
    try:
        return bench.row(part, way, _plainly(way))
    finally:
        model.zero_grad(set_to_none=True)
        model.requires_grad_(True).eval()


@torch.inference_mode()
def bench_growth(bench: Bench, sizes: tuple[int, ...] = GROWTH, tile: int | None = None) -> dict:
    """reconstruct of one picture by its side: time against counted operations, memory against
    pixels, each as a multiple of the smallest picture's.
    """
    rows: dict[str, Any] = {}
    for size in sizes:
        way = partial(bench.model.reconstruct, bench.images(size, 1), tile)
        with FlopCounter() as counter:  # this call is the warm-up too
            peak = peak_bytes(way, bench.device)
        time = time_ways({"ours": way}, bench.device, bench.repeats, warmup=0)["ours"]
        rows[str(size)] = {**time, "flops": counter.get_total_flops()}
        rows[str(size)]["peak_bytes"] = peak
    first = rows[str(sizes[0])]
    for size in sizes:
        row = rows[str(size)]
        row["time_over_flops"] = (row["seconds"] / first["seconds"]) / (
            row["flops"] / first["flops"]
        )
        if row["peak_bytes"] is not None:
            row["bytes_per_pixel"] = row["peak_bytes"] / size**2
    return rows


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    **{name: partial(bench_student, part=name) for name in ("encode", "decode", "reconstruct")},
    "teacher": bench_teacher,
    **{name: partial(bench_step, part=name) for name in ("losses", "train_step")},
    "growth": bench_growth,
}
