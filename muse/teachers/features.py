"""Frozen image backbones of one interface, and the feature teacher made of one.

An extractor is a module `extractor(images in [0,1], blocks)` -> list of (B,C,h,w), one for each
block; it normalises its own input. It serves the affinity teacher too.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from muse.errors import ConfigError
from muse.models.layers import IMAGENET_MEAN, IMAGENET_STD, check_images
from muse.teachers.base import FrozenTeacher, Normalise, image_size_option, log, resize_images
from muse.teachers.efficientnet_lite import load_efficientnet_lite0
from muse.teachers.hub import (
    is_timm_directory,
    loading,
    require_complete,
    stored_normalisation,
    timm_name,
)
from muse.utils.weights import load_into, read_state_dict

TORCHVISION = "torchvision:"
ADVICE = (
    "Set the source to efficientnet_lite0 (from a package, no download), to a local directory "
    "(timm or transformers layout), or see that the weights can be fetched."
)
# A fine, a middle and a coarse level of EfficientNet-Lite0; their vectors are of like length (48,
# 70, 92 on the demo's pictures).
FEATURE_LAYERS = tuple({"block": block, "size": 128} for block in (4, 10, 14))
Block = int | str


# ------------------------------------------------------------------------------------- extractors
class Extractor(FrozenTeacher):
    """A library's network that gives the features of `blocks` in a fixed order, picked by block."""

    def __init__(self, network: nn.Module, normalise: Normalise, blocks: Sequence[Block]):
        super().__init__()
        self.network, self.normalise, self.blocks = network, normalise, list(blocks)
        self.freeze()

    def outputs(self, pixels: Tensor) -> Sequence[Tensor]:
        """Features of `self.blocks` for normalised pixels."""
        return self.network(pixels)

    def forward(self, images: Tensor, blocks: Sequence[Block]) -> list[Tensor]:
        """Features (B,C,h,w) of `blocks`, in the order asked."""
        found = dict(zip(self.blocks, self.outputs(self.normalise(images))))
        return [found[block] for block in blocks]


class TimmFeatures(Extractor):
    """`features_only` of a timm model: a name, or a directory in timm's layout."""

    def __init__(
        self, source: str, config: dict[str, Any], blocks: Sequence[Block], pretrained: bool
    ):
        import timm  # noqa: PLC0415 - heavy

        levels = sorted(blocks)
        arguments = {"features_only": True, "out_indices": levels} | config
        arguments["pretrained"] = pretrained and config.get("pretrained", True)
        network = timm.create_model(timm_name(source), **arguments)
        stored = network.pretrained_cfg
        mean, std = stored.get("mean", IMAGENET_MEAN), stored.get("std", IMAGENET_STD)
        super().__init__(network, Normalise(mean, std), levels)


class TransformersFeatures(Extractor):
    """Any native transformers backbone class: ResNet, ConvNeXt, Swin, DINOv2, DINOv3 ..."""

    def __init__(
        self, source: str, config: dict[str, Any], blocks: Sequence[Block], pretrained: bool
    ):
        import transformers  # noqa: PLC0415 - heavy

        stages, normalise = sorted(blocks), Normalise()
        settings = transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=False, out_indices=stages, **config
        )
        # Not AutoBackbone.from_pretrained, which asks the hub even about a directory.
        kind = transformers.MODEL_FOR_BACKBONE_MAPPING[type(settings)]
        if pretrained:
            options = {"dtype": "float32", "weights_only": True, "output_loading_info": True}
            network, report = kind.from_pretrained(source, config=settings, **options)
            require_complete(source, report["missing_keys"])
            normalise = Normalise(*stored_normalisation(source))
        else:
            network = kind(settings)
        super().__init__(network, normalise, stages)

    def outputs(self, pixels: Tensor) -> Sequence[Tensor]:
        return self.network(pixels).feature_maps


class TorchvisionFeatures(Extractor):
    """Graph nodes of a torchvision model.

    `config.weights`: a name of torchvision's (by default DEFAULT), a file, or `none`.
    """

    def __init__(
        self, name: str, config: dict[str, Any], blocks: Sequence[Block], pretrained: bool
    ):
        weights = config.get("weights", "DEFAULT") if pretrained else "none"
        from_file = Path(str(weights)).is_file()
        by_name = None if from_file or weights == "none" else weights
        model = torchvision.models.get_model(name, weights=by_name)
        if from_file:
            load_into(model, read_state_dict(weights, name), weights, name)
        nodes = {node: node for node in blocks}
        network = create_feature_extractor(model, train_return_nodes=nodes, eval_return_nodes=nodes)
        super().__init__(network, Normalise(), list(blocks))

    def outputs(self, pixels: Tensor) -> Sequence[Tensor]:
        found = self.network(pixels)
        return [found[block] for block in self.blocks]


class RandomFeatures(FrozenTeacher):
    """Seeded 3x3 convolutions of stride 2 with ReLU, for tests. Block i is the i-th of them."""

    def __init__(self, channels: Sequence[int] = (8, 16, 16), seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        widths = [3, *channels]
        self.weights = nn.ParameterList(
            torch.randn(after, before, 3, 3, generator=generator, device="cpu")
            * (2 / (9 * before)) ** 0.5
            for before, after in zip(widths, widths[1:])
        )
        self.freeze()

    def forward(self, images: Tensor, blocks: Sequence[Block]) -> list[Tensor]:
        """Features (B,C,h,w) of `blocks`, in the order asked."""
        found, x = [], images * 2 - 1
        for weight in self.weights[: max(blocks) + 1]:
            x = F.relu(F.conv2d(x, weight, stride=2, padding=1))
            found.append(x)
        return [found[block] for block in blocks]


def load_extractor(
    source: str,
    config: dict[str, Any],
    blocks: Sequence[Block],
    where: str,
    pretrained: bool = True,
) -> nn.Module:
    """The extractor of `source`, ready to give the features of any of `blocks`.

    Args:
        source: `efficientnet_lite0` (blocks 0-15) | `timm:NAME`, a bare timm name or a directory
            in timm's layout (blocks: levels of a CNN, layers of a ViT) | `torchvision:NAME`
            (blocks: graph node names) | a directory or hub id OWNER/NAME of a transformers backbone
            (blocks: stages) | `random` (a strided stack from `config: {channels, seed}`).
        config: further arguments of the library's constructor.
        blocks: those that later calls may ask for.
        where: the section of the configuration, for the message of an error.
        pretrained: False makes the architecture without weights.
    """
    if not source:
        raise ConfigError(
            f"{where}.source is empty: name a backbone (efficientnet_lite0, timm:NAME, "
            "a directory, ...)"
        )
    if source == "efficientnet_lite0":
        return load_efficientnet_lite0(**config, pretrained=pretrained)
    if source == "random":
        return RandomFeatures(**config)
    ordered = list(dict.fromkeys(blocks))
    with loading(f"{where}.source {source!r}", ADVICE):
        if source.startswith(TORCHVISION):
            name = source.removeprefix(TORCHVISION)
            return TorchvisionFeatures(name, config, ordered, pretrained)
        is_hub_id = "/" in source and ":" not in source
        if (Path(source).is_dir() or is_hub_id) and not is_timm_directory(source):
            return TransformersFeatures(source, config, ordered, pretrained)
        return TimmFeatures(source, config, ordered, pretrained)


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
