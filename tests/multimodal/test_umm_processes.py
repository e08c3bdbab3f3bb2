"""Two processes over gloo, DDP and FSDP: kinds in step, noise of their own, resumed to the bit."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from muse.multimodal.umm_loading import open_umm
from muse.multimodal.umm_run_config import load_umm_config
from muse.multimodal.umm_task import UmmTask, train_umm
from muse.training.trainer import Trainer
from tests.multimodal.runs import write_kinds, write_umm_config
from tests.training.processes import Forked, free_port, fsdp_environment
from tools.killing import records

STEPS = {
    "model": {"source_tokens": ["latent", "encoder"]},
    "experiment": {"eval_every": 2, "generate_every": 4, "log_grad_every": 2},
    "training": {"max_train_steps": 6, "per_gpu_batch_size": 2, "drop_text": 0.0},
}


def one_of_two(rank: int, port: int, fsdp: bool, config: str, log: str) -> None:
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115 - until the process ends
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
    torch.set_num_threads(1)
    cfg = load_umm_config(config)
    trainer = Trainer(cfg, UmmTask(cfg))
    sharded = {n for n, p in trainer.model.named_parameters() if isinstance(p, DTensor)}
    assert len(sharded) > 100 if fsdp else not sharded
    trainer.run()


def train_in_two(config: Path, log: str, fsdp: bool) -> None:
    port = free_port()
    both = [Forked(one_of_two, rank, port, fsdp, str(config), f"{log}.{rank}") for rank in range(2)]
    codes = [one.wait() for one in both]
    assert codes == [0, 0], codes + [Path(f"{log}.{rank}").read_text()[-3000:] for rank in range(2)]


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_processes(fsdp, text_tokenizer_dir, tmp_path):
    data = tmp_path / "data"
    write_kinds(data)

    def config(output, *changes):
        path, output = tmp_path / f"{output}.yaml", tmp_path / output
        return write_umm_config(path, data, output, text_tokenizer_dir, STEPS, *changes)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_in_two(config("whole"), str(tmp_path / "log"), fsdp)
    lines = records(whole)
    assert {"loss/image", "loss/edit"} <= {name for line in lines for name in line}
    assert sorted(os.listdir(whole / "images")) == ["edit-4.png", "image-4.png"]

    # The evaluation does not depend on the processes: one alone measures the same.
    measured = [line["eval"] for line in lines if "eval" in line][-1]
    alone = config(
        "alone",
        {"experiment": {"init_from": str(whole)}, "optimizer": {"params": {"learning_rate": 0.0}}},
        {"lr_scheduler": {"params": {"end_lr": 0.0}}},
    )
    train_umm(load_umm_config(alone))
    again = [line["eval"] for line in records(tmp_path / "alone") if "eval" in line][-1]
    assert again == pytest.approx(measured, rel=1e-4)

    # The processes draw noise of their own.
    states = [load_file(whole / f"checkpoint-2/rank-{rank}.safetensors") for rank in range(2)]
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])

    # Stopped after step 2 and gone on: bit for bit what was not stopped.
    broken.mkdir()
    shutil.copytree(whole / "checkpoint-2", broken / "checkpoint-2")
    shutil.copy(whole / "metrics.jsonl", broken)
    train_in_two(config("broken"), str(tmp_path / "log"), fsdp)
    assert records(whole) == records(broken)
    for name in sorted(os.listdir(whole / "checkpoint-6")):
        if name != "state.json":  # it holds the configuration, and with it the folder
            assert (whole / "checkpoint-6" / name).read_bytes() == (
                broken / "checkpoint-6" / name
            ).read_bytes(), name
    assert open_umm(whole).generate(["picture 1"], steps=1).shape == (1, 3, 32, 32)


def test_two_processes_learn_what_one_learns_from_both_their_batches(text_tokenizer_dir, tmp_path):
    """Questions have no noise: gradients of two half batches average to that of the whole."""
    data = tmp_path / "data"
    write_kinds(data, shards=2, per_shard=2)
    plan = {
        "training": {"stage": "projector", "max_train_steps": 2},
        "experiment": {"save_every": 0},
        "dataset": {
            "params": {
                "train_shards_path_or_url": {
                    "urls": f"{data}/question-train-*.tar",
                    "kind": "question",
                },
                "eval_shards_path_or_url": {"urls": f"{data}/question-val.tar", "kind": "question"},
            }
        },
    }

    def config(output, size):
        sizes = {"training": {"per_gpu_batch_size": size}}
        path, output = tmp_path / f"{output}.yaml", tmp_path / output
        return write_umm_config(path, data, output, text_tokenizer_dir, plan, sizes)

    train_umm(load_umm_config(config("one", 4)))
    train_in_two(config("two", 2), str(tmp_path / "log"), fsdp=False)
    one, two = (load_file(tmp_path / run / "final/model.safetensors") for run in ("one", "two"))
    far = {
        n: float((one[n] - two[n]).abs().max())
        for n in one
        if not torch.allclose(one[n], two[n], atol=1e-5)
    }
    assert not far, far
