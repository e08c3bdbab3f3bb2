"""The networks behind metrics: options, protocol, and those of the Fréchet distance `fd_<name>`.

These are frozen and take [0,1] images to (B, D) features. `REGISTRY` names those that need a
builder of their own; any other name is taken as timm's. A distance in such a space is never called
FID.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from muse.errors import ConfigError, DataError
from muse.evaluation.metrics.dinov2 import MODEL, SIDE, load_dinov2
from muse.teachers.efficientnet_lite import load_efficientnet_lite0
from muse.utils.weights import read_state_dict, state_sha256


@dataclass(frozen=True)
class MetricOptions:
    """Where the networks behind the metrics come from; None is each network's default source."""

    device: str | torch.device = "cpu"
    feature_network: Callable | None = None  # used for fd_<name> in place of the one so named
    feature_weights: str | None = None
    inception_weights: str | None = None
    lpips_net: str = "alex"
    lpips_weights: str | None = None
    rounded_pairs: bool = False  # psnr and ssim see reconstructions rounded to bytes
    is_splits: int | None = 10  # parts of the Inception Score
    is_part: int | None = None  # or parts of so many pictures, in the order of the set


def rounded_bytes(images: torch.Tensor) -> torch.Tensor:
    """(B,3,H,W) float, nominal [0,1] -> uint8, clamped and rounded (not truncated)."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


class FeatureNetwork(nn.Module):
    """A frozen network and what a protocol must say of it: `name`, `weights_sha256`."""

    def __init__(
        self,
        name: str,
        network: nn.Module,
        pooled: Callable[[torch.Tensor], torch.Tensor],
        sha256: str,
    ):
        super().__init__()
        self.name = name
        self.weights_sha256 = sha256
        self.network = network.eval().requires_grad_(False)
        self._pooled = pooled

    def train(self, mode: bool = True) -> "FeatureNetwork":
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._pooled(images).float()


def network_protocol(network: Callable, library: str | None = None) -> dict:
    """What a metric's `protocol` says of its network, and of the library that it is from."""
    facts = {
        "network": getattr(network, "name", type(network).__name__),
        "weights_sha256": getattr(network, "weights_sha256", None),
    }
    return facts | ({"library": f"{library} {version(library)}"} if library else {})


def _efficientnet_lite0(weights: str | Path | None) -> FeatureNetwork:
    network = load_efficientnet_lite0(weights)
    return FeatureNetwork("efficientnet_lite0", network, network.pooled, network.weights_sha256)


def _timm(name: str, weights: str | Path | None) -> FeatureNetwork:
    import timm  # noqa: PLC0415  seconds that other metrics need not wait

    if not timm.is_model(name.split(".")[0]):
        raise ConfigError(
            f"unknown feature network '{name}': not one of {', '.join(sorted(REGISTRY))}, "
            "nor of timm's"
        )
    # strict loading wants the classifier that the file holds, so it is dropped afterwards
    if weights is not None:
        # one clear error for a missing or foreign file
        read_state_dict(weights, f"the feature network {name}")
        try:
            network = timm.create_model(name, checkpoint_path=str(weights))
        except (RuntimeError, KeyError) as error:
            raise DataError(
                f"{weights} does not hold the weights of the feature network {name}"
            ) from error
    else:
        try:
            network = timm.create_model(name, pretrained=True)
        except (OSError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"no weights for the feature network {name} ({reason}): pass a file with "
                "--feature-weights FILE, or use efficientnet_lite0, whose weights come with a "
                "package"
            ) from error
    network.reset_classifier(0)
    cfg = network.pretrained_cfg
    size = cfg.get("input_size", (3, 224, 224))[-2:]
    mean, std = (torch.tensor(cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))

    def pooled(images: torch.Tensor) -> torch.Tensor:
        images = F.interpolate(
            images, size, mode="bicubic", align_corners=False, antialias=True
        ).clamp(0, 1)
        return network((images - mean.to(images)) / std.to(images))

    return FeatureNetwork(name, network, pooled, state_sha256(network))


def _dinov2(weights: str | Path | None) -> FeatureNetwork:
    network = load_dinov2(weights)
    return FeatureNetwork(f"timm {MODEL} at {SIDE}", network, network.pooled, state_sha256(network))


REGISTRY: dict[str, Callable[[str | Path | None], FeatureNetwork]] = {
    "efficientnet_lite0": _efficientnet_lite0,
    "dinov2": _dinov2,
}


def load_feature_network(name: str, weights: str | Path | None = None) -> FeatureNetwork:
    """Network by name, pretrained; `weights` is a local file for it.

    ConfigError for a name nobody knows; DataError or CheckpointError, one line, when its weights
    cannot be had.
    """
    if name in ("inception", "inception_v3_compat"):
        raise ConfigError("the Inception distance is the metric 'rfid', not 'fd_inception'")
    return REGISTRY[name](weights) if name in REGISTRY else _timm(name, weights)
