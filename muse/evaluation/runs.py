"""What every measuring command shares: its flags, its processes, its data, and the one file it leaves."""

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from muse.config import plain
from muse.data.dataloader import EvalLoader, eval_loader
from muse.errors import DataError, MuseError
from muse.evaluation.reduce import all_objects
from muse.utils import cli


def add_flags(parser: argparse.ArgumentParser, output_dir: str, train: bool = False) -> None:
    """Data and output flags, each with `-` or `_`, before or after the release's spelling."""
    if train:
        parser.add_argument(
            "--train_url", "--train-url", default=None, help="training data; default: the configuration's"
        )
    parser.add_argument(
        "--val_url",
        "--val-url",
        default=None,
        help="shard pattern, directory of shards or of pictures; default: the configuration's evaluation data",
    )
    parser.add_argument("--output_dir", "--output-dir", default=output_dir, help="where metrics.json goes")
    parser.add_argument(
        "--batch_size", "--batch-size", type=int, default=None, help="images at a time; changes no result"
    )
    parser.add_argument("--num_workers", "--num-workers", type=int, default=0, help="loader processes")
    parser.add_argument(
        "--max_images", "--max-images", type=int, default=None, help="only the first so many of each set"
    )


def start(args: argparse.Namespace) -> None:
    """Join the process group a launcher (torchrun, accelerate) has prepared, if any, and take this process's device."""
    # trained weights make denormal activations, which a CPU computes three times slower
    torch.set_flush_denormal(True)
    args.device = cli.device(args.device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")


def finish() -> bool:
    """Leave the process group; True in the process that goes on to write results."""
    if not dist.is_initialized():
        return True
    main = dist.get_rank() == 0
    dist.barrier()
    dist.destroy_process_group()
    return main


def eval_data(
    args: argparse.Namespace, cfg: Any, source: str | None, default: str, fields: Sequence[str], **options
) -> EvalLoader:
    """Loader of this process's part of `source`, or of `dataset.params.<default>` when it is None."""
    params, preprocessing = cfg.dataset.params, cfg.dataset.preprocessing
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return eval_loader(
        plain(params[default]) if source is None else source,
        batch_size=args.batch_size or params.eval_batch_size,
        fields=tuple(fields),
        resize_shorter_edge=preprocessing.resize_shorter_edge,
        crop_size=preprocessing.crop_size,
        num_workers=args.num_workers,
        rank=rank,
        world=world,
        max_images=args.max_images,
        max_bad_fraction=cfg.dataset.max_bad_fraction,
        **options,
    )


def skipped(loader: EvalLoader) -> dict:
    """After a pass: samples read and skipped over all processes, with the first ten keys of every kind."""
    states = all_objects(loader.bad.state_dict())
    counts: dict[str, int] = {}
    keys: dict[str, list[str]] = {}
    for state in states:
        for kind, count in state["counts"].items():
            counts[kind] = counts.get(kind, 0) + count
            keys[kind] = (keys.get(kind, []) + state["keys"][kind])[:10]
    return {"read": sum(s["seen"] for s in states), "skipped": sum(counts.values()), "kinds": counts, "keys": keys}


def data_facts(loader: EvalLoader, cfg: Any) -> dict:
    """For the protocol: which data, which crop, what was skipped."""
    preprocessing = cfg.dataset.preprocessing
    return {
        "data": loader.stream.source.name,
        "crop": {"resize_shorter_edge": preprocessing.resize_shorter_edge, "center_crop": preprocessing.crop_size},
        "samples": skipped(loader),
    }


@contextlib.contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """A ValueError of a measurement (NaN, a label out of range, a wrong count) becomes a `DataError`."""
    try:
        yield
    except MuseError:
        raise
    except ValueError as error:
        raise DataError(f"{what}: {error}") from error


def write_metrics(args: argparse.Namespace, cfg: Any, values: dict, **facts) -> Path:
    """OUTPUT_DIR/metrics.json: the values, and a `protocol` that says what was measured."""
    path = cli.writable_directory(args.output_dir) / "metrics.json"
    cli.write_json(path, {**values, "protocol": cli.protocol(args, cfg, **facts)})
    return path
