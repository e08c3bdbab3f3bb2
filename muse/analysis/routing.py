"""Who learns from what: the gradient routing that FIDELITY's table states, and what autograd measures on a model.

`routing_table` follows the arrows of Fig. 2 backwards by rule; `measure_routing` takes the gradients of the three objectives,
each alone, with every parameter trainable. Zero means exactly zero (or no path at all), never small.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse.config import ROUTING_CELLS
from muse.losses.contrastive import itc_loss
from muse.losses.reconstruction import pixel_loss
from muse.losses.topology import select_blocks, topology_loss
from muse.models.muse_vit import MUSE_ViT

LOSSES = ("reconstruction", "topology", "itc")
# Owners inside a block. norm1 stands alone: it feeds W_Q, W_K and W_V, so it may learn from what W_O does not see.
BLOCK_GROUPS = {
    "W_QK": ("q_topo", "k_topo", "q_norm", "k_norm"),
    "W_V": ("v_sem",),
    "W_ITC": ("v_itc",),
    "norm1": ("norm1",),
    "W_O+MLP": ("proj", "norm2", "mlp"),
}
OUTER_GROUPS = {
    "encoder": ("encoder",),
    "adapter": ("adapter_mlp",),
    "projector": ("semantic_projector", "logit_scale"),
    "decoder": ("to_latent", "decoder_adapter", "decoder"),
}

Table = dict[str, dict[str, bool]]  # loss -> group -> does a gradient reach it


class Streams(NamedTuple):
    """The switches of SynergisticBlock, and which blocks each objective reads (`all` or `last`)."""

    isolate: bool
    shield: bool
    join: bool
    shield_semantics: bool
    shared: bool
    topology: str
    itc: str


def streams_of(routing: str, isolate: bool | None = None, **cells: Any) -> Streams:
    """The switches of a routing (`paper`, `release`, `shared`); `isolate`, `shield`, `join`, `shield_semantics`,
    `topology`, `itc` override cells."""
    base = ROUTING_CELLS[routing]
    chosen = {
        "isolate": base["isolate_streams"],
        "shield": base["shield_attention"],
        "join": base["join_semantics"],
        "shield_semantics": base["shield_semantics"],
        "topology": base["topology"],
        "itc": base["itc"],
    }
    given = {"isolate": isolate, **cells}
    return Streams(
        shared=routing == "shared",
        **(chosen | {name: value for name, value in given.items() if value is not None}),
    )


def routing_table(
    routing: str, isolate: bool | None = None, num_blocks: int = 6, **cells: Any
) -> Table:
    """What the table of docs/fidelity.md says: loss -> group -> whether a gradient reaches it. Arguments as `streams_of`."""
    streams = streams_of(routing, isolate, **cells)
    return {loss: _reach(loss, streams, num_blocks) for loss in LOSSES}


def _reach(loss: str, streams: Streams, num_blocks: int) -> dict[str, bool]:
    """Walk from the output back to the pixels; `flows` says whether a gradient arrives at the tokens between two blocks."""
    reached = {}
    flows = loss == "reconstruction"
    for index in reversed(range(num_blocks)):
        is_last = index == num_blocks - 1
        reads_attention = loss == "topology" and (streams.topology == "all" or is_last)
        reads_semantic = loss == "itc" and (streams.itc == "all" or is_last)
        attention = reads_attention or (flows and not streams.shield)
        values = flows or (streams.shared and reads_semantic)
        semantic = (
            reads_semantic or (flows and streams.join and not streams.shield_semantics)
        ) and not streams.shared
        norm1 = values or (attention and not streams.isolate)
        groups = {"W_QK": attention, "W_V": values, "norm1": norm1, "W_O+MLP": flows}
        groups |= {} if streams.shared else {"W_ITC": semantic}
        reached |= {f"muse_blocks.{index}.{name}": value for name, value in groups.items()}
        flows = flows or norm1 or (semantic and not streams.isolate)
    return {
        **reached,
        "encoder": flows,
        "adapter": flows,
        "projector": loss == "itc",
        "decoder": loss == "reconstruction",
    }


def owned_parameters(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Group -> name -> parameter; every parameter of the model is in exactly one group."""
    groups: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        prefix, kinds, part = ("", OUTER_GROUPS, parts[0])
        if parts[0] == "muse_blocks":
            prefix, kinds, part = (f"muse_blocks.{parts[1]}.", BLOCK_GROUPS, parts[2])
        group = prefix + next(kind for kind, members in kinds.items() if part in members)
        groups.setdefault(group, {})[name] = parameter
    return groups


def measure_routing(
    model: MUSE_ViT,
    images: Tensor,
    text_embeds: Tensor | None = None,
    topology_targets: Sequence[Tensor] | None = None,
    *,
    topology: str = "all",
    itc: str = "all",
    heads: str = "mean",
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """The norm of each parameter's gradient from each objective alone: loss -> parameter name -> norm, 0.0 where there is none.

    images (B, 3, H, W) in [0, 1], B > 1; text_embeds (B, E) and topology_targets (L tensors (B, 1 or heads, N, N), rows sum to 1)
    are random where not given. topology, itc: which blocks the objective reads, `all` or `last`.
    """
    device = next(model.parameters()).device
    with all_trainable(model) as named, torch.enable_grad():
        images = images.to(device)
        out = model(images)
        generator = torch.Generator().manual_seed(seed)
        if text_embeds is None:
            text_embeds = torch.randn(len(images), model.config.semantic_dim, generator=generator)
        if topology_targets is None:
            count = out.log_topology[0].shape[-1]
            maps = [
                torch.rand(len(images), 1, count, count, generator=generator)
                for _ in out.log_topology
            ]
            topology_targets = [one / one.sum(dim=-1, keepdim=True) for one in maps]
        targets = [one.to(device) for one in topology_targets]
        losses = {
            "reconstruction": pixel_loss(out.reconstruction, images),
            "topology": topology_loss(
                select_blocks(out.log_topology, topology), select_blocks(targets, topology), heads
            ),
            "itc": itc_loss(
                select_blocks(out.image_embeds, itc),
                F.normalize(text_embeds.to(device).float(), dim=-1),
                out.logit_scale,
                gather=False,
            ),
        }
        measured = {}
        for loss, value in losses.items():
            gradients = torch.autograd.grad(
                value, list(named.values()), retain_graph=True, allow_unused=True
            )
            measured[loss] = {
                name: 0.0 if gradient is None else float(gradient.float().norm())
                for name, gradient in zip(named, gradients)
            }
    return measured


@contextmanager
def all_trainable(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Within the block every parameter takes gradients; gives them by name, and restores what each one was."""
    named = dict(model.named_parameters())
    before = {name: parameter.requires_grad for name, parameter in named.items()}
    model.requires_grad_(True)
    try:
        yield named
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(before[name])


def routing_report(
    model: MUSE_ViT,
    images: Tensor,
    text_embeds: Tensor | None = None,
    topology_targets: Sequence[Tensor] | None = None,
    *,
    topology: str | None = None,
    itc: str | None = None,
    heads: str = "mean",
) -> dict[str, Any]:
    """Table and measurement side by side, ready for JSON; `agrees` is true when zeros stand exactly where the table says.

    Each group's entry: `expected`, `measured` (a gradient reaches some tensor of it), `tensors`, `reached` (how many) and `norm`.
    `dead` names the block tensors that none of the three objectives reaches. Arguments as `measure_routing`; `topology` and `itc`
    default to the routing's own.
    """
    config = model.config
    cells = {
        "shield": config.shield_attention,
        "join": config.join_semantics,
        "shield_semantics": config.shield_semantics,
        "topology": topology,
        "itc": itc,
    }
    streams = streams_of(config.routing, config.isolate_streams, **cells)
    table = routing_table(config.routing, config.isolate_streams, config.num_blocks, **cells)
    measured = measure_routing(
        model,
        images,
        text_embeds,
        topology_targets,
        topology=streams.topology,
        itc=streams.itc,
        heads=heads,
    )
    groups = owned_parameters(model)
    losses = {
        loss: {
            group: _entry(table[loss][group], [measured[loss][name] for name in names])
            for group, names in groups.items()
        }
        for loss in LOSSES
    }
    differing = [
        f"{loss} on {group}"
        for loss in LOSSES
        for group, entry in losses[loss].items()
        if entry["expected"] != entry["measured"]
    ]
    blocks = [name for name, _ in model.named_parameters() if name.startswith("muse_blocks.")]
    return {
        "routing": config.routing,
        "streams": streams._asdict(),
        "losses": losses,
        "agrees": not differing,
        "differing": differing,
        "block_tensors": len(blocks),
        "dead": [name for name in blocks if not any(measured[loss][name] for loss in LOSSES)],
    }


def _entry(expected: bool, norms: Sequence[float]) -> dict[str, Any]:
    reached = sum(norm > 0 for norm in norms)
    return {
        "expected": expected,
        "measured": reached > 0,
        "tensors": len(norms),
        "reached": reached,
        "norm": sum(norm**2 for norm in norms) ** 0.5,
    }
