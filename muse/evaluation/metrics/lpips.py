"""Perceptual metrics: LPIPS by the `lpips` package, and parts of muse/losses/perceptual.py."""

import urllib.error
from pathlib import Path

import torch
from torch import nn

from muse.errors import ConfigError, DataError
from muse.evaluation.metrics.networks import MetricOptions, network_protocol
from muse.evaluation.metrics.psnr_ssim import ImageMean
from muse.losses.perceptual import PARTS
from muse.losses.perceptual_parts import lpips_network
from muse.utils.weights import read_state_dict, state_sha256

LPIPS_NETS = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}


class Lpips(nn.Module):
    """LPIPS v0.1 of the `lpips` package: (B,3,H,W) in [0,1] twice -> (B,).

    weights: a file with torchvision's state dict of the backbone (alex: alexnet, vgg: vgg16,
    squeeze: squeezenet1_1), or a folder with such files under torchvision's names; None lets
    torchvision download it. The linear heads come with the package. DataError, one line, when there
    is neither.
    """

    def __init__(self, net: str = "alex", weights: str | None = None):
        super().__init__()
        import torchvision  # noqa: PLC0415

        if net not in LPIPS_NETS:
            raise ConfigError(f"unknown LPIPS backbone '{net}': one of {', '.join(LPIPS_NETS)}")
        backbone = getattr(torchvision.models, LPIPS_NETS[net])
        weights = _in_folder(weights, net)
        if weights is None:
            try:
                trained = backbone(weights="DEFAULT", progress=False)
            except (urllib.error.URLError, OSError) as error:
                raise DataError(
                    f"lpips needs torchvision's {LPIPS_NETS[net]} weights, which could not be "
                    f"downloaded ({error}): pass the file with --lpips-weights FILE (in Python: "
                    "lpips_weights=FILE), or choose other --metrics"
                ) from error
            state = trained.state_dict()
        else:
            state = read_state_dict(weights, f"LPIPS ({LPIPS_NETS[net]})")
        self.name = f"lpips_{net}"
        self.network = lpips_network(
            net, state, weights or LPIPS_NETS[net], f"LPIPS's backbone ({net})"
        )
        self.weights_sha256 = state_sha256(self.network)

    @torch.no_grad()
    def forward(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        return self.network(real.float(), fake.float(), normalize=True).flatten()


def _in_folder(weights: str | Path | None, net: str) -> str | Path | None:
    """The file of a backbone, where `weights` is a folder."""
    if weights is None or not Path(weights).is_dir():
        return weights
    found = sorted(Path(weights).glob(f"{LPIPS_NETS[net]}*.pth"))
    if not found:
        raise DataError(f"{weights} holds no {LPIPS_NETS[net]}*.pth, which lpips_{net} needs")
    return found[0]


def lpips_metric(name: str, options: MetricOptions) -> ImageMean:
    """`lpips`, with the backbone of the options, or `lpips_<backbone>`."""
    net = options.lpips_net if name == "lpips" else name.removeprefix("lpips_")
    network = Lpips(net, options.lpips_weights).to(options.device)
    return ImageMean(name, network, network_protocol(network, "lpips"))


def perceptual_metric(name: str, options: MetricOptions) -> ImageMean:
    """`perceptual_<part>`: a part of the perceptual loss as a metric."""
    part = name.removeprefix("perceptual_")
    if part not in PARTS:
        raise ConfigError(f"unknown perceptual network '{part}': one of {', '.join(PARTS)}")
    network = PARTS[part]().to(options.device)
    return ImageMean(name, network, {"network": part, "weights_sha256": state_sha256(network)})
