"""The section `model` of the configuration, and what each routing means."""

from dataclasses import dataclass
from typing import Any

from muse.config_fields import key, section

# What each routing means for the keys that stand at null (docs/fidelity.md).
ROUTING_CELLS: dict[str, dict[str, Any]] = {
    "paper": {
        "isolate_streams": True,
        "shield_attention": True,
        "join_semantics": True,
        "shield_semantics": True,
        "topology": "all",  # losses.topology.blocks
        "itc": "all",  # losses.itc.blocks
    },
    "release": {
        "isolate_streams": False,
        "shield_attention": True,
        "join_semantics": False,
        "shield_semantics": True,
        "topology": "last",
        "itc": "last",
    },
    "shared": {
        "isolate_streams": False,
        "shield_attention": False,
        "join_semantics": False,
        "shield_semantics": True,
        "topology": "all",
        "itc": "last",
    },
}
STREAM_KEYS = ("isolate_streams", "shield_attention", "join_semantics", "shield_semantics")


def by_routing(cell: str) -> str:
    """A cell's value in each routing, for a sentence: `paper: true; release, shared: false`."""
    routings: dict[str, list[str]] = {}
    for routing, cells in ROUTING_CELLS.items():
        routings.setdefault(str(cells[cell]).lower(), []).append(routing)
    return "; ".join(f"{', '.join(names)}: {value}" for value, names in routings.items())


@dataclass
class SourceConfig:
    source: str = key("random")
    config: dict[str, Any] = key({})


@dataclass
class EncoderConfig(SourceConfig):
    source: str = key(
        "OpenGVLab/InternVL3-1B-hf",
        "hub id | local directory (either InternVL layout) | random",
    )
    config: dict[str, Any] = key(
        {}, "fields of transformers' InternVLVisionConfig; empty: read from the source"
    )
    drop_path: float = key(
        0.0,
        "stochastic depth: rate at the last layer, linear from 0 at the first; in training, also "
        "while the encoder is frozen (InternVL3: 0.1)",
        least=0,
        below=1,
    )


@dataclass
class DecoderConfig(SourceConfig):
    source: str = key(
        "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers", "hub id | local directory | random"
    )
    config: dict[str, Any] = key(
        {}, "fields of diffusers' AutoencoderDC; empty: read from the source"
    )


@dataclass
class ModelConfig:
    routing: str = key(
        "paper",
        "who learns from what (docs/fidelity.md). The four keys below override its cells one by "
        "one; null: as the routing says",
        choices=ROUTING_CELLS,
    )
    isolate_streams: bool | None = key(
        None,
        f"detach the inputs of W_Q, W_K and W_ITC. {by_routing('isolate_streams')}; stage 3 sets "
        "it to false",
    )
    shield_attention: bool | None = key(
        None, f"the value path uses A.detach(). {by_routing('shield_attention')}"
    )
    join_semantics: bool | None = key(
        None,
        f"sg(S) joins the values: A.detach() (V + sg(S)). {by_routing('join_semantics')}",
    )
    shield_semantics: bool | None = key(
        None,
        f"the S that joins is sg(S). {by_routing('shield_semantics')}; false lets "
        "reconstruction into W_ITC (ablation)",
    )
    dim: int = key(512, "block width D", least=1)
    num_heads: int = key(8, "model.dim is this times an even number", least=1)
    num_blocks: int = key(6, "SynergisticBlocks L", least=1)
    unshuffle: int = key(
        2, "side of the pixel-unshuffle before the blocks; 1 keeps every encoder token", least=1
    )
    latent_dim: int = key(32, "channels of the latent", least=1)
    semantic_dim: int = key(768, "joint image-text width E; must be the text teacher's", least=1)
    grad_scale: float = key(
        1.0, "factor on the gradient that flows from the reconstruction back into the blocks"
    )
    gradient_checkpointing: str = key(
        "none",
        "what the backward pass computes again instead of keeping it: less memory, more time. all: "
        "the decoder's blocks and, where it learns, the encoder's layers too",
        choices=("none", "blocks", "all"),
        was={"False": "none", "True": "blocks"},
    )
    encoder: EncoderConfig = section(EncoderConfig)
    decoder: DecoderConfig = section(DecoderConfig)
