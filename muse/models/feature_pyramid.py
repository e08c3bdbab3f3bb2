"""MUSE_ViT as timm's `features_only` models are used: maps, with their channels and reductions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from muse.models.muse_vit import MUSE_ViT

LEVELS = ("encoder", "block", "semantic")


class PyramidInfo:
    """What timm's `feature_info` answers about the maps that the pyramid gives, in their order."""

    def __init__(self, rows: Sequence[dict[str, Any]]):
        self.rows = list(rows)

    def channels(self) -> list[int]:
        return [row["num_chs"] for row in self.rows]

    def reduction(self) -> list[int]:
        """Pixels of one cell."""
        return [row["reduction"] for row in self.rows]

    def module_name(self) -> list[str]:
        return [row["module"] for row in self.rows]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)


class FeaturePyramid(nn.Module):
    """`pyramid(images)` -> a list of maps (B, C, H/reduction, W/reduction), one pass for all.

    `encoder` are InternViT's tokens on their own grid, `block` the tokens after the last block,
    `semantic` its semantic value stream, both on the latent's grid. Gradients reach what the
    model's routing lets them reach.

    Args:
        model: a `MUSE_ViT`.
        levels: which maps, finest first.
    """

    def __init__(self, model: MUSE_ViT, levels: Sequence[str] = LEVELS):
        super().__init__()
        if not levels or set(levels) - set(LEVELS):
            raise ValueError(f"levels must be of {', '.join(LEVELS)}, got {tuple(levels)}")
        self.model, self.levels = model, tuple(levels)
        width, dim = model.encoder.config.hidden_size, model.config.dim
        last = f"muse_blocks.{model.config.num_blocks - 1}"
        known = {
            "encoder": {"num_chs": width, "reduction": model.patch_size, "module": "encoder"},
            "block": {"num_chs": dim, "reduction": model.cell, "module": last},
            "semantic": {"num_chs": dim, "reduction": model.cell, "module": f"{last}.v_itc"},
        }
        if model.config.routing == "shared":
            known["semantic"]["module"] = f"{last}.v_sem"
        self.feature_info = PyramidInfo([known[level] for level in self.levels])

    @classmethod
    def from_pretrained(cls, source: str | Path, levels: Sequence[str] = LEVELS) -> Self:
        """As `MUSE_ViT.from_pretrained`."""
        return cls(MUSE_ViT.from_pretrained(source), levels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) in [0, 1]; sides that are no multiples of the cell are padded."""
        model = self.model
        trunk = model._trunk(model._pad(images), False)
        tokens = {
            "encoder": (trunk.encoder_tokens, trunk.encoder_grid),
            "block": (trunk.tokens, trunk.grid),
            "semantic": (trunk.semantic, trunk.grid),
        }
        return [model._to_map(*tokens[level]) for level in self.levels]
