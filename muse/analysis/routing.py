"""Who learns from what: the routing that FIDELITY's table states, and what autograd measures.

`routing_table` follows the arrows of Fig. 2 backwards by rule; `measure_routing` takes the
gradients of the three objectives, each alone, with every parameter trainable. Zero means exactly
zero (or no path at all), never small.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse.config import ROUTING_CELLS, STREAM_KEYS
from muse.losses.contrastive import itc_loss
from muse.losses.reconstruction import pixel_loss
from muse.losses.topology import select_blocks, topology_loss
from muse.models.muse_vit import MUSE_ViT

LOSSES = ("reconstruction", "topology", "itc")
# Owners inside a block. norm1 stands alone: it feeds W_Q, W_K and W_V, so it may learn from what
# W_O does not see.
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
    """The switches of SynergisticBlock, and which blocks each objective reads (`all` or `last`).

    Named as in the configuration: `model.*`, and `losses.topology.blocks` and `losses.itc.blocks`.
    """

    shared: bool  # model.routing=shared: W_ITC does not exist, the mean of V is S
    isolate_streams: bool
    shield_attention: bool
    join_semantics: bool
    shield_semantics: bool
    topology_blocks: str
    itc_blocks: str


def streams_of(routing: str, **switches: bool | str | None) -> Streams:
    """The switches of a routing (`paper`, `release`, `shared`).

    `switches` are fields of `Streams` that differ from the routing's own; None changes nothing.
    """
    cells = dict(ROUTING_CELLS[routing])
    cells |= {"topology_blocks": cells.pop("topology"), "itc_blocks": cells.pop("itc")}
    cells |= {name: value for name, value in switches.items() if value is not None}
    return Streams(shared=routing == "shared", **cells)


def routing_table(routing: str, num_blocks: int = 6, **switches: bool | str | None) -> Table:
    """What the table of docs/fidelity.md says: loss -> group -> whether a gradient reaches it.

    Args:
        routing: `paper`, `release` or `shared`.
        num_blocks: of the model.
        switches: see `streams_of`.
    """
    streams = streams_of(routing, **switches)
    return {loss: _reach(loss, streams, num_blocks) for loss in LOSSES}


def _reach(loss: str, streams: Streams, num_blocks: int) -> dict[str, bool]:
    """Walk from the output back to the pixels.

    `flows` says whether a gradient arrives at the tokens between two blocks.
    """
    reached = {}
    flows = loss == "reconstruction"
    for index in reversed(range(num_blocks)):
        is_last = index == num_blocks - 1
        reads_attention = loss == "topology" and (streams.topology_blocks == "all" or is_last)
        reads_semantic = loss == "itc" and (streams.itc_blocks == "all" or is_last)
        attention = reads_attention or (flows and not streams.shield_attention)
        values = flows or (streams.shared and reads_semantic)
        joined = flows and streams.join_semantics and not streams.shield_semantics
        semantic = (reads_semantic or joined) and not streams.shared
        norm1 = values or (attention and not streams.isolate_streams)
        groups = {"W_QK": attention, "W_V": values, "norm1": norm1, "W_O+MLP": flows}
        groups |= {} if streams.shared else {"W_ITC": semantic}
        reached |= {f"muse_blocks.{index}.{name}": value for name, value in groups.items()}
        flows = flows or norm1 or (semantic and not streams.isolate_streams)
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
    topology_blocks: str = "all",
    itc_blocks: str = "all",
    heads: str = "mean",
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """The norm of each parameter's gradient from each objective alone; 0.0 where there is none.

    Args:
        model: in the mode that is asked about.
        images: (B,3,H,W) in [0,1], B > 1.
        text_embeds: (B,E); random where not given.
        topology_targets: L tensors (B,1 or heads,N,N), rows sum to 1; random where not given.
        topology_blocks, itc_blocks: which blocks the objective reads, `all` or `last`.
        heads: `mean` or `per_head`.
        seed: of what is random.

    Returns loss -> parameter name -> norm.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    with all_trainable(model) as named, torch.enable_grad():
        images = images.to(device)
        out = model(images)
        if text_embeds is None:
            text_embeds = torch.randn(len(images), model.config.semantic_dim, generator=generator)
        if topology_targets is None:
            topology_targets = _random_targets(out.log_topology, generator)
        texts = F.normalize(text_embeds.to(device).float(), dim=-1)  # (B,E)
        losses = {
            "reconstruction": pixel_loss(out.reconstruction, images),
            "topology": topology_loss(
                select_blocks(out.log_topology, topology_blocks),
                select_blocks([one.to(device) for one in topology_targets], topology_blocks),
                heads,
            ),
            "itc": itc_loss(
                select_blocks(out.image_embeds, itc_blocks), texts, out.logit_scale, gather=False
            ),
        }
        return {loss: _norms(value, named) for loss, value in losses.items()}


def _random_targets(log_topology: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    batch, _, count, _ = log_topology[0].shape
    maps = [torch.rand(batch, 1, count, count, generator=generator) for _ in log_topology]
    return [one / one.sum(dim=-1, keepdim=True) for one in maps]


def _norms(loss: Tensor, named: dict[str, nn.Parameter]) -> dict[str, float]:
    gradients = torch.autograd.grad(
        loss, list(named.values()), retain_graph=True, allow_unused=True
    )
    return {
        name: 0.0 if gradient is None else float(gradient.float().norm())
        for name, gradient in zip(named, gradients)
    }


@contextmanager
def all_trainable(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Within the block every parameter takes gradients; afterwards each is what it was.

    Gives the parameters by name.
    """
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
    topology_blocks: str | None = None,
    itc_blocks: str | None = None,
    heads: str = "mean",
) -> dict[str, Any]:
    """Table and measurement side by side, ready for JSON.

    `agrees` is true when zeros stand exactly where the table says. Each group's entry: `expected`,
    `measured` (a gradient reaches some tensor of it), `tensors`, `reached` (how many) and `norm`.
    `dead` names the block tensors that none of the three objectives reaches. Arguments as
    `measure_routing`; `topology_blocks` and `itc_blocks` default to the routing's own.
    """
    config = model.config
    switches = {name: config[name] for name in STREAM_KEYS}
    switches |= {"topology_blocks": topology_blocks, "itc_blocks": itc_blocks}
    streams = streams_of(config.routing, **switches)
    table = routing_table(config.routing, config.num_blocks, **switches)
    measured = measure_routing(
        model,
        images,
        text_embeds,
        topology_targets,
        topology_blocks=streams.topology_blocks,
        itc_blocks=streams.itc_blocks,
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
