"""Feature teacher: what a frozen backbone sees, for distilling it into a small encoder (in place of pretraining)."""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse.models.layers import check_images
from muse.models.teachers.affinity import FeatureLayer, layer_features, read_layers, resize_features
from muse.models.teachers.base import FrozenTeacher, log
from muse.models.teachers.extractors import load_extractor

# A fine, a middle and a coarse level; their vectors are of like length (48, 70, 92 on the demo's pictures).
EFFICIENTNET_LAYERS = tuple({"block": block, "size": 128} for block in (4, 10, 14))


class FeatureTeacher(FrozenTeacher):
    """`teacher(images, grid=None)` -> (B,C,h,w) float32: the features of all layers at one grid, stacked in C.

    grid: here or per call; without one, the first layer's own. normalize: each layer's vectors get unit length, so
    that in a cosine over C every layer counts alike.
    """

    def __init__(self, extractor: nn.Module, layers: Sequence[FeatureLayer], *, grid: tuple[int, int] | None = None,
                 normalize: bool = False):
        super().__init__()
        self.extractor, self.layers, self.grid, self.normalize = extractor, tuple(layers), grid, normalize
        self.freeze()
        self.dim = self(torch.zeros(1, 3, 64, 64), grid=(1, 1)).shape[1]

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Features of images (B,3,H,W) in [0,1]. Raises ValueError outside the pixel contract."""
        check_images(images, wait=False)
        features = [feature.float() for feature in layer_features(self.extractor, images, self.layers)]
        grid = grid or self.grid or tuple(features[0].shape[-2:])
        features = [resize_features(feature, grid) for feature in features]
        if self.normalize:
            features = [F.normalize(feature, dim=1) for feature in features]
        return torch.cat(features, dim=1)


def build(options: dict[str, Any], grid: tuple[int, int] | None) -> FeatureTeacher:
    """A FeatureTeacher from options `source, config, layers, image_size, normalize`."""
    where, source = "teacher.feature", str(options["source"])
    default = EFFICIENTNET_LAYERS if source == "efficientnet_lite0" else None
    layers = read_layers(options["layers"], options["image_size"], default, where)
    extractor = load_extractor(source, dict(options["config"]), [layer.block for layer in layers], where)
    teacher = FeatureTeacher(extractor, layers, grid=grid, normalize=bool(options["normalize"]))
    log.info("feature teacher: %s, blocks %s, %d channels", source, [layer.block for layer in layers], teacher.dim)
    return teacher
