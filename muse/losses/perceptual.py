"""Perceptual distance: frozen networks, chosen and weighed by one name.

`lpips-convnext_s-1.0-0.1` is LPIPS with weight 1.0 and ConvNeXt-S with 0.1; the weighted sum is
divided by the sum of the weights. The networks are in perceptual_parts.py.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor, nn

from muse.config import plain
from muse.errors import ConfigError
from muse.losses.perceptual_parts import PARTS
from muse.losses.term import Needs, Term
from muse.models.muse_vit import MUSE_ViT, StudentOutput
from muse.teachers.build import chosen_precision


def parse_perceptual_name(name: str) -> dict[str, float]:
    """`a-b-1.0-0.1` -> {a: 1.0, b: 0.1}; `a` alone -> {a: 1.0}. Raises ConfigError for others."""
    words = name.split("-")
    if len(words) == 1:
        words = [*words, "1.0"]
    half = len(words) // 2
    parts = words[:half]
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ConfigError(
            f"losses.perceptual.name={name}: unknown part '{unknown[0]}'; known: {', '.join(PARTS)}"
        )
    try:
        weights = [float(word) for word in words[half:]]
    except ValueError:
        weights = []
    # Written so that a NaN, which fails every comparison, is refused too.
    usable = (
        len(weights) == len(parts) == len(set(parts))
        and min(weights) >= 0
        and 0 < sum(weights) < math.inf
    )
    if not usable:
        raise ConfigError(
            f"losses.perceptual.name={name}: expected the parts, then as many weights >= 0, not "
            "all 0, joined by '-' (such as lpips-convnext_s-1.0-0.1)"
        )
    return dict(zip(parts, weights))


class PerceptualLoss(nn.Module):
    """The weighted mean of the parts that `name` lists; a part with weight 0 is not built.

    Args:
        name: such as `lpips-convnext_s-1.0-0.1` (`losses.perceptual.name`).
        weights: part -> file of its weights (`losses.perceptual.weights`).
        blocks: of EfficientNet-Lite0 (`losses.perceptual.blocks`), None for its default.
        pretrained: False makes the architectures without weights.
        precision: how the networks compute (`float32`, `tf32`, `bf16`); distances are in float32.

    Raises ConfigError for a bad name or a file given for an unknown part, CheckpointError when
    weights cannot be had.
    """

    def __init__(
        self,
        name: str,
        weights: Mapping[str, str | Path] | None = None,
        blocks: Sequence[int] | None = None,
        pretrained: bool = True,
        precision: str = "float32",
    ):
        super().__init__()
        weights = dict(weights or {})
        stray = sorted(weights.keys() - PARTS.keys())
        if stray:
            raise ConfigError(
                f"losses.perceptual.weights: unknown part '{stray[0]}'; known: {', '.join(PARTS)}"
            )
        named = parse_perceptual_name(name)
        self.part_weights = {part: weight for part, weight in named.items() if weight > 0}
        options = {"efficientnet_lite0": {"blocks": blocks}} if blocks is not None else {}
        self.parts = nn.ModuleDict(
            {
                part: PARTS[part](weights.get(part), pretrained, **options.get(part, {}))
                for part in self.part_weights
            }
        )
        for part in self.parts.values():
            part.precision = precision

    def train(self, mode: bool = True) -> "PerceptualLoss":
        """Stay in eval mode: the networks are frozen."""
        return super().train(False)

    def per_image(self, images: Tensor, target: Tensor) -> Tensor:
        """(B,) float32: the distance of each image from its target, both (B,3,H,W) in [0,1]."""
        total = sum(
            weight * self.parts[part](images, target) for part, weight in self.part_weights.items()
        )
        return total / sum(self.part_weights.values())

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Mean over the batch; a float32 scalar. Gradient reaches `images` alone."""
        return self.per_image(images, target).mean()


class PerceptualTerm(Term):
    """`PerceptualLoss` of the student's reconstruction."""

    name, needs = "perceptual", Needs(reconstruction=True)

    def __init__(self, weight: float, network: nn.Module):
        super().__init__(weight)
        self.network = network

    def forward(
        self, out: StudentOutput, batch: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.network(out.reconstruction, batch["images"]), {}


def build_perceptual_term(
    cfg: DictConfig, student: MUSE_ViT, pretrained: bool = True
) -> PerceptualTerm:
    """The term of `losses.perceptual`."""
    section = cfg.losses.perceptual
    precision = chosen_precision(cfg, section.precision)
    network = PerceptualLoss(
        section.name, plain(section.weights), plain(section.blocks), pretrained, precision
    )
    return PerceptualTerm(section.weight, network)
