"""What every measuring command shares: its flags, its processes, and the file that it leaves."""

import argparse
import math
import os
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path

import torch
from omegaconf import DictConfig

from muse import cli
from muse.evaluation.measurement import Measured, Setup, check_number
from muse.evaluation.protocols import protocol_names
from muse.evaluation.used_protocol import PRECISIONS, UsedProtocol, use_protocol
from muse.models.muse_vit import FEATURES
from muse.utils.distributed import join_processes
from muse.utils.io import writable_directory, write_json
from muse.utils.viz_utils import save_image

METRICS_FILE = "metrics.json"
# Minutes that a process waits for the slowest: shares differ, and one process writes or fits alone.
COLLECTIVE_MINUTES = 12 * 60.0


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
    add_flag(parser, "num_workers", type=int, help="loader processes; default: the configuration's")
    add_flag(
        parser,
        "max_images",
        type=int,
        help="only so many of each set, drawn evenly from all of it by training.seed",
    )
    add_timeout_flag(parser)
    cli.refuse(parser, cli.ONE_PROCESS, *cli.LAUNCHER_FLAGS)


def add_timeout_flag(parser: argparse.ArgumentParser) -> None:
    """--collective_timeout."""
    add_flag(
        parser,
        "collective_timeout",
        type=float,
        default=COLLECTIVE_MINUTES,
        metavar="MINUTES",
        help="how long one of several processes waits for the slowest",
    )


def join(args: argparse.Namespace, device: str) -> str:
    """`join_processes` with the time-out of the flags."""
    minutes = getattr(args, "collective_timeout", COLLECTIVE_MINUTES)
    check_number("collective_timeout", minutes, 0.0)
    return join_processes(device, timedelta(minutes=minutes))


def add_protocol_flags(
    parser: argparse.ArgumentParser, command: str, precision: bool = True
) -> None:
    """--protocol, --resize, --crop, --precision; `set_up` puts them into `Setup.protocol`.

    Args:
        parser: of the command.
        command: the script's name, which the table of protocols knows.
        precision: with --precision, for a command that runs a model.
    """
    names = ", ".join(protocol_names(command))
    add_flag(parser, "protocol", default="native", metavar="NAME", help=f"one of {names}")
    add_flag(parser, "resize", type=int, metavar="N", help="shorter edge, wins over the protocol")
    add_flag(parser, "crop", type=int, metavar="N", help="side of the square, likewise")
    if precision:
        add_flag(
            parser,
            "precision",
            choices=PRECISIONS,
            help="of what is measured; below float32 by autocast, for a GPU; default: the "
            "protocol's",
        )
    parser.set_defaults(protocol_of=command)


def resolve_protocol(args: argparse.Namespace, cfg: DictConfig | None) -> UsedProtocol:
    """What the flags of `add_protocol_flags` say; cfg is None for a command that takes none.

    ConfigError, one line, for a protocol that the command does not have (those that it has are
    listed), and for sizes that do not fit.
    """
    for name in ("resize", "crop"):
        check_number(name, getattr(args, name), 1)
    sizes = {
        "resize": args.resize,
        "crop": args.crop,
        "precision": getattr(args, "precision", None),
    }
    return use_protocol(args.protocol, args.protocol_of, cfg, **sizes)


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
    """The `Setup` of a command's flags, once they are checked and results can be written.

    The metrics.json of an earlier run goes: it must not be taken for the result of one that fails.
    Joins the process group that a launcher (torchrun, accelerate) has prepared, if any, and takes
    this process's device.
    """
    check_number("num_pictures", getattr(args, "num_pictures", None), 0)
    given = {f.name: getattr(args, f.name) for f in fields(Setup) if hasattr(args, f.name)}
    if hasattr(args, "protocol_of"):
        given["protocol"] = resolve_protocol(args, cfg)
    setup = Setup(cfg, **given | {"device": cli.device(args.device)})
    clear_metrics(setup.output_dir)
    # trained weights make denormal activations, which a CPU computes three times slower
    torch.set_flush_denormal(True)
    return replace(setup, device=join(args, setup.device))


def clear_metrics(output_dir: str | Path) -> Path:
    """A directory that can be written to and holds no metrics.json."""
    folder = writable_directory(output_dir)
    if os.environ.get("RANK", "0") == "0":
        (folder / METRICS_FILE).unlink(missing_ok=True)
    return folder


def write_metrics(setup: Setup, measured: Measured, picture: str | None = None) -> Path:
    """OUTPUT_DIR/metrics.json: the values, and a `protocol` that says what was measured.

    Args:
        setup: of the measurement.
        measured: what it gave.
        picture: a file in OUTPUT_DIR for its picture, drawn once the values are safe.
    """
    folder = writable_directory(setup.output_dir)
    loading = loading_facts(setup.images_at_a_time(), setup.workers())
    facts = setup.protocol_facts(measured.facts.get("images")) | measured.facts
    protocol = cli.protocol(setup, setup.cfg, **facts, loading=loading)
    write_values(folder / METRICS_FILE, measured.values, protocol)
    if picture is not None and measured.picture is not None:
        save_image(measured.picture(), folder / picture)
    return folder / METRICS_FILE


def loading_facts(batch_size: int, num_workers: int) -> dict:
    """For the protocol: what should change no result, and would have to be known if it did."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return {"batch_size": batch_size, "num_workers": num_workers, "processes": processes}


def write_values(path: str | Path, values: dict, protocol: dict) -> None:
    """Write metrics.json, with null for what JSON has no number for.

    `protocol.not_finite` then says by its path what stood there: `inf` (as the PSNR of equal
    pictures), `-inf` or `nan`.
    """
    odd: dict[str, str] = {}
    values = _finite(values, "", odd)
    protocol = {**protocol, "not_finite": odd} if odd else protocol
    write_json(path, {**values, "protocol": protocol})


def _finite(value, path: str, odd: dict[str, str]):
    """`value` with None for numbers that are not finite, each noted in `odd` under its path."""
    if isinstance(value, dict):
        return {key: _finite(one, f"{path}{key}.", odd) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one, f"{path}{index}.", odd) for index, one in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        odd[path.rstrip(".")] = str(value)
        return None
    return value
