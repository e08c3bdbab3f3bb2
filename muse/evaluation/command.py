"""What every measuring command shares: its flags, its processes, its data, and the one file it leaves."""

import argparse
import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from muse import cli
from muse.config import plain
from muse.data.dataloader import eval_loader
from muse.data.decode import BadSamples
from muse.data.eval import EvalLoader
from muse.errors import ConfigError, DataError, MuseError
from muse.utils.distributed import all_objects
from muse.utils.io import writable_directory, write_json


def add_flags(parser: argparse.ArgumentParser, output_dir: str, train: bool = False) -> None:
    """Data and output flags, each with `-` or `_`, before or after the release's spelling."""
    if train:
        parser.add_argument(
            "--train_url",
            "--train-url",
            default=None,
            help="training data; default: the configuration's",
        )
    parser.add_argument(
        "--val_url",
        "--val-url",
        default=None,
        help="shard pattern, directory of shards or of pictures; default: the configuration's evaluation data",
    )
    parser.add_argument(
        "--output_dir", "--output-dir", default=output_dir, help="where metrics.json goes"
    )
    parser.add_argument(
        "--batch_size",
        "--batch-size",
        type=int,
        default=None,
        help="images at a time; changes no result",
    )
    parser.add_argument(
        "--num_workers", "--num-workers", type=int, default=0, help="loader processes"
    )
    parser.add_argument(
        "--max_images",
        "--max-images",
        type=int,
        default=None,
        help="only the first so many of each set",
    )


def check_numbers(args: argparse.Namespace, **least: float) -> None:
    """ConfigError for a flag (a number, a list of them, or None) that is not finite or below its least value.

    A least of 0.0 (a float) is itself not allowed.
    """
    for name, bound in least.items():
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [] if given is None else [given]:
            if (
                not math.isfinite(value)
                or value < bound
                or (isinstance(bound, float) and value == bound)
            ):
                wanted = f"above {bound:g}" if isinstance(bound, float) else f"at least {bound}"
                raise ConfigError(f"--{name} must be {wanted}, not {value:g}")


def start(args: argparse.Namespace) -> None:
    """Prove that results can be written, join the process group a launcher (torchrun, accelerate) has prepared, if any,
    and take this process's device.
    """
    writable_directory(args.output_dir)
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
    args: argparse.Namespace,
    cfg: Any,
    source: str | None,
    default: str,
    fields: Sequence[str],
    **options,
) -> EvalLoader:
    """Loader of this process's part of `source`, or of `dataset.params.<default>` when it is None.

    Several processes count their bad samples together, after the pass (`skipped`): one that stopped alone would leave
    the others waiting, and the limit is a share of the whole set.
    """
    check_numbers(args, batch_size=1, num_workers=0, max_images=1)
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
        max_bad_fraction=cfg.dataset.max_bad_fraction if world == 1 else 1.0,
        **options,
    )


def skipped(loader: EvalLoader, max_fraction: float) -> dict:
    """After a pass: samples read and skipped over all processes, with the first ten keys of every kind.

    DataError when more than `max_fraction` of all samples were skipped.
    """
    together = BadSamples()
    for state in all_objects(loader.bad.state_dict()):
        together.seen += state["seen"]
        for kind, count in state["counts"].items():
            together.counts[kind] = together.counts.get(kind, 0) + count
            together.keys[kind] = (together.keys.get(kind, []) + state["keys"][kind])[
                : together.keep
            ]
    samples = {
        "read": together.seen,
        "skipped": together.total,
        "kinds": together.counts,
        "keys": together.keys,
    }
    check_share(samples, max_fraction)
    return samples


def check_share(samples: dict, max_fraction: float) -> None:
    """DataError when more than `max_fraction` of `samples` (as from `skipped`) were skipped."""
    bad = BadSamples(max_fraction)
    bad.load_state_dict(
        {"seen": samples["read"], "counts": samples["kinds"], "keys": samples["keys"]}
    )
    bad.check(final=True)


def check_count(loader: EvalLoader, facts: dict, count: int) -> None:
    """DataError unless `count` samples are all of a local data set but the skipped ones of `facts` (`data_facts`)."""
    whole = loader.num_samples
    if whole is not None and count != whole - facts["samples"]["skipped"]:
        raise DataError(
            f"{facts['data']}: {count} samples were measured, the data set has {whole} "
            f"({facts['samples']['skipped']} skipped)"
        )


def check_classes(train: dict, val: dict) -> None:
    """DataError when two image folders have other class folders: a label is a folder's place in the alphabet."""
    ours, theirs = (facts.get("class_names") for facts in (train, val))
    if ours and theirs and ours != theirs:
        odd = sorted(set(ours) ^ set(theirs))[0]
        raise DataError(
            f"the class folders of {train['data']} ({len(ours)}) and {val['data']} ({len(theirs)}) differ: "
            f"{odd!r} is in one of them only, so that their labels do not mean the same"
        )


def data_facts(loader: EvalLoader, cfg: Any) -> dict:
    """For the protocol: which data, which crop, what was skipped."""
    preprocessing = cfg.dataset.preprocessing
    return {
        "data": loader.stream.source.name,
        "crop": {
            "resize_shorter_edge": preprocessing.resize_shorter_edge,
            "center_crop": preprocessing.crop_size,
        },
        "samples": skipped(loader, cfg.dataset.max_bad_fraction),
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
    path = writable_directory(args.output_dir) / "metrics.json"
    write_json(path, {**values, "protocol": cli.protocol(args, cfg, **facts)})
    return path
