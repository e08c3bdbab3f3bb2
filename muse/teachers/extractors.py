"""Frozen image backbones of one interface, whatever library they come from.

An extractor is a module `extractor(images in [0,1], blocks)` -> list of (B,C,h,w), one for each
block; it normalises its own input. The affinity teacher and the feature teacher are made of one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from muse.errors import ConfigError
from muse.models.internvit import build_encoder
from muse.models.layers import IMAGENET_MEAN, IMAGENET_STD
from muse.teachers.base import FrozenTeacher, Normalise
from muse.teachers.efficientnet_lite import load_efficientnet_lite0
from muse.teachers.hub import (
    INTERNVIT,
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
Block = int | str


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


class InternViTFeatures(Extractor):
    """The patch tokens after each layer of an InternViT: InternVL's, or that of any MUSE model."""

    def __init__(
        self, source: str, config: dict[str, Any], blocks: Sequence[Block], pretrained: bool
    ):
        network = build_encoder(source, config, load_weights=pretrained)
        layers = network.config.num_hidden_layers
        if unknown := [one for one in blocks if one not in range(layers)]:
            raise ConfigError(f"{INTERNVIT}{source} has layers 0..{layers - 1}, not {unknown}")
        super().__init__(network, Normalise(), list(blocks))

    def outputs(self, pixels: Tensor) -> Sequence[Tensor]:
        states = self.network(pixels, output_hidden_states=True).hidden_states
        height, width = self.network.config.patch_size
        grid = (pixels.shape[-2] // height, pixels.shape[-1] // width)
        # The first state is the embedding, the first token the class's.
        tokens = [states[block + 1][:, 1:].transpose(1, 2) for block in self.blocks]
        return [each.unflatten(2, grid) for each in tokens]


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
            (blocks: graph node names) | `internvit:SOURCE`, what `model.encoder.source` takes
            (blocks: layers) | a directory or hub id OWNER/NAME of a transformers backbone
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
        if source.startswith(INTERNVIT):
            name = source.removeprefix(INTERNVIT)
            return InternViTFeatures(name, config, ordered, pretrained)
        if source.startswith(TORCHVISION):
            name = source.removeprefix(TORCHVISION)
            return TorchvisionFeatures(name, config, ordered, pretrained)
        is_hub_id = "/" in source and ":" not in source
        if (Path(source).is_dir() or is_hub_id) and not is_timm_directory(source):
            return TransformersFeatures(source, config, ordered, pretrained)
        return TimmFeatures(source, config, ordered, pretrained)
