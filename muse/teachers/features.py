"""The layers of a frozen backbone at their image sizes, and the feature teacher made of them."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse.errors import ConfigError
from muse.models.layers import check_images
from muse.teachers.base import FrozenTeacher, image_size_option, log, resize_images
from muse.teachers.extractors import Block, load_extractor

# A fine, a middle and a coarse level of EfficientNet-Lite0; their vectors are of like length (48,
# 70, 92 on the demo's pictures).
FEATURE_LAYERS = tuple({"block": block, "size": 128} for block in (4, 10, 14))


# -------------------------------------------------------------------------- layers at their sizes
class FeatureLayer(NamedTuple):
    """A block of an extractor, and the size (H, W) at which it sees images (None: their own)."""

    block: Block
    size: tuple[int, int] | None = None


def read_layers(layers: Any, image_size: Any, default: Any, where: str) -> list[FeatureLayer]:
    """The layers that a section of the configuration asks for.

    Args:
        layers: entries `{block, size}`, or a block alone.
        image_size: for entries without a size.
        default: where there are no layers.
        where: the section, for the message of an error.
    """
    if not layers and not default:
        raise ConfigError(
            f"{where}.layers must name the backbone's blocks, for example [{{block: 2, size: 128}}]"
        )
    read = []
    for entry in layers or default:
        entry = entry if isinstance(entry, dict) else {"block": entry}
        if not {"block"} <= entry.keys() <= {"block", "size"} or not isinstance(
            entry["block"], (int, str)
        ):
            raise ConfigError(
                f"{where}.layers: an entry is a block, or {{block: ..., size: ...}}, got {entry!r}"
            )
        size = image_size_option(entry.get("size", image_size), f"{where}.layers.size")
        read.append(FeatureLayer(entry["block"], size))
    return read


def layer_features(
    extractor: nn.Module, images: Tensor, layers: Sequence[FeatureLayer]
) -> list[Tensor]:
    """Features (B,C,h,w) of every layer, the extractor run once for each distinct size."""
    by_size: dict[Any, list[int]] = defaultdict(list)
    for index, layer in enumerate(layers):
        by_size[layer.size].append(index)
    found: dict[int, Tensor] = {}
    for size, indices in by_size.items():
        blocks = [layers[index].block for index in indices]
        found.update(zip(indices, extractor(resize_images(images, size), blocks)))
    return [found[index] for index in range(len(layers))]


def resize_features(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Features (B,C,hf,wf) at `grid`, bilinear, anti-aliased where they shrink."""
    if tuple(features.shape[-2:]) == tuple(grid):
        return features
    shrinks = features.shape[-2] > grid[0] or features.shape[-1] > grid[1]
    return F.interpolate(features, size=tuple(grid), mode="bilinear", antialias=shrinks)


# ---------------------------------------------------------------------------------------- teacher
class FeatureTeacher(FrozenTeacher):
    """`teacher(images, grid=None)` -> (B,C,h,w) float32: all layers at one grid, stacked in C.

    Args:
        extractor: see above.
        layers: which of its blocks, at which image size.
        grid: (h, w), here or per call; without one, the first layer's own.
        normalize: each layer's vectors get unit length, so that in a cosine over C every layer
            counts alike.
    """

    def __init__(
        self,
        extractor: nn.Module,
        layers: Sequence[FeatureLayer],
        *,
        grid: tuple[int, int] | None = None,
        normalize: bool = False,
    ):
        super().__init__()
        self.extractor, self.layers = extractor, tuple(layers)
        self.grid, self.normalize = grid, normalize
        self.freeze()
        self.dim = self(torch.zeros(1, 3, 64, 64), grid=(1, 1)).shape[1]

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Features of images (B,3,H,W) in [0,1]. Raises ValueError outside the pixel contract."""
        check_images(images, wait=False)
        with self.inside_precision():
            features = layer_features(self.extractor, images, self.layers)
        features = [feature.float() for feature in features]
        grid = grid or self.grid or tuple(features[0].shape[-2:])
        features = [resize_features(feature, grid) for feature in features]
        if self.normalize:
            features = [F.normalize(feature, dim=1) for feature in features]
        return torch.cat(features, dim=1)


def build_features(options: dict[str, Any], grid: tuple[int, int] | None) -> FeatureTeacher:
    """A FeatureTeacher from options `source, config, layers, image_size, normalize, pretrained`."""
    where, source = "teacher.feature", str(options["source"])
    default = FEATURE_LAYERS if source == "efficientnet_lite0" else None
    layers = read_layers(options["layers"], options["image_size"], default, where)
    blocks = [layer.block for layer in layers]
    extractor = load_extractor(
        source, dict(options["config"]), blocks, where, options["pretrained"]
    )
    teacher = FeatureTeacher(extractor, layers, grid=grid, normalize=bool(options["normalize"]))
    log.info("feature teacher: %s, blocks %s, %d channels", source, blocks, teacher.dim)
    return teacher
