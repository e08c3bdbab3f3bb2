"""The table of stages: what each one trains (MUSE, Sec. Training; docs/fidelity.md rows 8-10).

A stage is data, not code. Weights of the losses, learning rates and step counts of a stage are in
`configs/`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from muse.errors import ConfigError

if TYPE_CHECKING:  # torch takes seconds to import, and a configuration loads without it
    from torch import nn


@dataclass(frozen=True)
class Stage:
    """One row: regular expressions, searched in the student's parameter names.

    `training.trainable` in a configuration replaces them.
    """

    trainable: tuple[str, ...]


# What reconstruction and structure train while the encoder is frozen. W_ITC and the projector get
# no gradient without the semantic loss, and a tensor without gradient has no place in an optimizer
# (or in DDP's buckets).
_BODY = (
    r"^adapter_mlp\.",
    r"^muse_blocks\.\d+\.(norm1|q_topo|k_topo|q_norm|k_norm|v_sem|proj|norm2|mlp)\.",
    r"^to_latent\.",
    r"^decoder_adapter\.",
    r"^decoder\.",
)
_SEMANTIC = (r"^muse_blocks\.\d+\.v_itc\.", r"^semantic_projector\.", r"^logit_scale$")

STAGES: dict[str, Stage] = {
    # Stands in for a pretrained encoder where none can be had (the demo).
    "encoder_distillation": Stage((r"^encoder\.",)),
    # Structure: attention learns the teacher's topology.
    "topology_warmup": Stage(_BODY),
    # Semantics: values learn the language of CLIP.
    "semantic_injection": Stage((*_BODY, *_SEMANTIC)),
    # Everything together, encoder included.
    "synergistic_tuning": Stage((*_BODY, *_SEMANTIC, r"^encoder\.")),
}


def select_trainable(model: "nn.Module", patterns: Sequence[str]) -> list[str]:
    """Set `requires_grad` by name: True where a pattern is found, False elsewhere.

    Returns the names that learn.
    """
    compiled = [compile_pattern(pattern, "training.trainable") for pattern in patterns]
    names = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(pattern.search(name) for pattern in compiled))
        if parameter.requires_grad:
            names.append(name)
    if not names:
        raise ConfigError(f"training.trainable: no parameter of the model matches {list(patterns)}")
    return names


def compile_pattern(text: str, key: str) -> re.Pattern:
    """The pattern; `ConfigError` names the key where it is not a regular expression."""
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(f"{key}: {text!r} is not a regular expression ({error})") from None
