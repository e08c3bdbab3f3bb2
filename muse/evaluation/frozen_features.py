"""Frozen features of a data set for a probe: which network, which feature, from where, cached under which key."""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import nn

from muse import cli
from muse.config import plain
from muse.errors import CheckpointError, DataError
from muse.evaluation import command
from muse.evaluation.feature_store import source_facts, stored_features
from muse.evaluation.metrics.networks import state_sha256
from muse.evaluation.segmentation import foreground_masks
from muse.models.layers import padding_to_multiple
from muse.utils.io import file_sha256

FEATURES = ("semantic", "block", "latent", "encoder")
PIXEL_SIDE = 16


class BareEncoder(nn.Module):
    """The encoder as its source gives it, without a checkpoint of MUSE: `features(images)` on the latent grid."""

    def __init__(self, config: Any):
        super().__init__()
        from muse.models.internvit import build_encoder
        from muse.models.muse_vit import IMAGENET_MEAN, IMAGENET_STD

        self.encoder = build_encoder(config.encoder.source, plain(config.encoder.config), True)
        self.patch, self.unshuffle = self.encoder.config.patch_size[0], config.unshuffle
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))
        self.eval()

    def features(self, images: torch.Tensor, kind: str = "encoder") -> torch.Tensor:
        """(B,3,H,W) in [0,1] -> (B,C,h,w): patch tokens, averaged over unshuffle cells as MUSE_ViT.features does."""
        rows, columns = padding_to_multiple(images.shape[-2:], self.patch * self.unshuffle)
        images = (
            F.pad(images, (0, columns, 0, rows), mode="replicate") if rows or columns else images
        )
        tokens = self.encoder(pixel_values=(images - self.mean) / self.std).last_hidden_state[:, 1:]
        grid = [side // self.patch for side in images.shape[-2:]]
        return F.avg_pool2d(tokens.transpose(1, 2).unflatten(2, grid), self.unshuffle)


def add_flags(parser: argparse.ArgumentParser, feature: str) -> None:
    """--checkpoint, --feature (with this default), --baseline, --cache_dir."""
    parser.add_argument(
        "--checkpoint",
        default=None,
        help="what to probe; not needed for a baseline that does not look at it",
    )
    parser.add_argument(
        "--feature", default=feature, choices=FEATURES, help="which features of the model"
    )
    parser.add_argument(
        "--baseline",
        nargs="?",
        const="encoder",
        default=None,
        choices=("encoder", "pixels"),
        help="probe instead the bare encoder (as its source gives it; the checkpoint's where the source is "
        "random), or the picture shrunk to 16x16 pixels",
    )
    parser.add_argument(
        "--cache_dir",
        "--cache-dir",
        default=None,
        help="where extracted features stay; default OUTPUT_DIR/features",
    )


def feature_network(
    args: argparse.Namespace, cfg: Any
) -> tuple[Callable[[torch.Tensor], torch.Tensor], dict]:
    """images (B,3,H,W) -> (B,C,h,w), and the facts that name the network and its weights."""
    if args.baseline == "pixels":
        return lambda images: F.interpolate(images, (PIXEL_SIDE, PIXEL_SIDE), mode="area"), {
            "feature": "pixels 16x16"
        }
    if args.baseline == "encoder" and cfg.model.encoder.source != "random":
        encoder = BareEncoder(cfg.model).to(args.device)
        facts = {
            "feature": "bare encoder",
            "source": cfg.model.encoder.source,
            "weights_sha256": state_sha256(encoder),
        }
        return lambda images: encoder.features(images.to(args.device)), facts
    if args.checkpoint is None:
        raise CheckpointError(
            "--checkpoint is needed: only --baseline pixels, and the bare encoder of a pretrained source, go without"
        )
    from muse.models.loading import weights_file

    model = cli.load_model(args, cfg)
    kind = "encoder" if args.baseline else args.feature
    sha256 = file_sha256(weights_file(args.checkpoint))
    routing = {key: cfg.model[key] for key in ("routing", "join_semantics")}
    return lambda images: model.features(images.to(args.device), kind), {
        "feature": kind,
        "checkpoint_sha256": sha256,
        **routing,
    }


def frozen_features(
    args: argparse.Namespace,
    cfg: Any,
    network: Callable,
    network_facts: dict,
    source: str | None,
    default: str,
    target: str,
    pooled: bool,
    foreground: bool = False,
    **options,
) -> tuple[numpy.ndarray, numpy.ndarray, dict]:
    """Features and targets (`labels` or `masks`) of a whole data set as memory-mapped arrays, and the facts for the
    protocol.

    pooled: mean over the grid, (N,C); else the maps, (N,C,h,w). foreground: masks as 0 and 1. Extracted once per
    network, feature, crop and data; DataError when the rows are not the whole data set.
    """
    loader = command.eval_data(args, cfg, source, default, ("images", target), **options)

    @torch.no_grad()
    def extract() -> Iterator[dict[str, numpy.ndarray]]:
        for batch in loader:
            maps = network(batch["images"]).float()
            if not torch.isfinite(maps).all():
                raise DataError(
                    f"features of {batch['keys'][0]} and its batch contain NaN or infinity"
                )
            flat = (
                maps.flatten(1)
                if network_facts["feature"].startswith("pixels")
                else maps.mean((2, 3))
            )
            values = foreground_masks(batch[target]) if foreground else batch[target]
            values = values.to(torch.int64 if target == "labels" else torch.int32)
            yield {
                "features": (flat if pooled else maps).cpu().numpy(),
                target: values.numpy(),
                "indices": batch["indices"].numpy(),
            }

    crop = {key: cfg.dataset.preprocessing[key] for key in ("resize_shorter_edge", "crop_size")}
    facts = {
        **network_facts,
        **crop,
        **options,
        "target": target,
        "pooled": pooled,
        "max_images": args.max_images,
    }
    facts |= {
        "shards": source_facts(loader.stream.source),
        "model": plain(cfg.model),
        "foreground": foreground,
    }
    folder = args.cache_dir or f"{args.output_dir}/features"
    arrays, notes = stored_features(folder, facts, extract, lambda: command.data_facts(loader, cfg))
    command.check_share(
        notes["samples"], cfg.dataset.max_bad_fraction
    )  # a store may be from a run that allowed more
    command.check_count(loader, notes, len(arrays[target]))
    classes = {"class_names": list(loader.classes)} if loader.classes else {}
    return arrays["features"], arrays[target], {**notes, **classes, "images": len(arrays[target])}
