"""What the measurements of the full size cost: rates measured here, hours computed from them.

Measured: features of random pictures by the configuration's model with random weights, at 224 and
512 pixels, and k-NN in blocks. Computed: ImageNet's features, k-NN of its validation pictures, and
ADE20K's probe, in hours of this machine. Nothing of the data is read.
"""

import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from muse import cli
from muse.evaluation.knn import knn_scores
from muse.evaluation.measurement import check_number
from muse.models.muse_vit import MUSE_ViT
from muse.utils.io import versions, write_json

IMAGENET_TRAIN, IMAGENET_VAL = 1_281_167, 50_000
ADE20K_TRAIN, ADE20K_VAL = 20_210, 2_000
RELEASE_EPOCHS, DINOV2_PICTURES = 10, 40_000 * 16
WIDTH, ROWS, QUERIES, CLASSES = 512, 32_768, 1_024, 1_000


def seconds_of(call: Callable[[], object], repeats: int, device: str) -> float:
    """The fastest of some calls, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def rates(cfg, batch: int, repeats: int, device: str) -> dict[str, float]:
    """Pictures a second at 224 and 512 pixels, and pairs of rows a second of k-NN."""
    model = MUSE_ViT(cfg.model, load_backbones=False).to(device).eval()
    found = {}
    with torch.inference_mode():
        for side in (224, 512):
            images = torch.rand(batch, 3, side, side, device=device)
            features = partial(model.features, images, kind="semantic")
            taken = seconds_of(features, repeats, device)
            found[f"pictures_per_second_{side}"] = batch / taken
    rows, queries = torch.randn(ROWS, WIDTH), torch.randn(QUERIES, WIDTH)
    labels = torch.arange(ROWS) % CLASSES

    def neighbours():
        return knn_scores(rows, labels, queries, labels[:QUERIES], CLASSES, device=device)

    found["knn_pairs_per_second"] = ROWS * QUERIES / seconds_of(neighbours, repeats, device)
    return found


def hours(measured: dict[str, float]) -> dict[str, float]:
    """Computed, in hours of the machine whose rates these are."""
    fast, large = (measured[f"pictures_per_second_{side}"] for side in (224, 512))
    seconds = {
        "ImageNet, features of training and validation": (IMAGENET_TRAIN + IMAGENET_VAL) / fast,
        "ImageNet, k-NN on the features": IMAGENET_TRAIN
        * IMAGENET_VAL
        / measured["knn_pairs_per_second"],
        "ADE20K, `release`: ten epochs and the validation": (
            RELEASE_EPOCHS * ADE20K_TRAIN + ADE20K_VAL
        )
        / large,
        "ADE20K, `dinov2`: 640,000 crops, at least two windows a validation picture": (
            DINOV2_PICTURES + 2 * ADE20K_VAL
        )
        / large,
    }
    return {name: value / 3600 for name, value in seconds.items()}


@cli.entry
def main(argv=None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--batch", type=int, default=4, help="pictures at a time")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--output", help="JSON file for the numbers")
    args = cli.parse(parser, argv)
    check_number("batch", args.batch, 1)
    check_number("repeats", args.repeats, 1)
    device = cli.device(args.device)
    measured = rates(cli.load_cfg(args), args.batch, args.repeats, device)
    computed = hours(measured)
    for name, value in measured.items():
        print(f"{name:>40} {value:.4g} (measured)")
    for name, value in computed.items():
        print(f"{value:10.1f} h (computed)  {name}")
    if args.output:
        facts = {"device": device, "threads": torch.get_num_threads(), "versions": versions()}
        write_json(args.output, {"measured": measured, "hours": computed, "protocol": facts})
    return 0


if __name__ == "__main__":
    sys.exit(main())
