"""The loop: accumulation, processes, numbers that are not finite, what is logged."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from muse import load_config
from muse.errors import ConfigError
from muse.training.optim import lr_at
from muse.training.tokenizer_task import train
from tests.helpers import ROOT, random_images, run_config
from tests.training.processes import free_port

PLAIN = {
    "losses": {"perceptual": {"weight": 0.0}, "topology": {"weight": 0.0}, "itc": {"weight": 0.0}},
    "training": {"max_grad_norm": 0.0},
}


def first_moments(trainer) -> dict[str, torch.Tensor]:
    """Adam's mean after one step is (1 - beta1) times the gradient."""
    groups = trainer.optimizer.param_groups
    names = [name for group in groups for name in group["names"]]
    state = trainer.optimizer.state_dict()["state"]
    return {name: state[index]["exp_avg"] for index, name in enumerate(names) if index in state}


# -------------------------------------------------------------------------------- accumulation
def test_two_micro_batches_are_one_batch_of_both(trainer):
    images = random_images(6, 32, 32)
    batches = [
        {"images": part, "text": [""] * len(part), "keys": ["k"] * len(part)}
        for part in (images, images[:3], images[3:])
    ]
    given = {}
    for name, micro in (("one", batches[:1]), ("two", batches[1:])):
        one = trainer("topology_warmup", PLAIN)
        given[name] = one.train_step(micro), first_moments(one), one
    assert given["one"][0]["loss"].item() == pytest.approx(given["two"][0]["loss"].item(), rel=1e-5)
    assert given["one"][0]["grad_norm"].item() == pytest.approx(
        given["two"][0]["grad_norm"].item(), rel=1e-4
    )
    for name, moment in given["one"][1].items():
        other = given["two"][1][name]
        assert torch.allclose(
            moment, other, rtol=1e-3, atol=1e-4 * float(moment.abs().max()) + 1e-9
        ), name
    assert given["one"][2].progress.images_seen == given["two"][2].progress.images_seen == 6


def test_only_the_stage_s_tensors_have_an_optimizer_state_and_an_average(trainer):
    one = trainer("topology_warmup")
    names = [name for name, parameter in one.model.named_parameters() if parameter.requires_grad]
    assert (
        sorted(name for group in one.optimizer.param_groups for name in group["names"])
        == sorted(names)
        == sorted(one.ema.state_dict())
    )
    assert trainer("topology_warmup", {"training": {"use_ema": False}}).ema is None
    assert one.task.adversary is None and trainer("synergistic_tuning").task.adversary is not None


def test_an_adversary_that_starts_later_costs_nothing_before(trainer):
    one = trainer("synergistic_tuning", {"losses": {"adversarial": {"start": 1}}})
    batch = [{"images": random_images(2, 32, 32), "text": ["a", "b"], "keys": ["a", "b"]}]
    before = {
        name: tensor.clone()
        for name, tensor in one.task.adversary.discriminator.state_dict().items()
    }
    assert "generator" not in one.train_step(batch)
    assert all(
        torch.equal(tensor, before[name])
        for name, tensor in one.task.adversary.discriminator.state_dict().items()
    )
    numbers = one.train_step(batch)
    assert {"generator", "discriminator", "lecam"} <= numbers.keys()
    assert not all(
        torch.equal(tensor, before[name])
        for name, tensor in one.task.adversary.discriminator.state_dict().items()
    )
    # What the student descends is the weighted sum, the generator's term with its own weight.
    parts = {
        "reconstruction": 1.0,
        "perceptual": 0.1,
        "topology": 0.5,
        "itc": 0.5,
        "generator": 0.1,
    }
    assert numbers["loss"].item() == pytest.approx(
        sum(weight * numbers[name].item() for name, weight in parts.items()), rel=1e-5
    )


def test_rates_in_the_log_are_the_schedule_s(run):
    output = run(
        "topology_warmup", {"training": {"max_train_steps": 5}, "experiment": {"log_grad_every": 2}}
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "lr" in line]
    assert [line["lr"] for line in lines] == pytest.approx(
        [lr_at(step, base=1e-3, end=1e-5, warmup=2, total=5) for step in range(5)]
    )
    assert [any(key.startswith("grad_norm/") for key in line) for line in lines] == [
        False,
        True,
        False,
        True,
        False,
    ]
    whole = lines[1]
    assert whole["grad_norm"] == pytest.approx(
        sum(v**2 for k, v in whole.items() if k.startswith("grad_norm/")) ** 0.5, rel=1e-4
    )


def test_rates_by_part_reach_the_optimizer(trainer):
    one = trainer("synergistic_tuning", {"optimizer": {"lr_multipliers": {"^encoder\\.": 0.5}}})
    one.train_step([{"images": random_images(2, 32, 32), "text": ["a", "b"], "keys": ["a", "b"]}])
    rates = {name: group["lr"] for group in one.optimizer.param_groups for name in group["names"]}
    assert {rate for name, rate in rates.items() if name.startswith("encoder.")} == {
        0.5 * 0.5e-3
    }  # step 0 of 2 warm-up steps
    assert {rate for name, rate in rates.items() if not name.startswith("encoder.")} == {0.5e-3}


# ------------------------------------------------------------------------------------ refusals
def test_a_global_batch_that_is_not_met_is_refused(trainer):
    sizes = {
        "training": {
            "global_batch_size": 16,
            "per_gpu_batch_size": 4,
            "gradient_accumulation_steps": 2,
        }
    }
    with pytest.raises(
        ConfigError,
        match="global_batch_size=16 but 4 per process x 2 accumulated x 1 processes = 8",
    ):
        trainer("topology_warmup", sizes)
    sizes["training"]["global_batch_size"] = 8
    trainer("topology_warmup", sizes)


def test_images_that_a_recipe_promises_are_counted(trainer):
    """4 a step, twice accumulated, 3 steps: 24 pictures."""
    sizes = {
        "training": {
            "per_gpu_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_train_steps": 3,
            "total_images": 48,
        }
    }
    with pytest.raises(ConfigError, match="total_images=48 but 8 a step x 3 steps = 24"):
        trainer("topology_warmup", sizes)
    sizes["training"]["total_images"] = 24
    assert trainer("topology_warmup", sizes).cfg.training.total_images == 24


def test_a_text_teacher_of_another_width_is_refused(trainer):
    with pytest.raises(
        ConfigError, match="model.semantic_dim=16 but the text teacher .* embeds in 24 dimensions"
    ):
        trainer("semantic_injection", {"teacher": {"text": {"config": {"dim": 24}}}})


def test_trainable_patterns_of_one_s_own(trainer):
    one = trainer(
        "topology_warmup",
        {
            "training": {"trainable": ["q_topo", "k_topo"]},
            "losses": PLAIN["losses"]
            | {"topology": {"weight": 1.0}, "reconstruction": {"weight": 0.0}},
        },
    )
    assert {name.split(".")[-2] for name in one.ema.state_dict()} == {"q_topo", "k_topo"}
    assert one.task.loss.needs["reconstruction"] is False
    with pytest.raises(ConfigError, match="no parameter of the model matches"):
        trainer("topology_warmup", {"training": {"trainable": ["nothing"]}})


# ------------------------------------------------------------------------------- two processes
def test_two_processes_equal_one_with_the_same_global_batch(two_shards, tmp_path):
    """tools/train_stage2.sh with NUM_GPUS=2 on a CPU, contrast over both processes' captions,
    against one process here.
    """
    steps = {
        "experiment": {"save_every": 1, "keep_last": 5},
        "training": {"max_grad_norm": 0.0, "global_batch_size": 8},
    }
    outputs = {processes: tmp_path / f"run{processes}" for processes in (1, 2)}
    configs = {
        processes: run_config(
            tmp_path / f"{processes}.yaml", two_shards, output, "semantic_injection", steps
        )
        for processes, output in outputs.items()
    }
    train(load_config(configs[1], ["training.per_gpu_batch_size=8"]))
    environment = {
        **os.environ,
        "NUM_GPUS": "2",
        "BATCH_SIZE": "4",
        "MUSE_PYTHON": sys.executable,
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        ["bash", ROOT / "tools/train_stage2.sh", configs[2], "--device", "cpu"],
        env=environment,
        text=True,
        capture_output=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = outputs[1], outputs[2]
    logs = {
        number: [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        for number, output in outputs.items()
    }
    assert [line["step"] for line in logs[2]] == [1, 2]  # written once, not once a process
    assert [line["images"] for line in logs[2]] == [8, 16]
    for left, right in zip(logs[1], logs[2]):
        for name in ("loss", "reconstruction", "topology", "itc", "perceptual", "grad_norm"):
            assert left[name] == pytest.approx(right[name], rel=1e-3), name
    # Adam's first mean is the gradient of the global batch.
    a, b = (load_file(path / "checkpoint-1/state.safetensors") for path in (one, two))
    for name in (name for name in a if name.endswith("exp_avg")):
        assert torch.allclose(
            a[name], b[name], rtol=1e-3, atol=1e-3 * float(a[name].abs().max()) + 1e-9
        ), name
    assert sorted(path.name for path in (two / "checkpoint-2").glob("rank-*.json")) == [
        "rank-0.json",
        "rank-1.json",
    ]
    assert not list(two.glob(".partial*"))
