"""Two processes over gloo, DDP and FSDP: the numbers of one process, resumed bit for bit, saved
whole, interchangeable.
"""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from muse import MUSE_ViT, load_config
from muse.training.tokenizer_task import train
from tests.helpers import run_config
from tests.training.processes import train_in_two
from tools.killing import records

STEPS = {
    "experiment": {
        "save_every": 2,
        "keep_last": 5,
        "log_grad_every": 2,
        "eval_every": 3,
        "generate_every": 3,
        "num_pictures": 2,
    },
    "training": {"max_train_steps": 4, "global_batch_size": 8, "per_gpu_batch_size": 4},
}
SAME = (
    "loss",
    "reconstruction",
    "topology",
    "itc",
    "perceptual",
    "generator",
    "discriminator",
    "lecam",
    "grad_norm",
    "discriminator_grad_norm",
)


def steps_of(run) -> list[dict]:
    return [record for record in records(run) if "loss" in record]


def cosines_of(run) -> list[float]:
    """Of the gradients of pixels and semantics on the blocks, each averaged over the processes
    first.
    """
    return [
        record["gradients"]["cosine"]["reconstruction~semantics"]["blocks"]
        for record in records(run)
        if "gradients" in record
    ]


def hold_close(left, right, first: int = 0) -> None:
    """Two runs whose sums were formed in another order: losses within 1e-3, weights within 1e-4
    (the rate is 1e-3).
    """
    for a, b in zip(steps_of(left)[first:], steps_of(right)[first:], strict=True):
        assert {name: a[name] for name in SAME} == pytest.approx(
            {name: b[name] for name in SAME}, rel=1e-3, abs=1e-6
        ), a["step"]
        assert a["images"] == b["images"]
    for name in ("model.safetensors", "ema.safetensors"):
        a, b = (load_file(run / "checkpoint-4" / name) for run in (left, right))
        assert a.keys() == b.keys()
        far = {
            key: float((a[key] - b[key]).abs().max())
            for key in a
            if not torch.allclose(a[key], b[key], rtol=1e-3, atol=3e-4)
        }
        assert not far, far


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_processes(fsdp, two_shards, tmp_path):
    """Stage 3 with its adversary: everything learns, the contrast gathers, evaluation and pictures
    come in between.
    """

    def config(output, *changes):
        return str(
            run_config(
                tmp_path / f"{output}.yaml",
                two_shards,
                tmp_path / output,
                "synergistic_tuning",
                STEPS,
                *changes,
            )
        )

    alone = train(load_config(config("alone", {"training": {"per_gpu_batch_size": 8}}))).parent
    train_in_two(config("whole"), str(tmp_path / "log"), fsdp)
    whole = tmp_path / "whole"
    hold_close(alone, whole)
    assert [r["eval"]["psnr"] for r in records(whole) if "eval" in r] == pytest.approx(
        [r["eval"]["psnr"] for r in records(alone) if "eval" in r], rel=1e-3
    )
    assert (
        cosines_of(whole) == pytest.approx(cosines_of(alone), abs=1e-3)
        and len(cosines_of(alone)) == 2
    )
    assert sorted(os.listdir(whole / "images")) == ["attention-3.png", "reconstruction-3.png"]

    # Stopped after step 2 and gone on: bit for bit what was not stopped, with the generators and
    # positions of both processes.
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copytree(whole / "checkpoint-2", broken / "checkpoint-2")
    shutil.copy(whole / "metrics.jsonl", broken)
    train_in_two(config("broken"), str(tmp_path / "log"), fsdp)
    assert records(whole) == records(broken)
    for name in sorted(os.listdir(whole / "checkpoint-4")):
        if name != "state.json":  # it holds the configuration, and with it the folder
            assert (whole / "checkpoint-4" / name).read_bytes() == (
                broken / "checkpoint-4" / name
            ).read_bytes(), name
    assert {"rank-0.json", "rank-1.json"} <= set(os.listdir(broken / "checkpoint-4"))
    # What a step draws is another on each.
    first, second = (load_file(whole / f"checkpoint-4/rank-{rank}.safetensors") for rank in (0, 1))
    (name,) = [name for name in first if name.endswith("/torch")]
    assert not torch.equal(first[name], second[name])

    # One process goes on from the checkpoint of two; an epoch here is one step, so the data are
    # those of the unbroken run.
    single = tmp_path / "single"
    single.mkdir()
    shutil.copytree(whole / "checkpoint-2", single / "checkpoint-2")
    shutil.copy(whole / "metrics.jsonl", single)
    train(load_config(config("single", {"training": {"per_gpu_batch_size": 8}})))
    hold_close(alone, single, first=2)

    # `final` is whole, and the averages.
    last = {
        **load_file(whole / "checkpoint-4/model.safetensors"),
        **load_file(whole / "checkpoint-4/ema.safetensors"),
    }
    final = MUSE_ViT.from_pretrained(whole / "final").state_dict()
    assert final.keys() == last.keys() and all(
        torch.equal(final[name], last[name]) for name in final
    )


def test_an_average_over_accumulated_steps_is_shared_out_too(two_shards, tmp_path):
    """FSDP with two micro-batches: logit_scale, which stays whole on every process, gets the
    gradient of the global batch.
    """
    plan = {**STEPS, "losses": {"itc": {"gather": False}, "adversarial": {"weight": 0.0}}}
    changes = {
        "training": {
            "per_gpu_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_train_steps": 2,
        }
    }
    outputs = []
    for fsdp in (False, True):
        outputs.append(tmp_path / f"fsdp-{fsdp}")
        train_in_two(
            str(
                run_config(
                    tmp_path / f"{fsdp}.yaml",
                    two_shards,
                    outputs[-1],
                    "semantic_injection",
                    plan,
                    changes,
                )
            ),
            str(tmp_path / "log"),
            fsdp,
        )
    a, b = (load_file(output / "checkpoint-2/model.safetensors") for output in outputs)
    assert all(torch.allclose(a[name], b[name], rtol=1e-3, atol=3e-4) for name in a)
    assert a["logit_scale"].item() == pytest.approx(b["logit_scale"].item(), abs=1e-6)
    logs = [
        [
            json.loads(line)["grad_norm"]
            for line in (output / "metrics.jsonl").read_text().splitlines()
            if "grad_norm" in line
        ]
        for output in outputs
    ]
    assert logs[0] == pytest.approx(logs[1], rel=1e-3)
