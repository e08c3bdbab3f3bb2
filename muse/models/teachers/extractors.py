"""Frozen image backbones of one interface: `features(images in [0,1], blocks) -> list of (B,C,h,w)`, one a block.

Behind a feature-affinity teacher and a feature teacher. Each normalises its own input.
"""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse.errors import ConfigError
from muse.models.teachers.base import IMAGENET_MEAN, IMAGENET_STD, FrozenTeacher, Normalise
from muse.models.teachers.sources import is_timm_directory, loading, require_complete, stored_normalisation, timm_name

TORCHVISION = "torchvision:"
ADVICE = ("Set the source to efficientnet_lite0 (from a package, no download), to a local directory (timm or "
          "transformers layout), or see that the weights can be fetched.")
Block = int | str


def load_extractor(source: str, config: dict[str, Any], blocks: Sequence[Block], where: str) -> nn.Module:
    """The backbone of `source`, ready to give the features of `blocks` (a later call may ask for any of them).

    source: `efficientnet_lite0` (blocks 0-15) | `timm:NAME` or a bare timm name (blocks: feature levels of a CNN,
    layers of a ViT) | `torchvision:NAME` (blocks: graph node names) | a directory in timm's layout | a directory or
    hub id OWNER/NAME of a transformers backbone (blocks: stages) | `random` (a strided stack from `config: {channels,
    seed}`; blocks: its layers). config: further arguments of the library's constructor.
    """
    if not source:
        raise ConfigError(f"{where}.source is empty: name a backbone (efficientnet_lite0, timm:NAME, a directory, ...)")
    if source == "efficientnet_lite0":
        from muse.models.efficientnet_lite import load_efficientnet_lite0
        return load_efficientnet_lite0(**config)
    if source == "random":
        return RandomFeatures(**config)
    ordered = list(dict.fromkeys(blocks))
    with loading(f"{where}.source {source!r}", ADVICE):
        if source.startswith(TORCHVISION):
            return TorchvisionFeatures(source.removeprefix(TORCHVISION), config, ordered)
        is_hub_id = "/" in source and ":" not in source
        if (Path(source).is_dir() or is_hub_id) and not is_timm_directory(source):
            return TransformersFeatures(source, config, ordered)
        return TimmFeatures(source, config, ordered)


class _Chosen(FrozenTeacher):
    """A network that gives the features of `blocks` in a fixed order, picked from by block."""

    def __init__(self, network: nn.Module, normalise: Normalise, blocks: Sequence[Block]):
        super().__init__()
        self.network, self.normalise, self.blocks = network, normalise, list(blocks)
        self.freeze()

    def outputs(self, pixels: Tensor) -> Sequence[Tensor]:
        """Features of `self.blocks` for normalised pixels."""
        return self.network(pixels)

    def features(self, images: Tensor, blocks: Sequence[Block]) -> list[Tensor]:
        """Features (B,C,h,w) of `blocks`, in the order asked."""
        found = dict(zip(self.blocks, self.outputs(self.normalise(images))))
        return [found[block] for block in blocks]


class TimmFeatures(_Chosen):
    """`features_only` of a timm model: a name, or a directory holding timm's config.json and weights."""

    def __init__(self, source: str, config: dict[str, Any], blocks: Sequence[Block]):
        import timm
        levels = sorted(blocks)
        network = timm.create_model(timm_name(source), features_only=True, out_indices=levels,
                                    **({"pretrained": True} | config))
        stored = network.pretrained_cfg
        super().__init__(network, Normalise(stored.get("mean", IMAGENET_MEAN), stored.get("std", IMAGENET_STD)), levels)


class TransformersFeatures(_Chosen):
    """Any native transformers backbone class: ResNet, ConvNeXt, Swin, DINOv2, DINOv3 ..."""

    def __init__(self, source: str, config: dict[str, Any], blocks: Sequence[Block]):
        import transformers
        stages = sorted(blocks)
        settings = transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=False, out_indices=stages, **config)
        # Not AutoBackbone.from_pretrained, which asks the hub even about a directory.
        network, report = transformers.MODEL_FOR_BACKBONE_MAPPING[type(settings)].from_pretrained(
            source, config=settings, dtype="float32", weights_only=True, output_loading_info=True)
        require_complete(source, report["missing_keys"])
        super().__init__(network, Normalise(*stored_normalisation(source)), stages)

    def outputs(self, pixels: Tensor) -> Sequence[Tensor]:
        return self.network(pixels).feature_maps


class TorchvisionFeatures(_Chosen):
    """Graph nodes of a torchvision model. `config.weights`: a torchvision name (default DEFAULT), a file, or `none`."""

    def __init__(self, name: str, config: dict[str, Any], blocks: Sequence[Block]):
        import torchvision
        from muse.models.weight_files import load_into, read_state_dict
        weights = config.get("weights", "DEFAULT")
        from_file = Path(str(weights)).is_file()
        model = torchvision.models.get_model(name, weights=None if from_file or weights == "none" else weights)
        if from_file:
            load_into(model, read_state_dict(weights, name), weights, name)
        nodes = {node: node for node in blocks}
        network = torchvision.models.feature_extraction.create_feature_extractor(
            model, train_return_nodes=nodes, eval_return_nodes=nodes)
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
            torch.randn(after, before, 3, 3, generator=generator) * (2 / (9 * before)) ** 0.5
            for before, after in zip(widths, widths[1:]))
        self.freeze()

    def features(self, images: Tensor, blocks: Sequence[Block]) -> list[Tensor]:
        """Features (B,C,h,w) of `blocks`, in the order asked."""
        found, x = [], images * 2 - 1
        for weight in self.weights[:max(blocks) + 1]:
            x = F.relu(F.conv2d(x, weight, stride=2, padding=1))
            found.append(x)
        return [found[block] for block in blocks]
