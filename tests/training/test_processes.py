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
from muse.training.tokenizer_task import TokenizerTask, train
from muse.training.trainer import Trainer
from tests.helpers import run_config
from tests.training.processes import run_in_two, train_in_two
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


def _one_step_in_bf16(config: str, folder: str) -> None:
    """One step of a run; the types of what was computed, reduced and stored, its numbers and its
    gradients go to FOLDER.
    """
    cfg = load_config(config)
    trainer = Trainer(cfg, TokenizerTask(cfg))
    kinds, gradients = {}, {}

    def of(names, what):
        """Note the types of tensors by name, each once."""
        kinds.setdefault(what, set()).update(str(tensor.dtype) for tensor in names)

    block, real = trainer.model.muse_blocks[0], trainer.task.loss.weighted
    block.v_sem.register_forward_pre_hook(lambda m, args: of([m.weight], "gathered"))
    block.v_sem.register_forward_hook(lambda m, args, out: of([out], "inside"))
    trainer.model.encoder.register_forward_pre_hook(
        lambda m, args, kwargs: of([kwargs["pixel_values"]], "pixels"), with_kwargs=True
    )

    def weighted(out, batch):
        of([out.reconstruction, out.image_embeds, *out.log_topology, out.logit_scale], "outputs")
        values, numbers = real(out, batch)
        of([*values.values(), *numbers.values()], "losses")
        return values, numbers

    trainer.task.loss.weighted = weighted

    def keep(skip, optimizers, averages):
        named = [(n, p) for n, p in trainer.model.named_parameters() if p.grad is not None]
        of([parameter.grad for _, parameter in named], "gradients")
        gradients.update({name: whole(p.grad) for name, p in named})

    def whole(tensor):
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()

    trainer.guard.take_step = keep
    for name in ("reduce_scatter_single", "reduce_scatter_tensor"):  # torch's new and old name
        if real_reduce := getattr(torch.distributed, name, None):

            def watched(*args, real_reduce=real_reduce, **kwargs):
                of([kwargs["input"]], "reduced")
                return real_reduce(*args, **kwargs)

            setattr(torch.distributed, name, watched)
    numbers = trainer.train_step([next(trainer.batches())])
    of(trainer.model.parameters(), "stored")
    means = {
        name: float(trainer.accelerator.reduce(value, "mean")) for name, value in numbers.items()
    }
    kinds = {what: sorted(types) for what, types in kinds.items()}
    rank = trainer.accelerator.process_index
    torch.save((kinds, means, gradients), f"{folder}/{rank}.pt")


def test_fsdp_in_bf16_keeps_float32_where_sums_matter(two_shards, tmp_path):
    """Parameters are gathered in bf16; stored, reduced and judged in float32. DDP's numbers within
    what bf16 resolves (2^-8).
    """
    changes = {"training": {"mixed_precision": "bf16", "max_grad_norm": 0.0}}
    results = []
    for fsdp in (False, True):
        folder = tmp_path / f"fsdp-{fsdp}"
        folder.mkdir()
        config = run_config(
            tmp_path / f"{fsdp}.yaml",
            two_shards,
            folder / "run",
            "synergistic_tuning",
            {"losses": {"adversarial": {"weight": 0.0}}},
            changes,
        )
        run_in_two(_one_step_in_bf16, str(tmp_path / "log"), fsdp, str(config), str(folder))
        results.append(torch.load(folder / "0.pt", weights_only=True))
    (_, wanted, theirs), (kinds, numbers, ours) = results
    single, half = ["torch.float32"], ["torch.bfloat16"]
    assert kinds == {
        "stored": single,
        "gathered": half,
        "inside": half,
        "pixels": single,
        "outputs": single,
        "losses": single,
        "reduced": single,
        "gradients": single,
    }
    for name in ("loss", "reconstruction", "perceptual", "topology", "itc", "logit_scale"):
        assert numbers[name] == pytest.approx(wanted[name], rel=2**-8), name
    assert numbers["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=2**-4)
    assert ours.keys() == theirs.keys()
    both = [torch.cat([grads[name].flatten() for name in ours]) for grads in (ours, theirs)]
    assert torch.cosine_similarity(*both, dim=0) > 0.99
