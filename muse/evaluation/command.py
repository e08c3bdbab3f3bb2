"""What every measuring command shares: its flags, its processes, and the file that it leaves."""

import argparse
from dataclasses import fields, replace
from pathlib import Path

import torch
from omegaconf import DictConfig

from muse import cli
from muse.evaluation.measurement import Measured, Setup
from muse.models.muse_vit import FEATURES
from muse.utils.distributed import join_processes
from muse.utils.io import writable_directory, write_json


def add_flag(parser: argparse.ArgumentParser, *names: str, **options) -> None:
    """A flag under one or more names, their words joined by `_` or `-`; options are argparse's."""
    spelled = [f"--{one}" for name in names for one in (name, name.replace("_", "-"))]
    parser.add_argument(*dict.fromkeys(spelled), **options)


def add_data_flags(parser: argparse.ArgumentParser, output_dir: str, train: bool = False) -> None:
    """Data and output flags: fields of `Setup`."""
    if train:
        add_flag(parser, "train_url", help="training data; default: the configuration's")
    add_flag(
        parser,
        "val_url",
        help="shard pattern, directory of shards or of pictures; default: the configuration's "
        "evaluation data",
    )
    add_flag(parser, "output_dir", default=output_dir, help="where metrics.json goes")
    add_flag(parser, "batch_size", type=int, help="images at a time; changes no result")
    add_flag(parser, "num_workers", type=int, default=0, help="loader processes")
    add_flag(parser, "max_images", type=int, help="only the first so many of each set")
    cli.refuse(parser, cli.ONE_PROCESS, *cli.LAUNCHER_FLAGS)


def add_feature_flags(parser: argparse.ArgumentParser, feature: str) -> None:
    """--checkpoint, --feature (with this default), --baseline, --cache_dir."""
    add_flag(
        parser,
        "checkpoint",
        help="what to probe; not needed for a baseline that does not look at it",
    )
    add_flag(
        parser, "feature", default=feature, choices=FEATURES, help="which features of the model"
    )
    add_flag(
        parser,
        "baseline",
        nargs="?",
        const="encoder",
        choices=("encoder", "pixels"),
        help="probe instead the bare encoder (as its source gives it; the checkpoint's where the "
        "source is random), or the picture shrunk to 16x16 pixels",
    )
    add_flag(parser, "cache_dir", help="where extracted features stay; default OUTPUT_DIR/features")


def set_up(args: argparse.Namespace, cfg: DictConfig) -> Setup:
    """The `Setup` of a command's flags, once results can be written.

    Joins the process group that a launcher (torchrun, accelerate) has prepared, if any, and takes
    this process's device.
    """
    given = {f.name: getattr(args, f.name) for f in fields(Setup) if hasattr(args, f.name)}
    setup = Setup(cfg, **given | {"device": cli.device(args.device)})
    writable_directory(setup.output_dir)
    # trained weights make denormal activations, which a CPU computes three times slower
    torch.set_flush_denormal(True)
    return replace(setup, device=join_processes(setup.device))


def write_metrics(setup: Setup, measured: Measured) -> Path:
    """OUTPUT_DIR/metrics.json: the values, and a `protocol` that says what was measured."""
    path = writable_directory(setup.output_dir) / "metrics.json"
    protocol = cli.protocol(setup, setup.cfg, **measured.facts)
    write_json(path, {**measured.values, "protocol": protocol})
    return path
