"""What a run costs, computed and not measured: parameters, operations, memory, hours."""

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
        "recipe": _recipe(cfg, step, gpus, assumed),
        "assumptions": assumed,
    }


def _recipe(
    cfg: DictConfig, step: dict[str, Any], gpus: int, assumed: dict[str, Any]
) -> dict[str, Any]:
    """Images, operations and hours of all steps of a stage."""
    training = cfg.training
    images = (
        training.global_batch_size
        or training.per_gpu_batch_size * training.gradient_accumulation_steps * gpus
    )
    everything = images * training.max_train_steps
    mixed = "peak_tflops" if training.mixed_precision != "no" else "peak_tflops_float32"
    peaks = {"float32": "peak_tflops_float32", "tf32": "peak_tflops_tf32", "bf16": mixed}
    hours = {
        kind: count * everything / (assumed[peaks[kind]] * 1e12 * assumed["utilisation"] * 3600)
        for kind, count in step["flops_by_precision"].items()
    }
    moved = step["bytes_moved"] * everything
    return {
        "steps": training.max_train_steps,
        "global_batch": images,
        "images": everything,
        "flops": step["flops_training"]["total"] * everything,
        "gpu_hours": sum(hours.values()),
        "gpu_hours_float32": hours["float32"],
        "gpu_hours_moving": moved / (assumed["bandwidth_gb"] * 1e9 * 3600),
        "gpus": gpus,
        "hours": sum(hours.values()) / gpus,
    }
