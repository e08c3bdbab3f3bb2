"""The metrics an `Evaluator` can hold: each takes batches of image pairs; a new one is a line of `METRICS`.

A metric has `update(real, fake, indices)`, `compute() -> dict[str, float]` and `protocol` (the network behind it and
its SHA-256). `compute` sums over processes, changes nothing and can be called again.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch

from muse.errors import ConfigError
from muse.evaluation.metrics.frechet import MIN_IMAGES, RunningMoments, frechet_distance
from muse.evaluation.metrics.lpips import Lpips
from muse.evaluation.metrics.networks import load_feature_network, state_sha256
from muse.evaluation.metrics.psnr_ssim import float64, psnr, ssim
from muse.losses.perceptual import PARTS
from muse.utils.distributed import all_rows, all_sum, is_main, world_size

logger = logging.getLogger(__name__)


class ImageMean:
    """Mean over images of `measure(real, fake) -> (B,)`."""

    def __init__(self, name: str, measure: Callable, protocol: dict | None = None):
        self.name, self.measure, self.protocol = name, measure, protocol or {}
        self.total, self.count = torch.zeros((), dtype=torch.float64), 0

    def update(self, real: torch.Tensor, fake: torch.Tensor, indices: torch.Tensor | None) -> None:
        self.total = self.total + float64(self.measure(real, fake)).sum().cpu()
        self.count += len(real)

    def compute(self) -> dict[str, float]:
        total, count = all_sum(
            torch.stack((self.total, torch.tensor(float(self.count), dtype=torch.float64)))
        )
        if not count:
            raise ValueError(f"{self.name}: no images were given")
        return {self.name: float(total / count)}


class FrechetDistance:
    """Fréchet distance of real and fake features of `network(images) -> (B, D)`."""

    def __init__(self, name: str, network: Callable, protocol: dict | None = None):
        self.name, self.network, self.protocol = name, network, protocol or {}
        self.real, self.fake = RunningMoments(), RunningMoments()

    def update(self, real: torch.Tensor, fake: torch.Tensor, indices: torch.Tensor | None) -> None:
        self.add(self.network(real), self.network(fake))

    def add(self, real: torch.Tensor, fake: torch.Tensor) -> None:
        """Features (B, D) of both sides."""
        for moments, rows in ((self.real, real), (self.fake, fake)):
            if rows.ndim != 2:
                raise ValueError(
                    f"{self.name}: the network must return (B, D), got {tuple(rows.shape)}"
                )
            moments.update(rows)

    def compute(self) -> dict[str, float]:
        dim = int(max(all_rows(torch.tensor([self.real.dim or 0]))))
        if not dim:
            raise ValueError(f"{self.name}: no images were given")
        count, mean1, cov1 = self.real.compute(dim)
        _, mean2, cov2 = self.fake.compute(dim)
        if count < MIN_IMAGES and is_main():
            logger.warning(
                "%s from %d images: under %d a Fréchet distance is biased upwards",
                self.name,
                count,
                MIN_IMAGES,
            )
        return {self.name: frechet_distance(mean1, cov1, mean2, cov2)}


class InceptionScores:
    """rFID and/or Inception Score (of the fakes) from one pass of the Inception network.

    The score is torch-fidelity's, ten splits in the order of a seeded shuffle: it needs the logits of all images
    (4 KB each: 200 MB for 50,000), and in several processes the samples' indices, which give every image its place.
    """

    def __init__(self, names: tuple[str, ...], network: Callable, protocol: dict | None = None):
        self.names, self.network, self.protocol = names, network, protocol or {}
        self.distance = FrechetDistance("rfid", lambda images: network(images)[0])
        self.logits: list[torch.Tensor] = []
        self.indices: list[torch.Tensor] = []

    def update(self, real: torch.Tensor, fake: torch.Tensor, indices: torch.Tensor | None) -> None:
        features, logits = self.network(fake)
        if "rfid" in self.names:
            self.distance.add(self.network(real)[0], features)
        if "is" in self.names:
            if indices is None and world_size() > 1:
                raise ValueError("is: in several processes update() needs the samples' indices")
            self.logits.append(logits.cpu())
            start = sum(map(len, self.indices))
            self.indices.append(
                torch.arange(start, start + len(fake)) if indices is None else indices.cpu()
            )

    def compute(self) -> dict[str, float]:
        from muse.evaluation.metrics.inception import inception_score

        values = self.distance.compute() if "rfid" in self.names else {}
        if "is" in self.names:
            logits = all_rows(torch.cat(self.logits) if self.logits else torch.zeros(0, 1008))
            indices = all_rows(
                torch.cat(self.indices) if self.indices else torch.zeros(0, dtype=torch.long)
            )
            if not len(logits):
                raise ValueError("is: no images were given")
            values["is"], values["is_std"] = inception_score(logits[indices.argsort()])
        return values


@dataclass(frozen=True)
class Options:
    """Where the networks behind the metrics come from; None is each network's own default source."""

    device: str | torch.device = "cpu"
    feature_network: Callable | None = (
        None  # used for fd_<name> in place of the network of that name
    )
    feature_weights: str | None = None
    inception_weights: str | None = None
    lpips_net: str = "alex"
    lpips_weights: str | None = None


def _protocol(network: Callable, library: str | None = None) -> dict:
    facts = {
        "network": getattr(network, "name", type(network).__name__),
        "weights_sha256": getattr(network, "weights_sha256", None),
    }
    return facts | ({"library": f"{library} {version(library)}"} if library else {})


def _inception(names: tuple[str, ...], options: Options) -> InceptionScores:
    from muse.evaluation.metrics.inception import Inception

    network = Inception(options.inception_weights).to(options.device)
    return InceptionScores(names, network, _protocol(network, "torch-fidelity"))


def _frechet(name: str, options: Options) -> FrechetDistance:
    network = options.feature_network
    if network is None:
        network = load_feature_network(name.removeprefix("fd_"), options.feature_weights).to(
            options.device
        )
    return FrechetDistance(name, network, _protocol(network))


def _lpips(name: str, options: Options) -> ImageMean:
    network = Lpips(options.lpips_net, options.lpips_weights).to(options.device)
    return ImageMean(name, network, _protocol(network, "lpips"))


def _perceptual(name: str, options: Options) -> ImageMean:
    part = name.removeprefix("perceptual_")
    if part not in PARTS:
        raise ConfigError(f"unknown perceptual network '{part}': one of {', '.join(PARTS)}")
    network = PARTS[part]().to(options.device)
    return ImageMean(name, network, {"network": part, "weights_sha256": state_sha256(network)})


# name, or prefix of a name that ends in a network -> builder(name, options)
METRICS: dict[str, Callable] = {
    "psnr": lambda name, options: ImageMean(name, psnr),
    "ssim": lambda name, options: ImageMean(name, ssim),
    "lpips": _lpips,
    "fd_": _frechet,
    "perceptual_": _perceptual,
}


def build_metrics(names: Sequence[str], options: Options) -> list:
    """The metrics by name; rfid and is share one. ConfigError on a name that is not known."""
    if not names:
        raise ConfigError("no metric was named: give at least one, such as psnr")
    metrics = []
    inception = tuple(name for name in names if name in ("rfid", "is"))
    for name in dict.fromkeys(names):
        if name in inception:
            if name == inception[0]:
                metrics.append(_inception(inception, options))
            continue
        key = next(
            (
                key
                for key in METRICS
                if name == key or (key.endswith("_") and name.startswith(key) and name != key)
            ),
            None,
        )
        if key is None:
            known = ", ".join(key + "<network>" if key.endswith("_") else key for key in METRICS)
            raise ConfigError(f"unknown metric '{name}': one of rfid, is, {known}")
        metrics.append(METRICS[key](name, options))
    return metrics
