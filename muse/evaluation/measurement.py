"""What every measurement shares: what it is told, the data it reads, and the checks on them.

`Setup` is all that a measurement is told besides its own settings. A command makes it of its flags
(command.py); in Python one writes it down:

    run_linear_probe(Setup(load_config(FILE), checkpoint=DIRECTORY))
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf

from muse.config import plain
from muse.data.crops import PictureCrop
from muse.data.dataloader import eval_loader
from muse.data.eval import EvalLoader
from muse.data.faults import BadSamples
from muse.errors import CheckpointError, ConfigError, DataError, MuseError
from muse.evaluation.used_protocol import UsedProtocol, configured_cut, cut_facts
from muse.models import loading
from muse.models.muse_vit import MUSE_ViT
from muse.utils.distributed import all_objects, process_index, world_size


def check_number(name: str, given: float | Sequence[float] | None, least: float) -> None:
    """ConfigError for a setting that is not finite or below its least value.

    Args:
        name: the setting, without dashes.
        given: a number, several, or None where a default is taken.
        least: the smallest value allowed; written as 0.0 (a float) it is itself not allowed.
    """
    for value in [] if given is None else given if isinstance(given, Sequence) else [given]:
        above = isinstance(least, float)
        if not math.isfinite(value) or value < least or (above and value == least):
            wanted = f"above {least:g}" if above else f"at least {least}"
            raise ConfigError(f"--{name} must be {wanted}, not {value:g}")


AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Crop(NamedTuple):
    """How a picture is cut: its shorter edge resized, then the square in its centre."""

    resize_shorter_edge: int | None
    crop_size: int | None


class Measured(NamedTuple):
    """What a measurement gives.

    The picture is drawn when it is called for, after the values have been written: a sheet that
    cannot be drawn costs no result.
    """

    values: dict
    facts: dict  # for `protocol`
    picture: Callable[[], torch.Tensor] | None = None  # gives (3,h,w)


@dataclass(frozen=True)
class Setup:
    """What is measured, on which data, where and how. Fields are named as the flags.

    Args:
        cfg: the whole configuration.
        checkpoint: what `muse.models.loading.load_model` opens; a baseline may go without.
        train_url: training data; None takes the configuration's.
        val_url: evaluation data; None takes the configuration's.
        protocol: by what is measured; None is the configuration's crop and float32.
        device: where networks run.
        output_dir: where results go.
        cache_dir: where extracted features stay; None is `output_dir`/features.
        batch_size: images at a time, which changes no result; None takes the configuration's.
        num_workers: loader processes; None takes the configuration's.
        max_images: only so many of each set, drawn evenly from all of it by `training.seed`.
    """

    cfg: DictConfig
    checkpoint: str | None = None
    train_url: object = None
    val_url: object = None
    protocol: UsedProtocol | None = None
    device: str = "cpu"
    output_dir: str = "outputs"
    cache_dir: str | None = None
    batch_size: int | None = None
    num_workers: int | None = None
    max_images: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("num_workers", 0), ("max_images", 1)):
            check_number(name, getattr(self, name), least)

    def picture_crop(self) -> PictureCrop:
        """The protocol's cut, or the configuration's."""
        cut = self.protocol.recipe.crop if self.protocol else None
        return cut or configured_cut(self.cfg)

    def protocol_facts(self, images: int | None = None) -> dict:
        """The protocol's `facts`, of a measurement on so many pictures."""
        if self.protocol is not None:
            return self.protocol.facts(images)
        return {"name": "native", **cut_facts(self.picture_crop()), "precision": "float32"}

    def autocast(self) -> contextlib.AbstractContextManager:
        """Runs what is measured in the protocol's precision; metrics stay outside."""
        precision = self.protocol.precision if self.protocol else "float32"
        if precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.split(":")[0], AUTOCAST[precision])

    def images_at_a_time(self) -> int:
        """`batch_size`, or the configuration's."""
        return self.batch_size or self.cfg.dataset.params.eval_batch_size

    def workers(self) -> int:
        """`num_workers`, or the configuration's, but no more than there are processors."""
        if self.num_workers is not None:
            return self.num_workers
        return min(self.cfg.dataset.params.num_workers_per_gpu, os.cpu_count() or 1)

    def source(self, part: str) -> object:
        """The data of `train` or `val`: as given, or the configuration's.

        ConfigError where the configuration's training data is a mixture, which has no end.
        """
        given, key = {
            "train": (self.train_url, "train_shards_path_or_url"),
            "val": (self.val_url, "eval_shards_path_or_url"),
        }[part]
        if given is not None:
            return given
        # not resolved yet: the variables of a mixture may be unset
        kept = OmegaConf.to_container(self.cfg.dataset.params, resolve=False)[key]
        if isinstance(kept, list) and any(isinstance(one, Mapping) for one in kept):
            raise ConfigError(
                f"--{part}_url is needed: dataset.params.{key} is a mixture of {len(kept)} "
                "sources, and a measurement reads one set"
            )
        return plain(self.cfg.dataset.params[key])

    def load_model(self) -> MUSE_ViT:
        """The checkpoint's model on the device, in eval mode."""
        if self.checkpoint is None:
            raise CheckpointError("--checkpoint is needed")
        return loading.load_model(self.checkpoint, self.cfg.model, self.device)


def eval_data(setup: Setup, part: str, wanted: Sequence[str], **options) -> EvalLoader:
    """Loader of this process's share of a set, every sample once.

    Several processes count their bad samples together, after the pass (`skipped`): one that stopped
    alone would leave the others waiting, and the limit is a share of the whole set.

    Args:
        setup: which data, which crop, how many at a time.
        part: train or val.
        wanted: fields that a sample must have, out of images, labels, masks, text.
        options: further options of `eval_loader`.
    """
    world = world_size()
    return eval_loader(
        setup.source(part),
        batch_size=setup.images_at_a_time(),
        fields=tuple(wanted),
        transform=setup.picture_crop(),
        num_workers=setup.workers(),
        pin_memory=setup.device.startswith("cuda"),
        rank=process_index(),
        world=world,
        max_images=setup.max_images,
        sample_seed=setup.cfg.training.seed,
        max_bad_fraction=setup.cfg.dataset.max_bad_fraction if world == 1 else 1.0,
        **options,
    )


def skipped(loader: EvalLoader, max_fraction: float) -> dict:
    """After a pass: samples read and skipped over all processes, with ten keys of every kind.

    DataError when more than `max_fraction` of all samples were skipped.
    """
    together = BadSamples()
    for state in all_objects(loader.bad.state_dict()):
        together.seen += state["seen"]
        for kind, count in state["counts"].items():
            together.counts[kind] = together.counts.get(kind, 0) + count
            keys = together.keys.get(kind, []) + state["keys"][kind]
            together.keys[kind] = keys[: together.keep]
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
    """DataError unless `count` samples are all of a local set but the skipped of `data_facts`."""
    total = loader.num_samples
    if total is not None and count != total - facts["samples"]["skipped"]:
        raise DataError(
            f"{facts['data']}: {count} samples were measured, the data set has {total} "
            f"({facts['samples']['skipped']} skipped)"
        )


def check_classes(train: dict, val: dict) -> None:
    """DataError when the class folders of two image folders differ.

    A label is a folder's place in the alphabet.
    """
    ours, theirs = (facts.get("class_names") for facts in (train, val))
    if ours and theirs and ours != theirs:
        odd = sorted(set(ours) ^ set(theirs))[0]
        raise DataError(
            f"the class folders of {train['data']} ({len(ours)}) and {val['data']} ({len(theirs)}) "
            f"differ: {odd!r} is in one of them only, so that their labels do not mean the same"
        )


def data_facts(setup: Setup, loader: EvalLoader) -> dict:
    """For the protocol: which data, which of it, which crop, what was skipped."""
    source = loader.stream.source
    masks = getattr(source, "mask_folder", None)
    return {
        "data": source.name,
        **({"masks": masks} if masks else {}),
        "selection": selection(setup, loader),
        "crop": cut_facts(setup.picture_crop())["crop"],
        "samples": skipped(loader, setup.cfg.dataset.max_bad_fraction),
    }


def selection(setup: Setup, loader: EvalLoader) -> str | dict:
    """For the protocol: which samples of a set are measured."""
    stream = loader.stream
    if setup.max_images is None:
        return "all"
    if not stream.source.local:
        return {"max_images": setup.max_images, "how": "the first ones, of shards read as streams"}
    total = sum(stream.counts)
    if setup.max_images >= total:
        return "all"
    seed = setup.cfg.training.seed
    how = "one at random from each of as many stretches of the set"
    return {"max_images": setup.max_images, "of": total, "how": how, "seed": seed}


@contextlib.contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """A ValueError of a measurement (NaN, a label out of range, a wrong count) is a `DataError`."""
    try:
        yield
    except MuseError:
        raise
    except ValueError as error:
        raise DataError(f"{what}: {error}") from error
