"""The frozen networks of the perceptual distance, each a class that compares two pictures.

Images are RGB float in [0,1]; every part normalises its own input. A new part is one class and one
line of `PARTS`.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ConvNeXt_Small_Weights, VGG16_Weights, convnext_small

from muse.errors import CheckpointError, ConfigError
from muse.models.layers import IMAGENET_MEAN, IMAGENET_STD
from muse.teachers.base import frozen_precision
from muse.teachers.efficientnet_lite import load_efficientnet_lite0
from muse.utils.weights import load_into, read_state_dict

State = dict[str, Tensor]


def _torchvision_state(part: str, path: str | Path | None, weights: Any) -> tuple[State, str]:
    """A torchvision network's weights from a file, or else fetched; and where they came from."""
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


def lpips_network(net: str, state: State | None, source: str = "", what: str = "") -> nn.Module:
    """`lpips.LPIPS` v0.1, frozen.

    Args:
        net: `vgg`, `alex` or `squeeze`.
        state: torchvision's state dict of that backbone (its `features.*`); the linear layers come
            with the package. None: the architecture alone, without weights.
        source: where `state` came from, and
        what: whose weights they are, for the message of an error.

    Raises CheckpointError when the package is missing or the weights do not fit.
    """
    try:
        import lpips  # noqa: PLC0415 - optional: other parts do without the package
    except ImportError as error:
        raise CheckpointError(
            f"{what} needs the package '{error.name}': pip install lpips"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package calls torchvision by a deprecated argument
        if state is None:
            network = lpips.LPIPS(net=net, pnet_rand=True, pretrained=False, verbose=False)
            return network.eval().requires_grad_(False)
        with torch.device("meta"):  # no time and no random number spent on weights to be replaced
            network = lpips.LPIPS(net=net, pnet_rand=True, pretrained=False, verbose=False)
    # The package cuts torchvision's `features` into slices, whose layers keep their numbers.
    slices = [part.named_children() for part in network.net.children()]
    backbone = nn.ModuleDict({number: layer for part in slices for number, layer in part})
    features = {
        key.removeprefix("features."): value.float()
        for key, value in state.items()
        if key.startswith("features.")
    }
    load_into(backbone, features, source, what, assign=True)
    linears = nn.ModuleDict({f"lin{index}": layer for index, layer in enumerate(network.lins)})
    file = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    load_into(linears, read_state_dict(file, "the lpips package"), file, "LPIPS", assign=True)
    return network.eval().requires_grad_(False)


class PerceptualPart(nn.Module):
    """A frozen network that compares pictures. It gives gradient to its first input alone.

    The network computes in `precision`, the distance of what it gives in float32.
    """

    precision = "float32"

    def freeze(self) -> None:
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "PerceptualPart":
        """Stay in eval mode: the network is frozen."""
        return super().train(False)

    def compare(self, images: Tensor) -> list[Tensor]:
        """What is compared: images (B,3,H,W) -> feature maps (B,C,h,w) or vectors (B,C)."""
        raise NotImplementedError

    def distance(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        """(B,): by default the squared distance of unit channel vectors, mean over all places."""
        layers = [
            _unit_difference(a, b).sum(dim=1).mean(dim=(1, 2))  # (B,C,h,w) -> (B,)
            for a, b in zip(ours, theirs)
        ]
        return torch.stack(layers).mean(dim=0)

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Distance of each image from its target, (B,) float32. No gradient reaches the target."""
        with frozen_precision(self.precision, images.device):
            with torch.no_grad():
                theirs = self.compare(target.float())
            ours = self.compare(images.float())
        with torch.autocast(images.device.type, enabled=False):
            ours, theirs = ([layer.float() for layer in side] for side in (ours, theirs))
            return self.distance(ours, theirs)


def _unit_difference(a: Tensor, b: Tensor) -> Tensor:
    """Squared difference of channel vectors scaled to length 1; LPIPS' epsilon is 1e-10."""

    def unit(x: Tensor) -> Tensor:  # 1e-20 keeps the square root's gradient finite at 0
        return x / (x.square().sum(dim=1, keepdim=True).add(1e-20).sqrt() + 1e-10)

    return (unit(a) - unit(b)).square()


class LPIPSDistance(PerceptualPart):
    """LPIPS v0.1 on VGG-16 (Zhang et al., 2018), by the `lpips` package.

    weights: a state dict of torchvision's vgg16 (its `features.*`), else torchvision fetches it.
    """

    def __init__(self, weights: str | Path | None = None, pretrained: bool = True):
        super().__init__()
        state, source = None, ""
        if pretrained:
            state, source = _torchvision_state("lpips", weights, VGG16_Weights.IMAGENET1K_V1)
        self.network = lpips_network("vgg", state, source, "perceptual part 'lpips' (vgg16)")
        self.freeze()

    # Not the package's own forward: it runs the target with gradient, and its own gradient is NaN
    # where all features of a place are 0 (a flat picture).
    def compare(self, images: Tensor) -> list[Tensor]:
        scaled = self.network.scaling_layer(2 * images - 1)
        return list(self.network.net(scaled))

    def distance(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        layers = [
            linear(_unit_difference(a, b)).mean(dim=(1, 2, 3))  # (B,C,h,w) -> (B,1,h,w) -> (B,)
            for a, b, linear in zip(ours, theirs, self.network.lins)
        ]
        return torch.stack(layers).sum(dim=0)


class ConvNeXtDistance(PerceptualPart):
    """Mean squared error of ConvNeXt-S' ImageNet logits; images resized to 224x224 (antialiased).

    weights: a state dict of torchvision's convnext_small, else torchvision fetches it.
    """

    def __init__(self, weights: str | Path | None = None, pretrained: bool = True):
        super().__init__()
        if pretrained:
            known = ConvNeXt_Small_Weights.IMAGENET1K_V1
            state, source = _torchvision_state("convnext_s", weights, known)
            state = {key: value.float() for key, value in state.items()}
            with torch.device("meta"):
                self.network = convnext_small()
            load_into(self.network, state, source, "perceptual part 'convnext_s'", assign=True)
        else:
            self.network = convnext_small()
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))
        self.freeze()

    def compare(self, images: Tensor) -> list[Tensor]:
        images = F.interpolate(
            images, size=(224, 224), mode="bilinear", align_corners=False, antialias=True
        )
        network, pixels = self.network, (images - self.mean) / self.std
        pooled = network.avgpool(network.features(pixels))
        with torch.autocast(images.device.type, enabled=False):  # logits differ by their last bits
            return [network.classifier(pooled.float())]  # (B,1000)

    def distance(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        return (ours[0] - theirs[0]).square().mean(dim=1)


class EfficientNetDistance(PerceptualPart):
    """Unit channel vectors of some blocks of EfficientNet-Lite0: small enough for a CPU.

    Args:
        weights: a state dict file, else the installed package's.
        pretrained: False leaves the weights out.
        blocks: which blocks (0-15) are compared; later ones are not run.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        pretrained: bool = True,
        blocks: Sequence[int] = (2, 4, 10),
    ):
        super().__init__()
        self.blocks = tuple(blocks)
        self.network = load_efficientnet_lite0(weights, pretrained)
        count = len(self.network.blocks)
        if not self.blocks or not all(0 <= index < count for index in self.blocks):
            raise ConfigError(
                f"losses.perceptual.blocks must name blocks 0..{count - 1} of EfficientNet-Lite0, "
                f"got {list(self.blocks)}"
            )
        self.freeze()

    def compare(self, images: Tensor) -> list[Tensor]:
        return self.network(images, self.blocks)


class RandomDistance(PerceptualPart):
    """Three strided convolutions with weights from a fixed seed: needs no file. For tests."""

    def __init__(self, weights: str | Path | None = None, pretrained: bool = True):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        widths = (3, 8, 16, 32)
        self.kernels = nn.ParameterList(
            torch.randn(after, before, 3, 3, generator=generator, device="cpu") / (3 * before**0.5)
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
    "lpips": LPIPSDistance,
    "convnext_s": ConvNeXtDistance,
    "efficientnet_lite0": EfficientNetDistance,
    "random": RandomDistance,
}
