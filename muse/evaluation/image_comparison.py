"""Two sets of pictures against each other: FID, sFID, IS, precision, recall, fd_<network>, pairs.

The measurement of scripts/evaluate_images.py. A set is read once for everything that is of its
distribution, with one pass of Inception, and once more where pairs are compared. Several processes
read a stretch of each set, and put their rows together in the order of the set.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from muse.errors import ConfigError, DataError
from muse.evaluation.image_sets import ImageSet
from muse.evaluation.metrics.frechet import RunningMoments, frechet_distance, warn_of_few
from muse.evaluation.metrics.inception import Inception, inception_score, score_in_parts
from muse.evaluation.metrics.lpips import Lpips
from muse.evaluation.metrics.networks import load_feature_network
from muse.evaluation.metrics.precision_recall import precision_recall
from muse.evaluation.metrics.psnr_ssim import psnr, ssim
from muse.evaluation.metrics.spatial_frechet import SpatialTap
from muse.evaluation.recipes import ReconstructionRecipe
from muse.utils.distributed import all_objects, process_index, world_size

MANIFOLD = ("precision", "recall")
INCEPTION = ("fid", "sfid", "is", *MANIFOLD)


@dataclass(frozen=True)
class ComparisonOptions:
    """Where and how.

    Args:
        device: where networks run.
        batch_size: pictures at a time, which changes no result.
        num_workers: loader processes of each set.
        inception_weights: torch-fidelity's file, instead of its download.
        feature_weights: a file for the network of `fd_`, likewise.
        lpips_weights: torchvision's file for `lpips_`, likewise.
    """

    device: str = "cpu"
    batch_size: int = 64
    num_workers: int = 0
    inception_weights: str | None = None
    feature_weights: str | None = None
    lpips_weights: str | None = None

    def batches(self, images: ImageSet):
        """(B,3,H,W) of this process's stretch of a set, on the device."""
        part = process_index(), world_size()
        for batch in images.batches(self.batch_size, self.num_workers, *part):
            yield batch.to(self.device)


# Metrics of the pictures at one place in both sets: name -> builder of measure(real, fake) -> (B,)
PAIRED: dict[str, Callable] = {
    "psnr": lambda options: psnr,
    "ssim": lambda options: ssim,
    "lpips_alex": lambda options: Lpips("alex", options.lpips_weights).to(options.device),
    "lpips_vgg": lambda options: Lpips("vgg", options.lpips_weights).to(options.device),
}


def check_names(names: Sequence[str]) -> list[str]:
    """The names without repetition. ConfigError for an unknown one, or for none."""
    names = list(dict.fromkeys(names))
    if not names:
        raise ConfigError("no metric was named: give at least one, such as fid")
    for name in names:
        if name not in INCEPTION and name not in PAIRED and not _is_feature_distance(name):
            known = ", ".join((*INCEPTION, "fd_<network>", *PAIRED))
            raise ConfigError(f"unknown metric '{name}': one of {known}")
    return names


def check_metrics(names: Sequence[str], real: ImageSet, fake: ImageSet) -> list[str]:
    """The names without repetition. ConfigError for an unknown one, DataError for impossible ones.

    A set of statistics alone serves the distances that it has statistics of; pairs need two sets of
    one count.
    """
    names = check_names(names)
    for images in (real, fake):
        possible = [name for name in names if images.count != 0 or name in images.statistics]
        if images is real:  # the Inception Score is of the other set
            possible += [name for name in names if name == "is" and name not in possible]
        missing = [name for name in names if name not in possible]
        if missing:
            raise DataError(
                f"{missing[0]} needs pictures, and {images.name} holds statistics alone"
                + (f": give --metrics {','.join(possible)}" if possible else "")
            )
    pairs = [name for name in names if name in PAIRED]
    if pairs and real.count != fake.count:
        raise DataError(
            f"{pairs[0]} compares pairs, but {real.name} holds {real.count} pictures and "
            f"{fake.name} {fake.count}"
        )
    return names


def _is_feature_distance(name: str) -> bool:
    return name.startswith("fd_") and name != "fd_"


def compare_image_sets(
    real: ImageSet,
    fake: ImageSet,
    metrics: Sequence[str],
    recipe: ReconstructionRecipe | None = None,
    options: ComparisonOptions | None = None,
) -> tuple[dict[str, float], dict]:
    """Values by metric, and the facts for the protocol. All processes call it.

    ValueError where a metric cannot be had from so few pictures, or a network gives NaN.

    Args:
        real: the reference.
        fake: what is measured; the Inception Score is of this set alone.
        metrics: names, see `check_metrics`.
        recipe: parts of the Inception Score; balls, distances and pictures of precision and recall.
        options: where and how.
    """
    names = check_metrics(metrics, real, fake)
    recipe, options = recipe or ReconstructionRecipe(""), options or ComparisonOptions()
    networks = _Networks(names, (real, fake), options)
    pairs = {name: PAIRED[name](options) for name in names if name in PAIRED}
    of_sets = {name for name in names if name not in PAIRED}
    sides = (
        _SetFeatures(real, of_sets - {"is"}, recipe.manifold_images).read(networks, options),
        _SetFeatures(fake, of_sets).read(networks, options),
    )
    values: dict[str, float] = {}
    if pairs:
        values |= _pair_means(real, fake, pairs, options)
    for name in names:
        if name in ("fid", "sfid") or _is_feature_distance(name):
            gaussians = [side.gaussian(name) for side in sides]
            values[name] = frechet_distance(*gaussians[0], *gaussians[1])
    if "is" in names:
        logits = sides[1].rows("logits")
        values["is"], values["is_std"] = (
            inception_score(logits, recipe.is_splits)
            if recipe.is_part is None
            else score_in_parts(logits, recipe.is_part)
        )
    if of_sets & set(MANIFOLD):
        both = precision_recall(
            sides[0].rows("pooled")[: recipe.manifold_images],
            sides[1].rows("pooled"),
            recipe.manifold_k,
            dtype=getattr(torch, recipe.manifold_dtype),
            device=options.device,
        )
        values |= {name: getattr(both, name) for name in MANIFOLD if name in names}
    facts = {"sets": {"real": sides[0].facts(), "fake": sides[1].facts()}}
    return values, facts | {"feature_networks": networks.facts(pairs)}


class _Networks:
    """The networks that the metrics need, opened before any picture is read."""

    def __init__(
        self, names: Sequence[str], sets: tuple[ImageSet, ImageSet], options: ComparisonOptions
    ):
        self.features = {
            name: load_feature_network(name[3:], options.feature_weights).to(options.device)
            for name in names
            if _is_feature_distance(name)
        }
        by_inception = set(names) & set(INCEPTION)
        if all(by_inception <= set(images.statistics) for images in sets):
            by_inception = set()
        self.inception = (
            Inception(options.inception_weights).to(options.device) if by_inception else None
        )

    def facts(self, pairs: dict[str, Callable]) -> dict:
        """Network and SHA-256 of its weights, by metric."""
        used = {**self.features, **{k: v for k, v in pairs.items() if k.startswith("lpips")}}
        if self.inception is not None:
            used["inception"] = self.inception
        return {
            name: {"network": network.name, "weights_sha256": network.weights_sha256}
            for name, network in used.items()
        }


@dataclass
class _SetFeatures:
    """What one pass over a set leaves: moments by metric, and the rows that are all needed."""

    images: ImageSet
    metrics: set[str]
    manifold_images: int | None = None  # rows kept for precision and recall
    moments: dict[str, RunningMoments] = field(default_factory=dict)
    pooled: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    count: int = 0

    @torch.no_grad()
    def read(self, networks: _Networks, options: ComparisonOptions) -> "_SetFeatures":
        """The pass, where a metric needs it."""
        needed = self.metrics - set(self.images.statistics)
        tap = SpatialTap(networks.inception.network) if "sfid" in needed else None
        for batch in options.batches(self.images) if needed else ():
            if needed & set(INCEPTION):
                pooled, logits = networks.inception(batch)
                self._keep(needed, pooled, logits)
                if tap is not None:
                    self._add("sfid", tap.take())
            for name in needed & set(networks.features):
                self._add(name, networks.features[name](batch))
            self.count += len(batch)
        if tap is not None:
            tap.remove()
        self.count = sum(all_objects(self.count))
        return self

    def rows(self, kept: str) -> Tensor:
        """The `pooled` or `logits` of all processes in the order of the set."""
        parts = [rows for part in all_objects(getattr(self, kept)) for rows in part]
        if not parts:
            raise ValueError("no pictures were given")
        return torch.cat(parts)

    def _keep(self, needed: set[str], pooled: Tensor, logits: Tensor) -> None:
        if "fid" in needed:
            self._add("fid", pooled)
        if "is" in needed:
            self.logits.append(logits.cpu())
        wanted = self.manifold_images is None or self.count < self.manifold_images
        if needed & set(MANIFOLD) and wanted:
            self.pooled.append(pooled.cpu())

    def _add(self, name: str, rows: Tensor) -> None:
        self.moments.setdefault(name, RunningMoments()).update(rows)

    def gaussian(self, name: str) -> tuple:
        """Mean and covariance: the set's own statistics where it has them."""
        if name in self.images.statistics:
            return self.images.statistics[name]
        warn_of_few(name, self.count, self.images.name)
        moments = self.moments.setdefault(name, RunningMoments())
        width = max(all_objects(moments.dim or 0))  # a process may have no picture
        return moments.compute(width or None)[1:]

    def facts(self) -> dict:
        """For the protocol."""
        used = sorted(self.metrics & set(self.images.statistics))
        count = self.count if self.images.count is None else self.images.count
        return {"source": self.images.name, "images": count, "statistics_of_file": used}


@torch.no_grad()
def _pair_means(
    real: ImageSet, fake: ImageSet, pairs: dict[str, Callable], options: ComparisonOptions
) -> dict[str, float]:
    """Mean over the pictures of both sets, place by place."""
    sums, count = dict.fromkeys(pairs, 0.0), 0
    for a, b in zip(options.batches(real), options.batches(fake), strict=True):
        if a.shape != b.shape:
            raise DataError(
                f"pairs differ in size: {tuple(a.shape[-2:])} in {real.name}, "
                f"{tuple(b.shape[-2:])} in {fake.name}"
            )
        for name, measure in pairs.items():
            sums[name] += float(measure(a, b).double().sum())
        count += len(a)
    parts = all_objects((sums, count))
    count = sum(part[1] for part in parts)
    return {name: sum(part[0][name] for part in parts) / count for name in sums}
