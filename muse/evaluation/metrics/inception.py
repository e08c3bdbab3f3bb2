"""rFID and Inception Score: torch-fidelity's network, with its own resize and weights of 2015.

Only a number from this network is called FID. Images become uint8 by rounding, as in a saved PNG.
"""

import urllib.error
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from muse.errors import DataError
from muse.evaluation.metrics.frechet import FrechetDistance
from muse.evaluation.metrics.networks import MetricOptions, network_protocol, rounded_bytes
from muse.utils.distributed import all_rows, world_size
from muse.utils.io import file_sha256
from muse.utils.weights import read_state_dict


def cached_weights_path() -> Path:
    """Where torch-fidelity keeps the file it downloads."""
    # torch_fidelity takes a second to import: only who measures with it waits for it
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3  # noqa: PLC0415

    return Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]


class Inception(nn.Module):
    """(B,3,H,W) in [0,1] -> pooled features (B,2048) and unbiased logits (B,1008), float32.

    weights: path of torch-fidelity's file; None takes the downloaded copy, or lets torch-fidelity
    download it. `weights_sha256` goes into the protocol. DataError, one line, when there is no file
    and no network.
    """

    name = "inception"

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import (  # noqa: PLC0415
            URL_INCEPTION_V3,
            FeatureExtractorInceptionV3,
        )

        path = Path(weights) if weights else cached_weights_path()
        if weights or path.exists():
            # refuses pickled code before torch-fidelity, which does not, opens the file
            read_state_dict(path, "Inception")
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat",
                ["2048", "logits_unbiased"],
                str(path) if path.exists() else None,
                verbose=False,
            )
        except (urllib.error.URLError, OSError) as error:
            raise DataError(
                f"rfid and is need the file {path.name}, which could not be downloaded ({error}): "
                f"get it from {URL_INCEPTION_V3} and pass it with --inception-weights FILE "
                "(in Python: inception_weights=FILE), or choose other --metrics"
            ) from error
        except RuntimeError as error:
            raise DataError(f"{path} does not hold torch-fidelity's Inception weights") from error
        self.weights_sha256 = file_sha256(path if path.exists() else cached_weights_path())

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.network(rounded_bytes(images))


def inception_score(
    logits: torch.Tensor, splits: int = 10, seed: int = 2020
) -> tuple[float, float]:
    """Mean and standard deviation of the score over `splits` parts.

    torch-fidelity's definition and shuffle, so that the numbers agree.

    Args:
        logits: (N, classes) in data-set order.
        splits: parts; fewer images than that make one part an image.
        seed: of the shuffle.
    """
    from torch_fidelity.metric_isc import (  # noqa: PLC0415
        KEY_METRIC_ISC_MEAN,
        KEY_METRIC_ISC_STD,
        isc_features_to_metric,
    )

    scores = isc_features_to_metric(
        logits.cpu(), splits=min(splits, len(logits)), shuffle=True, rng_seed=seed
    )
    return scores[KEY_METRIC_ISC_MEAN], scores[KEY_METRIC_ISC_STD]


def score_in_parts(logits: torch.Tensor, size: int) -> tuple[float, float]:
    """Inception Score as ADM's evaluator has it: mean and spread over parts in their order.

    The exponential of the mean KL divergence from each part's own mean, in float64.

    Args:
        logits: (N, classes).
        size: pictures in a part; the last may have fewer.
    """
    scores = []
    for part in logits.double().split(size):
        logs = part.log_softmax(1)
        shares = logs.exp()
        scores.append((shares * (logs - shares.mean(0).log())).sum(1).mean().exp())
    return float(torch.stack(scores).mean()), float(torch.stack(scores).std(correction=0))


class InceptionScores:
    """rFID and/or Inception Score (of the fakes) from one pass of the Inception network.

    The score is torch-fidelity's, ten splits in the order of a seeded shuffle: it needs the logits
    of all images (4 KB each: 200 MB for 50,000), and in several processes the samples' indices,
    which give every image its place. `part` makes parts of so many images in the order of the set
    in place of the `splits`, as ADM's evaluator does.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        network: Callable,
        protocol: dict | None = None,
        splits: int | None = 10,
        part: int | None = None,
    ):
        self.names, self.network, self.protocol = names, network, protocol or {}
        self.splits, self.part = splits, part
        self.distance = FrechetDistance("rfid", lambda images: network(images)[0])
        self.logits: list[torch.Tensor] = []
        self.indices: list[torch.Tensor] = []

    def update(self, real: torch.Tensor, fake: torch.Tensor, indices: torch.Tensor | None) -> None:
        """Add (B,3,H,W) pairs; indices (B,): their places in the data set."""
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
        """Those of rfid, is, is_std that were asked for, over the images of all processes."""
        values = self.distance.compute() if "rfid" in self.names else {}
        if "is" in self.names:
            logits = all_rows(torch.cat(self.logits) if self.logits else torch.zeros(0, 1008))
            indices = all_rows(
                torch.cat(self.indices) if self.indices else torch.zeros(0, dtype=torch.long)
            )
            if not len(logits):
                raise ValueError("is: no images were given")
            logits = logits[indices.argsort()]
            values["is"], values["is_std"] = (
                inception_score(logits, self.splits)
                if self.part is None
                else score_in_parts(logits, self.part)
            )
        return values


def inception_metric(names: tuple[str, ...], options: MetricOptions) -> InceptionScores:
    """The metrics `rfid` and `is`, those of them that `names` holds."""
    network = Inception(options.inception_weights).to(options.device)
    facts = network_protocol(network, "torch-fidelity")
    return InceptionScores(names, network, facts, options.is_splits, options.is_part)
