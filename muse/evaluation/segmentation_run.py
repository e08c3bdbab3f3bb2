"""The measurement behind scripts/segment_probe.py."""

import argparse

import numpy
import torch

from muse.errors import ConfigError
from muse.evaluation import command, frozen_features
from muse.evaluation.segmentation import IGNORE, evaluate_segmentation, train_segmentation_probe
from muse.utils.viz_utils import segmentation_sheet

ADE20K_CLASSES = 150


def count_classes(masks: numpy.ndarray, block: int = 256) -> int:
    """Largest label + 1 over (N,H,W) masks, ignored pixels left out."""
    largest = -1
    for start in range(0, len(masks), block):
        part = numpy.asarray(masks[start : start + block])
        labelled = part[part != IGNORE]
        largest = max(largest, int(labelled.max()) if labelled.size else -1)
    if largest < 0:
        raise ValueError("the training masks hold no labelled pixel")
    return largest + 1


def run_segment_probe(
    args: argparse.Namespace, cfg
) -> tuple[dict, dict, torch.Tensor | None] | None:
    """Values, facts for the protocol and the picture; None in the processes that only extract features."""
    command.check_numbers(
        args, num_classes=2, steps=1, probe_batch_size=2, learning_rate=0.0, num_pictures=0
    )
    if args.num_classes is not None and args.labels == "foreground":
        raise ConfigError(
            "--num_classes does not go with --labels foreground, which has two classes"
        )
    command.start(args)
    network, network_facts = frozen_features.feature_network(args, cfg)
    ade20k = args.labels == "ade20k"
    sets = [
        frozen_features.frozen_features(
            args,
            cfg,
            network,
            network_facts,
            source,
            default,
            "masks",
            pooled=False,
            foreground=args.labels == "foreground",
            zero_label_ignored=ade20k,
        )
        for source, default in (
            (args.train_url, "train_shards_path_or_url"),
            (args.val_url, "eval_shards_path_or_url"),
        )
    ]
    if not command.finish():
        return None
    (train, train_masks, train_facts), (val, val_masks, val_facts) = sets
    with command.one_line_errors(
        "segmentation probe" + (" (ADE20K's labels counted from 0)" if ade20k else "")
    ):
        largest = count_classes(train_masks)
        classes = {"foreground": 2, "ade20k": ADE20K_CLASSES}.get(args.labels, max(largest, 2))
        classes = args.num_classes or classes
        if classes > IGNORE:
            raise ValueError(
                f"{classes} classes: at most {IGNORE}, since label {IGNORE} means an ignored pixel"
            )
        probe = train_segmentation_probe(
            train,
            train_masks,
            classes,
            args.steps,
            args.probe_batch_size,
            args.learning_rate,
            cfg.training.seed,
            args.device,
        )
        result = evaluate_segmentation(probe, val, val_masks)
    values = {
        "miou": result.mean,
        "pixel_accuracy": result.pixel_accuracy,
        "classes": classes,
        "classes_absent": result.absent,
        "iou_by_class": [None if value != value else value for value in result.per_class.tolist()],
    }
    settings = {
        name: getattr(args, name)
        for name in ("labels", "steps", "probe_batch_size", "learning_rate")
    }
    facts = {"network": network_facts, "probe": settings, "train": train_facts, "val": val_facts}
    return (
        values,
        facts,
        _picture(args, cfg, probe, val, val_masks, classes) if args.num_pictures else None,
    )


def _picture(args, cfg, probe, features, masks, classes: int) -> torch.Tensor:
    """The first pictures of the validation set with their true and predicted labels."""
    options = {"zero_label_ignored": args.labels == "ade20k"}
    loader = command.eval_data(
        args, cfg, args.val_url, "eval_shards_path_or_url", ("images", "masks"), **options
    )
    images = next(iter(loader))["images"][: args.num_pictures]
    truth = torch.tensor(numpy.array(masks[: len(images)])).long()
    maps = torch.tensor(numpy.array(features[: len(images)])).to(probe.classify.weight.device)
    return segmentation_sheet(images, truth, probe.predict(maps, truth.shape[-2:]).cpu(), classes)
