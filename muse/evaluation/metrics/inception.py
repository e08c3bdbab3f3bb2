"""The Inception network of rFID and Inception Score: torch-fidelity's, with its own resize and 2015 weights.

Only a number from this network is called FID. Images become uint8 by rounding, as a saved PNG would.
"""

import logging
import urllib.error
from pathlib import Path

import torch
from torch import nn

from muse.errors import DataError
from muse.utils.io import file_sha256
from muse.utils.weights import read_state_dict

logger = logging.getLogger(__name__)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """(B,3,H,W) float, nominal [0,1] -> uint8, clamped and rounded (not truncated)."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def cached_weights_path() -> Path:
    """Where torch-fidelity keeps the file it downloads."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]


class Inception(nn.Module):
    """(B,3,H,W) in [0,1] -> pooled features (B,2048) and unbiased logits (B,1008), float32.

    weights: path of torch-fidelity's file; None takes the downloaded copy, or lets torch-fidelity download it.
    `weights_sha256` goes into the protocol. DataError, one line, when there is no file and no network.
    """

    name = "inception"

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import (
            URL_INCEPTION_V3,
            FeatureExtractorInceptionV3,
        )

        path = Path(weights) if weights else cached_weights_path()
        if weights or path.exists():
            read_state_dict(
                path, "Inception"
            )  # refuses pickled code before torch-fidelity, which does not, opens it
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat",
                ["2048", "logits_unbiased"],
                str(path) if path.exists() else None,
                verbose=False,
            )
        except (urllib.error.URLError, OSError) as error:
            raise DataError(
                f"rfid and is need the file {path.name}, which could not be downloaded ({error}): get it from "
                f"{URL_INCEPTION_V3} and pass it with --inception-weights FILE (in Python: "
                "inception_weights=FILE), or choose other --metrics"
            ) from error
        except RuntimeError as error:
            raise DataError(f"{path} does not hold torch-fidelity's Inception weights") from error
        self.weights_sha256 = file_sha256(path if path.exists() else cached_weights_path())

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.network(to_uint8(images))


def inception_score(
    logits: torch.Tensor, splits: int = 10, seed: int = 2020
) -> tuple[float, float]:
    """(N, classes) logits in data-set order -> mean and standard deviation of the score over `splits` parts.

    torch-fidelity's definition and shuffle, so that the numbers agree; fewer images than splits make one split an
    image.
    """
    from torch_fidelity.metric_isc import (
        KEY_METRIC_ISC_MEAN,
        KEY_METRIC_ISC_STD,
        isc_features_to_metric,
    )

    scores = isc_features_to_metric(
        logits.cpu(), splits=min(splits, len(logits)), shuffle=True, rng_seed=seed
    )
    return scores[KEY_METRIC_ISC_MEAN], scores[KEY_METRIC_ISC_STD]
