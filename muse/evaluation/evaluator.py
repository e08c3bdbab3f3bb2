"""`Evaluator`: image pairs in, numbers out. It streams, and gives the same result for any batch size and world size."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from muse.evaluation.metric_table import Options, build_metrics
from muse.evaluation.metrics.psnr_ssim import check_pair
from muse.utils.distributed import all_sum


def _clamped(images: torch.Tensor) -> torch.Tensor:
    """Inside [0,1]; most are already, and a copy costs more than a look."""
    low, high = torch.aminmax(images)
    return images if low >= 0 and high <= 1 else images.clamp(0, 1)


class Evaluator:
    """Metrics of reconstructions against originals, [0,1] images.

    metrics: names out of psnr (dB), ssim, lpips, rfid, is, fd_<network>, perceptual_<network>.
    feature_network: the name of a network adds the metric fd_<name> (efficientnet_lite0, or any of timm's);
        a callable images -> (B, D) is used for the fd_ metric named, or adds fd_<its name>.
    device: where the images of `update` are moved and where sums are kept.
    expect: the number of images that must have been seen, over all processes, at `compute`.
    inception_weights, feature_weights, lpips_weights: local files instead of each library's download.
    lpips_net: alex, vgg or squeeze.

    ConfigError for an unknown name; DataError or CheckpointError when a network's weights cannot be had.
    """

    def __init__(
        self,
        metrics: Sequence[str] = ("psnr", "ssim"),
        feature_network: str | Callable | None = None,
        device: str | torch.device = "cpu",
        *,
        expect: int | None = None,
        inception_weights: str | Path | None = None,
        feature_weights: str | Path | None = None,
        lpips_net: str = "alex",
        lpips_weights: str | Path | None = None,
    ):
        names = [metrics] if isinstance(metrics, str) else list(metrics)
        if feature_network is not None and not isinstance(feature_network, str):
            if not any(name.startswith("fd_") for name in names):
                names.append(
                    f"fd_{getattr(feature_network, 'name', type(feature_network).__name__.lower())}"
                )
        elif feature_network is not None:
            names.append(f"fd_{feature_network}")
        options = Options(
            device=device,
            feature_network=None if isinstance(feature_network, str) else feature_network,
            feature_weights=feature_weights,
            inception_weights=inception_weights,
            lpips_net=lpips_net,
            lpips_weights=lpips_weights,
        )
        self.device, self.expect = torch.device(device), expect
        self.count = self.total = 0  # of this process, and of all (known after `compute`)
        self.metrics = build_metrics(names, options)

    @torch.no_grad()
    def update(
        self, real: torch.Tensor, fake: torch.Tensor, indices: torch.Tensor | None = None
    ) -> None:
        """Add (B,3,H,W) pairs. indices (B,): places in the data set, needed by `is` in several processes.

        ValueError when the shapes differ, or a value is NaN or outside [-0.01, 1.01] (the range seen is named).
        """
        check_pair(real, fake)
        real, fake = (_clamped(images.detach().to(self.device)) for images in (real, fake))
        for metric in self.metrics:
            metric.update(real, fake, indices)
        self.count += len(real)

    def compute(self) -> dict[str, float]:
        """name -> value over all images of all processes (every process must call it); can be called again.

        ValueError without images, or when their number is not `expect`.
        """
        self.total = int(all_sum(torch.tensor([float(self.count)], dtype=torch.float64)))
        if self.expect is not None and self.total != self.expect:
            raise ValueError(f"{self.total} images were evaluated, the data set has {self.expect}")
        values: dict[str, float] = {}
        for metric in self.metrics:
            values.update(metric.compute())
        return values

    def protocol(self) -> dict:
        """After `compute`: the number of images, and the networks behind the metrics with their weights' SHA-256."""
        networks = {
            getattr(m, "name", None) or "+".join(m.names): m.protocol
            for m in self.metrics
            if m.protocol
        }
        return {"images": self.total, "feature_networks": networks}


@torch.no_grad()
def reconstruct_batches(
    model, batches: Iterable[dict], evaluator: Evaluator
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Reconstruct every batch's `images`, add the pairs to the evaluator, and hand them on (on its device)."""
    for batch in batches:
        real = batch["images"].to(evaluator.device)
        fake = model.reconstruct(real)
        evaluator.update(real, fake, batch.get("indices"))
        yield real, fake


def evaluate_reconstruction(
    model,
    batches: Iterable[dict],
    metrics: Sequence[str] = ("psnr", "ssim"),
    feature_network=None,
    device="cpu",
    **options,
) -> dict[str, float]:
    """Metrics of `model.reconstruct` over batches with `images`; options go to `Evaluator`. All processes call it."""
    evaluator = Evaluator(metrics, feature_network, device, **options)
    for _ in reconstruct_batches(model, batches, evaluator):
        pass
    return evaluator.compute()
