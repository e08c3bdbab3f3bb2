"""Two processes, DDP and FSDP, through the accelerate file that serves all models."""

import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file

from muse.generation.generator import Generator
from scripts import train_generator
from tests.generation.conftest import generator_settings
from tests.training.processes import Forked, free_port, fsdp_environment


def _train(rank, port, fsdp, config):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
        **(fsdp_environment() if fsdp else {}),
    )
    torch.set_num_threads(1)
    sys.exit(train_generator.main(["--config", str(config)]))


def trained_by_two(latents_dir, folder, fsdp):
    file, port = folder / f"fsdp-{fsdp}.yaml", free_port()
    watched = {"experiment": {"eval_every": 4, "generate_every": 4}, "evaluation": {"images": 6}}
    changes = (watched, {"training": {"per_gpu_batch_size": 4}})
    file.write_text(json.dumps(generator_settings(latents_dir, folder / str(fsdp), *changes)))
    both = [Forked(_train, rank, port, fsdp, file) for rank in range(2)]
    assert [one.wait() for one in both] == [0, 0]
    return folder / str(fsdp)


def test_ddp_and_fsdp_train_the_same_generator(latents_dir, tmp_path):
    runs = [trained_by_two(latents_dir, tmp_path, fsdp) for fsdp in (False, True)]
    ddp, sharded = (load_file(run / "final/model.safetensors") for run in runs)
    assert ddp.keys() == sharded.keys()
    for name, value in ddp.items():
        torch.testing.assert_close(value, sharded[name], atol=1e-5, rtol=1e-4, msg=name)
    records = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in runs
    ]
    for left, right in zip(*records):
        if "eval" in left:
            left, right = left["eval"], right["eval"]
            assert left["fd_efficientnet_lite0"] == pytest.approx(
                right["fd_efficientnet_lite0"], rel=1e-2
            )
        else:
            assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
            assert left["images"] == 8 * left["step"]
    assert (runs[1] / "images/samples-4.png").is_file()
    assert Generator.from_pretrained(runs[1]).net.latent_shape == (8, 4, 4)
