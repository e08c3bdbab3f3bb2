"""What the multimodal commands share: their flags, the model they open, what they record."""

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import torch

from muse import __version__, cli
from muse.errors import CheckpointError, ConfigError
from muse.evaluation.measurement import check_number
from muse.models.loading import weights_file
from muse.multimodal.umm import MUSE_UMM
from muse.multimodal.umm_loading import open_umm, resolve_checkpoint
from muse.utils.distributed import join_processes
from muse.utils.io import file_sha256, versions


def umm_parser(description: str, sampling: bool = False) -> argparse.ArgumentParser:
    """A parser with the flags of every multimodal command.

    Args:
        description: the command's own.
        sampling: add those of the solver.
    """
    made = cli.plain_parser(description)
    made.add_argument(
        "--checkpoint", required=True, help="run, final, checkpoint-N, saved directory or hub id"
    )
    if sampling:
        made.add_argument("--steps", type=int, default=20, help="of the solver")
        made.add_argument("--guidance_scale", type=float, default=4.5, help="1: no guidance")
        made.add_argument("--seed", type=int, default=0, help="of the noise, with its number")
    made.add_argument("--batch_size", type=int, default=4, help="at a time; changes no result")
    made.add_argument(
        "--mixed_precision", default="no", choices=("no", "bf16"), help="of the model"
    )
    made.add_argument("--device", help="cuda, mps or cpu; the first that exists when not given")
    return made


def parse_umm(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and check the numbers of the common flags."""
    args = cli.parse(made, argv)
    for name, least in (("batch_size", 1), ("steps", 1), ("guidance_scale", 0), ("seed", 0)):
        check_number(name, getattr(args, name, None), least)
    return args


def one_of(args: argparse.Namespace, *flags: str) -> str:
    """The one of these flags that was given; `ConfigError` for none or several."""
    given = [flag for flag in flags if getattr(args, flag) is not None]
    names = " or ".join(f"--{flag}" for flag in flags)
    if len(given) != 1:
        raise ConfigError(f"give {names}" + (", not both" if given else ""))
    return given[0]


def open_for_command(args: argparse.Namespace) -> MUSE_UMM:
    """The checkpoint's model as the flags want it; puts the device into `args`."""
    args.device = join_processes(cli.device(args.device))
    torch.set_flush_denormal(True)
    model = open_umm(args.checkpoint, args.device)
    model.require_chat()
    if args.mixed_precision == "bf16":
        scale = copy.deepcopy(model.latent_scale)  # stays as it is: 3 digits are too few for it
        model.bfloat16().latent_scale = scale
    return model


def command_facts(args: argparse.Namespace, **extra: Any) -> dict[str, Any]:
    """The object `protocol` of a result: flags, checkpoint with its hash, versions."""
    facts = {**vars(args), "muse": __version__, "versions": versions(), **extra}
    try:
        file = weights_file(resolve_checkpoint(args.checkpoint))
        facts["checkpoint"] = {"path": str(args.checkpoint), "sha256": file_sha256(file)}
    except CheckpointError:  # a hub id
        facts["checkpoint"] = {"path": str(args.checkpoint)}
    return facts
