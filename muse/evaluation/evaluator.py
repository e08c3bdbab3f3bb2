"""Reconstructions against originals: the table of metrics and the `Evaluator`.

It takes image pairs and gives numbers. It streams, and gives the same result for any batch size and
number of processes. A new metric is one function or class and one line of `METRICS`.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from muse.data.crops import reflect_pad, unpad
from muse.errors import ConfigError
from muse.evaluation import measurement
from muse.evaluation.image_writer import image_writer
from muse.evaluation.measurement import Measured, Setup
from muse.evaluation.metrics.frechet import frechet_metric
from muse.evaluation.metrics.inception import inception_metric
from muse.evaluation.metrics.lpips import lpips_metric, perceptual_metric
from muse.evaluation.metrics.networks import MetricOptions, rounded_bytes
from muse.evaluation.metrics.psnr_ssim import ImageMean, check_pair, psnr, ssim
from muse.evaluation.recipes import ReconstructionRecipe
from muse.utils.distributed import all_sum, leave_processes
from muse.utils.viz_utils import comparison_sheet

# Name, or prefix of a name that ends in a network's -> builder(name, options). What it builds has
# `update(real, fake, indices)`, `compute() -> dict[str, float]` and `protocol` (the network behind
# it and its SHA-256); `compute` sums over processes, changes nothing and can be called again.
# `rfid` and `is` stand apart, since they share one pass of one network.
METRICS: dict[str, Callable] = {
    "psnr": lambda name, options: ImageMean(name, _of_pairs(psnr, options)),
    "ssim": lambda name, options: ImageMean(name, _of_pairs(ssim, options)),
    "lpips": lpips_metric,
    "lpips_": lpips_metric,
    "fd_": frechet_metric,
    "perceptual_": perceptual_metric,
}


def build_metrics(names: Sequence[str], options: MetricOptions) -> list:
    """The metrics by name; rfid and is share one. ConfigError on a name that is not known."""
    check_metric_names(names)
    metrics = []
    inception = tuple(name for name in names if name in ("rfid", "is"))
    for name in dict.fromkeys(names):
        if name in inception:
            if name == inception[0]:
                metrics.append(inception_metric(inception, options))
        else:
            metrics.append(METRICS[_key(name)](name, options))
    return metrics


def check_metric_names(names: Sequence[str]) -> None:
    """ConfigError unless there is a name, and every one is known."""
    if not names:
        raise ConfigError("no metric was named: give at least one, such as psnr")
    for name in names:
        if name not in ("rfid", "is"):
            _key(name)


def _key(name: str) -> str:
    """The line of `METRICS` for a name."""
    for key in METRICS:
        if name == key or (key.endswith("_") and name.startswith(key) and name != key):
            return key
    known = ", ".join(key + "<network>" if key.endswith("_") else key for key in METRICS)
    raise ConfigError(f"unknown metric '{name}': one of rfid, is, {known}")


def _of_pairs(measure: Callable, options: MetricOptions) -> Callable:
    """The measure, of pictures rounded to bytes where the options say so."""
    if not options.rounded_pairs:
        return measure
    return lambda real, fake: measure(real, rounded_bytes(fake).to(fake.dtype) / 255)


def _clamped(images: torch.Tensor) -> torch.Tensor:
    """Inside [0,1]; most are already, and a copy costs more than a look."""
    low, high = torch.aminmax(images)
    return images if low >= 0 and high <= 1 else images.clamp(0, 1)


class Evaluator:
    """Metrics of reconstructions against originals, [0,1] images.

    ConfigError for an unknown name; DataError or CheckpointError when a network's weights cannot
    be had.

    Args:
        metrics: names out of psnr (dB), ssim, lpips, lpips_<network>, rfid, is, fd_<network>,
            perceptual_<network>.
        feature_network: the name of a network adds the metric fd_<name> (efficientnet_lite0, or any
            of timm's); a callable images -> (B, D) is used for the fd_ metric named, or adds
            fd_<its name>.
        device: where the images of `update` are moved and where sums are kept.
        expect: the number of images that must have been seen, over all processes, at `compute`.
        inception_weights: torch-fidelity's file, instead of its download.
        feature_weights: a file for the feature network, instead of its library's download.
        lpips_net: alex, vgg or squeeze, for the plain name `lpips`.
        lpips_weights: torchvision's file of that network, or a folder of such files, instead of a
            download.
        recipe: of a protocol: parts of the Inception Score, whether pairs are rounded to bytes.
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
        recipe: ReconstructionRecipe | None = None,
    ):
        names = [metrics] if isinstance(metrics, str) else list(metrics)
        given = None if isinstance(feature_network, str) else feature_network
        if isinstance(feature_network, str):
            names.append(f"fd_{feature_network}")
        elif given is not None and not any(name.startswith("fd_") for name in names):
            names.append(f"fd_{getattr(given, 'name', type(given).__name__.lower())}")
        recipe = recipe or ReconstructionRecipe("")
        options = MetricOptions(
            device=device,
            feature_network=given,
            feature_weights=feature_weights,
            inception_weights=inception_weights,
            lpips_net=lpips_net,
            lpips_weights=lpips_weights,
            rounded_pairs=recipe.rounded_pairs,
            is_splits=recipe.is_splits,
            is_part=recipe.is_part,
        )
        self.device, self.expect = torch.device(device), expect
        self.count = self.total = 0  # of this process, and of all (known after `compute`)
        self.metrics = build_metrics(names, options)

    @torch.no_grad()
    def update(
        self, real: torch.Tensor, fake: torch.Tensor, indices: torch.Tensor | None = None
    ) -> None:
        """Add pairs.

        ValueError when the shapes differ, or a value is NaN or outside [-0.01, 1.01] (the range
        seen is named).

        Args:
            real: (B,3,H,W) originals.
            fake: (B,3,H,W) reconstructions.
            indices: (B,) places in the data set, needed by `is` in several processes.
        """
        check_pair(real, fake)
        real, fake = (_clamped(images.detach().to(self.device)) for images in (real, fake))
        for metric in self.metrics:
            metric.update(real, fake, indices)
        self.count += len(real)

    def compute(self) -> dict[str, float]:
        """name -> value over all images of all processes, which all must call it; repeatable.

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
        """After `compute`: the number of images, and the networks with their weights' SHA-256."""
        networks = {
            getattr(m, "name", None) or "+".join(m.names): m.protocol
            for m in self.metrics
            if m.protocol
        }
        return {"images": self.total, "feature_networks": networks}


@torch.no_grad()
def reconstruct_batches(
    model,
    batches: Iterable[dict],
    evaluator: Evaluator,
    autocast: Callable = nullcontext,
    pad_multiple: int | None = None,
) -> Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Reconstruct every batch's `images`, add the pairs to the evaluator, and hand them on.

    The pairs, (B,3,H,W) twice, are on the evaluator's device; with them come the batch's indices.

    Args:
        model: has `reconstruct`.
        batches: with `images`, and `indices` where there are several processes.
        evaluator: takes the pairs.
        autocast: makes the context in which the model runs; metrics stay outside it.
        pad_multiple: pictures are padded by reflection to a multiple of so many pixels before the
            model, and reconstructions cut back.
    """
    for batch in batches:
        real = batch["images"].to(evaluator.device, non_blocking=True)
        padded, padding = reflect_pad(real, pad_multiple) if pad_multiple else (real, None)
        with autocast():
            fake = model.reconstruct(padded)
        fake = (fake if padding is None else unpad(fake, padding)).float()
        evaluator.update(real, fake, batch.get("indices"))
        yield real, fake, batch.get("indices")


def evaluate_reconstruction(
    model,
    batches: Iterable[dict],
    metrics: Sequence[str] = ("psnr", "ssim"),
    feature_network=None,
    device="cpu",
    **options,
) -> dict[str, float]:
    """Metrics of `model.reconstruct` over batches with `images`. All processes call it.

    metrics, feature_network, device and the options are those of `Evaluator`.
    """
    evaluator = Evaluator(metrics, feature_network, device, **options)
    for _ in reconstruct_batches(model, batches, evaluator):
        pass
    return evaluator.compute()


def measure_reconstruction(
    setup: Setup,
    metrics: Sequence[str] | None = None,
    num_pictures: int = 0,
    save_images: str | Path | None = None,
    **options,
) -> Measured | None:
    """The measurement of scripts/evaluate.py; None in the processes that write nothing.

    Data and metrics are opened before the model, so that a wrong path or a missing weights file is
    told of at once.

    Args:
        setup: what to measure, on which data.
        metrics: names, as for `Evaluator`; None takes the protocol's.
        num_pictures: how many pictures the sheet shows; 0 makes none.
        save_images: folder or npz file for all reconstructions, see `image_writer`.
        options: `feature_network` and the other options of `Evaluator`.
    """
    measurement.check_number("num_pictures", num_pictures, 0)
    recipe = setup.protocol.recipe if setup.protocol else ReconstructionRecipe("")
    loader = measurement.eval_data(setup, "val", ("images",))
    evaluator = Evaluator(metrics or recipe.metrics, device=setup.device, recipe=recipe, **options)
    model = setup.load_model()
    first: list[tuple[torch.Tensor, torch.Tensor]] = []
    pairs = reconstruct_batches(model, loader, evaluator, setup.autocast, recipe.pad_multiple)
    writer = image_writer(save_images) if save_images else nullcontext(lambda *_: None)
    # the pictures come under their name once all values are there
    with measurement.one_line_errors("evaluation"), writer as save:
        for real, fake, indices in pairs:
            save(fake, indices)
            missing = num_pictures - sum(len(pair[0]) for pair in first)
            if missing > 0:
                first.append((real[:missing].cpu(), fake[:missing].cpu()))
        facts = measurement.data_facts(setup, loader)
        if loader.num_samples is not None:
            evaluator.expect = loader.num_samples - facts["samples"]["skipped"]
        values = evaluator.compute()
    if not leave_processes():
        return None
    facts |= evaluator.protocol() | ({"saved_images": str(save_images)} if save_images else {})
    sides = [torch.cat(side) for side in zip(*first, strict=True)]
    sheet = functools.partial(comparison_sheet, *sides) if sides else None
    return Measured(values, facts, sheet)
