"""The commands give the same numbers for every batch size, and for one or two processes."""

import json
import os
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from scripts import evaluate, knn, linear_probe, segment_probe, zero_shot

COMMANDS = {
    "evaluate": (evaluate, ["--metrics", "psnr,ssim,perceptual_random,fd_efficientnet_lite0"]),
    "linear_probe": (linear_probe, ["--epochs", "3"]),
    "knn": (knn, ["--k", "5,10"]),
    "zero_shot": (zero_shot, ["--retrieval", "8"]),
    "segment_probe": (segment_probe, ["--labels", "plain", "--steps", "10"]),
}


def run(name, flags, folder, batch):
    """One command into folder/NAME; its exit code."""
    script, extra = COMMANDS[name]
    prompts = ["--templates", f"{folder.parent}/templates.txt"] if name == "zero_shot" else []
    return script.main(
        [*flags, *extra, *prompts, "--batch_size", str(batch), "--output_dir", str(folder / name)]
    )


def run_all(flags, folder, batch):
    assert [run(name, flags, folder, batch) for name in COMMANDS] == [0] * len(COMMANDS)


@pytest.fixture(scope="module")
def settled(trained_run, tmp_path_factory):
    """The flags, a folder, and what one process with batches of 64 gives."""
    folder = tmp_path_factory.mktemp("invariance")
    (folder / "templates.txt").write_text("a {}\n")
    config, run = trained_run
    flags = ["--config", str(config), "--checkpoint", str(run / "final"), "--device", "cpu"]
    run_all(flags, folder / "64", 64)
    return flags, folder


def numbers(value, name=""):
    """Every number in nested lists and dicts, by path."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: number for k, v in items for key, number in numbers(v, f"{name}.{k}").items()}
    return {name: value} if isinstance(value, (int, float)) else {}


def hold_equal(folder, other):
    for name in COMMANDS:
        one, two = (
            json.loads((at / name / "metrics.json").read_text()) for at in (folder / "64", other)
        )
        protocols = [result.pop("protocol") for result in (one, two)]
        assert numbers(two) == pytest.approx(numbers(one), rel=1e-6), name
        assert len(numbers(one)) >= 4
        for part in ("samples", "train", "val"):
            assert protocols[0].get(part) == protocols[1].get(part), name
        for store in (folder / "64" / name / "features").glob("*/*.npy"):
            rows = np.load(store)
            again = np.load(other / name / "features" / store.parent.name / store.name)
            np.testing.assert_allclose(again, rows, rtol=1e-6, atol=1e-6 * np.abs(rows).max())


@pytest.mark.parametrize("batch", [1, 7])
def test_batch_size(settled, batch):
    flags, folder = settled
    run_all(flags, folder / str(batch), batch)
    hold_equal(folder, folder / str(batch))


def worker(rank, ports, flags, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    for port, name in zip(ports, COMMANDS, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        assert run(name, flags, folder / "two", 3) == 0


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def test_two_processes(settled):
    flags, folder = settled
    mp.spawn(worker, (free_ports(len(COMMANDS)), flags, folder), nprocs=2)
    hold_equal(folder, folder / "two")
