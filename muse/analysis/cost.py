"""What a run costs, computed and not measured: parameters, operations, memory, hours; a table."""

from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig

from muse.analysis.step_count import count_step

ASSUMPTIONS = (
    "computed, not measured: a real step also spends time on normalisations, activations, data "
    "and communication; the utilisation stands for them",
    "teachers and perceptual networks at teacher.precision and losses.perceptual.precision, the "
    "rest at training.mixed_precision",
    "every caption is embedded once a step; a memory of captions or maps saves more",
    "weights, gradients, AdamW's two moments and the running means in float32",
    "activations: what autograd keeps for the backward pass with fused attention, 16-bit copies of "
    "weights included; no workspace, no fragmentation, no CUDA context",
    "bytes moved: what all operations but matrix products, convolutions and attention read and "
    "write, run one by one; a compiler that fuses them moves less",
)
LABELS = {
    "weights": "weights of student (and discriminator)",
    "gradients": "gradients",
    "optimizer": "AdamW's moments",
    "ema": "running means",
    "teachers": "teachers, perceptual networks",
    "activations": "activations kept for the backward pass",
    "recomputed": "largest piece computed again",
}
Row = tuple[str, list[str]]


def run_cost(
    cfg: DictConfig,
    *,
    batch: int | None = None,
    gpus: int = 8,
    utilisation: float = 0.4,
    peak: float = 989.0,
    peak_float32: float = 67.0,
    peak_tf32: float = 494.0,
    bandwidth: float = 3350.0,
) -> dict[str, Any]:
    """`count_step`, and what all steps of the stage take.

    Args:
        cfg: the configuration of one stage.
        batch: images of one process, for the memory; default: the configuration's.
        gpus: processes, which with the configuration's batch give the images of a step unless
            `training.global_batch_size` does.
        utilisation: share of the peaks that is reached.
        peak: 10^12 operations a second and GPU in mixed precision.
        peak_float32: the same in float32.
        peak_tf32: the same in TF32.
        bandwidth: 10^9 bytes a second between a GPU and its memory.
    """
    training = cfg.training
    step = count_step(cfg, batch or training.per_gpu_batch_size)
    images = (
        training.global_batch_size
        or training.per_gpu_batch_size * training.gradient_accumulation_steps * gpus
    )
    limits = {"float32": peak_float32, "tf32": peak_tf32}
    limits["bf16"] = peak if training.mixed_precision != "no" else peak_float32
    everything = images * training.max_train_steps
    hours = {
        kind: count * everything / (limits[kind] * 1e12 * utilisation * 3600)
        for kind, count in step["flops_by_precision"].items()
    }
    recipe = _recipe(step, training.max_train_steps, images, gpus, hours, bandwidth)
    assumed = {
        "utilisation": utilisation,
        "peak_tflops": peak,
        "peak_tflops_float32": peak_float32,
        "peak_tflops_tf32": peak_tf32,
        "bandwidth_gb": bandwidth,
        "notes": list(ASSUMPTIONS),
    }
    return {
        "stage": training.stage,
        "mixed_precision": training.mixed_precision,
        "crop": cfg.dataset.preprocessing.crop_size,
        "batch": batch or training.per_gpu_batch_size,
        **step,
        "recipe": recipe,
        "assumptions": assumed,
    }


def _recipe(
    step: dict[str, Any],
    steps: int,
    images: int,
    gpus: int,
    hours: dict[str, float],
    bandwidth: float,
) -> dict[str, Any]:
    """What all `steps` of `images` take; hours: GPU-hours by precision."""
    everything = images * steps
    return {
        "steps": steps,
        "global_batch": images,
        "images": everything,
        "flops": step["flops_training"]["total"] * everything,
        "gpu_hours": sum(hours.values()),
        "gpu_hours_float32": hours["float32"],
        "gpu_hours_moving": step["bytes_moved"] * everything / (bandwidth * 1e9 * 3600),
        "gpus": gpus,
        "hours": sum(hours.values()) / gpus,
    }


# ------------------------------------------------------------------------------------------- table
def _section(
    costs: Sequence[dict[str, Any]],
    pick: Callable[[dict[str, Any]], dict[str, Any]],
    form: Callable[[Any], str],
    labels: dict[str, str] | None = None,
) -> list[Row]:
    """One row a key, in the order in which the keys first come, a dash where a stage has none."""
    keys = list(dict.fromkeys(key for cost in costs for key in pick(cost)))
    keys = [key for key in keys if key != "total"] + ["total"] * ("total" in keys)
    return [
        (
            (labels or {}).get(key, key),
            [form(pick(cost)[key]) if key in pick(cost) else "–" for cost in costs],
        )
        for key in keys
    ]


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.3g}" if value < 100 else f"{value:,.1f}"


def _giga(value: float) -> str:
    return _number(value / 1e9)


def _sections(costs: Sequence[dict[str, Any]]) -> list[tuple[str, list[Row]]]:
    """(title, rows) of the whole table."""

    def million(value: float) -> str:
        return f"{value / 1e6:.2f}"

    def memory(cost: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in cost["memory"].items() if key != "buckets"}

    learning = ("learning", [million(cost["parameters"]["learning"]["total"]) for cost in costs])
    moved = [_giga(cost["bytes_moved"]) for cost in costs]
    return [
        (
            "parameters, millions",
            [*_section(costs, lambda cost: cost["parameters"]["student"], million), learning],
        ),
        (
            "networks beside the student, millions",
            _section(costs, lambda cost: cost["parameters"]["beside"], million),
        ),
        (
            "forward pass of the student, GFLOPs an image",
            _section(costs, lambda cost: cost["flops_forward"], _giga),
        ),
        (
            "training step, GFLOPs an image",
            [
                *_section(costs, lambda cost: cost["flops_training"], _giga),
                ("of it in float32", [f"{100 * cost['float32_share']:.0f}%" for cost in costs]),
                ("bytes moved by other operations, GB", moved),
            ],
        ),
        (
            "activations kept for the backward pass, GB",
            _section(costs, lambda cost: cost["activations"], _giga),
        ),
        (
            "memory of one process, GB (10⁹ bytes)",
            [
                ("images in the batch", [str(cost["batch"]) for cost in costs]),
                *_section(costs, memory, _giga, LABELS),
                ("more with DDP: buckets", [_giga(cost["memory"]["buckets"]) for cost in costs]),
            ],
        ),
        ("the whole stage", _stage_rows([cost["recipe"] for cost in costs])),
    ]


def _stage_rows(recipe: Sequence[dict[str, Any]]) -> list[Row]:
    """Steps, images, operations and hours of whole stages."""
    return [
        ("optimizer steps", [f"{part['steps']:,}" for part in recipe]),
        ("images a step", [f"{part['global_batch']:,}" for part in recipe]),
        ("images", [f"{part['images']:,}" for part in recipe]),
        ("operations, 10¹⁸", [_number(part["flops"] / 1e18) for part in recipe]),
        ("GPU-hours", [_number(part["gpu_hours"]) for part in recipe]),
        ("of them in float32", [_number(part["gpu_hours_float32"]) for part in recipe]),
        (
            "beside them, moving bytes unfused",
            [_number(part["gpu_hours_moving"]) for part in recipe],
        ),
        (
            "hours on that many GPUs: "
            + ", ".join(dict.fromkeys(str(part["gpus"]) for part in recipe)),
            [_number(part["hours"]) for part in recipe],
        ),
    ]


def cost_text(costs: Sequence[dict[str, Any]]) -> str:
    """The table for a terminal: one column for each stage."""
    parts, names = _sections(costs), [cost["name"] for cost in costs]
    first = max(len(label) for _, rows in parts for label, _ in rows) + 2
    width = max(12, *(len(name) + 2 for name in names))
    lines = [" " * first + "".join(f"{name:>{width}}" for name in names)]
    for title, rows in parts:
        if rows:
            lines += [
                "",
                title,
                *(
                    f"  {label:<{first - 2}}" + "".join(f"{value:>{width}}" for value in values)
                    for label, values in rows
                ),
            ]
    return "\n".join([*lines, "", *_totals(costs), *_footnotes(costs)])


def cost_markdown(costs: Sequence[dict[str, Any]]) -> str:
    """The table for a document."""
    names = [cost["name"] for cost in costs]
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(costs)]
    for title, rows in _sections(costs):
        if rows:
            lines += [
                f"| **{title}** |" + " |" * len(costs),
                *(f"| {label} | " + " | ".join(values) + " |" for label, values in rows),
            ]
    return (
        "\n".join([*lines, "", *(f"- {line}" for line in (*_totals(costs), *_footnotes(costs)))])
        + "\n"
    )


def _totals(costs: Sequence[dict[str, Any]]) -> list[str]:
    """The exact count, and what all stages take together."""
    student = costs[-1]["parameters"]["student"]["total"]
    lines = [f"{student:,} parameters in the student"]
    if len(costs) > 1:
        parts = [cost["recipe"] for cost in costs]
        lines.append(
            f"all {len(costs)} stages: {sum(part['images'] for part in parts):,} images, "
            f"{_number(sum(part['flops'] for part in parts) / 1e18)} x 10¹⁸ operations, "
            f"{_number(sum(part['gpu_hours'] for part in parts))} GPU-hours"
        )
    return lines


def _footnotes(costs: Sequence[dict[str, Any]]) -> list[str]:
    """What was assumed."""
    first = costs[0]["assumptions"]
    peak = (
        f"at {100 * first['utilisation']:.0f}% of {first['peak_tflops']:g} TFLOP/s in mixed "
        f"precision, {first['peak_tflops_tf32']:g} in TF32 and {first['peak_tflops_float32']:g} in "
        f"float32, for each GPU; {first['bandwidth_gb']:g} GB/s"
    )
    return [peak, *first["notes"]]
