"""Perceptual distances: frozen networks, chosen and weighed by one name.

`lpips-convnext_s-1.0-0.1` is LPIPS with weight 1.0 and ConvNeXt-S with 0.1; the weighted sum is divided by the sum of
the weights. Images are RGB float in [0,1]; every part normalises its own input. A new part is one class and one line of
`PARTS`.
"""

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from muse.config import plain
from muse.errors import CheckpointError, ConfigError
from muse.losses.term import Needs, Term
from muse.models.muse_vit import MUSE_ViT, StudentOutput
from muse.teachers.efficientnet_lite import load_efficientnet_lite0
from muse.utils.weights import load_into, read_state_dict

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)


def _unit(features: Tensor) -> Tensor:
    """Channel vectors scaled to length 1, with LPIPS' epsilon, and one more for the square root's gradient at 0."""
    return features / (features.square().sum(dim=1, keepdim=True).add(1e-20).sqrt() + 1e-10)


def _torchvision_state(
    part: str, path: str | Path | None, weights
) -> tuple[dict[str, Tensor], str]:
    """A torchvision network's state dict, from a file or else as torchvision fetches it, and where it came from."""
    if path is not None:
        return read_state_dict(path, f"perceptual part '{part}'"), str(path)
    name = weights.url.rsplit("/", 1)[-1]
    try:
        return weights.get_state_dict(
            progress=False, check_hash=True, map_location="cpu", weights_only=True
        ), name
    except OSError as error:  # no network, no cache, or a cache that cannot be written
        raise CheckpointError(
            f"perceptual part '{part}' needs {name}, which torchvision could not fetch ({error}); "
            f"name the file: losses.perceptual.weights.{part}=/path/to/{name}"
        ) from error


class PerceptualPart(nn.Module):
    """A frozen network that compares pictures. It stays in eval mode and gives gradient to its input alone."""

    def freeze(self) -> None:
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "PerceptualPart":
        """Stay in eval mode: the network is frozen."""
        return super().train(False)

    def compare(self, images: Tensor) -> list[Tensor]:
        """What is compared: images (B,3,H,W) in [0,1] -> feature maps (B,C,h,w) or vectors (B,C)."""
        raise NotImplementedError

    def distance(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        """(B,): by default, the squared distance of unit channel vectors, mean over positions and layers."""
        layers = [
            (_unit(a) - _unit(b)).square().sum(dim=1).mean(dim=(1, 2)) for a, b in zip(ours, theirs)
        ]
        return torch.stack(layers).mean(dim=0)

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Distance of each image from its target, (B,) float32. No gradient reaches the target."""
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                theirs = self.compare(target.float())
            return self.distance(self.compare(images.float()), theirs)


class LPIPS(PerceptualPart):
    """LPIPS v0.1 on VGG-16 (Zhang et al., 2018). The linear weights come with the `lpips` package.

    weights: a state dict of torchvision's vgg16 (its `features.*`), else torchvision fetches it.
    """

    TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        from torchvision.models import VGG16_Weights
        from torchvision.models.vgg import cfgs, make_layers

        state, source = _torchvision_state("lpips", weights, VGG16_Weights.IMAGENET1K_V1)
        with torch.device("meta"):
            layers = make_layers(cfgs["D"], batch_norm=False)[: self.TAPS[-1] + 1]
        features = {
            key.removeprefix("features."): value.float()
            for key, value in state.items()
            if key.startswith("features.")
        }
        load_into(layers, features, source, "perceptual part 'lpips' (vgg16)", assign=True)
        for layer in layers:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # what is kept of a layer must survive the next one
        self.layers = layers
        self.linears = nn.ParameterList(self._package_linears())
        # LPIPS' own shift and scale are for [-1,1].
        self.register_buffer("shift", _channels((-0.030, -0.088, -0.188)))
        self.register_buffer("scale", _channels((0.458, 0.448, 0.450)))
        self.freeze()

    @staticmethod
    def _package_linears() -> list[Tensor]:
        package = find_spec("lpips")
        if package is None or package.origin is None:
            raise CheckpointError(
                "perceptual part 'lpips' needs the package 'lpips': pip install lpips"
            )
        state = read_state_dict(
            Path(package.origin).parent / "weights" / "v0.1" / "vgg.pth", "the lpips package"
        )
        return [state[f"lin{index}.model.1.weight"] for index in range(5)]

    def compare(self, images: Tensor) -> list[Tensor]:
        x = (2 * images - 1 - self.shift) / self.scale
        kept = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in self.TAPS:
                kept.append(x)
        return kept

    def distance(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        layers = [
            F.conv2d((_unit(a) - _unit(b)).square(), linear).mean(dim=(1, 2, 3))
            for a, b, linear in zip(ours, theirs, self.linears)
        ]
        return torch.stack(layers).sum(dim=0)


class ConvNeXtS(PerceptualPart):
    """Mean squared error of ConvNeXt-S' ImageNet logits; images resized to 224x224 (antialiased bilinear).

    weights: a state dict of torchvision's convnext_small, else torchvision fetches it.
    """

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        from torchvision.models import ConvNeXt_Small_Weights, convnext_small

        state, source = _torchvision_state(
            "convnext_s", weights, ConvNeXt_Small_Weights.IMAGENET1K_V1
        )
        with torch.device("meta"):
            self.network = convnext_small()
        load_into(
            self.network,
            {key: value.float() for key, value in state.items()},
            source,
            "perceptual part 'convnext_s'",
            assign=True,
        )
        self.register_buffer("mean", _channels(IMAGENET_MEAN))
        self.register_buffer("std", _channels(IMAGENET_STD))
        self.freeze()

    def compare(self, images: Tensor) -> list[Tensor]:
        images = F.interpolate(
            images, size=(224, 224), mode="bilinear", align_corners=False, antialias=True
        )
        return [self.network((images - self.mean) / self.std)]

    def distance(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        return (ours[0] - theirs[0]).square().mean(dim=1)


class EfficientNetLite0(PerceptualPart):
    """Unit channel vectors of some blocks of EfficientNet-Lite0, squared distance: small enough for a CPU.

    blocks: which blocks (0-15); later ones are not run. weights: a state dict file, else the installed package's.
    """

    def __init__(self, weights: str | Path | None = None, blocks: Sequence[int] = (2, 4, 10)):
        super().__init__()
        self.blocks = tuple(blocks)
        self.network = load_efficientnet_lite0(weights)
        if not self.blocks or not all(
            0 <= index < len(self.network.blocks) for index in self.blocks
        ):
            raise ConfigError(
                f"losses.perceptual.blocks must name blocks 0..{len(self.network.blocks) - 1} "
                f"of EfficientNet-Lite0, got {list(self.blocks)}"
            )
        self.freeze()

    def compare(self, images: Tensor) -> list[Tensor]:
        return self.network.features(images, self.blocks)


class RandomConvolutions(PerceptualPart):
    """Three strided convolutions with weights from a fixed seed: needs no file. For tests."""

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        widths = (3, 8, 16, 32)
        self.kernels = nn.ParameterList(
            torch.randn(after, before, 3, 3, generator=generator) / (3 * before**0.5)
            for before, after in zip(widths, widths[1:])
        )
        self.freeze()

    def compare(self, images: Tensor) -> list[Tensor]:
        x, kept = 2 * images - 1, []
        for kernel in self.kernels:
            x = F.leaky_relu(F.conv2d(x, kernel, stride=2, padding=1), 0.1)
            kept.append(x)
        return kept


PARTS: dict[str, type[PerceptualPart]] = {
    "lpips": LPIPS,
    "convnext_s": ConvNeXtS,
    "efficientnet_lite0": EfficientNetLite0,
    "random": RandomConvolutions,
}


def parse_perceptual_name(name: str) -> dict[str, float]:
    """`a-b-1.0-0.1` -> {a: 1.0, b: 0.1}; `a` alone -> {a: 1.0}. Raises ConfigError for anything else."""
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
            f"losses.perceptual.name={name}: expected the parts, then as many weights >= 0, not all 0, "
            "joined by '-' (such as lpips-convnext_s-1.0-0.1)"
        )
    return dict(zip(parts, weights))


class PerceptualLoss(nn.Module):
    """The weighted mean of the parts that `name` lists; a part with weight 0 is not built.

    weights: part -> file of its backbone's weights (`losses.perceptual.weights`); blocks: which blocks of
    EfficientNet-Lite0 (`losses.perceptual.blocks`), None for its default.
    Raises ConfigError for a bad name or a file given for an unknown part, CheckpointError when weights cannot be had.
    """

    def __init__(
        self,
        name: str,
        weights: Mapping[str, str | Path] | None = None,
        blocks: Sequence[int] | None = None,
    ):
        super().__init__()
        weights = dict(weights or {})
        stray = sorted(weights.keys() - PARTS.keys())
        if stray:
            raise ConfigError(
                f"losses.perceptual.weights: unknown part '{stray[0]}'; known: {', '.join(PARTS)}"
            )
        self.part_weights = {
            part: weight for part, weight in parse_perceptual_name(name).items() if weight > 0
        }
        options = {"efficientnet_lite0": {"blocks": blocks}} if blocks is not None else {}
        self.parts = nn.ModuleDict(
            {
                part: PARTS[part](weights.get(part), **options.get(part, {}))
                for part in self.part_weights
            }
        )

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
    name, needs = "perceptual", Needs(reconstruction=True)

    def __init__(self, weight: float, network: nn.Module):
        super().__init__(weight)
        self.network = network

    def forward(
        self, out: StudentOutput, batch: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.network(out.reconstruction, batch["images"]), {}


def build_perceptual_term(cfg: DictConfig, student: MUSE_ViT, grid: tuple[int, int]) -> Term:
    section = cfg.losses.perceptual
    return PerceptualTerm(
        section.weight, PerceptualLoss(section.name, plain(section.weights), plain(section.blocks))
    )
