"""A stop signal saves, whoever gets it: the process alone, or its whole group with the workers."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed as dist
from safetensors.torch import load_file
from torch.utils.data import IterableDataset

from muse import load_config
from muse.data.samples import torch_loader
from muse.errors import MuseError
from muse.models.loading import checkpoints
from muse.training import signals
from muse.training.signals import StopSignal
from muse.training.tokenizer_task import train
from tests.helpers import ROOT, run_config
from tests.training.helpers import hold_equal
from tools.killing import records

LONG = {"training": {"max_train_steps": 400}, "lr_scheduler": {"params": {"warmup_steps": 400}}}
WORKERS = {"dataset": {"params": {"num_workers_per_gpu": 2}}}
ONE_PROCESS = SimpleNamespace(num_processes=1, is_main_process=True)


@pytest.fixture
def started(shapes_data, tmp_path):
    """Start a long run in a process group of its own; gives its configuration and the process, once
    it has logged two steps.
    """
    processes = []

    def start(*changes):
        config = run_config(
            tmp_path / "c.yaml",
            shapes_data,
            tmp_path / "stopped",
            "topology_warmup",
            LONG,
            *changes,
        )
        process = subprocess.Popen(
            [
                sys.executable,
                ROOT / "scripts/train_stage1.py",
                "--config",
                config,
                "--device",
                "cpu",
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        log = tmp_path / "stopped/metrics.jsonl"
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
            time.sleep(0.05)
        return config, process

    yield start
    for process in processes:
        process.kill()


@pytest.mark.parametrize(
    ("number", "group"),
    [
        (signal.SIGTERM, False),
        (signal.SIGTERM, True),
        (signal.SIGINT, True),
        (signal.SIGUSR1, True),
    ],
    ids=["term-process", "term-group", "int-group", "usr1-group"],
)
def test_a_stop_signal_saves_and_the_same_command_goes_on(number, group, started, tmp_path):
    """To a group, as `kill -- -PGID`, Ctrl-C and Slurm send it, the two workers get it too."""
    config, process = started(WORKERS if group else {})
    (os.killpg if group else os.kill)(process.pid, number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "on a signal; the same command goes on from there" in output
    assert "Traceback" not in output
    ((step, path),) = checkpoints(tmp_path / "stopped")
    assert 2 <= step < 400 and not (tmp_path / "stopped/final").exists()
    # The very same numbers as a run that nobody stopped. (A shorter total changes nothing: the rate
    # is still warming up.)
    total = [f"training.max_train_steps={step + 1}"]
    train(load_config(config, total))
    train(load_config(config, [*total, f"experiment.output_dir={tmp_path / 'unbroken'}"]))
    hold_equal(
        tmp_path / f"stopped/checkpoint-{step + 1}", tmp_path / f"unbroken/checkpoint-{step + 1}"
    )
    assert records(tmp_path / "stopped") == records(tmp_path / "unbroken")
    left, right = (
        load_file(tmp_path / run / "final/model.safetensors") for run in ("stopped", "unbroken")
    )
    assert all((left[name] == right[name]).all() for name in left) and left.keys() == right.keys()


def test_a_second_interrupt_ends_at_once(monkeypatch):
    """The first one only sets the flag, also after SIGTERM; the handlers of before come back."""
    monkeypatch.setattr(signals.os, "write", lambda file, text: said.append((file, text)))
    said, before = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopSignal(ONE_PROCESS) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested() and not said
        signal.raise_signal(signal.SIGINT)
        assert stop.requested() and said == [(2, signals.HINT)]
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


class Stuck(IterableDataset):
    """One batch, the reader's process, and then a read that never returns."""

    def __iter__(self):
        yield os.getpid()
        time.sleep(1000)


def test_a_stuck_worker_outlives_signals_until_its_parent_ends_it():
    """Else a run that has saved would wait for ever for a read that hangs."""
    batches = iter(torch_loader(Stuck(), num_workers=1, seed=0, pin_memory=False))
    worker = psutil.Process(next(batches))
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        # From another process than the parent, whose SIGTERM is an order.
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
    time.sleep(0.5)
    assert worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE
    worker.terminate()
    worker.wait(timeout=30)


def test_machines_that_gloo_cannot_connect_are_one_line(monkeypatch, tmp_path):
    """A real group of one process; the next one looks for an interface that does not exist."""
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
        two = SimpleNamespace(num_processes=2, is_main_process=True)
        with pytest.raises(MuseError, match=r"set GLOO_SOCKET_IFNAME on each .*now: nowhere0") as e:
            StopSignal(two).__enter__()
        assert "\n" not in str(e.value)
    finally:
        dist.destroy_process_group()
