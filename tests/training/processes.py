"""Real processes that start quickly: a server imports torch once and forks them (multiprocessing's
`forkserver`).
"""

import importlib
import multiprocessing
import os
import resource
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from muse import load_config
from muse.training.tokenizer_task import train
from tests.helpers import ROOT

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "muse.training.tokenizer_task",
        "muse.models.muse_vit",
        "muse.data.dataloader",
        "tests.training.processes",
        "transformers.models.internvl.modeling_internvl",
        "diffusers.models.autoencoders.autoencoder_dc",
    ]
)


class Forked:
    """A forked process with `pid`, `poll` and `wait` as those of `subprocess.Popen`."""

    def __init__(self, target, *args):
        self._process = context.Process(target=target, args=args)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, limit: float = 300.0) -> int | None:
        self._process.join(limit)
        return self._process.exitcode


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _quiet(log: str | Path) -> None:
    sys.stdout = sys.stderr = open(log, "a", buffering=1)


def train_alone(config: str, log: str, *overrides: str) -> None:
    """Train in this process; what it says goes to `log`."""
    _quiet(log)
    torch.set_num_threads(1)
    train(load_config(config, list(overrides)))


def run_script(stage: int, log: str, file_limit: int, argv: list[str]) -> None:
    """The stage's script; ends with its status.

    file_limit: bytes after which the system refuses to write on (-1: none).
    """
    _quiet(log)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.exit(importlib.import_module(f"scripts.train_stage{stage}").main(argv))


def train_in_two(config: str, log: str, fsdp: bool, *overrides: str) -> None:
    """Train in two processes over gloo, DDP or FSDP; raises if one of them fails."""
    run_in_two(_train, log, fsdp, config, overrides)


def run_in_two(function: Callable[..., None], log: str, fsdp: bool, *arguments: Any) -> None:
    """`function(*arguments)` in two processes that accelerate joins over gloo, DDP or FSDP as
    configs/accelerate/fsdp.yaml says; raises if one of them fails. What they say goes to LOG.RANK.
    """
    port = free_port()
    both = [
        Forked(_one_of_two, rank, port, fsdp, f"{log}.{rank}", function, arguments)
        for rank in range(2)
    ]
    codes = [one.wait(600) for one in both]
    assert codes == [0, 0], codes + [Path(f"{log}.{rank}").read_text()[-3000:] for rank in range(2)]


def fsdp_environment() -> dict[str, str]:
    """What `accelerate launch --config_file configs/accelerate/fsdp.yaml` sets."""
    section = yaml.safe_load((ROOT / "configs/accelerate/fsdp.yaml").read_text())["fsdp_config"]
    names = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
    return {
        "ACCELERATE_USE_FSDP": "true",
        **{
            names.get(key, key.upper()): str(value).lower()
            if isinstance(value, bool)
            else str(value)
            for key, value in section.items()
        },
    }


def _one_of_two(
    rank: int,
    port: int,
    fsdp: bool,
    log: str,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
        CUDA_VISIBLE_DEVICES="",
        **(fsdp_environment() if fsdp else {}),
    )
    _quiet(log)
    torch.set_num_threads(1)
    function(*arguments)


def _train(config: str, overrides: tuple[str, ...]) -> None:
    train(load_config(config, list(overrides)))
