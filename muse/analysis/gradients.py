"""What the objectives' gradients do to each other (MUSE, Fig. 3): cosines, and where energy goes.

The three objectives of the paper are sums of the loss terms that serve them. A gradient is taken of
each alone, on the tensors that train, after any stop-gradient of the routing. Where no tensor of a
subspace gets a gradient from both objectives of a pair there is nothing to compare: the cosine is
None ("no shared gradient"), never a 0 that would look like a measurement.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from muse.errors import ConfigError
from muse.utils.curves import read_run

OBJECTIVES: dict[str, tuple[str, ...]] = {
    "reconstruction": ("reconstruction", "perceptual"),
    "structure": ("topology",),
    "semantics": ("itc",),
}
PAIRS = tuple(f"{first}~{second}" for first, second in combinations(OBJECTIVES, 2))
MATRICES = {"W_Q": ("q_topo",), "W_K": ("k_topo",), "W_V": ("v_sem",), "W_ITC": ("v_itc",)}
# W_V of a pair's cosine is the whole space of values: with MUSE's own values for semantics, W_ITC
# belongs to it.
SUBSPACES = {**MATRICES, "W_QK": ("q_topo", "k_topo"), "W_V": ("v_sem", "v_itc")}

Gradients = dict[
    str, Tensor | None
]  # parameter name -> gradient; None or all zero where the objective does not reach


def objectives(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weighted loss terms by name -> the objectives that are on."""
    found = {
        name: [values[term] for term in terms if term in values]
        for name, terms in OBJECTIVES.items()
    }
    return {
        name: torch.stack([value.float() for value in terms]).sum()
        for name, terms in found.items()
        if terms
    }


def subspace(name: str, names: Iterable[str]) -> list[str]:
    """The parameters of a subspace, out of `names`.

    name: `W_Q`, `W_K`, `W_QK` or `W_V` (weights of the blocks), `blocks`, `encoder` (with the
    adapter) or `all`.
    """
    if name == "all":
        return list(names)
    if name == "encoder":
        return [key for key in names if key.startswith(("encoder.", "adapter_mlp."))]
    inside = [key for key in names if key.startswith("muse_blocks.")]
    return (
        inside
        if name == "blocks"
        else [key for key in inside if key.split(".")[2] in SUBSPACES[name]]
    )


def take_gradients(
    model: nn.Module, losses: Mapping[str, Tensor], accelerator: Any = None
) -> dict[str, Gradients]:
    """Objective -> gradient of each tensor that trains; `.grad` of the parameters is left alone.

    Args:
        model: some of its parameters have `requires_grad`.
        losses: objective -> scalar with graph.
        accelerator: averages over its processes; None: there is one.
    """
    named = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    taken = {}
    for objective, loss in losses.items():
        grads = torch.autograd.grad(
            loss, list(named.values()), retain_graph=True, allow_unused=True
        )
        if accelerator is not None and accelerator.num_processes > 1:
            # One graph on every process, so the same tensors are reached on all of them.
            grads = [
                grad if grad is None else accelerator.reduce(grad, reduction="mean")
                for grad in grads
            ]
        taken[objective] = dict(zip(named, grads))
    return taken


def cosine(first: Gradients, second: Gradients, names: Iterable[str]) -> float | None:
    """Cosine of two gradients; None where no tensor gets both.

    Args:
        first: one objective's gradients by parameter name.
        second: the other's.
        names: the tensors that are taken as one vector.
    """
    dot, norms, shared = 0.0, [0.0, 0.0], False
    for name in names:
        sizes = [
            0.0 if grad is None else float(grad.double().square().sum())
            for grad in (first.get(name), second.get(name))
        ]
        norms = [total + size for total, size in zip(norms, sizes)]
        if all(sizes):
            shared = True
            dot += float((first[name].double() * second[name].double()).sum())
    return dot / (norms[0] * norms[1]) ** 0.5 if shared else None


def energy_shares(gradients: Gradients) -> dict[str, float] | None:
    """Shares of an objective's squared gradient on W_Q, W_K, W_V and W_ITC of all blocks.

    They sum to 1. None where it reaches none of them.
    """
    energy = {
        matrix: sum(
            float(grad.double().square().sum())
            for name, grad in gradients.items()
            if grad is not None and name.startswith("muse_blocks.") and name.split(".")[2] in parts
        )
        for matrix, parts in MATRICES.items()
    }
    total = sum(energy.values())
    return {matrix: value / total for matrix, value in energy.items()} if total else None


def gradient_report(gradients: Mapping[str, Gradients]) -> dict[str, Any]:
    """What one step's gradients, by objective, say in numbers.

    `cosine`: pair -> subspace -> cosine or None; `energy`: objective -> shares or None; `norm`:
    objective -> norm on all tensors.
    """
    names = list(next(iter(gradients.values())))
    report: dict[str, Any] = {"cosine": {}, "energy": {}, "norm": {}}
    for pair in PAIRS:
        first, second = pair.split("~")
        if first in gradients and second in gradients:
            report["cosine"][pair] = {
                space: cosine(gradients[first], gradients[second], subspace(space, names))
                for space in ("all", "blocks", "W_QK", "W_V", "encoder")
            }
    for objective, grads in gradients.items():
        report["energy"][objective] = energy_shares(grads)
        report["norm"][objective] = (
            sum(float(grad.double().square().sum()) for grad in grads.values() if grad is not None)
            ** 0.5
        )
    return report


# ------------------------------------------------------------------------- what runs have kept
def gradient_records(folders: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """What successive runs measured of their gradients (`experiment.log_grad_every`).

    `total_step` counts through the runs.
    """
    offset = 0
    for folder in map(Path, folders):
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"{folder}: no run directory (it holds no config.yaml)")
        stage = OmegaConf.load(folder / "config.yaml").training.stage
        records = read_run(folder).records
        for record in records:
            if "gradients" in record:
                yield {
                    "stage": stage,
                    "step": record["step"],
                    "total_step": offset + record["step"],
                    **record["gradients"],
                }
        offset += max((record["step"] for record in records), default=0)


def conflict(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Gradients of many steps in a few numbers: pair -> subspace -> numbers or None.

    They are `abs` (mean |cosine|), `mean`, `negative` (share of steps with a cosine below 0) and
    `conflict` (mean of max(0, -cosine)) over `steps` of the `measured` ones. Only steps in which
    the pair shares a gradient there count; None where it never does.
    """
    values: dict[str, dict[str, list[float | None]]] = {}
    for record in records:
        for pair, spaces in record["cosine"].items():
            for space, value in spaces.items():
                values.setdefault(pair, {}).setdefault(space, []).append(value)
    return {
        pair: {space: _summary(each) for space, each in spaces.items()}
        for pair, spaces in values.items()
    }


def _summary(values: Sequence[float | None]) -> dict[str, Any] | None:
    shared = [value for value in values if value is not None]
    count = len(shared)
    return (
        {
            "abs": sum(map(abs, shared)) / count,
            "mean": sum(shared) / count,
            "negative": sum(value < 0 for value in shared) / count,
            "conflict": sum(max(0.0, -value) for value in shared) / count,
            "steps": count,
            "measured": len(values),
        }
        if shared
        else None
    )
