"""Topology teacher anyone can have: affinity of a backbone's features, not DINOv3's attention.

A plain affinity softmax is a trivial target, because the diagonal and the position dominate it.
Here features are centred in each picture (what all its places share says nothing), the cosines of
several layers are averaged, places are compared by how they relate to the whole picture
(`order: 2`), and the diagonal gets its row's largest other value.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse.models.layers import check_images
from muse.teachers.base import (
    FrozenTeacher,
    TopologyTarget,
    evenly_spaced_layers,
    log,
)
from muse.teachers.extractors import load_extractor
from muse.teachers.features import (
    FeatureLayer,
    layer_features,
    read_layers,
    resize_features,
)

# Fine to coarse, all from one forward pass at 128 px; near the best of such sets by same-object AUC
# on the demo's training composites. On 120 composites of held-out objects (looked at while
# choosing), grids 8x8 / 16x16, temperature .1: AUC .969 / .967 (positional prior .856 / .841), KL
# from the positional prior .705 / .730 nats, from uniform 1.59 / 1.79. Blocks 4 and 14 at 192 px:
# AUC .974 / .972 for 1.3 to 2 times the time.
EFFICIENTNET_LAYERS = tuple({"block": block, "size": 128} for block in (1, 4, 10, 14))


def centred_cosine(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cosines between the N = h*w places of a grid, of features (B,C,hf,wf) centred per picture."""
    tokens = resize_features(features.float(), grid).flatten(2).transpose(1, 2)  # (B,N,C)
    tokens = F.normalize(tokens - tokens.mean(dim=1, keepdim=True), dim=-1)
    return tokens @ tokens.transpose(1, 2)  # (B,N,N)


def profile_cosine(cosine: Tensor) -> Tensor:
    """Second-order affinity (...,N,N): cosine between the centred rows of `cosine`.

    Two places are alike if they are like the same places. Parts of one object that differ from
    each other (a handle, a shadow side) but differ alike from the rest come together, so that a row
    shows the object and not its neighbourhood.
    """
    rows = F.normalize(cosine - cosine.mean(dim=-1, keepdim=True), dim=-1)
    return rows @ rows.transpose(-1, -2)


def affinity_to_map(cosine: Tensor, temperature: float) -> Tensor:
    """Row-wise softmax(cosine / temperature) of (...,N,N).

    Each diagonal entry is first replaced by its row's largest other.
    """
    size = cosine.shape[-1]
    if size == 1:
        return torch.ones_like(cosine)
    diagonal = torch.eye(size, dtype=torch.bool, device=cosine.device)
    largest = cosine.masked_fill(diagonal, float("-inf")).amax(dim=-1, keepdim=True)
    return torch.where(diagonal, largest, cosine).div(temperature).softmax(dim=-1)


class AffinityTeacher(FrozenTeacher):
    """`teacher(images, grid=None)` -> TopologyTarget of `num_maps` maps.

    Args:
        extractor: `extractor(images, blocks)` -> list of (B,C,h,w).
        layers: which of its blocks, at which image size.
        num_maps: how many student blocks there are.
        temperature: of the softmax over cosines.
        grid: the student's token grid, here or per call; without one, the last layer's own.
        spread: False: the mean over all layers, one tensor standing in every place; True: each
            layer's own map, evenly spaced onto the student blocks.
        heads: `mean`, or `per_head`: each layer is a head.
        order: 1 for the features' own cosines, 2 for `profile_cosine` of them.
    """

    def __init__(
        self,
        extractor: nn.Module,
        layers: Sequence[FeatureLayer],
        num_maps: int,
        *,
        temperature: float = 0.1,
        grid: tuple[int, int] | None = None,
        spread: bool = False,
        heads: str = "mean",
        order: int = 2,
    ):
        super().__init__()
        self.extractor, self.layers = extractor, tuple(layers)
        self.num_maps, self.grid = num_maps, grid
        self.temperature, self.spread, self.heads, self.order = temperature, spread, heads, order
        self.freeze()

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int] | None = None) -> TopologyTarget:
        """Maps of images (B,3,H,W) in [0,1]. Raises ValueError outside the pixel contract."""
        check_images(images, wait=False)
        # One picture at a time is as fast on a CPU, and its map then does not depend on its batch.
        parts = images.split(1) if images.device.type == "cpu" else (images,)
        with self.inside_precision():
            features = [layer_features(self.extractor, part, self.layers) for part in parts]
        grid = grid or self.grid or tuple(features[0][-1].shape[-2:])
        with torch.autocast(images.device.type, enabled=False):
            cosines = torch.cat(
                [torch.stack([centred_cosine(f, grid) for f in part], dim=1) for part in features]
            )  # (B,layers,N,N)
            return TopologyTarget(self._maps(cosines), tuple(grid))

    def _maps(self, cosines: Tensor) -> tuple[Tensor, ...]:
        """Maps for each student block from the cosines (B, layers, N, N)."""
        if self.heads == "mean" and not self.spread:
            cosines = cosines.mean(dim=1, keepdim=True)
        if self.order == 2:
            cosines = profile_cosine(cosines)
        maps = affinity_to_map(cosines, self.temperature)
        if self.spread:
            each = maps.split(1, dim=1)
            chosen = evenly_spaced_layers(len(self.layers), self.num_maps)
            return tuple(each[layer] for layer in chosen)
        return (maps,) * self.num_maps


def build_affinity_teacher(
    options: dict[str, Any], num_maps: int, grid: tuple[int, int] | None
) -> AffinityTeacher:
    """An AffinityTeacher from the options of `teacher.topology`, and `pretrained`.

    Args:
        options: `source, config, layers, image_size, temperature, heads, spread, order`, and
            `pretrained` (False: the architecture alone).
        num_maps: how many student blocks there are.
        grid: the student's token grid.
    """
    where, source = "teacher.topology", str(options["source"])
    default = EFFICIENTNET_LAYERS if source == "efficientnet_lite0" else None
    layers = read_layers(options["layers"], options["image_size"], default, where)
    blocks = [layer.block for layer in layers]
    extractor = load_extractor(
        source, dict(options["config"]), blocks, where, options["pretrained"]
    )
    words = "topology teacher: affinity of %s, blocks %s, order %d, temperature %g"
    log.info(words, source, blocks, options["order"], options["temperature"])
    return AffinityTeacher(
        extractor,
        layers,
        num_maps,
        temperature=float(options["temperature"]),
        grid=grid,
        spread=bool(options["spread"]),
        heads=options["heads"],
        order=options["order"],
    )
